"""Deformable sampling in pure torch: the truth, the fallback, and the oracle of tests and benchmarks.

Place in the flow: `op.deform_sample` hands a call to this file when the backend is "torch". It runs wherever torch
runs (CPU, CUDA, any floating dtype including float64) and is differentiable in all three tensors through autograd.

    out[n, q, h, :] = Σ_l Σ_p  weights[n, q, h, l, p] · bilinear(value_l[n, :, h, :], locations[n, q, h, l, p])

Shapes: value [N, S, H, D], locations [N, Q, H, L, P, 2] as (x, y), weights [N, Q, H, L, P] → [N, Q, H·D]
(N rows, S positions of all levels one after the other, H heads, D channels per head, Q queries, L levels, P points).

Source: multi-scale deformable attention, Zhu et al. 2021 (Deformable DETR), Eq. 3; it is the sampling inside the
MMFS of MM-Interleaved, Eq. 4. Pixel centres lie at (i + 0.5) / size, so location 0 is the outer edge of the first
pixel; corners outside the map count as zero (`grid_sample(align_corners=False, padding_mode="zeros")`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype in which coordinates and sums are held: the widest of the tensors', and never below float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def deform_sample_reference(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
) -> Tensor:
    """Weighted bilinear samples of multi-level maps, level by level with `grid_sample`.

    Args:
        value: [N, S, H, D], levels concatenated along S, each in row-major order.
        spatial_shapes: (height, width) of each level; Σ height·width = S.
        locations: [N, Q, H, L, P, 2], (x, y) relative to the map, [0, 1] inside; anything outside samples zeros.
        weights: [N, Q, H, L, P], used as they are (no softmax).

    Returns:
        [N, Q, H·D] in value's dtype. 16-bit inputs are computed in float32.

    Shapes are checked by `op.deform_sample`, not here.
    """
    n, _, heads, dim = value.shape
    queries = locations.shape[1]
    dtype = compute_dtype(value, locations, weights)
    if n == 0 or queries == 0:
        # grid_sample refuses empty input; the sum keeps the (zero) gradient path of all three tensors.
        graph = value.sum() + locations.sum() + weights.sum()
        return value.new_zeros(n, queries, heads * dim) + graph.to(value.dtype)

    per_head = value.to(dtype).permute(0, 2, 3, 1).reshape(n * heads, dim, -1)  # [N·H, D, S]
    grid = (2.0 * locations.to(dtype) - 1.0).transpose(1, 2).flatten(0, 1)  # [N·H, Q, L, P, 2] in [-1, 1]
    strengths = weights.to(dtype).transpose(1, 2).flatten(0, 1)  # [N·H, Q, L, P]

    out = value.new_zeros((n * heads, dim, queries), dtype=dtype)
    start = 0
    for level, (height, width) in enumerate(spatial_shapes):
        feature_map = per_head[:, :, start : start + height * width].reshape(n * heads, dim, height, width)
        samples = F.grid_sample(
            feature_map, grid[:, :, level], mode="bilinear", padding_mode="zeros", align_corners=False
        )  # [N·H, D, Q, P]
        out = out + (samples * strengths[:, None, :, level]).sum(-1)
        start += height * width
    return out.view(n, heads * dim, queries).transpose(1, 2).contiguous().to(value.dtype)
