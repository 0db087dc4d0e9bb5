"""Free continuation: it ends where the model's context is full, and what was made before is kept."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from tiny import tiny_config, tiny_model

from mmi_engine.errors import TextTooLongError
from mmi_engine.generate import interleave
from mmi_engine.generate.settings import Settings
from mmi_engine.pieces import Piece


def few_images():
    """A model that tells three images apart."""
    config = tiny_config()
    language = replace(config.language, mmfs=replace(config.language.mmfs, max_images=4))
    return tiny_model(config=replace(config, language=language))


@pytest.fixture(scope="module", params=[tiny_model, few_images])
def model(request):
    return request.param()


@pytest.fixture
def eager(model, monkeypatch):
    """A model that always writes the same few words and then opens a picture."""
    words = model.tokenizer.encode("Pip runs to the lake.")
    made = [model.config.tokens.bos, *words, model.config.tokens.boi]
    monkeypatch.setattr(
        interleave, "generate_text", lambda model, prompt, *a, **k: SimpleNamespace(ids=[made] * len(prompt.ids))
    )


def fill(model, pieces: list[Piece], free: int, new_tokens: int = 8) -> list[Piece]:
    settings = Settings(steps=1, max_new_tokens=new_tokens)
    neighbour = [Piece("text", "Boo waves."), Piece("image")]
    filled, other = interleave.fill(model, [pieces, neighbour], [3, 4], settings, 2, [free, 0])
    assert [piece.kind for piece in other] == ["text", "image"] and other[1].value is not None
    return filled


START = [Piece("text", "Pip is on the beach."), Piece("image")]


@pytest.mark.parametrize("new_tokens", [8, 150])
def test_it_ends_where_the_context_is_full(model, eager, new_tokens):
    full = fill(model, START, 50, new_tokens)
    assert all(piece.value is not None for piece in full)
    pictures = [piece for piece in full if piece.kind == "image"]
    most = model.config.language.mmfs.max_images
    assert 2 <= len(pictures) < 30 and (most > 4 or len(pictures) == 4), "a fourth is drawn behind three"
    kinds = [piece.kind for piece in full[2:]]
    assert kinds == (["text", "image"] * len(kinds))[: len(kinds)]
    asked = fill(model, START, len(pictures) - 1, new_tokens)  # as many as it came to, asked for
    count = len(asked)
    assert count in (len(full), len(full) - 1)
    for one, other in zip(asked, full[:count], strict=True):
        same = one.value == other.value if one.kind == "text" else one.value.tobytes() == other.value.tobytes()
        assert one.kind == other.kind and same


def test_where_not_even_the_first_piece_has_room_the_item_fails(model, eager):
    given = [Piece("text", "Pip is on the beach near a red ball. " * 30)]
    with pytest.raises(TextTooLongError):
        fill(model, given, 3)
    with pytest.raises(TextTooLongError):  # a piece that was asked for is never dropped
        fill(model, [*START, *given, Piece("image")], 3)
