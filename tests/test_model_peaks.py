"""The memory that `mmi model info` foretells beside the peak that a process reaches."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("kernel", ["auto", "torch"])
def test_the_estimate_is_near_the_peak_and_not_below_it(kernel: str) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/model_memory.py"), "--sizes", "tiny", "--kernel", kernel]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["weights_estimate"] == 4 * found["parameters"]
    assert 0.97 < found["weights"] / found["weights_estimate"] < 1.05, found
    assert 0.85 < found["peak"] / found["peak_estimate"] <= 1, found


def test_every_table_of_the_page_ends_before_the_next_paragraph() -> None:
    lines = (ROOT / "docs/model.md").read_text(encoding="utf-8").splitlines()
    after = [line for row, line in zip(lines, lines[1:], strict=False) if row.startswith("|")]
    assert all(line == "" or line.startswith("|") for line in after)
