"""A forward pass in the numbers that ``loop.precision`` names, weights kept in fp32.

Place in the flow: :mod:`.interleaved` and :mod:`.image_decoder` call their model through `run_in`. On a CPU torch's
fused attention is slow in bf16 with the backward pass, so `lean_attention` takes its place there. Measured with torch
2.13 on an AMD EPYC with AVX512-BF16, one thread, forward and backward of 48 × 4 heads: 256 queries and 16 keys of 24
channels 56 ms fused and 6 ms as two products, 64 and 64 of 40 channels 31 and 7 ms; 256 and 256 of 24 channels 131 ms
fused in bf16, 160 as products, 83 fused in fp32. A step of the image decoder takes 2.3 s instead of 3.0.
"""

from __future__ import annotations

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
FEW_KEYS = 64
"""Up to so many keys two products are faster than the fused form in fp32."""


def attend(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Tensor:
    """What `F.scaled_dot_product_attention` gives in bf16, by a faster way; softmax in fp32 as there.

    Args:
        query: ``[…, Q, d]``; key, value: ``[…, K, d]``; given: further arguments as there.
    """
    if given.get("attn_mask") is None and not given.get("is_causal") and key.shape[-2] <= FEW_KEYS:
        scale = given.get("scale") or query.shape[-1] ** -0.5
        shares = (query * scale @ key.transpose(-1, -2)).softmax(-1, dtype=torch.float32)
        return shares.to(value.dtype) @ value
    mask = given.pop("attn_mask", None)
    mask = mask.float() if mask is not None and mask.is_floating_point() else mask
    return F.scaled_dot_product_attention(query.float(), key.float(), value.float(), mask, **given).to(query.dtype)


class lean_attention(TorchFunctionMode):
    """While it lasts, `F.scaled_dot_product_attention` is `attend` for bf16 on a CPU where gradients are wanted."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """See class."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and torch.is_grad_enabled():
            given = dict(zip(ARGUMENTS, args, strict=False)) | kwargs
            query = given["query"]
            plain = not given.get("dropout_p") and not given.get("enable_gqa")
            if plain and query.dtype == torch.bfloat16 and query.device.type == "cpu":
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
    with lean_attention():
        return functional_call(module, cast, args, kwargs)
