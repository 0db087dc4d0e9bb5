"""Small copies of the pictures that rows give, in ``index_files/``: what a gallery shows beside the results.

Place in the flow: `run.py` makes them while reading, `outdir.py` writes them just before an item's row, the gallery
asks which there are, and whatever no page shows is swept away when the directory is finished. Nothing else depends on
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

COPIES = "index_files"


def copy_name(stem: str, number: int) -> str:
    """File name of an item's small copy."""
    return f"{number}-{stem}.jpg"


def write_copies(directory: Path, scratch: Path, copies: Mapping[str, bytes]) -> None:
    """Write encoded pictures by name, each under a temporary name first.

    Args:
        directory: the output directory; scratch: a folder on the same file system.
    """
    for name, content in copies.items():
        draft = scratch / "copy"
        draft.write_bytes(content)
        target = directory / COPIES / name
        target.parent.mkdir(exist_ok=True)
        draft.replace(target)


def copies_of(directory: Path, stem: str) -> list[str]:
    """The small copies kept for an item, in order, as paths relative to the directory."""
    names: list[str] = []
    while (directory / COPIES / copy_name(stem, len(names))).exists():
        names.append(f"{COPIES}/{copy_name(stem, len(names))}")
    return names


def sweep_copies(directory: Path, needed: set[str]) -> None:
    """Remove the small copies that no page shows."""
    folder = directory / COPIES
    for path in list(folder.iterdir()) if folder.is_dir() else ():
        if f"{COPIES}/{path.name}" not in needed:
            path.unlink()
    if not needed and folder.is_dir():
        folder.rmdir()
