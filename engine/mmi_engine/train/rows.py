"""Manifest rows by number, and an endless shuffled order of them: the floor of the data path.

Place in the flow: ``packing.py`` asks for row i of a set. A manifest is read once to find where its lines begin (24
bytes a row are kept); rows are read and parsed when they are asked for, so it may be larger than memory. The order of
an epoch is a permutation computed number by number (a Feistel network, Luby & Rackoff 1988, walked until it falls into
the range), so it needs no memory either, and any process can start anywhere in it.
"""

from __future__ import annotations

import hashlib
import os
from functools import cached_property
from pathlib import Path

import numpy as np

from mmi_engine.data.manifest import Manifest, Row, parse_row
from mmi_engine.errors import ConfigError

BLOCK = 2**24
ROUNDS = 6


class RowIndex:
    """Rows of a JSON lines manifest by number, blank lines counted out.

    Args:
        path: the manifest.
        held_out: share of the rows that is set apart, spread over the file and at least one where it is not zero.
        inverse: the rows set apart instead of the others.

    Raises:
        ManifestError: it cannot be read.
        ConfigError: it is no file of JSON lines, or holds no row.
    """

    def __init__(self, path: Path, *, held_out: float = 0.0, inverse: bool = False) -> None:
        self.held_out, self.inverse = held_out, inverse
        source = Manifest(path)
        if source.format != "jsonl" or source.path is None:
            raise ConfigError(f"{path} is no JSON lines manifest", remedy="convert it: mmi data import …")
        self.path, self.root = source.path, source.root
        if not len(self.lines):
            raise ConfigError(f"{path} holds no rows", remedy="name another manifest")

    @cached_property
    def lines(self) -> np.ndarray:
        """int64 ``[rows, 3]``: begin and end of every line that is not blank, in bytes, and its number from 1."""
        ends: list[np.ndarray] = []
        with self.path.open("rb") as stream:
            start = 0
            while block := stream.read(BLOCK):
                ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + start)
                start += len(block)
        stops = np.concatenate([*ends, [start]]).astype(np.int64) if start else np.zeros(0, np.int64)
        begins = np.concatenate([[0], stops[:-1] + 1]).astype(np.int64) if start else stops
        spans = np.stack([begins, stops, np.arange(1, len(stops) + 1)], 1)
        spans = spans[spans[:, 1] - spans[:, 0] > 1]
        if not self.held_out or len(spans) < 2:
            return spans
        apart = np.zeros(len(spans), bool)
        apart[:: max(2, round(1 / self.held_out))] = True
        return spans[apart if self.inverse else ~apart]

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, number: int) -> Row | None:
        """Row ``number`` (from 0); its ``error`` says what is wrong with it. None for a line of spaces."""
        begin, end, line = (int(value) for value in self.lines[number])
        with self.path.open("rb") as stream:
            stream.seek(begin)
            raw = stream.read(end - begin)
        return parse_row(line, raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw)

    @cached_property
    def fingerprint(self) -> str:
        """Short hash of name, size and time of the file: whether a plan made for it still holds."""
        info = os.stat(self.path)
        return hashlib.sha256(
            f"{self.path.name}:{info.st_size}:{info.st_mtime_ns}:{self.held_out}:{self.inverse}".encode()
        ).hexdigest()[:16]


def shuffled(position: int, count: int, seed: tuple[int, ...]) -> int:
    """Element ``position`` of an endless shuffled order of 0 … ``count`` − 1; every epoch is an order of its own.

    Args:
        position: from 0; position // count is the epoch.
        count: numbers in an epoch.
        seed: of the order.
    """
    epoch, value = divmod(position, count)
    if count == 1:
        return 0
    half = max(1, (int(count - 1).bit_length() + 1) // 2)
    keys = _keys((*seed, epoch))
    while True:
        value = _feistel(value, half, keys)
        if value < count:
            return value


_KEPT: dict[tuple[int, ...], list[int]] = {}


def _keys(seed: tuple[int, ...]) -> list[int]:
    if seed not in _KEPT:
        if len(_KEPT) > 64:
            _KEPT.clear()
        _KEPT[seed] = [int(key) for key in np.random.default_rng(seed).integers(1, 2**31, ROUNDS)]
    return _KEPT[seed]


def _feistel(value: int, half: int, keys: list[int]) -> int:
    """One pass of a balanced Feistel network over 2 · ``half`` bits: a bijection of them."""
    mask = (1 << half) - 1
    left, right = value >> half, value & mask
    for key in keys:
        mixed = ((right + key) * 0x9E3779B1) & 0xFFFFFFFF
        mixed = ((mixed ^ (mixed >> 15)) * 0x85EBCA6B) & 0xFFFFFFFF
        left, right = right, left ^ ((mixed ^ (mixed >> 13)) & mask)
    return (left << half) | right
