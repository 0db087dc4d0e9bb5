"""The files behind a recipe: what it extends, its scaled profile, and data sets named on the command line.

Place in the flow: ``recipe.py`` calls :func:`read` and builds the dataclasses from the merged table. A recipe may say
``extends = "NAME"`` (keys of the file win over the named recipe's; lists are replaced whole) and hold a table
``[toon]``, the profile in which the same recipe runs on the embedded model and drawn data.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmi_engine.errors import ConfigError

PROFILE = "toon"
LAYERS = 5
"""Most files one recipe may be made of; more are taken for a circle."""


def read(path: Path, find: Callable[[str], Path], profile: str = "") -> tuple[dict[str, Any], dict[str, str]]:
    """A recipe file, everything that it extends, and the profile asked for, as one table.

    Args:
        path: the file.
        find: name → file, for ``extends``.
        profile: ``toon`` or nothing.

    Returns:
        the table, and for every leaf set by a file the words that tell its origin.

    Raises:
        ConfigError: a file that is no TOML, a circle, or no such profile.
    """
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    scaled: list[tuple[dict[str, Any], str]] = []
    for source, table in reversed(_chain(path, find)):
        scaled.append((table.pop(PROFILE, {}), f"recipe {source.name} [{PROFILE}]"))
        _merge(merged, table, f"recipe {source.name}", origins)
    if profile:
        if not any(own for own, _ in scaled):
            raise ConfigError(f"{path.stem} has no [{profile}] profile", remedy="name a model with --model")
        for own, words in scaled:
            _merge(merged, own, words, origins)
    return merged, origins


def has_profile(path: Path, find: Callable[[str], Path]) -> bool:
    """Whether the recipe, or one that it extends, holds a ``[toon]`` table; raises ConfigError as :func:`read`."""
    return any(PROFILE in table for _, table in _chain(path, find))


def _chain(path: Path, find: Callable[[str], Path]) -> list[tuple[Path, dict[str, Any]]]:
    """The file and what it extends, in this order, with their tables."""
    chain: list[tuple[Path, dict[str, Any]]] = []
    following: Path | None = path
    while following is not None:
        if len(chain) == LAYERS or any(following == known for known, _ in chain):
            raise ConfigError(f"{path}: extends itself", remedy="remove one extends")
        table = _toml(following)
        parent = table.pop("extends", None)
        chain.append((following, table))
        following = find(str(parent)) if parent is not None else None
    return chain


def with_data(table: dict[str, Any], named: Sequence[str]) -> dict[str, Any]:
    """The table with ``--data`` in place: ``NAME=MANIFEST`` fills the set of that name, another path is a set of its
    own. Sets of the recipe that are not named are left out.

    Raises:
        ConfigError: a NAME that the recipe does not know.
    """
    sets = {str(entry.get("name")): entry for entry in table.get("data", {}).get("sets", [])}
    chosen: list[dict[str, Any]] = []
    for text in named:
        name, separator, path = text.partition("=")
        if separator and name in sets:
            chosen.append({**sets[name], "manifest": path, "toon": ""})
        elif separator and not Path(text).exists():
            known = ", ".join(sets) or "none"
            raise ConfigError(f"--data {text}: the recipe has no set {name!r}", remedy=f"its sets: {known}")
        else:
            place = Path(text)
            stem = place.parent.name if place.stem == "manifest" and place.parent.name else place.stem
            known_set = sets.get(stem, {"name": _unused(stem, chosen)})
            chosen.append({**known_set, "manifest": text, "toon": ""})
    return {**table, "data": {**table.get("data", {}), "sets": chosen, "source": "manifests"}}


def _unused(name: str, chosen: list[dict[str, Any]]) -> str:
    taken = {entry["name"] for entry in chosen}
    return next(n for n in (name, *(f"{name}-{k}" for k in range(2, len(taken) + 3))) if n not in taken)


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a TOML file: {error}", remedy="correct the recipe") from error


def _merge(into: dict[str, Any], new: dict[str, Any], words: str, origins: dict[str, str], prefix: str = "") -> None:
    """``new`` over ``into``, table by table; every leaf of ``new`` gets ``words`` as its origin."""
    for key, value in new.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            child = into.setdefault(key, {})
            if not isinstance(child, dict):
                child = into[key] = {}
            _merge(child, value, words, origins, f"{name}.")
            continue
        for old in [leaf for leaf in origins if leaf.startswith(f"{name}.")]:
            del origins[old]
        into[key] = value
        origins[name] = words
