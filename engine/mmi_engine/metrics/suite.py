"""Suite files: a benchmark as data. Which rows, which command with which prompt and decoding, which metric, what the
paper reports.

Place in the flow: `mmi eval --suite NAME` reads one (or all of the paper's) from ``suites/NAME.toml`` or from a file of
the user's, `produce.py` generates, `score.py` scores. Source of those that ship: the paper's Table 16 (benchmarks),
Table 17 (prompts) and Tables 1 to 4 (figures).
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from mmi_engine.errors import ConfigError
from mmi_engine.metrics.names import METRICS

TASKS = ("caption", "vqa", "ground", "t2i", "seg2img", "story")
VARIANTS = ("default", "released")


@dataclass(frozen=True)
class Goal:
    """One metric of a part.

    Attributes:
        metric: its name; measure: the one beside which the paper's figure stands, default the headline.
        variant: ``default`` or ``released``.
        instead: metric to take where this one's network was not given.
        paper: setting (``zero_shot``, ``sft``, ``reported``) → the paper's figure.
        scale: what our value is multiplied by to stand beside it.
    """

    metric: str
    measure: str | None = None
    variant: str = "default"
    instead: str | None = None
    paper: dict[str, float] = field(default_factory=dict)
    scale: float = 1.0

    def __post_init__(self) -> None:
        for name in (self.metric, self.instead or self.metric):
            if name not in METRICS:
                raise ConfigError(f'no metric "{name}"', remedy=f"choose from {', '.join(METRICS)}")
        if self.variant not in VARIANTS:
            raise ConfigError(f'no variant "{self.variant}"', remedy=f"choose from {', '.join(VARIANTS)}")


@dataclass(frozen=True)
class Part:
    """One data set of a suite.

    Attributes:
        data: manifest NAME.jsonl in the user's data folder; also the folder of its results.
        split: for the reader; task: the command.
        ask: options of the command; tuned: those that change after fine-tuning.
        decoding: generation settings.
        goals: metrics.
    """

    data: str
    task: str
    goals: tuple[Goal, ...]
    split: str = ""
    ask: dict[str, Any] = field(default_factory=dict)
    tuned: dict[str, Any] = field(default_factory=dict)
    decoding: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ConfigError(f'no task "{self.task}"', remedy=f"choose from {', '.join(TASKS)}")
        if not self.goals:
            raise ConfigError(f'part "{self.data}" has no [[part.score]]')


@dataclass(frozen=True)
class Suite:
    """A benchmark.

    Attributes:
        name, title: short and for the reader; format: how to get the manifests; note: what to know.
        makes: ``toon`` where the data is drawn instead of given.
        parts: its data sets.
    """

    name: str
    title: str
    parts: tuple[Part, ...]
    format: str = ""
    note: str = ""
    makes: str | None = None


_TOP = {"title", "format", "note", "makes", "task", "ask", "tuned", "decoding", "part"}
_PART = {"data", "split", "task", "ask", "tuned", "decoding", "score"}
_SCORE = {"metric", "measure", "variant", "instead", "paper", "scale"}


def names() -> list[str]:
    """The suites that ship, in alphabetical order."""
    return sorted(path.stem for path in _folder().glob("*.toml"))


def _folder() -> Path:
    return Path(str(resources.files("mmi_engine.metrics"))) / "suites"


def load(name: str) -> Suite:
    """A suite by name, or by the path of a TOML file.

    Raises:
        ConfigError: no such suite, broken TOML, an unknown key, metric or task.
    """
    path = Path(name) if name.endswith(".toml") else _folder() / f"{name}.toml"
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(names())
        raise ConfigError(f'no suite "{name}"', remedy=f"choose from {known}, paper, or name a .toml file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"suite {path.name}: {error}") from None
    try:
        _known(content, _TOP, "")
        parts = tuple(_part(entry, content) for entry in content.get("part", []))
        if not parts:
            raise ConfigError("no [[part]]")
        fields = {key: content[key] for key in ("format", "note", "makes") if key in content}
        return Suite(path.stem, str(content.get("title", path.stem)), parts, **fields)
    except (ConfigError, KeyError, TypeError, AttributeError) as error:
        reason = f"missing {error}" if isinstance(error, KeyError) else str(error)
        raise ConfigError(f"suite {path.name}: {reason}") from None


def _known(table: dict[str, Any], keys: set[str], where: str) -> None:
    unknown = sorted(set(table) - keys)
    if unknown:
        raise ConfigError(f'unknown key "{where}{unknown[0]}"', remedy=f"known keys are {', '.join(sorted(keys))}")


def _part(entry: dict[str, Any], top: dict[str, Any]) -> Part:
    _known(entry, _PART, "part.")
    goals = []
    for score in entry.get("score", []):
        _known(score, _SCORE, "part.score.")
        goals.append(Goal(**score))
    merged = {key: {**top.get(key, {}), **entry.get(key, {})} for key in ("ask", "tuned", "decoding")}
    task = entry.get("task") or top["task"]
    return Part(entry["data"], task, tuple(goals), str(entry.get("split", "")), **merged)
