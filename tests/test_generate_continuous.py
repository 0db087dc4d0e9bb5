"""Continuous batching: the same tokens as one text at a time, whatever shares the steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from command_data import go, make_data
from PIL import Image
from tiny import tiny_model

from mmi_cli.main import main
from mmi_engine.generate.interleave import fill
from mmi_engine.generate.settings import Settings
from mmi_engine.pieces import Piece


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=4)


def items() -> list[list[Piece]]:
    """Texts after 0 to 3 pictures and texts of several lengths; one story with two texts and a picture."""
    noise = np.random.default_rng(0)
    found = []
    for number in range(7):
        pictures = [Image.fromarray(noise.integers(0, 256, (32, 32, 3), np.uint8)) for _ in range(number % 4)]
        text = "Pip runs to the lake. " * (1 + number % 3 * 4)
        found.append([*[Piece("image", one) for one in pictures], Piece("text", text), Piece("text")])
    return [*found, [*found[1], Piece("image"), Piece("text", "Boo."), Piece("text")]]


SETTINGS = {
    "greedy": Settings(steps=1, max_new_tokens=6, repetition_penalty=1.3),
    "sampled": Settings(steps=1, max_new_tokens=8, min_new_tokens=3, temperature=1.0, top_p=0.9),
}


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("rows", [1, 3])
def test_the_same_tokens_as_alone(model, kind, rows):
    seeds, settings = list(range(len(items()))), SETTINGS[kind]
    alone = [fill(model, [item], [seed], settings, 1)[0] for item, seed in zip(items(), seeds, strict=True)]
    together = fill(model, items(), seeds, settings, rows, continuous=True)
    for one, other in zip(alone, together, strict=True):
        assert [p.value for p in one if p.kind == "text"] == [p.value for p in other if p.kind == "text"]


def test_commands_take_it(tmp_path: Path, capsys):
    data = make_data(tmp_path)
    options = ["--batch-size", "2", "--beams", "1"]
    fixed = go(data, "vqa", tmp_path / "fixed", *options)
    together = go(data, "vqa", tmp_path / "together", *options, "--batching", "continuous")
    assert {name: row["answer"] for name, row in fixed.items()} == {n: row["answer"] for n, row in together.items()}
    same = ["vqa", str(data / "vqa.jsonl"), "--model", str(data / "model"), "--device", "cpu"]
    assert main([*same, "--out", str(tmp_path / "together"), *options]) == 2  # another way of batching
    assert "batching" in capsys.readouterr().err
    assert main([*same, "--out", str(tmp_path / "b"), "--batching", "continuous", "--beams", "2"]) == 2
    assert "--beams 1" in capsys.readouterr().err
