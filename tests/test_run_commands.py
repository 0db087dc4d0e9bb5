"""All generating commands with a real model of a few thousand weights: what changes bytes, and what must not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from command_data import FIXED, OPTIONS, go, make_data
from PIL import Image
from test_run_kill import tree

from mmi_cli.main import main


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("command", OPTIONS)
def test_resume_shards_and_neighbours_leave_no_trace(command, data, tmp_path):
    whole = go(data, command, tmp_path / "whole", "--batch-size", "2")
    expected = tree(tmp_path / "whole")
    if command != "ground":  # a random model writes no boxes: all its rows fail, alike
        assert len(whole) >= 3
    main_arguments = ("--batch-size", "2")
    pieces = tmp_path / "pieces"
    partial = ["--out", str(pieces), "--model", str(data / "model"), *FIXED, *OPTIONS[command], "-q", *main_arguments]
    assert main([command, str(data / f"{command}.jsonl"), "--limit", "1", *partial]) in (0, 3)
    for shard in ("3/3", "1/3", "2/3"):
        assert main([command, str(data / f"{command}.jsonl"), "--shard", shard, *partial]) in (0, 3)
    assert tree(pieces) == expected
    lines = (data / f"{command}.jsonl").read_text().splitlines()
    shuffled = data / f"shuffled-{command}.jsonl"
    shuffled.write_text("\n".join(lines[::-1]) + "\n")
    assert go(data, command, tmp_path / "shuffled", *main_arguments, manifest=shuffled) == whole
    for name in (name for name in expected if name.endswith(".png")):
        assert (tmp_path / "shuffled" / name).read_bytes() == expected[name]


@pytest.mark.parametrize("command", ["caption", "vqa", "t2i", "story"])
def test_batch_sizes_give_the_same_tokens_and_pixels_within_one_level(command, data, tmp_path):
    runs = {size: go(data, command, tmp_path / size, "--batch-size", size) for size in ("1", "3", "8")}
    for size in ("3", "8"):
        for name, row in runs["1"].items():
            one, many = dict(row), dict(runs[size][name])
            assert np.allclose(one.pop("scores", 0), many.pop("scores", 0), atol=1e-3)
            assert one == many
        for path in (tmp_path / "1").rglob("*.png"):
            pair = (path, tmp_path / size / path.relative_to(tmp_path / "1"))
            first, second = (np.asarray(Image.open(one)).astype(int) for one in pair)
            assert np.abs(first - second).max() <= 1
