"""Memory beside the model stays flat, by the benchmark that docs/output.md quotes; times are for its reader alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks/overhead.py"


@pytest.mark.parametrize(("task", "rows"), [("vqa", 3000), ("t2i", 1000)])
def test_memory_stays_flat(task, rows):
    command = [sys.executable, str(SCRIPT), "--task", task, "--rows", str(rows), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    found = json.loads(done.stdout)
    assert found["rows"] == rows and found["ms_per_item"] > 0
    assert found["memory_peak_mib"] - found["memory_early_mib"] < 8
    assert found["bytes_per_row"] < 2000, "rows are kept in memory"
