"""What follows from weights alone, computed once: tables, fused matrices.

Place in the flow: `mmfs.py` and `unet.py` keep here what they derive from their own weights. Kept between calls in
evaluation without gradients, never in training, under autocast or while compiling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Kept:
    """Holds one result. It serves as long as every weight has the address and the version counter it was made from.

    The weights' memory is held along with it, so that an address cannot come to mean another tensor. Its owner drops it
    (`forget`) in ``train``, ``eval`` and moves, which covers changes that go past the counter (through ``.data``).
    """

    def __init__(self) -> None:
        self.entry: tuple[tuple[Any, ...], tuple[Tensor, ...], Any] | None = None

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        """A copy makes its own: what is kept is tied to the addresses of the original's weights."""
        return Kept, ()

    def forget(self) -> None:
        """Make it anew at the next call."""
        self.entry = None

    def may(self, training: bool, weights: Sequence[Tensor]) -> bool:
        """Whether anything may be kept here and now."""
        return not (
            training
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.is_autocast_enabled(weights[0].device.type)
            or any(weight.is_inference() or weight.is_meta for weight in weights)
        )

    def get(self, weights: Sequence[Tensor], make: Callable[[], Any]) -> Any:
        """The kept result, or a fresh one that is kept."""
        key = tuple([(weight.data_ptr(), weight._version, weight.dtype) for weight in weights])
        if self.entry is None or self.entry[0] != key:
            self.entry = (key, tuple(weight.detach() for weight in weights), make())
        return self.entry[2]


def joined(second: Tensor, first: Tensor, bias: Tensor, then: Tensor | None) -> tuple[Tensor, Tensor]:
    """Two linear maps in a row as one: (``second @ first``, ``second @ bias + then``), computed in ≥ float32."""
    wide = torch.promote_types(second.dtype, torch.float32)
    weight = second.to(wide) @ first.to(wide)
    shift = second.to(wide) @ bias.to(wide)
    if then is not None:
        shift = shift + then.to(wide)
    return weight.to(second.dtype), shift.to(second.dtype)
