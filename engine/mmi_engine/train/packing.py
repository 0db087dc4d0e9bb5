"""Which documents stand in which row of the training stream: planned by text alone, the same in every process.

    row k of the stream ─ Blend ─▶ (set, n) ─ Stream ─▶ chunk of the set's shuffled order ─▶ Slots (row of the manifest,
    first and last token)

Place in the flow: ``collate.py`` asks :class:`Blend` for row k and loads it. A chunk of ``CHUNK`` documents is
tokenised and packed as a whole, so a plan depends on the seed and the manifests alone and never on who asks: any
number of workers and processes, and a run that resumes in the middle of an epoch, see the same rows. How many rows the
chunks came to is kept in a small file, so that a resumed run need not plan again what is past.
Source: paper appendix B.1 (concatenation to the context length, several pairs of one data set in a row).
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections import Counter, OrderedDict
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from mmi_engine.errors import ConfigError, ItemError, RowError
from mmi_engine.model.config import SpecialTokens
from mmi_engine.sequence import TextTokenizer, tokenize
from mmi_engine.train.documents import Choices, Draft, draft
from mmi_engine.train.rows import RowIndex, shuffled
from mmi_engine.train.sections import SetConfig

CHUNK = 512
"""Documents that are packed together; a set with fewer is packed epoch by epoch."""
OPEN_ROWS = 48
"""Rows that wait for a document that fits."""
KEPT_CHUNKS = 4
BLOCK = 256
"""Rows in which every set has its exact share."""


@dataclass
class Encoded:
    """A document's tokens: ids with ``<s>`` and ``</s>``, which carry no text loss, and where its pictures begin."""

    ids: list[int]
    silent: list[bool]
    starts: list[int]
    """Per picture, the place of its ``<BoI>``."""


@dataclass(frozen=True)
class Slot:
    """A document, or a part of one, in a row: position in the set's endless order, tokens ``first`` … ``last`` − 1."""

    position: int
    first: int = 0
    last: int | None = None


@dataclass
class Planned:
    """A row of the stream: its documents, and what was dropped while planning (counted with a chunk's first row)."""

    slots: list[Slot] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    images: int = 0


@dataclass(frozen=True)
class Layout:
    """What turns a document into tokens, and how long a row is."""

    tokenizer: TextTokenizer
    tokens: SpecialTokens
    per_image: int
    row_tokens: int
    pack: bool = True


def encode(document: Draft, layout: Layout) -> Encoded:
    """A document's tokens, ``</s>`` included."""
    tokens, pieces = layout.tokens, document.pieces

    def length(count: int) -> int:
        return len(tokenize(pieces[:count], layout.tokenizer, tokens, layout.per_image).ids)

    ids = tokenize(pieces, layout.tokenizer, tokens, layout.per_image).ids
    silent = [False] * len(ids)
    begin = 0
    for number, flag in enumerate(document.silent):
        if number + 1 < len(pieces) and document.silent[number + 1] == flag:
            continue
        end = length(number + 1) if number + 1 < len(pieces) else len(ids)
        if flag:
            silent[begin:end] = [True] * (end - begin)
        begin = end
    starts = [place for place, value in enumerate(ids) if value == tokens.boi]
    return Encoded([*ids, tokens.eos], [*silent, False], starts)


class Stream:
    """The rows of one set, numbered from 0 without end.

    Args:
        index: the set's manifest; entry: its rules; number: of the set, for its random numbers.
        layout: see :class:`Layout`; choices: of documents.
        seed: of the run.
        folder: where row counts are kept between runs; None keeps them in memory.
    """

    def __init__(
        self,
        index: RowIndex,
        entry: SetConfig,
        number: int,
        layout: Layout,
        choices: Choices,
        seed: int,
        folder: Path | None = None,
    ) -> None:
        self.index, self.entry, self.layout, self.choices = index, entry, layout, choices
        self.seed, self.number, self.folder = seed, number, folder
        self._chunks: OrderedDict[int, list[Planned]] = OrderedDict()
        self._ends: list[int] = []  # rows up to and including each chunk
        self._useless: Counter[str] = Counter()  # why rows were dropped in chunks of which nothing was left
        self.chunk = min(CHUNK, len(index))

    def document(self, position: int) -> tuple[str, Draft]:
        """Name and draft of the document at ``position`` of the endless order.

        Raises:
            RowError: the row is broken, or a rule drops it.
        """
        count = len(self.index)
        place = shuffled(position, count, (self.seed, self.number))
        row = self.index[place]
        if row is None:
            raise RowError("a blank line", code="blank")
        rng = np.random.default_rng((self.seed, self.number, position // count, place))
        return f"{self.entry.name}:{row.id}", draft(row, self.entry, self.choices, rng)

    def row(self, number: int) -> Planned:
        """Row ``number`` of this set.

        Raises:
            ConfigError: a whole epoch without a usable row.
        """
        if not self._ends:
            self._ends = self._kept_counts()
        while not self._ends or number >= self._ends[-1]:
            chunk = len(self._ends)
            rows = len(self._planned(chunk))
            self._ends.append((self._ends[-1] if self._ends else 0) + rows)
            if self._ends[-1] == 0 and chunk * self.chunk > len(self.index):
                why = ", ".join(code for code, _ in self._useless.most_common())  # counts are of several epochs
                raise ConfigError(
                    f"{self.index.path}: no usable row for set {self.entry.name!r}; all were dropped: {why}",
                    remedy=f"look at it with `mmi data check {self.index.path}`",
                )
            self._keep_counts()
        chunk = bisect_right(self._ends, number)
        return self._planned(chunk)[number - (self._ends[chunk - 1] if chunk else 0)]

    def _planned(self, chunk: int) -> list[Planned]:
        if chunk not in self._chunks:
            self._chunks[chunk] = self._pack(chunk)
            while len(self._chunks) > KEPT_CHUNKS:
                self._chunks.popitem(last=False)
        self._chunks.move_to_end(chunk)
        return self._chunks[chunk]

    def _pack(self, chunk: int) -> list[Planned]:
        """The rows of one chunk in shuffled order."""
        rows: list[Planned] = []
        waiting: list[Planned] = []
        dropped: Counter[str] = Counter()
        for position in range(chunk * self.chunk, (chunk + 1) * self.chunk):
            try:
                _, document = self.document(position)
            except ItemError as error:
                dropped[error.code] += 1
                continue
            encoded = encode(document, self.layout)
            if len(encoded.ids) > self.layout.row_tokens and not self.entry.split:
                dropped["text_too_long"] += 1
                continue
            self._place(position, encoded, rows, waiting)
        rows += waiting
        order = np.random.default_rng((self.seed, self.number, chunk, 1)).permutation(len(rows))
        rows = [rows[place] for place in order]
        if rows:
            rows[0].dropped = dropped
        else:
            self._useless += dropped
        return rows

    def _place(self, position: int, encoded: Encoded, rows: list[Planned], waiting: list[Planned]) -> None:
        """Put a document into the fullest waiting row that takes it, in parts where the set allows, or into a new."""
        room, most = self.layout.row_tokens, self.entry.row_images or len(encoded.starts) + 10**9
        length, images = len(encoded.ids), len(encoded.starts)
        if not self.layout.pack and not self.entry.split:
            rows.append(Planned([Slot(position)], Counter(), length, images))
            return
        if self.entry.split:
            self._split(position, encoded, rows, waiting)
            return
        fits = [row for row in waiting if row.tokens + length <= room and row.images + images <= most]
        if fits:
            best = max(fits, key=lambda row: row.tokens)
        else:
            best = Planned()
            waiting.append(best)
            if len(waiting) > OPEN_ROWS:
                fullest = max(waiting[:-1], key=lambda row: row.tokens)
                waiting.remove(fullest)
                rows.append(fullest)
        best.slots.append(Slot(position))
        best.tokens, best.images = best.tokens + length, best.images + images

    def _split(self, position: int, encoded: Encoded, rows: list[Planned], waiting: list[Planned]) -> None:
        """Fill rows one after another; a picture that would be cut begins the next row."""
        room, most = self.layout.row_tokens, self.entry.row_images or 10**9
        block = self.layout.per_image + 1
        first, total = 0, len(encoded.ids)
        while first < total:
            if not waiting:
                waiting.append(Planned())
            row = waiting[0]
            last = min(total, first + room - row.tokens)
            inside = [start for start in encoded.starts if first <= start < last]
            if len(inside) > most - row.images:
                last = inside[most - row.images]
                inside = inside[: most - row.images]
            if inside and inside[-1] + block > last:
                last = inside.pop()
            if last > first:
                row.slots.append(Slot(position, first, last))
                row.tokens, row.images = row.tokens + last - first, row.images + len(inside)
            elif not row.slots:
                raise ConfigError(
                    f"data.row_tokens {room} has no room for a picture of {block} tokens", remedy="make rows longer"
                )
            first = last
            if first < total:
                rows.append(waiting.pop(0))

    # ------------------------------------------------------------------ what is kept between runs

    @cached_property
    def _file(self) -> Path | None:
        if self.folder is None:
            return None
        layout = self.layout
        parts = [self.seed, self.number, self.index.fingerprint, CHUNK, OPEN_ROWS, layout.row_tokens, layout.pack]
        parts += [layout.per_image, asdict(self.entry), asdict(self.choices)]
        digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]
        return self.folder / f"{self.entry.name}-{digest}.json"

    def _kept_counts(self) -> list[int]:
        if self._file is None or not self._file.is_file():
            return []
        return [int(value) for value in json.loads(self._file.read_text(encoding="utf-8"))]

    def _keep_counts(self) -> None:
        """Write the counts; whoever writes last writes the truth, as all plan the same."""
        if self._file is None or len(self._kept_counts()) >= len(self._ends):
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_name(f".{self._file.name}.{os.getpid()}")
        partial.write_text(json.dumps(self._ends), encoding="utf-8")
        os.replace(partial, self._file)


class Blend:
    """Rows of several sets by their weights.

    Every ``BLOCK`` rows hold each set's share to the row, in an order shuffled by the seed.

    Args:
        streams: one per set.
        weights: of the sets, not all zero.
        seed: of the run.

    Raises:
        ConfigError: no set has a positive weight.
    """

    def __init__(self, streams: list[Stream], weights: list[float], seed: int) -> None:
        total = sum(weights)
        if total <= 0:
            raise ConfigError("data.sets: no set has a positive weight", remedy="give one a weight")
        self.streams, self.seed = streams, seed
        exact = [weight / total * BLOCK for weight in weights]
        shares = [int(value) for value in exact]
        for place in sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])[: BLOCK - sum(shares)]:
            shares[place] += 1
        self.shares = shares
        self._kept: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def place(self, number: int) -> tuple[int, int]:
        """Set and row of that set of row ``number`` of the stream."""
        block, inside = divmod(number, BLOCK)
        if self._kept[0] != block:
            names = np.repeat(np.arange(len(self.shares)), self.shares)
            self._kept = (block, np.random.default_rng((self.seed, block, 2)).permutation(names))
        order = self._kept[1]
        chosen = int(order[inside])
        return chosen, block * self.shares[chosen] + int((order[:inside] == chosen).sum())

    def row(self, number: int) -> tuple[Stream, Planned]:
        """Row ``number``: the set it is of, and its documents."""
        chosen, inside = self.place(number)
        return self.streams[chosen], self.streams[chosen].row(inside)


def efficiency(blend: Blend, rows: int, room: int) -> float:
    """Share of the tokens of the first ``rows`` rows that are no padding, rows being ``room`` long."""
    return sum(blend.row(number)[1].tokens for number in range(rows)) / (rows * room)
