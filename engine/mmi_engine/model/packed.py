"""Weights of linear maps and convolutions in the layout that oneDNN computes with, made once: for generation on a CPU.

Place in the flow: `generate/interleave.py` gives the model's layers these classes (`packed`) before it reads or draws.
Plain torch rearranges a convolution's weights in every call, and leaves products of matrices to MKL, which uses half of
an AMD processor's arithmetic. The operators here are those that torch's own compiler calls on a CPU. Training,
autocast, other devices, other types than float32 and products with few rows take torch's ordinary path.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmi_engine.model.config import LAID_OUT_TWICE
from mmi_engine.model.kept import Keeps, Kept
from mmi_engine.model.rows import SteadyConv2d

Model = TypeVar("Model", bound=nn.Module)
FEW_ROWS = 32
"""Rows of one item (dimensions but the first and the last) below which the ordinary product is as fast. Not counted
over the batch, so that an item takes one path whatever stands beside it."""
MOST_BYTES = LAID_OUT_TWICE


_linear, _reordered, _convolution = (
    getattr(torch.ops.mkldnn, name, None)
    for name in ("_linear_pointwise", "_reorder_linear_weight", "_convolution_pointwise")
)
_reorder_kernel = getattr(torch._C._nn, "mkldnn_reorder_conv2d_weight", None)


def available() -> bool:
    """Whether this torch has the operators and this processor gains by them."""
    known = None not in (_linear, _reordered, _convolution, _reorder_kernel)
    return known and platform.machine().lower() in ("x86_64", "amd64") and torch.backends.mkldnn.is_available()


_SOURCE = """
def linear(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

def convolution(
    x: Tensor, weight: Tensor, bias: Optional[Tensor], pad: List[int], step: List[int], dilation: List[int], groups: int
) -> Tensor:
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, pad, step, dilation, groups, "none", [], "")
"""


@cache
def _recordable() -> Any:
    """The operators for `torch.jit.trace`, which cannot record their lists of optional numbers itself."""
    return torch.jit.CompilationUnit(_SOURCE)


def _multiplied(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if torch.jit.is_tracing():
        return _recordable().linear(input, weight, bias)
    return _linear(input, weight, bias, "none", [], "")


def _reordered_kernel(weight: Tensor, *rest: Any) -> Tensor:
    *settings, shape = rest
    packed: Tensor = _reorder_kernel(weight.to_mkldnn(), *settings, list(shape))
    return packed


class Packed(Keeps):
    """What both layers share: when the second layout serves.

    ``plain`` leaves it out (the released engine's form, for comparison).
    """

    weight: Tensor
    plain: bool

    def _second(self, input: Tensor, make: Callable[[], Tensor]) -> Tensor | None:
        """The weight in its second layout; ``None`` where the ordinary path is to be taken."""
        weight = self.weight
        if (
            self.plain
            or self.training
            or torch.is_grad_enabled()
            or input.dtype != torch.float32
            or weight.dtype != torch.float32
            or input.device.type != "cpu"
            or not self.kept.may(False, (weight,))
        ):
            return None
        packed: Tensor = self.kept.get((weight,), make)
        return packed


class PackedLinear(Packed, nn.Linear):
    """A linear map whose weight is also kept as oneDNN wants it."""

    def forward(self, input: Tensor) -> Tensor:
        """``[N, ..., in_features]`` → ``[N, ..., out_features]``, as its base class up to rounding."""
        shape = input.shape
        if len(shape) < 3 or shape[1] * (shape[2] if len(shape) > 3 else 1) < FEW_ROWS:
            return nn.Linear.forward(self, input)
        weight = self._second(input, lambda: _reordered(self.weight.detach(), input.numel() // self.in_features))
        if weight is None:
            return nn.Linear.forward(self, input)
        return _multiplied(input, weight, self.bias)


class PackedMap:
    """A linear map that follows from weights and is no layer itself; it serves as long as what it was made of.

    Args:
        weight: ``[out_features, in_features]``.
        bias: ``[out_features]``.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight, bias
        self.may = available() and weight.device.type == "cpu" and weight.dtype == torch.float32
        self.second: Tensor | None = None

    def __call__(self, input: Tensor) -> Tensor:
        """``[N, Q, in_features]`` → ``[N, Q, out_features]``."""
        if not self.may or input.shape[1] < FEW_ROWS or input.dtype != torch.float32:
            return F.linear(input, self.weight, self.bias)
        if self.second is None:
            self.second = _reordered(self.weight, input.shape[0] * input.shape[1])
        return _multiplied(input, self.second, self.bias)


class PackedConv2d(Packed, SteadyConv2d):
    """A convolution whose weight is also kept as oneDNN wants it. One small picture alone takes no other algorithm
    than several."""

    def forward(self, input: Tensor) -> Tensor:
        """As its base class up to rounding."""
        settings = (self.padding, self.stride, self.dilation, self.groups)
        weight = None
        if input.ndim == 4:
            weight = self._second(input, lambda: _reordered_kernel(self.weight.detach(), *settings, input.shape))
        if weight is None:
            return SteadyConv2d.forward(self, input)
        if torch.jit.is_tracing():
            return _recordable().convolution(input, weight, self.bias, *map(list, settings[:3]), self.groups)
        return _convolution(input, weight, self.bias, *settings, "none", [], "")


def packed(model: Model) -> Model:
    """``model`` with its linear maps and convolutions made `PackedLinear` and `PackedConv2d` where that helps.

    Names and weights stay as they are; subclasses of torch's layers (quantised, sharded, adapted ones) are left alone.
    """
    kinds: dict[type, type[Packed]] = {nn.Linear: PackedLinear, SteadyConv2d: PackedConv2d}
    layers = [m for m in model.modules() if type(m) in kinds and type(m.weight) is nn.Parameter]
    if not available() or sum(4 * layer.weight.numel() for layer in layers) > MOST_BYTES:
        return model
    for layer in layers:
        if isinstance(layer, nn.Conv2d) and (isinstance(layer.padding, str) or layer.padding_mode != "zeros"):
            continue
        layer.__class__ = kinds[type(layer)]
        layer.plain, layer.kept = False, Kept()
    return model
