"""Small copies of the pictures that rows give, in ``index_files/``: what a gallery shows beside the results.

Place in the flow: `reading.py` makes them, `outdir.py` writes them just before an item's row, the gallery asks which
there are, and whatever no page shows is swept away when the directory is finished. Nothing else depends on them. Each
carries a comment that says what it is, and a file without it is the user's: never shown, replaced or removed.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

COPIES = "index_files"
SMALL_COPY = b"small copy, made by mmi for its gallery"  # a JPEG comment
HEAD = 256  # bytes of a JPEG within which its comment stands


def small_copy(image: Image.Image, side: int = 320) -> bytes:
    """A JPEG of at most `side` × `side` pixels for a gallery, proportions kept; `SMALL_COPY` is its comment."""
    from PIL import Image

    small = image.convert("RGB")
    if max(small.size) > side:
        small.thumbnail((side, side), Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    small.save(stream, format="JPEG", quality=88, comment=SMALL_COPY)
    return stream.getvalue()


def copy_name(stem: str, number: int) -> str:
    """File name of an item's small copy."""
    return f"{number}-{stem}.jpg"


def write_copies(directory: Path, scratch: Path, copies: Mapping[str, bytes]) -> None:
    """Write encoded pictures by name, each under a temporary name first.

    Args:
        directory: the output directory; scratch: a folder on the same file system.
    """
    for name, content in copies.items():
        target = directory / COPIES / name
        if target.exists() and not is_copy(target):
            continue
        draft = scratch / "copy"
        draft.write_bytes(content)
        target.parent.mkdir(exist_ok=True)
        draft.replace(target)


def copies_of(directory: Path, stem: str) -> list[str]:
    """The small copies kept for an item, in order, as paths relative to the directory."""
    names: list[str] = []
    while is_copy(directory / COPIES / copy_name(stem, len(names))):
        names.append(f"{COPIES}/{copy_name(stem, len(names))}")
    return names


def sweep_copies(directory: Path, needed: set[str]) -> None:
    """Remove the small copies that no page shows, and their folder where nothing else is in it."""
    folder = directory / COPIES
    for path in list(folder.iterdir()) if folder.is_dir() else ():
        if f"{COPIES}/{path.name}" not in needed and is_copy(path):
            path.unlink()
    if not needed:
        with contextlib.suppress(OSError):
            folder.rmdir()


def is_copy(path: Path) -> bool:
    """Whether a file is a small copy that a run made."""
    try:
        with path.open("rb") as stream:
            return SMALL_COPY in stream.read(HEAD)
    except OSError:
        return False
