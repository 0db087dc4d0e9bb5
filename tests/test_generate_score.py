"""Ranking: options by log-probabilities against a full forward pass, candidates by captioning and by CLIP."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model

from mmi_engine.generate import interleave
from mmi_engine.generate.encoding import picture_tensor
from mmi_engine.generate.interleave import Maker
from mmi_engine.generate.rank import CAPTION_PROMPT, ClipScorer, caption_scores
from mmi_engine.generate.settings import Settings
from mmi_engine.sequence import InterleavedBatch, Piece, tokenize


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return tiny_model()


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8))


@torch.no_grad()
def brute_force(model, pieces: list[Piece], text: str) -> float:
    """Σ log p of the text behind the pieces, by one forward pass over everything, without cache or padding."""
    tokens, per_image = model.config.tokens, model.config.tokens_per_image
    start = len(tokenize(pieces, model.tokenizer, tokens, per_image).ids)
    whole = tokenize([*pieces, Piece("text", text)], model.tokenizer, tokens, per_image)
    ids = torch.tensor([whole.ids])
    images = torch.stack([picture_tensor(image) for image in whole.images])
    batch = InterleavedBatch(ids, torch.ones_like(ids), images, torch.tensor([len(whole.images)]))
    hidden = model.hidden_states(batch, model.visual_tokenizer(images))
    logs = torch.log_softmax(model.text_head(hidden).float(), dim=-1)[0]
    assert len(whole.ids) > start
    return sum(float(logs[column - 1, whole.ids[column]]) for column in range(start, len(whole.ids)))


OPTIONS = ("red", "blue", "the red ball near Pip", "no", "Pip is running on the beach", "7", "two")


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_options_are_ranked_by_their_log_probability(model, batch_size):
    asked = [Piece("text", "Look:"), Piece("image", picture(1)), Piece("text", "What colour? answer:")]
    other = [Piece("image", picture(2)), Piece("text", "Who is this, and where? The answer is:")]
    items = [[*pieces, Piece("text", options=OPTIONS)] for pieces in (asked, other)]
    filled = interleave.fill(model, items, [0, 1], Settings(), batch_size)
    for pieces, made in zip((asked, other), filled, strict=True):
        expected = [brute_force(model, pieces, option) for option in OPTIONS]
        assert made[-1].scores == pytest.approx(expected, abs=2e-4)
        assert made[-1].value == OPTIONS[int(np.argmax(expected))]


def test_an_options_score_does_not_depend_on_the_others(model):
    pieces = [Piece("image", picture(1)), Piece("text", "answer:")]

    def score(options):
        return interleave.fill(model, [[*pieces, Piece("text", options=options)]], [0], Settings(), 2)[0][-1].scores

    few, many = score(("red", "blue")), score(("red", "blue", "green", "no"))
    assert few == pytest.approx(many[:2], abs=1e-5)


def test_candidates_are_scored_as_captions(model):
    pictures = [picture(seed) for seed in range(5)]
    found = caption_scores(Maker(model, Settings(), 2), pictures, "Pip runs near a ball.")
    prompt = Piece("text", CAPTION_PROMPT)
    expected = [brute_force(model, [Piece("image", image), prompt], "Pip runs near a ball.") for image in pictures]
    assert found == pytest.approx(expected, abs=2e-4) and len(set(found)) == 5


def test_clip_scores_are_cosines_of_its_own_embeddings(tmp_path):
    """A random CLIP of the library, saved and scored; against the library's whole forward pass."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPConfig,
        CLIPImageProcessorPil,
        CLIPModel,
        CLIPTextConfig,
        CLIPVisionConfig,
        PreTrainedTokenizerFast,
    )

    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = CLIPTextConfig(vocab_size=12, max_position_embeddings=8, eos_token_id=11, bos_token_id=10, **small)
    sight = CLIPVisionConfig(image_size=16, patch_size=8, **small)
    config = CLIPConfig(text_config=words.to_dict(), vision_config=sight.to_dict(), projection_dim=8)
    clip = CLIPModel(config).eval()
    clip.save_pretrained(tmp_path)
    plain = Tokenizer(models.WordLevel({"a": 1, "red": 2, "ball": 3, "<unk>": 0, "<end>": 11}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", eos_token="<end>", pad_token="<end>")
    tokenizer.save_pretrained(tmp_path)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor.save_pretrained(tmp_path)
    pictures = [picture(seed) for seed in range(3)]
    found = ClipScorer(str(tmp_path), "cpu").scores(pictures, "a red ball " * 9)
    pixels = processor(pictures, return_tensors="pt")["pixel_values"]
    ids = tokenizer("a red ball " * 9, truncation=True, max_length=8, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = clip(input_ids=ids, pixel_values=pixels).logits_per_image[:, 0] / clip.logit_scale.exp()
    assert found == pytest.approx(expected.tolist(), abs=1e-5)
