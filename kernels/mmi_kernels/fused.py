"""The two attentions over feature maps, whole: from projected queries to sampled values, on every backend.

Place in the flow: the modules of the engine (MMFS in the language model and the image decoder, deformable attention in
the vision adapter) make linear projections and come here. Backend "cuda" does all of it in one kernel (`cuda_op.py`),
and sampling locations never exist in memory. Every other backend takes the same algebra in torch, which is written
here and is the reference of the kernel's tests, and then samples through `op.deform_sample`.

    MMFS       location = reference + (offset + table[r]) · scale_l     r = relative index of the image, 0 = hidden
               weights  = softmax over images × levels × points of (logit + table[r]), with one more logit 0
               out      = Σ weights · samples + (weight of the logit 0) · token

    attention  location = reference + offset / (width_l, height_l)      weights = softmax over levels × points

B sequences, Q queries, M images, H heads, L levels, P points, D channels per head, S positions of all levels.
Source: MM-Interleaved, Eq. 4, with the ignore slot of the released model; Zhu et al. 2021 (Deformable DETR), Eq. 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from mmi_kernels import traced
from mmi_kernels.cuda_build import ATTENTION, MMFS
from mmi_kernels.op import backend_for, deform_sample

HIDDEN_LOGIT = -10000.0
"""Added to the logits of hidden images; not −inf, so that a row that sees nothing stays finite."""

Shapes = Sequence[tuple[int, int]]
"""(height, width) per level."""


def relative_index(visible: Tensor) -> Tensor:
    """Relative image index r: ``visible`` ``[..., M]`` (0 / 1) → ``[..., M]`` long, 1 = nearest visible, 0 = hidden."""
    visible = visible.long()
    at_or_after = visible.flip(-1).cumsum(-1).flip(-1)
    return at_or_after * visible


def mmfs_attention(
    values: Tensor,
    shapes: Shapes,
    offsets: Tensor,
    logits: Tensor,
    tables: tuple[Tensor, Tensor],
    reference: Tensor,
    scales: Sequence[tuple[float, float]],
    visible: Tensor,
    token: Tensor,
    *,
    rows: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Sample the maps of all visible images, softmax and ignore slot included; differentiable in all float tensors.

    Args:
        values: [R, M·S, H, D] projected features, image after image.
        shapes: (height, width) of the L levels of one image.
        offsets: [B, Q, H·P·2] projected queries, in cells of the base grid.
        logits: [B, Q, H·L·P] projected queries.
        tables: what relative index r adds to offsets [K, H·P·2] and logits [K, H·L·P].
        reference: [1 or B, Q, 2] points (x, y) in [0, 1].
        scales: per level, the share of the map's width and height that one unit of offset spans.
        visible: [B, 1 or Q, M], 0 / 1. A query may see at most K − 1 images.
        token: [H·D], the value of the ignore slot.
        rows: [B] which row of ``values`` a sequence looks at; default its own (R = B).
        backend: see `op.resolve`.

    Returns:
        [B, Q, H·D] in the dtype of ``values``.

    Raises:
        ValueError: shapes or devices do not fit together, or no such backend.
        KernelUnavailable: the named backend cannot serve this call.
    """
    dtypes = (values.dtype, offsets.dtype, logits.dtype)
    served_by = backend_for(backend, values, dtypes, images=visible.shape[-1])
    if served_by == "cuda":
        from mmi_kernels import cuda_op

        in_cells = [(x * width, y * height) for (x, y), (height, width) in zip(scales, shapes, strict=True)]
        given = {"tables": tables, "reference": reference, "visible": visible, "rows": rows, "token": token.flatten()}
        return cuda_op.sample(values, shapes, offsets, logits, in_cells, MMFS, **given)
    if served_by == "numba" and _without_gradients(values, offsets, logits, *tables, reference, token):
        spans, whole = tuple(map(tuple, scales)), tuple(map(tuple, shapes))
        return _numba_attend()(values, whole, offsets, logits, tables, reference, spans, visible, token.flatten(), rows)
    if torch.compiler.is_compiling() and not torch.is_grad_enabled():
        return traced.mmfs(values, shapes, offsets, logits, tables, reference, scales, visible, token, rows, served_by)
    if rows is not None:
        values = values[rows]
    heads, levels = values.shape[2], len(shapes)
    weights, ignored, offsets = _mmfs_weights(offsets, logits, tables, visible, heads, levels)
    locations = _mmfs_locations(reference, offsets, scales)
    n_images = visible.shape[-1]
    sampled = deform_sample(values, list(shapes) * n_images, locations, weights, backend=backend)
    batch, n_query = sampled.shape[:2]
    summed = sampled.view(batch, n_query, heads, -1) + ignored * token.view(1, 1, heads, -1).to(sampled.dtype)
    return summed.flatten(2)


def _without_gradients(*tensors: Tensor) -> bool:
    """Whether nothing is to be differentiated or traced, so that one compiled loop may do all of it."""
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return not (wanted or torch.compiler.is_compiling() or forward_ad._current_level >= 0)


@cache
def _numba_attend() -> Callable[..., Tensor]:
    # An import statement in a function costs a tenth of a short call, each time.
    from mmi_kernels.numba_attention import attend

    return attend


def _mmfs_weights(
    offsets: Tensor, logits: Tensor, tables: tuple[Tensor, Tensor], visible: Tensor, heads: int, levels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights ``[B, Q, H, M·L, P]``, ignored mass ``[B, Q, H, 1]`` and offsets ``[B, Q, M, H, P, 2]``."""
    batch, n_query = logits.shape[:2]
    points, n_images = logits.shape[2] // (heads * levels), visible.shape[-1]
    index = relative_index(visible)
    offsets = offsets[:, :, None] + F.embedding(index, tables[0])
    logits = logits[:, :, None] + F.embedding(index, tables[1])
    logits = logits + (1 - visible.to(logits.dtype))[..., None] * HIDDEN_LOGIT
    logits = logits.view(batch, n_query, n_images, heads, levels * points).transpose(2, 3).flatten(3)
    precise = torch.promote_types(logits.dtype, torch.float32)
    weights = torch.softmax(F.pad(logits, (0, 1)).to(precise), dim=-1).to(logits.dtype)  # extra logit 0: ignore
    weights, ignored = weights[..., :-1], weights[..., -1:]
    weights = weights.reshape(batch, n_query, heads, n_images * levels, points)
    return weights, ignored, offsets.view(batch, n_query, n_images, heads, points, 2)


def _mmfs_locations(reference: Tensor, offsets: Tensor, scales: Sequence[tuple[float, float]]) -> Tensor:
    """Sampling locations ``[B, Q, H, M·L, P, 2]`` as (x, y) in [0, 1]."""
    # In 16 bits a location would be off by up to half a cell of the finest map.
    precise = torch.promote_types(offsets.dtype, torch.float32)
    offsets, reference = offsets.to(precise), reference.to(precise)
    batch, n_query, n_images, heads, points, _ = offsets.shape
    per_level = offsets.new_tensor(scales)  # (L, 2)
    moved = offsets.transpose(2, 3)[:, :, :, :, None] * per_level[:, None]  # (B, Q, H, M, L, P, 2)
    located = reference[:, :, None, None, None, None] + moved
    return located.reshape(batch, n_query, heads, n_images * len(scales), points, 2)


def deform_attention(
    value: Tensor, shapes: Shapes, offsets: Tensor, logits: Tensor, reference: Tensor, *, backend: str = "auto"
) -> Tensor:
    """Ordinary deformable attention, softmax included; differentiable in value, offsets and logits.

    Args:
        value: [B, S, H, D].
        shapes: (height, width) of the L levels.
        offsets: [B, Q, H·L·P·2] in cells of each level.
        logits: [B, Q, H·L·P].
        reference: [Q, 2] points (x, y) in [0, 1].
        backend: see `op.resolve`.

    Returns:
        [B, Q, H·D] in value's dtype. Raises as :func:`mmfs_attention`.
    """
    dtypes = (value.dtype, offsets.dtype, logits.dtype)
    served_by = backend_for(backend, value, dtypes)
    if served_by == "cuda":
        from mmi_kernels import cuda_op

        return cuda_op.sample(
            value, shapes, offsets, logits, [(1.0, 1.0)] * len(shapes), ATTENTION, reference=reference[None]
        )
    if served_by == "numba" and _without_gradients(value, offsets, logits, reference):
        whole = tuple(map(tuple, shapes))
        scales = tuple((1 / width, 1 / height) for height, width in whole)
        nothing = (offsets.new_zeros(2, offsets.shape[2]), logits.new_zeros(2, logits.shape[2]))
        seen = torch.ones(1, 1, 1, dtype=torch.int32, device=logits.device).expand(len(logits), 1, 1)
        return _numba_attend()(value, whole, offsets, logits, nothing, reference[None], scales, seen, None, None)
    heads, levels = value.shape[2], len(shapes)
    grid = (heads, levels, logits.shape[2] // (heads * levels))
    precise = torch.promote_types(offsets.dtype, torch.float32)
    sizes = torch.tensor([(width, height) for height, width in shapes], device=offsets.device, dtype=precise)
    moves = offsets.unflatten(-1, (*grid, 2)).to(precise)  # (B, Q, H, L, P, 2), in cells of each map
    locations = reference[:, None, None, None] + moves / sizes[:, None]
    strengths = logits.unflatten(-1, (heads, -1)).softmax(dim=-1, dtype=precise).unflatten(-1, grid[1:])
    return deform_sample(value, shapes, locations, strengths, backend=backend)
