"""What follows from weights alone, computed once: tables, fused matrices.

Place in the flow: modules that derive something from their own weights are `Keeps` (MMFS, the U-Net's blocks, the
vision encoder, packed layers, the language model's single step). Kept between calls in
evaluation without gradients, never in training, under autocast or while compiling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn


class Kept:
    """Holds one result. It serves as long as every weight has the address and the version counter it was made from.

    The weights' memory is held along with it, so that an address cannot come to mean another tensor.
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
        entry = self.entry  # another thread may forget it meanwhile
        if entry is None or entry[0] != key:
            self.entry = entry = (key, tuple(weight.detach() for weight in weights), make())
        return entry[2]


class Keeps(nn.Module):
    """A module with something `Kept`, of any number and name, dropped in ``train``, ``eval`` and moves: that covers
    changes of weights that go past the version counter (through ``.data``)."""

    kept: Kept

    def __init__(self) -> None:
        super().__init__()
        self.kept = Kept()

    def train(self, mode: bool = True) -> Self:
        """See torch; forgets what was derived from the weights."""
        self._forget()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._forget()
        return super()._apply(*args, **kwargs)

    def _forget(self) -> None:
        for thing in vars(self).values():
            if isinstance(thing, Kept):
                thing.forget()


def joined(second: Tensor, first: Tensor, bias: Tensor, then: Tensor | None) -> tuple[Tensor, Tensor]:
    """Two linear maps in a row as one: (``second @ first``, ``second @ bias + then``), computed in ≥ float32."""
    wide = torch.promote_types(second.dtype, torch.float32)
    weight = second.to(wide) @ first.to(wide)
    shift = second.to(wide) @ bias.to(wide)
    if then is not None:
        shift = shift + then.to(wide)
    return weight.to(second.dtype), shift.to(second.dtype)
