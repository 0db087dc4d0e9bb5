"""Memory of imports, measured: the benchmark that took the published figure, at a small size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_memory_stays_at_a_shard_and_a_little_and_a_killed_import_goes_on() -> None:
    """The benchmark at a small size: processes of their own, one killed half-way."""
    command = [sys.executable, str(ROOT / "benchmarks/import_memory.py"), "--gigabytes", "0.2", "--shard", "0.03"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert 0 < found["resumed"] < found["files"]
    allowed = found["largest_shard"] + 60e6  # one tensor, its bf16 copy, and what the allocator keeps
    assert max(found["peak_until_killed"], found["peak_resumed"]) < allowed < found["source_bytes"], found
