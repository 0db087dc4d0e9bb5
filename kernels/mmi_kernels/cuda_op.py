"""The sampling operation on CUDA devices as two torch operators: what is handed to the kernels, and their gradients.

Place in the flow: `fused.py` and `op.py` call `sample` when the backend is "cuda". It calls `torch.ops.mmi.sample`,
registered here with shapes for tracing (fake tensors) and with its gradient, so that autograd, `torch.compile`, CUDA
graphs and `torch.library.opcheck` work. `cuda_build.launch` starts the kernels of `mmfs.cu`.

    value    [R, M·S, H, D]     offsets [B, Q, F_o]    logits [B, Q, F_l]     → out [B, Q, H·D], stats [B, Q, H, 2]
    tables   [K, F_o], [K, F_l] and visible [B, 1 or Q, M], reference [1 or B, Q, 2], rows [B], token [H·D]

with F_l = H·L·P, F_o = H·P·2 in mode `MMFS` and H·L·P·2 in the others. Gradients of offsets and logits come back from
the kernel per relative image index; the sums here give those of the projections and of the tables.

Deterministic mode (`torch.use_deterministic_algorithms`): value gradients are added in 64-bit fixed point with
2⁻³⁸ of the largest possible term as unit, so the order of the additions leaves no trace. Nothing else is added
atomically.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmi_kernels.cuda_build import KINDS, MMFS, MOST_CELLS, SAMPLE, THREADS, Spec, launch, layout, levels_table

Launch = Callable[[Spec, torch.device, int, tuple[int, ...]], None]

_INPUTS = (
    "Tensor value, Tensor offsets, Tensor logits, Tensor? table_offsets, Tensor? table_logits, Tensor? reference, "
    "Tensor? visible, Tensor? rows, Tensor? token, int[] shapes, float[] scales, int mode"
)
_LIBRARY = torch.library.Library("mmi", "DEF")
_LIBRARY.define(f"sample({_INPUTS}) -> (Tensor, Tensor)")
_LIBRARY.define(
    f"sample_backward(Tensor grad_out, Tensor stats, {_INPUTS}, bool want_value) -> (Tensor, Tensor, Tensor)"
)

_BUSY_LANES = 2**16  # threads that keep a large device busy; with fewer, groups share a query
_UNIT_BITS = 38


def sample(
    value: Tensor,
    shapes: Sequence[tuple[int, int]],
    offsets: Tensor,
    logits: Tensor,
    scales: Sequence[tuple[float, float]],
    mode: int,
    *,
    tables: tuple[Tensor, Tensor] | None = None,
    reference: Tensor | None = None,
    visible: Tensor | None = None,
    rows: Tensor | None = None,
    token: Tensor | None = None,
) -> Tensor:
    """Run the operator; shapes as in the module's docstring.

    Args:
        shapes: (height, width) of the L levels of one image.
        scales: per level, cells of the map per unit of offset in x and y.
        visible: 0 / 1 in any dtype, True or 1 = seen. rows: value row of each query row, default its own.

    Returns:
        [B, Q, H·D] in value's dtype.
    """
    query = logits.dtype
    if offsets.dtype != query:
        query = torch.promote_types(offsets.dtype, query)
        offsets, logits = offsets.to(query), logits.to(query)
    table_offsets, table_logits = (None, None) if tables is None else (tables[0].to(query), tables[1].to(query))
    if visible is not None and visible.is_floating_point():
        visible = visible.bool()
    return _operator(
        value,
        offsets,
        logits,
        table_offsets,
        table_logits,
        None if reference is None else reference.float(),
        visible,
        rows,
        None if token is None else token.float(),
        [side for shape in shapes for side in shape],
        [factor for pair in scales for factor in pair],
        mode,
    )[0]


def _operator(*operands: Any) -> tuple[Tensor, Tensor]:
    return torch.ops.mmi.sample.default(*operands)


def _pairs(flat: Sequence[Any]) -> tuple[tuple[Any, Any], ...]:
    return tuple(zip(flat[::2], flat[1::2], strict=True))


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous, and at a multiple of 16 bytes as the kernel's loads need it."""
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _in_rows(tensor: Tensor) -> Tensor:
    """[B, Q, F] whose rows lie at one distance from each other, such as a slice of a wider projection."""
    regular = tensor.stride(2) == 1 and (tensor.shape[0] == 1 or tensor.stride(0) == tensor.shape[1] * tensor.stride(1))
    return tensor if regular else tensor.contiguous()


class _Form:
    """What all calls of one form share: sizes, checked once, and from them the grids and the plain arguments.

    Made from the first call of a form and kept by `_form`; holds none of the call's tensors. Raises ValueError.
    """

    def __init__(
        self,
        value: Tensor,
        offsets: Tensor,
        logits: Tensor,
        table_logits: Tensor | None,
        reference: Tensor | None,
        visible: Tensor | None,
        rows: Tensor | None,
        shapes: Sequence[int],
        scales: Sequence[float],
        mode: int,
    ) -> None:
        self.mode, self.shapes = mode, _pairs(shapes)
        self.batch, self.queries = logits.shape[:2]
        self.heads, self.dim = value.shape[2:]
        self.levels = len(self.shapes)
        self.points = logits.shape[2] // (self.heads * self.levels)
        self.positions = sum(height * width for height, width in self.shapes)
        self.images = value.shape[1] // self.positions if mode == MMFS else 1
        self.lanes, self.backward_lanes = (layout(self.dim, value.dtype, backward)[0] for backward in (False, True))
        self._check(value, offsets, logits, visible, rows)
        self.out_shape = (self.batch, self.queries, self.heads * self.dim)
        self.stats_shape = (self.batch, self.queries, self.heads, 2) if mode != SAMPLE else (0,)
        # Kept here because captured graphs and later calls point to it.
        self.level_table = levels_table(self.shapes, _pairs(scales), value.device)
        self.split = self._split()
        self.blocks, width = self._grid(THREADS // self.lanes // self.split)
        self.sizes = self._sizes(offsets, logits, table_logits, reference, visible, width, self.split)
        self.backward_blocks, width = self._grid(THREADS // self.backward_lanes)
        self.backward_sizes = self._sizes(offsets, logits, table_logits, reference, visible, width, 1)
        spec = partial(Spec, value.dtype, logits.dtype, self.dim, self.points, mode)
        self.spec = spec(split=self.split > 1)
        self.backward_specs = tuple(spec(backward=True, deterministic=strict) for strict in (False, True))

    def _check(
        self, value: Tensor, offsets: Tensor, logits: Tensor, visible: Tensor | None, rows: Tensor | None
    ) -> None:
        per_level = 1 if self.mode == MMFS else self.levels
        if value.shape[1] != self.images * self.positions:
            raise ValueError(
                f"value has {value.shape[1]} positions, not a multiple of the {self.positions} of an image"
            )
        if logits.shape[2] != self.heads * self.levels * self.points or not self.points:
            raise ValueError(f"logits {tuple(logits.shape)} do not fit {self.heads} heads and {self.levels} levels")
        if tuple(offsets.shape) != (self.batch, self.queries, self.heads * per_level * self.points * 2):
            raise ValueError(f"offsets {tuple(offsets.shape)} do not fit logits {tuple(logits.shape)}")
        if len(value if rows is None else rows) != self.batch:
            raise ValueError(f"{len(value)} value rows for {self.batch} query rows; tell which by `rows`")
        if visible is not None and visible.shape[-1] != self.images:
            raise ValueError(f"visible tells of {visible.shape[-1]} images, value holds {self.images}")
        if value.dtype not in KINDS or logits.dtype not in KINDS or offsets.dtype != logits.dtype:
            raise ValueError(f"dtypes {value.dtype}, {offsets.dtype}, {logits.dtype} are not the kernel's")
        if max(height * width for height, width in self.shapes) > MOST_CELLS:
            raise ValueError(f"a level of {self.shapes} has more than {MOST_CELLS} positions")

    def _split(self) -> int:
        """Groups that share a query: as many as keep the device busy, at most one per level of an image."""
        groups, items = THREADS // self.lanes, self.images * self.levels
        lanes, split = self.batch * self.queries * self.heads * self.lanes, 1
        while split < min(items, groups) and lanes * split < _BUSY_LANES:
            split *= 2
        return split

    def _grid(self, slots: int) -> tuple[int, int]:
        """(blocks of so many queries, width of the query grid or 0): a square of queries is cut into tiles 8 wide."""
        side = math.isqrt(self.queries)
        if side * side == self.queries and side >= 8 and slots >= 8:
            tiles = -(-side // 8) * -(-side // (slots // 8))
        else:
            side, tiles = 0, -(-self.queries // slots)
        return tiles * self.heads * self.batch, side

    def _sizes(
        self,
        offsets: Tensor,
        logits: Tensor,
        table_logits: Tensor | None,
        reference: Tensor | None,
        visible: Tensor | None,
        query_width: int,
        split: int,
    ) -> tuple[int, ...]:
        """The plain numbers of MMI_ARGUMENTS of `mmfs.cu`, in its order, after the pointers."""
        reference_strides, visible_strides = (0, 0), (0, 0, 0)
        if reference is not None:
            batch, query = reference.stride(0), reference.stride(1)
            reference_strides = (batch if reference.shape[0] > 1 else 0, query)
        if visible is not None:
            size, (batch, query, image) = visible.element_size(), visible.stride()
            visible_strides = (batch * size, query * size if visible.shape[1] > 1 else 0, image * size)
        sizes = (self.queries, self.heads, self.levels, self.images, self.positions)
        rows = 0 if table_logits is None else table_logits.shape[0]
        strides = (offsets.stride(1), logits.stride(1), *reference_strides, *visible_strides)
        return (*sizes, rows, *strides, query_width, split)


_FORMS: dict[tuple[Any, ...], _Form] = {}
_MOST_FORMS = 4096


def _look(tensor: Tensor | None) -> tuple[Any, ...] | None:
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype)


def _prepare(
    value: Tensor,
    offsets: Tensor,
    logits: Tensor,
    table_offsets: Tensor | None,
    table_logits: Tensor | None,
    reference: Tensor | None,
    visible: Tensor | None,
    rows: Tensor | None,
    token: Tensor | None,
    shapes: Sequence[int],
    scales: Sequence[float],
    mode: int,
) -> tuple[_Form, tuple[int, ...], tuple[Tensor | None, ...]]:
    """The call's form, the pointers of MMI_ARGUMENTS, and the tensors they point to, to be kept until the launch."""
    value = _aligned(value)
    offsets = offsets if offsets.is_contiguous() else _in_rows(offsets)
    logits = logits if logits.is_contiguous() else _in_rows(logits)
    if table_offsets is not None and table_logits is not None:
        table_offsets, table_logits = table_offsets.contiguous(), table_logits.contiguous()
    if reference is not None and reference.stride(2) != 1:
        reference = reference.contiguous()
    if rows is not None:
        rows = rows.long().contiguous()
    if token is not None:
        token = token.contiguous()
    tables = None if table_logits is None else table_logits.shape[0]
    n_rows = None if rows is None else rows.shape[0]
    given = (value.shape, value.dtype, value.device, *_look(offsets), *_look(logits))  # type: ignore[misc]
    key = (*given, tables, _look(reference), _look(visible), n_rows, tuple(shapes), tuple(scales), mode)
    form = _FORMS.get(key)
    if form is None:
        form = _Form(value, offsets, logits, table_logits, reference, visible, rows, shapes, scales, mode)
        if len(_FORMS) >= _MOST_FORMS:
            _FORMS.clear()
        _FORMS[key] = form
    tensors = (value, offsets, logits, table_offsets, table_logits, reference, visible, rows, token, form.level_table)
    return form, tuple([0 if tensor is None else tensor.data_ptr() for tensor in tensors]), tensors


def _forward(start: Launch, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    form, pointers, _kept = _prepare(value, *rest)
    out = value.new_empty(form.out_shape)
    stats = value.new_empty(form.stats_shape, dtype=torch.float32)
    if form.blocks and out.numel():
        start(form.spec, value.device, form.blocks, (*pointers, *form.sizes, out.data_ptr(), stats.data_ptr()))
    return out, stats


def _backward(
    start: Launch, grad_out: Tensor, stats: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, want_value = rest
    form, pointers, kept = _prepare(value, *inputs)
    grad_out = _aligned(grad_out.to(value.dtype))
    single = {"dtype": torch.float32, "device": value.device}
    per_level = () if form.mode == MMFS else (form.levels,)
    slots = (form.batch, form.queries, form.images, form.heads)
    grad_offsets = torch.empty((*slots, *per_level, form.points, 2), **single)
    grad_logits = torch.empty((*slots, form.levels, form.points), **single)
    deterministic = want_value and torch.are_deterministic_algorithms_enabled()
    kind = torch.int64 if deterministic else torch.float32
    grad_value = torch.zeros(value.shape if want_value else (0,), dtype=kind, device=value.device)
    unit = _fixed_point_unit(grad_out, kept[2] if form.mode == SAMPLE else None) if deterministic else None
    if grad_out.numel():
        scale = None if unit is None else 1.0 / unit
        target = grad_value.data_ptr() if want_value else 0
        ends = (grad_out.data_ptr(), stats.data_ptr(), target, 0 if scale is None else scale.data_ptr())
        arguments = (*pointers, *form.backward_sizes, *ends, grad_offsets.data_ptr(), grad_logits.data_ptr())
        start(form.backward_specs[deterministic], value.device, form.backward_blocks, arguments)
    if unit is not None:
        grad_value = grad_value.double() * unit.double()
    return grad_value.to(value.dtype), grad_offsets, grad_logits


def _fixed_point_unit(grad_out: Tensor, weights: Tensor | None) -> Tensor:
    """2⁻³⁸ of the largest possible term of a value gradient, a power of two; NaN where the gradient is not finite."""
    largest = grad_out.abs().amax().float() if grad_out.numel() else grad_out.new_zeros((), dtype=torch.float32)
    if weights is not None and weights.numel():
        largest = largest * weights.abs().amax().float()
    bits = torch.log2(largest).ceil().clamp(-80.0, 120.0) - _UNIT_BITS
    return torch.exp2(bits) + (largest - largest)


def _forward_fake(value: Tensor, offsets: Tensor, logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, queries = logits.shape[:2]
    heads, dim = value.shape[2:]
    size = (batch, queries, heads, 2) if rest[-1] != SAMPLE else (0,)
    return value.new_empty(batch, queries, heads * dim), value.new_empty(size, dtype=torch.float32)


def _backward_fake(
    grad_out: Tensor, stats: Tensor, value: Tensor, offsets: Tensor, logits: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    shapes, mode, want_value = _pairs(rest[-4]), rest[-2], rest[-1]
    positions = sum(height * width for height, width in shapes)
    (batch, queries), heads, levels = logits.shape[:2], value.shape[2], len(shapes)
    points = logits.shape[2] // (heads * levels)
    slots = (batch, queries, value.shape[1] // positions if mode == MMFS else 1, heads)
    per_level = () if mode == MMFS else (levels,)
    return (
        torch.empty_like(value, memory_format=torch.contiguous_format) if want_value else value.new_empty(0),
        value.new_empty((*slots, *per_level, points, 2), dtype=torch.float32),
        value.new_empty((*slots, levels, points), dtype=torch.float32),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, shapes, scales, mode = inputs
    ctx.save_for_backward(output[1], *tensors)
    ctx.plain = shapes, scales, mode
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad_out: Tensor, _grad_stats: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of value, offsets, logits, both tables and the token; see the module's docstring."""
    stats, *tensors = ctx.saved_tensors
    value, offsets, logits, table_offsets, table_logits, *_, token = tensors
    wanted = ctx.needs_input_grad
    grad_value, by_offset, by_logit = torch.ops.mmi.sample_backward(grad_out, stats, *tensors, *ctx.plain, wanted[0])
    found: list[Tensor | None] = [grad_value if wanted[0] else None]
    for side, slots, want in ((offsets, by_offset, wanted[1]), (logits, by_logit, wanted[2])):
        over_images = slots if slots.shape[2] == 1 else slots.sum(2)
        found.append(over_images.reshape(side.shape).to(side.dtype) if want else None)
    for table, slots, want in ((table_offsets, by_offset, wanted[3]), (table_logits, by_logit, wanted[4])):
        found.append(_table_gradient(table, slots) if want else None)
    grad_token = None
    if wanted[8]:
        ignored = torch.exp(-stats[..., 0]) * stats[..., 1]  # (B, Q, H)
        per_head = grad_out.float().unflatten(-1, (value.shape[2], -1))
        grad_token = (ignored[..., None] * per_head).sum((0, 1)).reshape(token.shape)
    return *found, None, None, None, grad_token, None, None, None


def _table_gradient(table: Tensor, slots: Tensor) -> Tensor:
    """Slot s belongs to row s + 1; row 0 is of hidden images, which weigh nothing."""
    rows = slots.sum((0, 1)).flatten(1)[: table.shape[0] - 1]  # (images, F)
    return F.pad(rows, (0, 0, 1, table.shape[0] - 1 - rows.shape[0])).to(table.dtype)


def register(start: Launch, key: str) -> None:
    """Serve the operators for a dispatch key ("CUDA"; tests: "CPU") with kernels started by ``start``."""
    _LIBRARY.impl("sample", partial(_forward, start), key)
    _LIBRARY.impl("sample_backward", partial(_backward, start), key)


register(launch, "CUDA")
torch.library.register_fake("mmi::sample", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("mmi::sample_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd("mmi::sample", _gradients, setup_context=_keep, lib=_LIBRARY)
