"""Writing that survives a kill or a power cut, and what the operating system says when it cannot be done.

Place in the flow: `outdir.py` writes through this module.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING

from mmi_engine.errors import OutputError

if TYPE_CHECKING:
    from PIL import Image


def write_file(path: Path, content: bytes) -> None:
    """Write a file and flush it to the disk."""
    with path.open("wb") as stream:
        stream.write(content)
        flush(stream)


def write_pictures(directory: Path, scratch: Path, pictures: Mapping[str, Image.Image]) -> None:
    """PNGs, each under a temporary name and then renamed; on return all of them are on the disk.

    Nothing needs to be flushed earlier, as without a row the pictures are made again, and flushing once behind all
    renames takes a third of the time.

    Args:
        directory: where they go.
        scratch: a folder of the same file system for the temporary names.
        pictures: path relative to the directory → RGB picture.
    """
    with contextlib.ExitStack() as stack:
        drafts = []
        for number, image in enumerate(pictures.values()):
            draft = scratch / f"{number}.png"
            stream = stack.enter_context(draft.open("wb"))
            image.save(stream, format="PNG")
            drafts.append((draft, stream))
        for (draft, stream), name in zip(drafts, pictures, strict=True):
            target = directory / name
            target.parent.mkdir(parents=True, exist_ok=True)
            stream.flush()
            draft.replace(target)
        for _, stream in drafts:
            flush(stream)
        for folder in {directory, *((directory / name).parent for name in pictures)}:
            flush_folder(folder)


def flush_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush(stream: IO[bytes]) -> None:
    """Bring what was written to the disk."""
    stream.flush()
    os.fsync(stream.fileno())


@contextlib.contextmanager
def os_errors(directory: Path) -> Iterator[None]:
    """Errors of the operating system as OutputError; `directory` is the output directory that they name."""
    try:
        yield
    except OSError as error:
        where = Path(error.filename).name if error.filename else directory.name
        raise OutputError(
            f'cannot write to "{directory}" ({where}): {error.strerror or error}',
            remedy="free space or choose another --out; the same command then resumes",
        ) from error
