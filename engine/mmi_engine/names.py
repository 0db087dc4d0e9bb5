"""Item ids to file names: readable where possible, never colliding, never outside the output directory.

Place in the flow: `run.py` asks for one stem per item; a task writes `STEM.png` or `STEM/00.png`. An id made of plain
characters is its own stem. Any other id (slashes, dots in front, control characters, non-ASCII, more than 100
characters, names that a file system or the output directory itself reserves) becomes `slug~hash`; `~` never occurs in
a plain stem, and the 80-bit hash is of the whole id. Of ids that differ only in case, the first keeps its name: on file
systems that ignore case the twins would be one file.
"""

from __future__ import annotations

import hashlib
import re

MAX_STEM = 100
_PLAIN = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._+=@ -]*[A-Za-z0-9_+=@-])?", re.ASCII)
_DEVICES = {"con", "prn", "aux", "nul"} | {f"{port}{digit}" for port in ("com", "lpt") for digit in range(10)}
_OWN = re.compile(r"(results|errors)(-.*)?\.jsonl|(run|metrics)\.json|index(-\d+)?\.html|index_files", re.ASCII)


def safe_stem(item_id: str) -> str:
    """The file stem of an id, looked at alone: a pure, injective function of the id."""
    if len(item_id) <= MAX_STEM and _PLAIN.fullmatch(item_id) and not _reserved(item_id):
        return item_id
    return _hashed(item_id)


def _reserved(stem: str) -> bool:
    lowered = stem.lower()
    return lowered.split(".")[0] in _DEVICES or _OWN.fullmatch(lowered) is not None


def _hashed(item_id: str) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", item_id.lower()).strip("-")[:40].strip("-") or "item"
    return f"{slug}~{hashlib.sha256(item_id.encode('utf-8')).hexdigest()[:20]}"


class Stems:
    """Stems for all ids of one manifest, in manifest order, so that case twins are told apart.

    The result depends on the manifest alone, not on which part of it a process works on.
    """

    def __init__(self) -> None:
        self._owner: dict[str, str] = {}  # casefolded stem → the id that holds it
        self._twins: dict[str, str] = {}  # id → its hashed stem

    def add(self, item_id: str) -> None:
        """Announce an id; call once per manifest row, in order."""
        stem = safe_stem(item_id)
        owner = self._owner.setdefault(stem.casefold(), item_id)
        if owner != item_id:
            self._twins[item_id] = _hashed(item_id)

    def __getitem__(self, item_id: str) -> str:
        return self._twins.get(item_id) or safe_stem(item_id)
