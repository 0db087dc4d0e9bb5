"""What generation keeps instead of computing it again, and switches that turn the keeping off.

Place in the flow: `interleave.py` keeps encoded pictures, `text.py` and `image.py` the projected values of MMFS. With a
switch off the same numbers are computed again wherever the released engine does so; only tests and `mmi bench generate`
do that, to show that nothing changes but the time.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

import torch
from PIL import Image
from torch import Tensor

from mmi_engine.model.interleaved import MMInterleaved, per_row
from mmi_engine.model.language import VisualContext
from mmi_engine.model.unet import ImageVision, MMFSUNet


@dataclass(frozen=True)
class Reuse:
    """What is computed once.

    Attributes:
        pictures: visual tokens and feature maps of a picture, by its content. Off: every picture of a document is
            encoded again for every piece that is made.
        values: the projected values of every MMFS layer, shared by decoding steps and beams, by denoising steps and
            both halves of guidance; with them the U-Net's keys and values of the text. Off: projected again in every
            step, for every row.
        prefix: keys, values and hidden states of what the language model has read of a document. Off: every piece reads
            all that stands before it.
    """

    pictures: bool = True
    values: bool = True
    prefix: bool = True


LITERAL = Reuse(pictures=False, values=False, prefix=False)
"""Computes again what the released engine computes again; the keys of a text's own tokens are kept in both."""


@dataclass
class Encoded:
    """One encoded picture: visual tokens ``[K, d]``, feature maps ``[C, h_l, w_l]``, and what every MMFS layer of the
    language model projects of these, ``[S, H, D]``."""

    tokens: Tensor
    features: list[Tensor]
    values: list[Tensor] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Memory of its tensors."""
        return sum(t.numel() * t.element_size() for t in (self.tokens, *self.features, *self.values))

    def own(self) -> Encoded:
        """A copy that does not hold on to the batch it was encoded in."""
        return Encoded(self.tokens.clone(), [m.clone() for m in self.features], self.values)


class PictureStore:
    """Encoded pictures by content, the least recently used dropped first. One store serves one model with its weights.

    An encoded picture has the same bits whatever stands beside it in its batch, so a hit changes no result; the number
    of rows that were encoded together is part of the key, because it may change the last bits.

    Args:
        limit: bytes kept at most.
    """

    def __init__(self, limit: int = 256 * 2**20) -> None:
        self.limit, self.bytes, self.hits = limit, 0, 0
        self._kept: OrderedDict[bytes, Encoded] = OrderedDict()

    @staticmethod
    def key(picture: Image.Image, rows: int) -> bytes:
        """Of an RGB picture as the model reads it, encoded in a batch of ``rows``."""
        head = f"{picture.mode} {picture.size} {rows} ".encode()
        return hashlib.sha256(head + picture.tobytes()).digest()

    def get(self, key: bytes) -> Encoded | None:
        """The picture, if it is kept."""
        found = self._kept.get(key)
        if found is not None:
            self.hits += 1
            self._kept.move_to_end(key)
        return found

    def put(self, key: bytes, encoded: Encoded) -> Encoded:
        """Keep a picture; returns what a later :meth:`get` gives."""
        encoded = encoded.own()
        if key not in self._kept and encoded.bytes <= self.limit:
            self._kept[key] = encoded
            self.bytes += encoded.bytes
            while self.bytes > self.limit:
                self.bytes -= self._kept.popitem(last=False)[1].bytes
        return encoded

    def __len__(self) -> int:
        return len(self._kept)


class Anew(Sequence[Tensor]):
    """Stands where projected values stand, and projects them at every access.

    Args:
        blocks: with ``project_values``, one per MMFS layer.
        flat: feature maps ``[R, M, S, C]``, level after level.
    """

    def __init__(self, blocks: Sequence[Any], flat: Tensor) -> None:
        self.blocks, self.flat = blocks, flat

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.blocks[index].project_values(self.flat)

    def __len__(self) -> int:
        return len(self.blocks)

    def select(self, rows: Tensor) -> Anew:
        """The same for other rows."""
        return Anew(self.blocks, self.flat[rows])


def language_anew(
    model: MMInterleaved, visual: VisualContext, features: Sequence[Tensor], counts: Tensor
) -> VisualContext:
    """The language model's view of ``features`` ``[ΣN, C, h, w]``, projected again at every step."""
    if visual.visible.shape[-1] == 0:
        return visual
    maps = [per_row(m, counts) for m in features][model.config.language.finest_map :]
    flat = torch.cat([m.flatten(3).transpose(2, 3) for m in maps], dim=2)
    return replace(visual, values=Anew(model.language.mmfs_layers, flat))


def unet_anew(unet: MMFSUNet, features: Sequence[Tensor], visible: Tensor, halves: int) -> ImageVision | None:
    """The U-Net's view of ``features`` ``[N, M, C, h_l, w_l]``, projected again for every step and half of guidance."""
    vision = unet.look(list(features), visible)
    if vision is None:
        return None
    flat = torch.cat([m[vision.rows].flatten(3).transpose(2, 3) for m in features], dim=2)
    repeated = vision.repeat(halves, len(visible))
    return replace(repeated, values=Anew(list(unet.mmfs_blocks), flat.repeat(halves, 1, 1, 1)), sources=None)
