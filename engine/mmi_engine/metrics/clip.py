"""CLIP similarity: of a made picture to the true one, or to its text.

Place in the flow: pictures and texts → embeddings of a CLIP model (a transformers directory given by the user, ViT-L/14
for the paper's figures) → cosine per picture, mean per item. Source: Radford et al., *CLIP* (2021); the evaluation of
visual storytelling compares the last image with the true one.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmi_engine.errors import ManifestError, ModelError
from mmi_engine.metrics.base import Options, Scores, mean_measure
from mmi_engine.metrics.features import blame, extract, folder_fingerprint, spread
from mmi_engine.metrics.pairs import Pair
from mmi_engine.metrics.pictures import Source, made_pictures, texts, true_pictures

if TYPE_CHECKING:
    from PIL import Image

REMEDY = "name a transformers CLIP directory, such as a copy of openai/clip-vit-large-patch14"


class ClipFeatures:
    """Extractor of image embeddings, and of text embeddings.

    Args:
        directory: config.json, weights, preprocessor_config.json and, for texts, the tokenizer.

    Raises:
        ModelError: none of that there.
    """

    def __init__(self, directory: Path, device: str = "cpu") -> None:
        from transformers import CLIPImageProcessorPil, CLIPModel

        if not (directory / "config.json").is_file():
            raise ModelError(f'CLIP directory "{directory}" has no config.json', remedy=REMEDY)
        try:
            self.network = CLIPModel.from_pretrained(directory, local_files_only=True).to(device).eval()
            self.processor = CLIPImageProcessorPil.from_pretrained(directory, local_files_only=True)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ModelError(f'"{directory}" is no CLIP model: {str(error).splitlines()[0]}', remedy=REMEDY) from error
        self.network.requires_grad_(False)
        self.directory, self.device = directory, device
        self.name, self.fingerprint = "clip", folder_fingerprint(directory)
        self.width = int(self.network.config.projection_dim)

    def prepare(self, image: Image.Image) -> Any:
        """``[3, side, side]``, normalised as the directory says."""
        return self.processor(images=image, return_tensors="pt")["pixel_values"][0]

    def features(self, prepared: list[Any]) -> np.ndarray:
        """Unit vectors ``[b, width]``."""
        import torch

        with torch.inference_mode():
            seen = self.network.vision_model(pixel_values=torch.stack(prepared).to(self.device))
            return _unit(self.network.visual_projection(seen.pooler_output).float().cpu().numpy())

    def texts(self, lines: list[str]) -> np.ndarray:
        """Unit vectors ``[b, width]`` of texts, cut at the model's context length."""
        import torch
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.directory, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ModelError(f'"{self.directory}" has no tokenizer', remedy=REMEDY) from error
        limit = int(self.network.config.text_config.max_position_embeddings)
        out = []
        with torch.inference_mode():
            for start in range(0, len(lines), 64):
                batch = tokenizer(
                    lines[start : start + 64], padding=True, truncation=True, max_length=limit, return_tensors="pt"
                ).to(self.device)
                read = self.network.text_model(
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
                ).pooler_output
                out.append(_unit(self.network.text_projection(read).float().cpu().numpy()))
        return np.concatenate(out)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12))


class ClipImage:
    """Cosine of a made and a true picture; a missing picture scores 0."""

    differs = ""
    label = "CLIP image-image"

    def __init__(self, options: Options) -> None:
        assert options.clip is not None
        self.options = options
        self.extractor = ClipFeatures(options.clip, options.device)

    def reference(self, pair: Pair) -> list[Any]:
        """The true pictures."""
        return true_pictures(pair)

    def prediction(self, pair: Pair) -> list[Source]:
        """The made ones."""
        return made_pictures(pair)

    def _targets(self, references: list[list[Any]], counts: list[int]) -> np.ndarray:
        sources = spread(counts, references)
        vectors, broken = extract(self.extractor, sources, self.options, "true pictures")
        for index, why in broken.items():
            source = sources[index]
            raise ManifestError(f"{source.place if source else ''}: {why}", remedy="a reference must load")
        return vectors

    def score(self, references: list[list[Any]], predictions: list[list[Source] | None]) -> Scores:
        """See `Metric.score`."""
        counts = [len(item) for item in references]
        target = self._targets(references, counts)
        lists = [p if p is not None and len(p) == count else [] for p, count in zip(predictions, counts, strict=True)]
        made, problems = extract(self.extractor, spread(counts, lists), self.options, "pictures")
        cosine = (made * target).sum(1)
        lost = blame(problems, counts)
        owner = np.repeat(np.arange(len(counts)), counts)
        parts = np.bincount(owner, cosine, minlength=len(counts)) / np.maximum(1, counts)
        parts[[k for k, item in enumerate(lists) if not item or k in lost]] = 0.0
        what = f"CLIP {self.extractor.network.config.vision_config.hidden_size} wide"
        scores = Scores([mean_measure(self.label, parts)], float(np.mean(counts)) if counts else 0.0)
        scores.implementation = f"transformers, {what}, weights {self.extractor.fingerprint[:12]}"
        scores.problems = lost
        return scores


class ClipText(ClipImage):
    """Cosine of a made picture and its text."""

    label = "CLIP image-text"

    def reference(self, pair: Pair) -> list[Any]:
        """The texts."""
        return texts(pair)

    def prediction(self, pair: Pair) -> list[Source]:
        """The made pictures, one per text."""
        return made_pictures(pair)

    def _targets(self, references: list[list[Any]], counts: list[int]) -> np.ndarray:
        return self.extractor.texts([line for item in references for line in item])
