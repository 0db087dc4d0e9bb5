"""Latents computed once: the codec's posterior of every picture to be drawn, kept between steps, epochs and runs.

    squares of a batch (uint8) ─ hash ─▶ kept moments, or codec (frozen) ─▶ moments ─▶ InterleavedBatch.moments

Place in the flow: ``collate.py`` looks moments up while it builds a batch; what is missing is encoded on the device by
the training process, one picture at a time, so that a picture's moments depend on nothing else. The key is the hash of
the square itself: crop, mirroring and size are in it. The file is named after the codec and its size. All in float32:
the image loss is that of a float32 run that encodes anew in every step, to the rounding of convolutions over several
pictures (to the bit, where each is encoded alone).
"""

from __future__ import annotations

import hashlib
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmi_engine.metrics.features import Cache
from mmi_engine.model.vae import ImageCodec


@dataclass(frozen=True)
class _Codec:
    """What names the file and the length of a vector."""

    name: str
    fingerprint: str
    width: int


class Moments:
    """Posterior mean and standard deviation, unscaled, by picture.

    Args:
        folder: for ``latents-CODEC.sqlite``; shared by runs and processes.
        codec: frozen; side: of the pictures in pixels.
        fingerprint: of the codec's encoder.
    """

    def __init__(self, folder: Path, codec: ImageCodec, side: int, fingerprint: str) -> None:
        self.codec, self.folder = codec, folder
        cells = side // codec.config.downsampling
        self.shape = (2 * codec.config.latent_channels, cells, cells)
        self._named = _Codec("latents", f"{fingerprint}{side:06d}", int(np.prod(self.shape)))
        self._opened = threading.local()

    @property
    def _cache(self) -> Cache:
        """A connection of this thread of this process: SQLite's can be handed to no other."""
        if getattr(self._opened, "process", None) != os.getpid():
            self._opened.cache, self._opened.process = Cache(self.folder, self._named), os.getpid()  # type: ignore[arg-type]
        return self._opened.cache  # type: ignore[no-any-return]

    def known(self, keys: list[str]) -> dict[str, np.ndarray]:
        """Kept moments, flat float32, of those keys that have any."""
        return self._cache.get(sorted(set(keys) - {""}))

    def of(self, keys: list[str], known: dict[str, np.ndarray], squares: Tensor | None) -> Tensor:
        """Moments ``[N, 2C, h, w]`` on the CPU, encoded and kept where they are not known; zeros for an empty key.

        Args:
            keys: of the pictures, in order.
            known: what was found earlier.
            squares: uint8 ``[N, side, side, 3]``; None where all are known.
        """
        found = dict(known)
        missing = [place for place, key in enumerate(keys) if key and key not in found]
        if missing:
            found |= self._cache.get([keys[place] for place in missing])
        fresh: dict[str, np.ndarray] = {}
        for place in missing:
            if keys[place] not in found and keys[place] not in fresh:
                assert squares is not None
                fresh[keys[place]] = self._encoded(squares[place : place + 1])
        self._cache.put(fresh)
        found |= fresh
        nothing = np.zeros(self._named.width, np.float32)
        stacked = np.stack([found.get(key, nothing) for key in keys])
        return torch.from_numpy(stacked.reshape(-1, *self.shape))

    @torch.no_grad()
    def _encoded(self, square: Tensor) -> np.ndarray:
        """Moments of one square ``[1, side, side, 3]``."""
        device = next(self.codec.parameters()).device
        picture = square.permute(0, 3, 1, 2).float().to(device) / 255
        with torch.autocast(device.type, enabled=False):
            posterior = self.codec.posterior(picture)
        return torch.cat([posterior.mean, posterior.std], 1).float().cpu().numpy().ravel()


def key_of(square: np.ndarray) -> str:
    """Name of a square by what is in it."""
    return hashlib.sha256(repr(square.shape).encode() + square.tobytes()).hexdigest()
