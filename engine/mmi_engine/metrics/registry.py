"""Metrics by name, imported when they are made.

Place in the flow: `score.py` makes a metric from a name in the table of `names.py`.
"""

from __future__ import annotations

import importlib
from typing import Any

from mmi_engine.errors import UsageError
from mmi_engine.metrics.base import Metric, Options
from mmi_engine.metrics.names import ALIASES, METRICS


def canonical(name: str) -> str:
    """The name in the table of a name that people use."""
    return ALIASES.get(name.lower(), name.lower())


def make(name: str, options: Options) -> Metric:
    """The metric of a name.

    Raises:
        UsageError: unknown, or without the option that it needs.
    """
    name = canonical(name)
    entry = METRICS.get(name)
    if entry is None:
        raise UsageError(f'no metric "{name}"', remedy=f"choose from {', '.join(METRICS)}")
    if entry.needs is not None and getattr(options, entry.needs) is None:
        instead = {"fid": "fd-encoder", "kid": "kd-encoder"}.get(name)
        other = f", or --metric {instead} for the model's own encoder" if instead else ""
        raise UsageError(
            f"--metric {name} needs --{entry.needs}", remedy=f"name the weights (docs/eval.md says which){other}"
        )
    module = importlib.import_module(f"mmi_engine.metrics.{entry.module}")
    return getattr(module, entry.attribute)(options)


def choose(reference: dict[str, Any], result: dict[str, Any]) -> list[str]:
    """The metrics for which both rows have what it takes, when the user names none."""
    fits = [
        name
        for name, entry in METRICS.items()
        if entry.auto
        and any(key in result for key in entry.result)
        and any(key in reference for key in entry.reference)
    ]
    answers = reference.get("answers")
    if "answer" in result and isinstance(answers, list):
        fits.append("vqa" if len(answers) > 1 else "exact")
    if not fits:
        raise UsageError("no metric fits these rows by itself", remedy=f"name one: --metric {'|'.join(METRICS)}")
    return fits
