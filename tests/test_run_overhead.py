"""The cost of everything but the model, by the benchmark that docs/output.md quotes, on fewer rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks/overhead.py"


def test_an_item_costs_little_and_memory_stays_flat():
    command = [sys.executable, str(SCRIPT), "--rows", "3000", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    found = json.loads(done.stdout)
    assert found["rows"] == 3000
    assert found["cpu_ms_per_item"] < 4, "2 ms is the promise on a free machine"
    assert found["memory_peak_mib"] - found["memory_early_mib"] < 8
    assert found["bytes_per_row"] < 2000, "rows are kept in memory"
