"""Writing that survives a kill or a power cut, and what the operating system says when it cannot be done.

Place in the flow: `outdir.py` writes through this module.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from mmi_engine.errors import OutputError


def write_file(path: Path, content: bytes) -> None:
    """Write a file and flush it to the disk."""
    with path.open("wb") as stream:
        stream.write(content)
        flush(stream)


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
