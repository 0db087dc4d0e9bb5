"""The released engine's arithmetic, for comparison: MMFS without its algebra, and sampling by `grid_sample`.

Place in the flow: `mmi bench generate` and tests run generation inside `literal(model)` and compare results and time.
Weights and formulas are those of `model/mmfs.py`; here every query is repeated for every image before it is projected,
every level has an ignore slot of its own, locations exist per image and level, and nothing is skipped or fused.
Source: docs/model.md; the formulas as the released implementation writes them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from mmi_engine.model.mmfs import MMFS, Projecting, Shapes, per_query, relative_index
from mmi_engine.model.unet import MMFSBlock
from mmi_kernels import deform_sample

SWITCHES = {"backend": "torch", "plain": True, "lean": False}
"""Attributes of modules that leave out kernels, oneDNN's layouts (`model/packed.py`) and `step.py`."""


@contextmanager
def literal(model: nn.Module) -> Iterator[None]:
    """While it lasts, every MMFS of ``model`` computes literally and all deformable sampling goes through torch."""
    before = [(m, name, getattr(m, name)) for m in model.modules() for name in SWITCHES if hasattr(m, name)]
    changed: list[tuple[nn.Module, str]] = []
    for module, name, _ in before:
        setattr(module, name, SWITCHES[name])
    for module in model.modules():
        if isinstance(module, MMFS):
            module.forward = partial(_forward, module)
            changed.append((module, "forward"))
        if isinstance(module, MMFSBlock):
            module.out_map = lambda: None
            changed.append((module, "out_map"))
        if isinstance(module, Projecting):
            module.keeps_values = lambda: False
            changed.append((module, "keeps_values"))
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
        for module, name in changed:
            vars(module).pop(name)


def _forward(
    module: MMFS,
    query: Tensor,
    reference: Tensor,
    values: Tensor,
    shapes: Shapes,
    visible: Tensor,
    rows: Tensor | None = None,
    out: None = None,
) -> Tensor:
    """As :meth:`MMFS.forward`."""
    images, (batch, n_query) = visible.shape[-1], query.shape[:2]
    if images == 0:  # nothing to sample: both engines leave the ignore token alone
        return module.blind().expand(batch, n_query, -1)
    if rows is not None:
        values = values[rows]
    visible = per_query(visible, n_query).expand(batch, n_query, images)
    heads, points, levels = module.config.heads, module.config.points, len(module.config.levels)
    repeated = module.query_proj(query[:, None].repeat(1, images, 1, 1))
    repeated = repeated + module.image_index(relative_index(visible).transpose(1, 2))  # (B, M, Q, d)
    offsets = module.offsets(repeated).view(batch, images, n_query, heads, 1, points, 2)
    locations = reference[:, None, :, None, None, None] + offsets * offsets.new_tensor(module.scales(shapes))[:, None]
    logits = module.logits(repeated).view(batch, images, n_query, heads, levels, points + 1)
    logits = logits - 10000.0 * (1 - visible.to(logits.dtype)).transpose(1, 2)[..., None, None, None]
    logits[..., -1] = -math.log(images * levels)
    slots = logits.permute(0, 2, 3, 1, 4, 5).flatten(3)  # (B, Q, H, M·L·(P+1))
    weights = torch.softmax(slots.float(), dim=-1).to(slots.dtype)
    weights = weights.view(batch, n_query, heads, images * levels, points + 1)
    located = locations.permute(0, 2, 3, 1, 4, 5, 6).flatten(3, 4)  # (B, Q, H, M·L, P, 2)
    sampled = deform_sample(values, list(shapes) * images, located, weights[..., :-1].contiguous(), backend="torch")
    tokens = module.ignore_token.view(heads, 1, -1) * weights[..., -1:]  # (B, Q, H, M·L, D)
    return module.output_proj(sampled + tokens.sum(dim=3).flatten(2))
