"""Pictures back to label maps: OneFormer through transformers, or the embedded world's oracle.

Place in the flow: `miou.py` asks when a result has a picture and no map. The released evaluation reads its pictures
with a OneFormer trained on ADE20K; its classes 0 to 149 are ids 1 to 150 of the maps. Shapes: picture → ids ``[h, w]``
of the true map's size.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mmi_engine.errors import ModelError
from mmi_engine.metrics.features import folder_fingerprint

if TYPE_CHECKING:
    from PIL import Image

REMEDY = 'name a transformers OneFormer directory trained on ADE20K (it needs pip install "mmi[eval]"), or toon'


class Segmenter(Protocol):
    """`name` and `fingerprint` for the card."""

    name: str
    fingerprint: str

    def read(self, image: Image.Image, shape: tuple[int, ...]) -> np.ndarray:
        """Ids ``[h, w]`` of the shape asked for; 0 is unlabelled."""
        ...


def make(name: str, device: str = "cpu") -> Segmenter:
    """``toon``, or a model directory.

    Raises:
        ModelError: no such directory, or no segmentation model in it.
    """
    if name == "toon":
        return Oracle()
    directory = Path(name)
    if not (directory / "config.json").is_file():
        raise ModelError(f'segmenter "{name}" has no config.json', remedy=REMEDY)
    return OneFormer(directory, device)


class Oracle:
    """The embedded world's oracle: geometry and palette, nothing learnt."""

    name, fingerprint = "toon oracle", "1"

    def read(self, image: Image.Image, shape: tuple[int, ...]) -> np.ndarray:
        """See `Segmenter.read`; the oracle's own size is 128 × 128."""
        from PIL import Image as Pil

        from mmi_engine.toon.oracle import read_map

        labels = Pil.fromarray(read_map(image))
        return np.asarray(labels.resize((shape[1], shape[0]), Pil.Resampling.NEAREST)).astype(np.int64)


class OneFormer:
    """OneFormer's semantic task, or any transformers model with semantic post-processing (SegFormer, Mask2Former)."""

    def __init__(self, directory: Path, device: str = "cpu") -> None:
        import transformers

        self.name, self.fingerprint, self.device = directory.name, folder_fingerprint(directory), device
        try:
            config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
            self.oneformer = config.model_type == "oneformer"
            self.processor, self.network = _load(transformers, directory, self.oneformer)
        except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
            reason = str(error).splitlines()[0]
            raise ModelError(f'"{directory}" is no semantic segmenter: {reason}', remedy=REMEDY) from error
        self.network.to(device).eval().requires_grad_(False)

    def read(self, image: Image.Image, shape: tuple[int, ...]) -> np.ndarray:
        """See `Segmenter.read`: class k of the network is id k + 1."""
        import torch

        words = {"task_inputs": ["semantic"]} if self.oneformer else {}
        batch = self.processor(images=image, return_tensors="pt", **words)
        inputs = {
            key: value.to(self.device) for key, value in batch.items() if key in ("pixel_values", "task_inputs")
        }  # fmt: skip
        with torch.inference_mode():
            seen = self.network(**inputs)
        processor: Any = getattr(self.processor, "image_processor", self.processor)
        (labels,) = processor.post_process_semantic_segmentation(seen, target_sizes=[(shape[0], shape[1])])
        return np.asarray(labels.cpu().numpy(), dtype=np.int64) + 1


def _load(transformers: Any, directory: Path, oneformer: bool) -> tuple[Any, Any]:
    if not oneformer:
        processor = transformers.AutoImageProcessor.from_pretrained(directory, local_files_only=True, backend="pil")
        network = transformers.AutoModelForSemanticSegmentation.from_pretrained(directory, local_files_only=True)
        return processor, network
    from transformers.models.oneformer.image_processing_pil_oneformer import OneFormerImageProcessorPil

    network = transformers.OneFormerForUniversalSegmentation.from_pretrained(directory, local_files_only=True)
    processor = transformers.OneFormerProcessor(
        image_processor=OneFormerImageProcessorPil.from_pretrained(directory, local_files_only=True),
        tokenizer=transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True),
        max_seq_length=network.config.max_seq_len,
        task_seq_length=network.config.task_seq_len,
    )
    return processor, network
