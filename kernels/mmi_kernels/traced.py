"""MMFS as one torch operator, for functions that are being traced.

Place in the flow: `fused.mmfs_attention` comes here while `torch.compile` traces it without gradients, on all
backends but "cuda", which has an operator of its own (`cuda_op.py`). To the tracer the call is a box that makes a
tensor of known shape; when the graph runs, the operator calls `fused.mmfs_attention` again. So the numba backend
serves compiled functions, which know no addresses, and the torch backend's loop over images is not unrolled for every
number of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("mmi", "FRAGMENT")
_LIBRARY.define(
    "mmfs(Tensor values, int[] shapes, Tensor offsets, Tensor logits, Tensor table_offsets, Tensor table_logits, "
    "Tensor reference, float[] scales, Tensor visible, Tensor token, Tensor? rows, str backend) -> Tensor"
)


def mmfs(
    values: Tensor,
    shapes: Sequence[tuple[int, int]],
    offsets: Tensor,
    logits: Tensor,
    tables: tuple[Tensor, Tensor],
    reference: Tensor,
    scales: Sequence[tuple[float, float]],
    visible: Tensor,
    token: Tensor,
    rows: Tensor | None,
    backend: str,
) -> Tensor:
    """`fused.mmfs_attention` as an operator without gradients; same arguments, same result."""
    sides = [side for shape in shapes for side in shape]
    spans = [span for pair in scales for span in pair]
    out: Tensor = torch.ops.mmi.mmfs.default(
        values, sides, offsets, logits, *tables, reference, spans, visible, token, rows, backend
    )
    return out


def _run(
    values: Tensor,
    sides: Sequence[int],
    offsets: Tensor,
    logits: Tensor,
    table_offsets: Tensor,
    table_logits: Tensor,
    reference: Tensor,
    spans: Sequence[float],
    visible: Tensor,
    token: Tensor,
    rows: Tensor | None,
    backend: str,
) -> Tensor:
    from mmi_kernels.fused import mmfs_attention

    shapes, scales = (list(zip(flat[::2], flat[1::2], strict=True)) for flat in (sides, spans))
    tables = (table_offsets, table_logits)
    return mmfs_attention(
        values, shapes, offsets, logits, tables, reference, scales, visible, token, rows=rows, backend=backend
    )


def _fake(values: Tensor, sides: Sequence[int], offsets: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return values.new_empty(*logits.shape[:2], values.shape[2] * values.shape[3])


_LIBRARY.impl("mmfs", _run, "CompositeExplicitAutograd")
torch.library.register_fake("mmi::mmfs", _fake, lib=_LIBRARY)
