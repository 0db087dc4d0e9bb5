"""`mmi` with the fake engine in place of the model: what the examples of docs and scripts run against."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / name) for name in ("tests", ".", "engine", "kernels")]

from fake_engine import FakeEngine  # noqa: E402

from mmi_cli import generating, main  # noqa: E402

generating.make_engine = lambda options, decoding: FakeEngine(
    batch_size=2, answer="(100,200)(500,600)" if decoding == "ground" else None
)

if __name__ == "__main__":
    sys.exit(main.main())
