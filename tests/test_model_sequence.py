"""Layout of interleaved sequences: ids, masks and index maps against their definition, written as plain loops."""

from __future__ import annotations

import random

import pytest
import torch

from mmi_engine.model.config import SpecialTokens
from mmi_engine.sequence import (
    NO_LOSS,
    Piece,
    decoder_visibility,
    image_contexts,
    language_visibility,
    pad_rows,
    text_targets,
    tokenize,
)

TOKENS = SpecialTokens(1, 2, 19, 20, 21)


class Letters:
    """One id per word, so that the layout can be read off."""

    def encode(self, text: str) -> list[int]:
        return [3 + len(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join("x" * (i - 3) for i in ids)


def random_row(rng: random.Random) -> list[int]:
    """Up to three documents of texts and images, sometimes starting in the middle of a document."""
    row: list[int] = [] if rng.random() < 0.2 else [1]
    for document in range(rng.randint(1, 3)):
        if document:
            row.append(1)
        for _ in range(rng.randint(1, 4)):
            row += [rng.randint(3, 18) for _ in range(rng.randint(0, 3))]
            if rng.random() < 0.7:
                row += [20, 21, 21]
        row.append(2)
    return row


@pytest.fixture(params=range(20))
def batch(request: pytest.FixtureRequest) -> torch.Tensor:
    rng = random.Random(request.param)
    return pad_rows([random_row(rng) for _ in range(3)], TOKENS.pad)[0]


def images_of(row: list[int]) -> list[int]:
    """Columns of the row's ``<BoI>`` that open an image."""
    return [t for t in range(len(row) - 1) if row[t] == 20 and row[t + 1] == 21]


def start_of(row: list[int], column: int) -> int:
    """Column of the last ``<s>`` at or before ``column``, 0 if there is none."""
    return max([t for t in range(column + 1) if row[t] == 1], default=0)


def test_language_visibility_follows_its_definition(batch: torch.Tensor) -> None:
    count = max(len(images_of(row)) for row in batch.tolist()) or 1
    visible = language_visibility(batch, TOKENS, count)
    for b, row in enumerate(batch.tolist()):
        sites = images_of(row)
        for t in range(len(row)):
            for m in range(count):
                expected = m < len(sites) and sites[m] < t and start_of(row, t) <= sites[m]
                assert bool(visible[b, t, m]) == expected


def test_contexts_and_decoder_visibility_follow_their_definition(batch: torch.Tensor) -> None:
    rows, columns, mask = image_contexts(batch, TOKENS)
    two_back = decoder_visibility(batch, TOKENS, context_images=2)
    index = 0
    for b, row in enumerate(batch.tolist()):
        sites = images_of(row)
        for order, site in enumerate(sites):
            start = start_of(row, site)
            expected = list(range(site, start - 1, -1))
            assert int(rows[index]) == b
            assert columns[index][mask[index].bool()].tolist() == expected
            seen = [order - back >= 0 and sites[order - back] >= start for back in (2, 1)]
            assert two_back[index].bool().tolist() == seen
            index += 1
    assert index == len(rows)


def test_text_targets_rules() -> None:
    ids = torch.tensor([[1, 20, 21, 21, 5, 6, 20, 21, 21, 2, 19]])
    assert text_targets(ids, TOKENS)[0].tolist() == [
        NO_LOSS, NO_LOSS, NO_LOSS, NO_LOSS, 5, 6, 20, NO_LOSS, NO_LOSS, 2, NO_LOSS,
    ]  # fmt: skip
    late = torch.tensor([[1, 5, 20, 21, 6, 2, 1, 7, 8, 20, 21, 2]])
    kept = text_targets(late, TOKENS, skip_imageless=True)[0].tolist()
    assert [i for i, t in enumerate(kept) if t != NO_LOSS] == [2, 4, 5, 9, 11]
    prompted = text_targets(late, TOKENS, prompt_lengths=[5])[0].tolist()
    assert [i for i, t in enumerate(prompted) if t != NO_LOSS] == [5, 7, 8, 9, 11]


def test_tokenize_joins_texts_and_places_images() -> None:
    pieces = [Piece("text", "a bb"), Piece("text", " ccc "), Piece("image", "P"), Piece("text", ""), Piece("text", "d")]
    made = tokenize(pieces, Letters(), TOKENS, per_image=2)
    assert made.ids == [1, 4, 5, 6, 20, 21, 21, 4]
    assert made.images == ["P"]


def test_padding_sides() -> None:
    ids, mask = pad_rows([[3, 4], [5]], 19, left=True, length=4)
    assert ids.tolist() == [[19, 19, 3, 4], [19, 19, 19, 5]]
    assert mask.tolist() == [[0, 0, 1, 1], [0, 0, 0, 1]]
