"""Kernel distance between two sets of pictures: KID with Inception features, a distance of its own name with others.

Place in the flow: pictures → `features.py` → all pairs of a polynomial kernel. Source: Bińkowski et al., *Demystifying
MMD GANs* (2018): the unbiased estimate of MMD² with the kernel (x·y / d + 1)³, here over all pairs at once instead of
averaged over random subsets (the same expectation, less variance); printed times 1000.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from mmi_engine.metrics.base import Measure
from mmi_engine.metrics.frechet import InceptionDistance, SetDistance, linear_resample

BLOCK = 2048
SCALE = 1000.0


def row_sums(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Sum over j of k(x_i, y_j), ``[n]``, in blocks."""
    width = x.shape[1]
    out = np.zeros(len(x))
    for start in range(0, len(x), BLOCK):
        for other in range(0, len(y), BLOCK):
            kernel = (x[start : start + BLOCK] @ y[other : other + BLOCK].T / width + 1.0) ** 3
            out[start : start + BLOCK] += kernel.sum(1)
    return out


def mmd(x: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
    """Unbiased MMD² of features ``[n, d]`` and ``[n, d]``, and the influence of row i of both, ``[n]``."""
    n, width = x.shape
    diagonal = [((z * z).sum(1) / width + 1.0) ** 3 for z in (x, y)]
    xx, yy = row_sums(x, x) - diagonal[0], row_sums(y, y) - diagonal[1]
    xy, yx = row_sums(x, y), row_sums(y, x)
    within = (xx.sum() + yy.sum()) / (n * (n - 1))
    value = within - 2.0 * xy.sum() / (n * n)
    parts = 2.0 * ((xx + yy) / (n - 1) - (xy + yx) / n - value)
    return float(value), parts


class Kid(InceptionDistance):
    """KID × 1000."""

    label = "KID × 1000"
    biased = False

    def _measure(self, made: np.ndarray, true: np.ndarray, counts: list[int]) -> Measure:
        return _kernel_measure(self.label, made, true, counts)


class EncoderKd(SetDistance):
    """Kernel distance × 1000 of the features of the model's own encoder."""

    label = "KD × 1000 (own encoder)"
    biased = False

    def _measure(self, made: np.ndarray, true: np.ndarray, counts: list[int]) -> Measure:
        return _kernel_measure(self.label, made, true, counts)


def _kernel_measure(label: str, made: np.ndarray, true: np.ndarray, counts: list[int]) -> Measure:
    if len(made) < 2:
        return Measure(label, float("nan"), higher=False)
    value, influences = mmd(made, true)
    owner = np.repeat(np.arange(len(counts)), counts)
    parts = SCALE * np.bincount(owner, influences, minlength=len(counts))
    resample = partial(linear_resample, SCALE * value, parts, np.array(counts, float))
    return Measure(label, SCALE * value, higher=False, resample=resample)
