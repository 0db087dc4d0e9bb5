"""Small things count: cells of a picture weighted by how rare the class is that they show.

Place in the flow: `train.data` puts the weights beside the latents of a batch, the image loss of task ``image_decoder``
multiplies the squared error of every latent cell with them. Things, hats and the number on a shirt cover a tenth of a
picture and are most of what a text or an earlier picture tells; in a plain mean sky and ground outweigh them. A class
that is not rare but hard, as digits are, is raised by ``emphasis``. The minimum is the same, since no cell's target
changes; only where a small model spends its capacity does. Weights by a power of the
class's share: Mahajan et al. 2018 ("Exploring the Limits of Weakly Supervised Pretraining"), there 1/2 for images.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mmi_engine.errors import ConfigError
from mmi_engine.toon.palette import CLASSES
from mmi_engine.train.cache import Cache

SAMPLE = 50
"""Stories of which the shares are counted."""


def check_classes(emphasis: Mapping[str, float]) -> None:
    """Raise ConfigError where ``emphasis`` names a class that semantic maps do not have."""
    unknown = sorted(set(emphasis) - set(CLASSES))
    if unknown:
        raise ConfigError(f"loss.emphasis: no class {unknown[0]!r}", remedy=f"one of {', '.join(CLASSES)}")


def class_weights(cache: Cache, exponent: float, emphasis: Mapping[str, float]) -> np.ndarray:
    """float32 ``[classes]``: emphasis · share ** −exponent, of mean 1 over all pixels; 0 for classes never seen.

    Args:
        cache: semantic maps of its first ``SAMPLE`` stories are counted.
        exponent: 0 weighs all pixels alike, 1 all classes alike.
        emphasis: class → further factor.

    Raises:
        ConfigError: see :func:`check_classes`.
    """
    check_classes(emphasis)
    maps = np.stack([cache.array("maps", story) for story in range(min(SAMPLE, cache.stories))])
    shares = np.bincount(maps.reshape(-1), minlength=len(CLASSES)) / maps.size
    factors = np.array([emphasis.get(name, 1.0) for name in CLASSES])
    weights = np.where(shares > 0, factors * np.maximum(shares, 1e-9) ** -exponent, 0.0)
    return (weights / (shares * weights).sum()).astype(np.float32)


def cell_weights(labels: np.ndarray, weights: np.ndarray, side: int) -> np.ndarray:
    """Class ids ``[N, H, W]`` → float32 ``[N, side, side]``, the mean weight of every cell's pixels."""
    count, height, width = labels.shape
    cells = weights[labels].reshape(count, side, height // side, side, width // side)
    mean: np.ndarray = cells.mean(axis=(2, 4))
    return mean
