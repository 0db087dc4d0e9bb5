"""Items in batches of one shape, and what to do when a batch fails.

Place in the flow: `run.py` hands jobs in and takes results out; the model is behind the `Engine` protocol. Shapes
depend on an item alone, never on its neighbours, so how items are put together does not change their bytes.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from mmi_engine.data.manifest import shorten
from mmi_engine.errors import GenerationError, ItemError, MMIError, is_out_of_memory
from mmi_engine.pieces import Piece
from mmi_engine.tasks import Job

log = logging.getLogger(__name__)

WINDOW = 8  # batches' worth of items read ahead so that buckets of equal shape fill up


class Engine(Protocol):
    """The model as the loop sees it.

    Attributes:
        image_size: side in pixels of the pictures it makes; input_side: no part of it sees more pixels of a given one.
        batch_size: items of one shape worked on together; at_once: how many `fill` is given at a time, at least these.
        undecided: after `identity`, whether a sample would settle what ``auto`` should be.
    """

    undecided: bool
    image_size: int
    input_side: int
    batch_size: int

    @property
    def at_once(self) -> int: ...

    def identity(
        self, rows: int, recorded: dict[str, Any], sample: Callable[[], Job | None] | None = None
    ) -> dict[str, Any]:
        """Model fingerprint (``model``) and ``settings``: all that changes an item's output.

        Args:
            rows: rows of the manifest, whatever part of it is worked on.
            recorded: the identity of the run that is resumed, or {}; choices left to ``auto`` are taken from it.
            sample: the manifest's first sound job, to try what ``auto`` should be.
        """
        ...

    def record(self) -> dict[str, Any]:
        """What run.json tells about model, settings with their origin, and versions."""
        ...

    def load(self) -> None:
        """Bring the model into memory; called once, only if there is work."""
        ...

    def shape(self, job: Job) -> Hashable:
        """Items with equal shapes may share a batch. Called after `load`; raises ItemError where none can be made."""
        ...

    def fill(self, jobs: Sequence[Job], seeds: Sequence[int], batch_size: int) -> list[list[Piece]]:
        """Values for all missing pieces, computed as if in a full batch of `batch_size` whatever `len(jobs)`.

        A job's further candidates and free pieces follow its own pieces.
        """
        ...


Attempt = tuple[Job, "list[Piece] | ItemError", bool]


def attempt(
    engine: Engine,
    seeded: Sequence[tuple[Job, int]],
    batch_size: int,
    notice: Callable[[str], None],
    reduced: bool = False,
) -> Iterator[Attempt]:
    """Fill a batch; whatever raises is narrowed down to the item that causes it.

    Out of memory halves the batch size for these items only and marks them; any other error is retried item by item at
    the same batch size (short batches are filled up by the engine), so that the good neighbours keep their bytes.

    Args:
        engine: the model.
        seeded: jobs of one shape with their seeds.
        batch_size: what the engine fills a short batch up to.
        notice: told about reduced batches.
        reduced: whether the batch size is already below the run's.

    Yields:
        (job, its pieces or the error, whether the batch size was reduced).

    Raises:
        MMIError: errors that are not an item's fault (device, model).
    """
    filled = _filled(engine, seeded, batch_size)  # what failed is let go of before the next attempt needs its memory
    if not isinstance(filled, ItemError):
        for (job, _), pieces in zip(seeded, filled, strict=True):
            yield job, pieces, reduced
    elif filled.code == "out_of_memory" and batch_size > 1:
        smaller = batch_size // 2
        notice(f"out of memory with batches of {batch_size}: trying {smaller} for these items")
        for start in range(0, len(seeded), smaller):
            yield from attempt(engine, seeded[start : start + smaller], smaller, notice, True)
    elif len(seeded) > 1:
        for pair in seeded:
            yield from attempt(engine, [pair], batch_size, notice, reduced)
    else:
        yield seeded[0][0], filled, reduced


def _filled(engine: Engine, seeded: Sequence[tuple[Job, int]], batch_size: int) -> list[list[Piece]] | ItemError:
    """The pieces of a batch, or why it failed; raises what is not an item's fault."""
    try:
        filled = engine.fill([job for job, _ in seeded], [seed for _, seed in seeded], batch_size)
        if len(filled) != len(seeded):
            raise GenerationError(f"the model returned {len(filled)} of {len(seeded)} items")
        return filled
    except Exception as error:
        log.debug("batch of %d failed", len(seeded), exc_info=error)
        return as_item_error(error)


def buckets(jobs: Iterable[tuple[Job, Hashable]], batch_size: int, most: int = 2**62) -> Iterator[list[Job]]:
    """Jobs with their shapes as batches of equal shape, in the order in which these fill up.

    At most `WINDOW` batches' worth of jobs wait, and they weigh at most `most` bytes.
    """
    waiting: dict[Hashable, list[Job]] = {}
    count = weight = 0
    for job, key in jobs:
        bucket = waiting.setdefault(key, [])
        bucket.append(job)
        count, weight = count + 1, weight + job.weight
        if len(bucket) < batch_size:
            if count < WINDOW * batch_size and weight < most:
                continue
            key = next(iter(waiting))  # the bucket that has waited longest
        full = waiting.pop(key)
        count, weight = count - len(full), weight - sum(job.weight for job in full)
        yield full
    yield from waiting.values()


def as_item_error(error: Exception) -> ItemError:
    """Why an item failed, with a stable code; errors that are not the item's fault are raised again."""
    if isinstance(error, ItemError):
        return error
    if isinstance(error, MMIError):
        raise error
    name = type(error).__name__
    if is_out_of_memory(error):
        remedy = "use a smaller --batch-size or --dtype bf16"
        return GenerationError("out of memory", remedy=remedy, code="out_of_memory")
    if isinstance(error, FloatingPointError):
        return GenerationError("the model produced NaN", remedy="try --dtype fp32", code="not_finite")
    first_line = (str(error).strip().splitlines() or [""])[0]
    portable = re.sub(r"(?<![\w.])/[^\s'\":,]*/", "", first_line)  # rows carry no absolute paths …
    portable = re.sub(r"0x[0-9a-fA-F]+", "0x…", portable)  # … and no addresses
    return GenerationError(f"{name}: {shorten(portable, 160)}", remedy="run with -vv for the traceback")
