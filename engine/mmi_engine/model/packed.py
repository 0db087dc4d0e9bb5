"""Weights of linear maps and convolutions in the layout that oneDNN computes with, made once: for generation on a CPU.

Place in the flow: `generate/interleave.py` gives the model's layers these classes (`packed`) before it reads or draws.
Plain torch rearranges a convolution's weights in every call, and leaves products of matrices to MKL, which uses half of
an AMD processor's arithmetic. The operators here are those that torch's own compiler calls on a CPU. Training,
autocast, other devices, other types than float32 and products with few rows take torch's ordinary path.
"""

from __future__ import annotations

import platform
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mmi_engine.model.kept import Kept
from mmi_engine.model.rows import SteadyConv2d

Model = TypeVar("Model", bound=nn.Module)
FEW_ROWS = 32
"""Rows of one item (dimensions but the first and the last) below which the ordinary product is as fast. Not counted
over the batch, so that an item takes one path whatever stands beside it."""
MOST_BYTES = 512 * 2**20
"""Weights of this size in all are laid out a second time; a larger model keeps its own alone."""


def available() -> bool:
    """Whether this torch has the operators and this processor gains by them."""
    operators = ("_linear_pointwise", "_reorder_linear_weight", "_convolution_pointwise")
    return (
        platform.machine().lower() in ("x86_64", "amd64")
        and torch.backends.mkldnn.is_available()
        and all(hasattr(torch.ops.mkldnn, name) for name in operators)
        and hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight")
    )


class Packed(nn.Module):
    """What both layers share: when the second layout serves, and that it is forgotten with the weights.

    ``plain`` leaves it out (the released engine's form, for comparison).
    """

    weight: Tensor
    plain: bool
    _packed: Kept

    def _serves(self, input: Tensor) -> bool:
        weight = self.weight
        return (
            not self.plain
            and input.device.type == "cpu"
            and input.dtype == weight.dtype == torch.float32
            and type(weight) in (Tensor, nn.Parameter)
            and self._packed.may(self.training, (weight,))
        )

    def train(self, mode: bool = True) -> Any:
        """See torch; forgets the second layout."""
        self._packed.forget()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._packed.forget()
        return super()._apply(*args, **kwargs)


class PackedLinear(Packed, nn.Linear):
    """A linear map whose weight is also kept as oneDNN wants it."""

    def forward(self, input: Tensor) -> Tensor:
        """``[N, ..., in_features]`` → ``[N, ..., out_features]``, as its base class up to rounding."""
        if input.ndim < 3 or input[0, ..., 0].numel() < FEW_ROWS or not self._serves(input):
            return nn.Linear.forward(self, input)
        rows = input.numel() // self.in_features
        weight = self._packed.get(
            (self.weight,), lambda: torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), rows)
        )
        return torch.ops.mkldnn._linear_pointwise(input, weight, self.bias, "none", [], "")


class PackedConv2d(Packed, SteadyConv2d):
    """A convolution whose weight is also kept as oneDNN wants it. One small picture alone takes no other algorithm
    than several."""

    def forward(self, input: Tensor) -> Tensor:
        """As its base class up to rounding."""
        if input.ndim != 4 or self.padding_mode != "zeros" or not self._serves(input):
            return SteadyConv2d.forward(self, input)
        settings = (self.padding, self.stride, self.dilation, self.groups)
        weight = self._packed.get((self.weight,), lambda: self._reordered(input))
        return torch.ops.mkldnn._convolution_pointwise(input, weight, self.bias, *settings, "none", [], "")

    def _reordered(self, input: Tensor) -> Tensor:
        settings = (self.padding, self.stride, self.dilation, self.groups)
        return torch._C._nn.mkldnn_reorder_conv2d_weight(self.weight.detach().to_mkldnn(), *settings, list(input.shape))


def packed(model: Model) -> Model:
    """``model`` with its linear maps and convolutions made `PackedLinear` and `PackedConv2d` in place, where that helps.

    Names and weights stay as they are; subclasses of torch's layers (quantised, sharded, adapted ones) are left alone.
    """
    kinds: dict[type, type[Packed]] = {nn.Linear: PackedLinear, SteadyConv2d: PackedConv2d}
    layers = [module for module in model.modules() if type(module) in kinds]
    size = sum(weight.numel() * 4 for layer in layers for weight in (layer.weight,) if isinstance(weight, Tensor))
    if not available() or size > MOST_BYTES:
        return model
    for layer in layers:
        if isinstance(getattr(layer, "padding", None), str):  # "same"
            continue
        layer.__class__ = kinds[type(layer)]
        layer.plain, layer._packed = False, Kept()
    return model
