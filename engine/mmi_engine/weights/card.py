"""``README.md`` of a model directory: what it is, how it was trained, what it reaches, how to use it.

Place in the flow: `mmi model card` writes it, before a directory is uploaded to the hub, whose pages show it. Numbers
come from files: the directory's configuration and headers, a run's ``recipe.json``, and ``metrics.json`` of `mmi eval`.
Format: Markdown with the hub's YAML head (https://huggingface.co/docs/hub/model-cards).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmi_engine.errors import ConfigError, OutputError
from mmi_engine.model_info import ModelInfo, describe
from mmi_engine.weights import store

CARD = "README.md"
SEAL = "<!-- mmi model card {} -->\n"
"""Last line of a card: a checksum of what stands before it."""


def write_card(
    directory: Path,
    *,
    run: Path | None = None,
    metrics: Sequence[Path] = (),
    license_: str | None = None,
    bases: Sequence[str] = (),
    about: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the card of a model directory; returns its path.

    The last line of a card is a checksum of the rest: what was changed by hand is told by it, and kept.

    Args:
        directory: the model.
        run: run directory of the training, for its recipe.
        metrics: ``metrics.json`` files, or folders with one.
        license_: identifier for the hub.
        bases: hub ids of the models it was made from.
        about: a sentence or two of the author's.
        overwrite: replace a ``README.md`` that is not as this function wrote it.

    Raises:
        ModelError: no model directory.
        OutputError: a ``README.md`` is there that somebody else wrote or changed.
        ConfigError: a file cannot be read.
    """
    info = describe(str(directory))
    scores = [row for path in metrics for row in _scores(path)]
    recipe = None if run is None else _read(run / "recipe.json" if run.is_dir() else run)
    parts = [
        _head(info, license_, bases),
        f"# {info.name}\n",
        about or _what(info),
        _sizes(info),
        _use(directory.resolve().name),
        _training(recipe),
        _results(scores),
    ]
    path = directory / CARD
    if path.exists() and not overwrite and not _as_written(path):
        raise OutputError(
            f"{path} was written or changed by hand, or by another version of mmi, and is left as it is",
            remedy="--overwrite replaces it; --about adds your own words to a new card",
        )
    text = "\n".join(part for part in parts if part) + "\n"
    store.write_text(path, text + SEAL.format(_checksum(text)))
    return path


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _as_written(path: Path) -> bool:
    """Whether a card is as `write_card` left it."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    body, _, seal = text.rstrip("\n").rpartition("\n")
    return seal + "\n" == SEAL.format(_checksum(body + "\n"))


def _head(info: ModelInfo, license_: str | None, bases: Sequence[str]) -> str:
    lines = ["---", "library_name: mmi", "pipeline_tag: any-to-any", "tags:", "- mm-interleaved", "- interleaved"]
    if license_:
        lines.append(f"license: {license_}")
    if bases:
        lines += ["base_model:", *(f"- {base}" for base in bases)]
    return "\n".join([*lines, "---", ""])


def _what(info: ModelInfo) -> str:
    language = info.config.language.transformers.get("model_type")
    sides = f"reads pictures at {info.config.vision.image_size} px and draws them at {info.image_size} px"
    return f"A model for text and pictures in any order, after MM-Interleaved ({language}); it {sides}.\n"


def _sizes(info: ModelInfo) -> str:
    rows = [f"| {part} | {count:,} |" for part, count in info.parts.items()]
    total = f"| **all** | **{info.parameters:,}** |"
    stored = f"{info.bytes / 1e9:.2f} GB, stored as {', '.join(info.stored)}; fingerprint `{info.fingerprint[:16]}`."
    return "\n".join(["## Sizes\n", "| part | parameters |", "|---|---|", *rows, total, "", stored, ""])


def _use(name: str) -> str:
    lines = ["## Use\n", "```bash", f"mmi story story.jsonl --model {name} --out out", f"mmi model info {name}", "```"]
    lines.append("")
    return "\n".join(lines)


def _training(recipe: dict[str, Any] | None) -> str:
    if recipe is None:
        return ""
    table, origins = recipe.get("recipe", recipe), recipe.get("origins", {})
    rows = [f"| `{key}` | {value} | {origins.get(key, '')} |" for key, value in _flat(table)]
    return "\n".join(["## Training\n", "| recipe key | value | from |", "|---|---|---|", *rows, ""])


def _flat(table: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Dotted key and value of every leaf, as JSON, without empty ones."""
    rows: list[tuple[str, str]] = []
    for key, value in table.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        elif value not in (None, "", [], {}):
            rows.append((f"{prefix}{key}", json.dumps(value).replace("|", "\\|")))
    return rows


def _results(scores: list[tuple[str, str, str, str]]) -> str:
    if not scores:
        return ""
    rows = [f"| {' | '.join(row)} |" for row in scores]
    return "\n".join(["## Results\n", "| metric | value | 95 % | items |", "|---|---|---|---|", *rows, ""])


def _scores(path: Path) -> list[tuple[str, str, str, str]]:
    """Rows of a ``metrics.json``: metric and measure, value, interval, items."""
    file = path / "metrics.json" if path.is_dir() else path
    rows = []
    try:
        for metric, card in _read(file)["scores"].items():
            for name, measure in card["measures"].items():
                unit = measure.get("unit") or ""
                low, high = measure.get("low"), measure.get("high")
                interval = "" if low is None or high is None else f"{low:.4g} to {high:.4g}"
                label = metric if name.lower() == metric.lower() else f"{metric}: {name}"
                value = "–" if measure["value"] is None else f"{measure['value']:.4g}{unit}"
                rows.append((label, value, interval, str(card["items"])))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"{file} holds no scores", remedy="give a metrics.json that mmi eval wrote") from error
    return rows


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", remedy="name the run or results folder") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds no JSON object", remedy="name the run or results folder")
    return value
