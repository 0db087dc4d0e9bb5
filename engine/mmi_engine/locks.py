"""Who may write into an output directory: parts, and locks that a killed process loses by itself.

Place in the flow: `outdir.py` takes a part's lock for the length of a run and the guard for moments in which files that
all parts share are rewritten. Locks are `flock`s on files in `DIR/.mmi/`: the kernel frees them when their process
dies, so a file that nobody holds is a leftover and is removed. Two parts may run together when no item can
belong to both.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mmi_engine.errors import OutputBusyError, UsageError

STATE_DIR = ".mmi"  # exists only while a run is at work or after it was killed
SETTLE = "settle"


@dataclass(frozen=True)
class Part:
    """The share of a manifest that one process works on.

    Attributes:
        shard, shards: `--shard I/N`, I from 1: items whose id hashes to I.
        rank, world: process number and count under `accelerate launch` / `torchrun`: the shard's rows dealt in turn.
    """

    shard: int = 1
    shards: int = 1
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not (1 <= self.shard <= self.shards and 0 <= self.rank < self.world):
            raise UsageError(f"shard {self.shard}/{self.shards} does not exist", remedy="I runs from 1 to N, as in 1/4")

    @classmethod
    def parse(cls, text: str, *, rank: int = 0, world: int = 1) -> Part:
        """``"I/N"`` as a part; raises UsageError."""
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if not match:
            raise UsageError(f'"{text}" is no shard', remedy="write I/N with I from 1 to N, as in 1/4")
        return cls(int(match[1]), int(match[2]), rank, world)

    @property
    def whole(self) -> bool:
        """Whether this is everything."""
        return self.shards == 1 and self.world == 1

    @property
    def label(self) -> str:
        """File name suffix, e.g. ``1-of-4`` or, launched on two devices, ``1-of-4.0-of-2``."""
        launched = f".{self.rank}-of-{self.world}" if self.world > 1 else ""
        return f"{self.shard}-of-{self.shards}{launched}"

    @classmethod
    def from_label(cls, label: str) -> Part | None:
        """Inverse of `label`; None for anything else."""
        match = re.fullmatch(r"(\d+)-of-(\d+)(?:\.(\d+)-of-(\d+))?", label)
        if not match:
            return None
        try:
            part = cls(int(match[1]), int(match[2]), int(match[3] or 0), int(match[4] or 1))
        except UsageError:
            return None
        return part if part.label == label else None

    def owns_id(self, item_id: str) -> bool:
        """Whether the id hashes into this shard."""
        if self.shards == 1:
            return True
        digest = hashlib.sha256(item_id.encode("utf-8")).digest()
        return int.from_bytes(digest[:8], "big") % self.shards == self.shard - 1

    def disjoint(self, other: Part) -> bool:
        """Whether no item can belong to both."""
        if self.shards != other.shards:
            return False
        return self.shard != other.shard or (self.world == other.world and self.rank != other.rank)


def _open_locked(path: Path, *, wait: bool) -> IO[bytes] | None:
    """`path` opened and locked; None when another process holds it and `wait` is off.

    The file may be removed by its previous holder between opening and locking: then the lock is on a file that has no
    name any more, and is taken again.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = path.open("ab")
        except FileNotFoundError:  # the folder was removed in between
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.stat(path).st_ino == os.fstat(handle.fileno()).st_ino:
                return handle
        except BlockingIOError:
            handle.close()
            return None
        except FileNotFoundError:
            pass
        except BaseException:
            handle.close()
            raise
        handle.close()


@contextlib.contextmanager
def guard(directory: Path) -> Iterator[None]:
    """Held for moments: only its holder reads or changes what all parts share. Waits for its turn."""
    state = directory / STATE_DIR
    handle = _open_locked(state / "guard", wait=True)
    assert handle is not None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if [entry.name for entry in state.iterdir()] == ["guard"]:
                (state / "guard").unlink()
                state.rmdir()
        handle.close()


@contextlib.contextmanager
def settle(directory: Path) -> Iterator[None]:
    """Held while a run decides what ``auto`` comes to. Waits for its turn."""
    state = directory / STATE_DIR
    handle = _open_locked(state / SETTLE, wait=True)
    assert handle is not None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (state / SETTLE).unlink()
            state.rmdir()  # where nothing else is at work
        handle.close()


class PartLock:
    """The lock of a part; taken and released under the guard."""

    def __init__(self, directory: Path, part: Part) -> None:
        self._path = directory / STATE_DIR / f"lock-{part.label}"
        self._handle: IO[bytes] | None = None
        self._part = part

    def acquire(self) -> list[str]:
        """Takes the lock and removes the locks of dead processes.

        Returns:
            labels of the other parts at work, all disjoint from this one.

        Raises:
            OutputBusyError: a running process works on this part or one that overlaps it.
        """
        others = live_parts(self._path.parent.parent)
        for label in others:
            other = Part.from_label(label)
            if other is None or not self._part.disjoint(other):
                raise OutputBusyError(
                    f"another run works on {'this directory' if label == '1-of-1' else 'part ' + label}",
                    remedy="wait for it, stop it, or choose another --out",
                )
        _remove_leftover(self._path.with_name(SETTLE))
        self._handle = _open_locked(self._path, wait=False)
        if self._handle is None:
            raise OutputBusyError("another run has just started here", remedy="wait for it, or choose another --out")
        return others

    def release(self) -> None:
        """Gives the lock back and removes its file."""
        if self._handle is not None:
            self._path.unlink(missing_ok=True)
            self._handle.close()
            self._handle = None


def live_parts(directory: Path) -> list[str]:
    """Labels of the parts that running processes hold; locks nobody holds are removed. Call under the guard."""
    found = sorted((directory / STATE_DIR).glob("lock-*"))
    return [path.name.removeprefix("lock-") for path in found if not _remove_leftover(path)]


def _remove_leftover(path: Path) -> bool:
    """Remove a lock file that nobody holds; False where a process does."""
    try:
        with path.open("rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    except FileNotFoundError:
        pass
    return True
