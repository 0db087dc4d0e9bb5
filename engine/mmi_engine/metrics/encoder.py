"""Features of the model's own visual encoder, for distances where no Inception weights are at hand.

Place in the flow: the extractor of ``fd-encoder`` and ``kd-encoder``, which are never called FID or KID. Of a model
directory only the visual tokenizer's weights are read. A vector is the mean over patches of the trunk's last hidden
states, each brought to zero mean and unit variance over its channels, ``[C]``; pictures are cropped and resized to the
encoder's own size.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmi_engine.data.images import prepare
from mmi_engine.errors import ModelError
from mmi_engine.model.checkpoint import SkipInit
from mmi_engine.model.config import ModelConfig
from mmi_engine.model.resampler import QFormer
from mmi_engine.model.vision import VisualTokenizer
from mmi_engine.model_info import fingerprint, locate, weight_files

if TYPE_CHECKING:
    from PIL import Image

PREFIX = "visual_tokenizer."
PREPARATION = "centre crop, mean of normalised patches"  # part of the cache's key


class EncoderFeatures:
    """Extractor.

    Args:
        model: ``toon`` or a model directory; device: where to compute.

    Raises:
        ModelError: not a model directory, or without a visual tokenizer.
    """

    def __init__(self, model: str = "toon", device: str = "cpu") -> None:
        directory = locate(model)
        config = ModelConfig.load(directory)
        with SkipInit():
            d_llm = int(config.language.transformers["hidden_size"])
            self.network = VisualTokenizer(config.vision, QFormer(config.visual_resampler), d_llm)
        try:
            tensors: dict[str, Tensor] = {}
            for path in weight_files(directory):
                with safe_open(path, framework="pt") as file:
                    names = [name for name in file.keys() if name.startswith(PREFIX)]  # noqa: SIM118
                    tensors |= {name.removeprefix(PREFIX): file.get_tensor(name).float() for name in names}
            self.network.load_state_dict(tensors, strict=True)
        except (SafetensorError, OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ModelError(f"{directory}: the visual encoder cannot be read: {reason}") from error
        self.network.to(device).eval().requires_grad_(False)
        self.device, self.side, self.width = device, config.vision.image_size, config.vision.hidden_size
        self.name = f"encoder-{config.name}"
        self.fingerprint = hashlib.sha256(f"{fingerprint(directory)} {PREPARATION}".encode()).hexdigest()

    def prepare(self, image: Image.Image) -> Tensor:
        """``[3, side, side]`` in [0, 1]."""
        pixels = np.array(prepare(image, self.side), dtype=np.uint8)
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255

    @torch.inference_mode()
    def features(self, prepared: list[Tensor]) -> np.ndarray:
        """``[b, C]``."""
        hidden = self.network(torch.stack(prepared).to(self.device)).last_hidden
        patches = hidden[:, self.network.trunk.prefix :].float()
        return np.asarray(torch.nn.functional.layer_norm(patches, patches.shape[-1:]).mean(1).cpu().numpy())
