"""The engine of `mmi`: data in, interleaved sequence, model, generation, output directory.

Rooms in the order in which data flows: `data` (manifest rows, images) → `sequence` (the one place that knows the
token layout) → `model` → `generate` → `tasks` (row to pieces, pieces to row) → `run` (the output directory) →
`gallery`. Beside them `train` and `toon`. Importing the package imports nothing heavy.
"""

from __future__ import annotations

__version__ = "0.1.0"
