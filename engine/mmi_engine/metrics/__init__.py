"""Scores for finished results: `mmi eval`.

    results.jsonl ┐
                  ├─ pairs.py ──▶ a metric ──▶ bootstrap.py ──▶ score.py: cards, metrics.json
    references    ┘              (registry.py)                  compare.py, plot.py, worst.py

One file per family of metrics; `registry.py` is the table of their names. Nothing here loads a generator; pictures are
looked at by networks only where a metric asks for features (`features.py`).
"""
