"""Pictures → what the models read of them: visual tokens, feature maps, and the values that MMFS projects of these.

Place in the flow: `interleave.py` encodes the pictures before the next missing piece, each content once (`reuse.py`).
Source: docs/model.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmi_engine.generate.reuse import Encoded
from mmi_engine.model.interleaved import MMInterleaved


def encode(model: MMInterleaved, pictures: Sequence[Image.Image], rows: int, *, values: bool = True) -> list[Encoded]:
    """Encode prepared pictures in batches of ``rows``, the last one filled up with black.

    Args:
        model: whose visual tokenizer reads them.
        pictures: RGB, of the model's size.
        rows: of a batch.
        values: also project the values of the language model's MMFS layers.
    """
    made: list[Encoded] = []
    for start in range(0, len(pictures), rows):
        part = [picture_tensor(picture) for picture in pictures[start : start + rows]]
        pixels = torch.stack(part + [torch.zeros_like(part[0])] * (rows - len(part)))
        visual = model.visual_tokenizer(pixels.to(model.device, model.boi_embedding.dtype))
        made += [Encoded(visual.tokens[row], [f[row] for f in visual.features]) for row in range(len(part))]
    if values:
        for picture in made:  # one by one: a picture's values have the same bits whatever stands beside it
            picture.values = model.language.picture_values([f[None, None] for f in picture.features])
    return made


def picture_tensor(image: Image.Image) -> Tensor:
    """RGB picture → ``[3, h, w]`` float in [0, 1]."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).float() / 255


def to_picture(pixels: Tensor) -> Image.Image:
    """``[3, h, w]`` in [0, 1] → RGB picture, rounded to 8 bits."""
    return Image.fromarray((pixels * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy(), "RGB")
