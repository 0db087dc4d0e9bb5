"""Which of several pictures fits a text best: by the model's own captioning, or by a CLIP model.

Place in the flow: `engine.py` asks for the scores of an item's candidates after drawing them. Both kinds look at one
item alone and at fixed shapes, so neighbours leave no trace. Source: the paper ranks eight COCO samples by CLIP
similarity.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mmi_engine.errors import ModelError
from mmi_engine.generate.interleave import Document, Maker
from mmi_engine.generate.score import row_scores
from mmi_engine.pieces import Piece

CAPTION_PROMPT = "a photo of"  # the short zero-shot prompt of `mmi caption`


@torch.no_grad()
def caption_scores(maker: Maker, pictures: Sequence[Image.Image], text: str) -> list[float]:
    """Summed log-probability of `text` as the caption of each picture."""
    scores: list[float] = []
    for start in range(0, len(pictures), maker.batch_size):
        part = [_captioned(picture) for picture in pictures[start : start + maker.batch_size]]
        maker.encode([(document, 2) for document in part])
        ids = maker.continuation(part[0].pieces[:2], text)
        rows = [*part, *[part[0]] * (maker.batch_size - len(part))]
        prompt = maker.prompt([(document, 2) for document in rows], left=True)
        scores += row_scores(maker.model, prompt, [ids] * len(rows))[: len(part)]
    return scores


def _captioned(picture: Image.Image) -> Document:
    return Document([Piece("image", picture), Piece("text", CAPTION_PROMPT), Piece("text")], seed=0, free=0)


class ClipScorer:
    """Cosine of CLIP embeddings of picture and text.

    Args:
        directory: a CLIP model as transformers saves it (weights, tokenizer, preprocessor).
        device: where it computes, in float32.

    Raises:
        ModelError: the directory holds no CLIP model, or an incomplete one.
    """

    def __init__(self, directory: str, device: str) -> None:
        from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

        try:
            self.model: Any = CLIPModel.from_pretrained(directory).eval().to(device)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(directory)
            settings = (Path(directory) / "preprocessor_config.json").is_file()
            self.images: Any = CLIPImageProcessorPil.from_pretrained(directory) if settings else self._processor()
        except Exception as error:  # the library raises OSError, ValueError, KeyError … on foreign directories
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise ModelError(
                f'"{directory}" cannot be used for --rerank: {first}', remedy="name a directory with a CLIP model"
            ) from error
        self.device = device

    def _processor(self) -> Any:
        from transformers import CLIPImageProcessorPil

        side = self.model.config.vision_config.image_size
        return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})

    @torch.no_grad()
    def scores(self, pictures: Sequence[Image.Image], text: str) -> list[float]:
        """One cosine in [−1, 1] per picture; a text beyond CLIP's context is cut."""
        limit = self.model.config.text_config.max_position_embeddings
        words = self.tokenizer([text], return_tensors="pt", truncation=True, max_length=limit).to(self.device)
        texts = self.model.text_projection(self.model.text_model(**words).pooler_output)
        found = []
        for picture in pictures:  # one by one: a row's bytes then do not depend on how many there are
            pixels = self.images(picture, return_tensors="pt")["pixel_values"].to(self.device)
            seen = self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)
            found.append(float(torch.nn.functional.cosine_similarity(seen, texts)[0]))
        return found
