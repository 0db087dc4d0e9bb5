"""A forward pass in the numbers that ``loop.precision`` names, weights kept in fp32.

Place in the flow: :mod:`.interleaved` and :mod:`.image_decoder` call their model through `run_in`. On a CPU torch's
fused attention is slow in bf16 with the backward pass, so there `exact_attention` computes it in fp32. Measured with
torch 2.13 on an AMD EPYC with AVX512-BF16, one thread, forward and backward of 48 × 4 heads: 256 queries and 16 keys of
24 channels 56 ms in bf16 and 17 in fp32, 64 and 64 of 40 channels 31 and 13 ms, 256 and 256 of 24 channels 131 and 83.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "bf16-pure": torch.bfloat16}
"""``loop.precision`` → numbers of the weights in a step (``bf16`` leaves the choice to autocast)."""
ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
"""Of `F.scaled_dot_product_attention`, as far as they may be positional."""


def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **given: Any) -> Tensor:
    """`F.scaled_dot_product_attention` computed in fp32, its result in the dtype of ``query``.

    Args:
        query: ``[…, Q, d]``; key, value: ``[…, K, d]``; attn_mask, given: as there.
    """
    mask = attn_mask.float() if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
    wide = (part.float() for part in (query, key, value))
    return F.scaled_dot_product_attention(*wide, attn_mask=mask, **given).to(query.dtype)


class exact_attention(TorchFunctionMode):
    """While it lasts, `F.scaled_dot_product_attention` is `attend` for bf16 where gradients are wanted."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """See class."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and torch.is_grad_enabled():
            given = dict(zip(ARGUMENTS, args, strict=False)) | kwargs
            if given["query"].dtype == torch.bfloat16:
                return attend(**given)
        return func(*args, **kwargs)


def run_in(dtype: torch.dtype, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """``module(*args, **kwargs)`` with floating-point weights and buffers cast to ``dtype``.

    Gradients reach the weights themselves.
    """
    if dtype == torch.float32:
        return module(*args, **kwargs)
    weights = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    cast = {name: w.to(dtype) if w.is_floating_point() else w for name, w in weights.items()}
    on_cpu = all(w.device.type == "cpu" for w in weights.values())
    with exact_attention() if on_cpu else contextlib.nullcontext():
        return functional_call(module, cast, args, kwargs)
