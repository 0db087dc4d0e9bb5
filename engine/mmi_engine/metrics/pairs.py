"""Finished results and their references, read and brought together by id.

Place in the flow: the entry of `mmi eval`. RESULTS is an output directory (results.jsonl, part files, errors.jsonl) or
a JSONL file of rows with an id; REFERENCES is a manifest whose rows carry the truth. Nothing is guessed: an id that
occurs twice, a line that is no JSON (NaN included), an empty file or two files without an id in common end the
evaluation with place and remedy. Items without a result, or with a failed one, stay in the list and say why.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmi_engine.data.images import ImageLoader
from mmi_engine.data.manifest import Manifest, Row, shorten
from mmi_engine.errors import ManifestError

SHOWN = 3  # broken lines named in one message


@dataclass
class Pair:
    """A reference row and what was made for it.

    Attributes:
        id: of both; place: ``file:line`` of the reference; result_place: of the result, or empty.
        reference, result: the rows; result is None where `problem` says why there is none.
        problem: ``missing``, or ``failed: …``, or ``unusable: …``; None for an item with a result.
        truth, made: loaders of pictures named by the one and by the other.
    """

    id: str
    place: str
    reference: dict[str, Any]
    truth: ImageLoader
    made: ImageLoader
    result: dict[str, Any] | None = None
    result_place: str = ""
    problem: str | None = None


@dataclass(frozen=True)
class Results:
    """A run's rows.

    Attributes:
        name: as the user wrote it; folder: what its media paths are relative to.
        rows: id → (place, row); failures: id → reason.
        run: what run.json says of model and settings, {} without one.
    """

    name: str
    folder: Path
    rows: dict[str, tuple[str, dict[str, Any]]]
    failures: dict[str, str] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)


def read_results(path: str | Path) -> Results:
    """Rows of an output directory or of a JSONL file.

    Raises:
        ManifestError: nothing there, no row, a broken line, a row without id, an id that occurs twice.
    """
    source = Path(path)
    if source.is_dir():
        files = sorted(source.glob("results*.jsonl"))
        if not files:
            raise ManifestError(f'"{path}" holds no results.jsonl', remedy="name an output directory of mmi, or a file")
        folder, errors = source, sorted(source.glob("errors*.jsonl"))
    else:
        if source.suffix == ".json":
            raise ManifestError(f'"{path}" is JSON, not JSON lines', remedy="write one object with an id per line")
        files, folder = [source], source.parent
        errors = [p for p in (source.with_name("errors.jsonl"),) if source.name == "results.jsonl" and p.is_file()]
    rows: dict[str, tuple[str, dict[str, Any]]] = {}
    failures: dict[str, str] = {}
    for file in files:
        _add_rows(file, rows, failures)
    for file in errors:
        for row in Manifest(file).rows():
            if row.error is None and row.id not in rows:
                failures.setdefault(row.id, shorten(f"{row.data.get('error')}: {row.data.get('message')}", 200))
    if not rows and not failures:
        raise ManifestError(f'"{path}" holds no result', remedy="let the run finish at least one item")
    return Results(str(path), folder, rows, failures, _run_json(folder))


def _add_rows(file: Path, rows: dict[str, tuple[str, dict[str, Any]]], failures: dict[str, str]) -> None:
    manifest, broken = Manifest(file), []
    for row in manifest.rows():
        place = f"{manifest.name}:{row.line}"
        if row.error is not None:
            broken.append(f"{place}: {row.error.message}")
        elif "id" not in row.data and "custom_id" not in row.data:
            broken.append(f"{place}: the row has no id")
        elif row.id in rows and rows[row.id][1] == row.data and not rows[row.id][0].startswith(f"{manifest.name}:"):
            continue  # a part file whose merge was interrupted
        elif row.id in rows:
            broken.append(f'{place}: id "{shorten(row.id)}" occurs before ({rows[row.id][0]})')
        elif row.data.get("status", "ok") != "ok":
            failures[row.id] = shorten(f"status {row.data['status']}", 200)
        else:
            rows[row.id] = (place, row.data)
    _refuse(broken, "a number over ambiguous results would mean nothing: correct or remove these lines")


def _run_json(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / "run.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _refuse(broken: list[str], remedy: str) -> None:
    if broken:
        more = f" (and {len(broken) - SHOWN} more)" if len(broken) > SHOWN else ""
        raise ManifestError("; ".join(broken[:SHOWN]) + more, remedy=remedy)


def read_references(path: str | Path, *, root: str | None = None, allow_urls: bool = False) -> References:
    """All rows of a manifest, every one of which must be sound.

    Raises:
        ManifestError: nothing there, no row, a broken row, an id that occurs twice.
    """
    manifest = Manifest(path, root=root)
    rows = list(manifest.rows())
    _refuse(
        [f"{manifest.name}:{row.line}: {row.error.message}" for row in rows if row.error is not None],
        "references must be sound: correct these lines",
    )
    if not rows:
        raise ManifestError(f'"{path}" holds no reference', remedy="name a manifest with one row per item")
    return References(manifest.name, rows, ImageLoader(manifest.root, allow_urls=allow_urls), manifest.fingerprint())


@dataclass(frozen=True)
class References:
    """The truth: name of the manifest, its rows, how its pictures are read, sha256 of its bytes."""

    name: str
    rows: list[Row]
    loader: ImageLoader
    fingerprint: str

    def only(self, ids: Iterable[str]) -> References:
        """Those with the given ids, in the manifest's order."""
        wanted = set(ids)
        return References(self.name, [r for r in self.rows if r.id in wanted], self.loader, self.fingerprint)


def pair(references: References, results: Results) -> tuple[list[Pair], list[str]]:
    """Bring both together.

    Returns:
        one Pair per reference, in the manifest's order; ids of results that no reference asks for.

    Raises:
        ManifestError: not one id in common.
    """
    made = ImageLoader(results.folder)
    pairs = []
    for row in references.rows:
        item = Pair(row.id, f"{references.name}:{row.line}", row.data, references.loader, made)
        if row.id in results.rows:
            item.result_place, item.result = results.rows[row.id]
        elif row.id in results.failures:
            item.problem = f"failed: {results.failures[row.id]}"
        else:
            item.problem = "missing"
        pairs.append(item)
    known = {row.id for row in references.rows}
    if not known & (results.rows.keys() | results.failures.keys()):
        sample = shorten(next(iter(results.rows.keys() or results.failures.keys())))
        raise ManifestError(
            f'no id of {results.name} is in {references.name} (results have "{sample}", references '
            f'"{shorten(references.rows[0].id)}")',
            remedy="pass the manifest that the results were made from, with the truth in its rows",
        )
    return pairs, [key for key in results.rows if key not in known]
