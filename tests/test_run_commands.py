"""All generating commands with a real model of a few thousand weights: what changes bytes, and what must not."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_data import FIXED, OPTIONS, go, make_data
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
