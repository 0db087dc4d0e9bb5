"""Frozen matrices in less memory: bfloat16, and 8 bits for the language model's layers.

Place in the flow: ``finetune.py`` calls this once freezing and adapters are settled. What is trained stays in float32;
the exported model has the frozen weights as the base has them, not as they were kept here.
Source: LLM.int8() (Dettmers et al. 2022) through bitsandbytes, the base of QLoRA-like fine-tuning.
"""

from __future__ import annotations

import torch
from torch import nn

from mmi_engine.weights import quantize

BASE = ".base_layer"


def halve(model: nn.Module, besides: nn.Module | None = None) -> int:
    """Keep the matrices of frozen linear, convolution and embedding layers in bfloat16; returns the bytes saved.

    Vectors stay: they cost nothing, and norms want them in float32. So does ``besides``, a part of the model.
    """
    saved, whole = 0, set() if besides is None else set(besides.modules())
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding) and module not in whole:
            weight = module.weight
            if not weight.requires_grad and weight.dtype == torch.float32:
                module.weight = nn.Parameter(weight.detach().to(torch.bfloat16), requires_grad=False)
                saved += 2 * weight.numel()
    return saved


def eight_bits(model: nn.Module) -> list[str]:
    """Replace the frozen linear maps of the decoder layers by 8-bit ones, adapters beside them kept; returns names.

    Raises:
        BackendError: bitsandbytes is not installed, or cannot run here.
    """
    library = quantize.library()
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not module.weight.requires_grad
        and quantize.LINEAR.match(name.removesuffix(BASE))
    ]
    for name in names:
        old = model.get_submodule(name)
        assert isinstance(old, nn.Linear)
        bias = old.bias is not None
        with torch.device("meta"):
            new = library.nn.Linear8bitLt(
                old.in_features, old.out_features, bias=bias, has_fp16_weights=False, threshold=6.0
            )
        new.weight = quantize.quantised(old.weight.detach(), 8, old.weight.device)
        new.bias = old.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new.requires_grad_(False))
    return names
