"""8- and 4-bit decoder layers through bitsandbytes: the language model in a half or a quarter of its memory.

Place in the flow: `model/checkpoint.py` replaces the layers' linear maps before it reads their weights; every weight is
quantised as it arrives on its device. MMFS, the heads, the visual encoder and the image decoder stay as they are.
Source: LLM.int8() (Dettmers et al. 2022) with outlier threshold 6; NF4 (Dettmers et al. 2023), blocks of 64.
"""

from __future__ import annotations

import logging
import re
from typing import Any

import torch
from torch import Tensor, nn

from mmi_engine.errors import BackendError

LINEAR = re.compile(r"language\.body\.layers\.\d+\.(?:layer\.)?(?:self_attn|mlp)\.\w+_proj$")
BITS = (8, 4)


def library() -> Any:
    """bitsandbytes.

    Raises:
        BackendError: it is not installed, or cannot run here.
    """
    try:
        import bitsandbytes
    except Exception as error:  # it looks for CUDA libraries while it is imported
        what = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be used: {error}"
        raise BackendError(
            f"bitsandbytes, which 8- and 4-bit language models need, {what}",
            remedy='install it with pip install "mmi[bits]", or leave out --llm-bits',
        ) from error
    # It says at every call that activations are cast to float16, which is how LLM.int8() works.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return bitsandbytes


def require(device_map: object) -> None:
    """Find out before any work that a language model can be quantised here.

    Args:
        device_map: where its layers would go; it stays on one device.

    Raises:
        BackendError: its layers are to be spread, or see :func:`library`.
    """
    if device_map is not None:
        raise BackendError("a quantised language model stays on one device", remedy="leave out --device-map")
    library()


def replace_linears(model: nn.Module, bits: int, dtype: torch.dtype) -> list[str]:
    """Put quantised linear maps without memory into the decoder layers.

    Args:
        model: a skeleton.
        bits: 8 or 4.
        dtype: in which activations are computed.

    Returns:
        Names of the replaced modules.

    Raises:
        BackendError: see :func:`library`.
    """
    nn_bits = library().nn
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and LINEAR.match(n)]
    for name in names:
        old = model.get_submodule(name)
        assert isinstance(old, nn.Linear)
        bias = old.bias is not None
        with torch.device("meta"):
            if bits == 8:
                new = nn_bits.Linear8bitLt(
                    old.in_features, old.out_features, bias=bias, has_fp16_weights=False, threshold=6.0
                )
            else:
                new = nn_bits.Linear4bit(
                    old.in_features, old.out_features, bias=bias, compute_dtype=dtype, quant_type="nf4"
                )
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new.requires_grad_(False))
    return names


def quantised(weight: Tensor, bits: int, device: torch.device) -> nn.Parameter:
    """A linear map's weight ``[out, in]`` as the library keeps it, on ``device``."""
    nn_bits = library().nn
    if bits == 8:
        return nn_bits.Int8Params(weight.to(torch.float16), has_fp16_weights=False, requires_grad=False).to(device)
    return nn_bits.Params4bit(weight, requires_grad=False, quant_type="nf4").to(device)
