"""One prediction of the U-Net in shares: rows of a batch, or the halves of guidance, each on a thread of its own.

Place in the flow: `image.denoise` takes its predictions from here. The many small operators of a small model gain
little by more threads inside each of them: they wait for each other at the end of every one. A share waits once in a
step. All shares have the same shape, so a row's bits do not depend on where it stands. Large models, whose operators
keep all threads busy, other devices and a single thread have one share, which is the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mmi_engine.generate.recorded import traced
from mmi_engine.model.config import LAID_OUT_TWICE
from mmi_engine.model.unet import ImageVision, MMFSUNet, Paths, text_keys, text_once

Predict = Callable[[Tensor, Tensor], Tensor]
"""Latents ``[N, C, h, w]`` and a step → predictions ``[k·N, C, h, w]`` under k text conditions."""
Job = Callable[[], Tensor]


@dataclass
class Share:
    """Some rows of the latents under some of their text conditions: ``tokens`` ``[c·n, T, C]``, one condition after
    the other; what their MMFS looks at; how the U-Net's paths are run."""

    rows: slice
    tokens: Tensor
    vision: ImageVision | None
    paths: Paths | None = None


def cut(rows: int, conditions: int, threads: int) -> list[tuple[slice, slice]]:
    """Which rows and which of their text conditions every share has; all have as many of both.

    Args:
        rows: of the latents.
        conditions: of every row.
        threads: that there are for shares.
    """
    if threads > 1 and rows % threads == 0:
        each = rows // threads
        return [(slice(start, start + each), slice(0, conditions)) for start in range(0, rows, each)]
    if threads > 1 and rows == 1:
        return [(slice(0, 1), slice(half, half + 1)) for half in range(conditions)]
    return [(slice(0, rows), slice(0, conditions))]


@contextmanager
def predicting(
    unet: MMFSUNet, latents: Tensor, tokens: Sequence[Tensor], vision: ImageVision | None, steps: int
) -> Iterator[Predict]:
    """The predictions for one batch, as long as it lasts.

    Args:
        unet: evaluated without gradients.
        latents: an example of what will be predicted from.
        tokens: text conditions of the N rows, ``[N, T, C]`` each: both halves of guidance, or one.
        vision: of `MMFSUNet.look` for the N rows.
        steps: how many predictions will be made.
    """
    shares = []
    for rows, some in cut(len(latents), len(tokens), _threads(unet)):
        conditions = [condition[rows] for condition in tokens[some]]
        seen = _seen(unet, vision, rows, len(conditions), len(latents), latents.dtype)
        shares.append(Share(rows, torch.cat(conditions), seen))
    each = len(shares[0].tokens) // len(latents[shares[0].rows])

    def predict(inputs: Tensor, step: Tensor) -> Tensor:
        made = run([partial(unet, inputs[s.rows], step, s.tokens, s.vision, s.paths) for s in shares])
        if len(made) == 1:
            return made[0]
        parts = [one.chunk(each) for one in made]
        return torch.cat([part[condition] for condition in range(each) for part in parts])

    with on_threads(len(shares)) as run:
        if unet.compiled:
            yield predict
            return
        contexts = [share.tokens for share in shares]
        keys = [text_keys(unet, context) for context in contexts]
        recording = traced(unet, latents[shares[0].rows], contexts[0], keys[0], steps)
        if recording is not None:
            for share, known in zip(shares, keys, strict=True):
                share.paths = recording.bound(known)
        with text_once(unet, contexts, keys):
            yield predict


def _threads(unet: MMFSUNet) -> int:
    """How many threads there are for shares: one where a share would gain nothing, and under autocast, which holds for
    one thread alone."""
    weights = list(unet.parameters())
    if torch.is_autocast_enabled("cpu"):
        return 1
    small = sum(weight.numel() * weight.element_size() for weight in weights) <= LAID_OUT_TWICE
    return torch.get_num_threads() if small and weights[0].device.type == "cpu" and not unet.compiled else 1


def _seen(
    unet: MMFSUNet, vision: ImageVision | None, rows: slice, conditions: int, batch: int, dtype: torch.dtype
) -> ImageVision | None:
    """What some rows look at, under each of their conditions the same."""
    if vision is None:
        return None
    count = rows.stop - rows.start
    vision = vision if count == batch else vision.part(rows)
    vision = vision.repeat(conditions, count) if conditions > 1 else vision
    return vision if unet.indexes(dtype) else vision.side_by_side()


@contextmanager
def on_threads(count: int) -> Iterator[Callable[[Sequence[Job]], list[Tensor]]]:
    """A function that runs ``count`` jobs at a time, one of them in this thread, torch's own threads dealt out evenly.

    Its results are in the order of the jobs. What a job raises is raised, after all others have ended.
    """
    if count == 1:
        yield lambda jobs: [job() for job in jobs]
        return
    before = torch.get_num_threads()
    each, flushing = max(1, before // count), _flushes_denormals()

    def prepare() -> None:  # all of this holds for one thread alone
        torch.set_num_threads(each)
        torch.set_flush_denormal(flushing)

    def without_gradients(job: Job) -> Tensor:
        with torch.no_grad():
            return job()

    try:
        with ThreadPoolExecutor(count - 1, "mmi-share", prepare) as pool:
            torch.set_num_threads(each)

            def run(jobs: Sequence[Job]) -> list[Tensor]:
                others = [pool.submit(without_gradients, job) for job in jobs[1:]]
                return [jobs[0](), *(other.result() for other in others)]

            yield run
    finally:
        torch.set_num_threads(before)  # last: a thread's own number is also what later threads start with


def _flushes_denormals() -> bool:
    return bool((torch.full((1,), 1e-38) * 0.1 == 0).all())
