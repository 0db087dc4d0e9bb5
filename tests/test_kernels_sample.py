"""deform_sample against a plain Python loop, finite differences, and between its backends."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from mmi_kernels import deform_sample

# (rows N, level shapes (h, w), heads H, channels D, queries Q, points P): odd on purpose
CASES = {
    "two levels": (2, [(8, 8), (4, 4)], 4, 6, 5, 4),
    "taller than wide": (1, [(7, 5)], 2, 16, 9, 3),
    "one point": (3, [(3, 9), (2, 2)], 3, 16, 4, 1),
    "one-pixel levels": (2, [(1, 1), (1, 7), (5, 1)], 1, 3, 6, 5),
    "wide channels with a rest": (1, [(6, 4)], 2, 37, 7, 2),
    "more samples than a chunk": (1, [(4, 6)] * 11, 2, 16, 3, 7),
    "one query": (2, [(16, 16), (8, 8)], 4, 32, 1, 4),
    "many queries": (1, [(4, 4)], 2, 16, 64, 4),
    "heads in groups with a rest": (1, [(6, 4)], 11, 70, 3, 7),
    "maps copied in groups with a rest": (1, [(3, 3)], 3, 48, 12, 2),
    "wide channels, many queries": (1, [(2, 3)], 2, 144, 9, 1),
}


def draw(case: str, *, spread: float = 1.0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list, Tensor, Tensor]:
    """Inputs of a case; spread 1 puts about a third of the locations outside the maps."""
    rows, shapes, heads, dim, queries, points = CASES[case]
    generator = torch.Generator().manual_seed(len(case))
    positions = sum(height * width for height, width in shapes)
    value = torch.randn(rows, positions, heads, dim, generator=generator)
    locations = 0.5 + spread * 0.5 * torch.randn(rows, queries, heads, len(shapes), points, 2, generator=generator)
    weights = torch.randn(rows, queries, heads, len(shapes), points, generator=generator)
    return value.to(dtype), shapes, locations.to(dtype), weights.to(dtype)


def by_hand(value: Tensor, shapes: list, locations: Tensor, weights: Tensor) -> np.ndarray:
    """The definition, one sample at a time in Python floats: pixel centres at (i + 0.5) / size, zeros outside."""
    rows, _, heads, dim = value.shape
    queries, points = weights.shape[1], weights.shape[4]
    values, places, factors = value.double().numpy(), locations.double().numpy(), weights.double().numpy()
    out = np.zeros((rows, queries, heads, dim))
    for n, q, h, p in np.ndindex(rows, queries, heads, points):
        start = 0
        for level, (height, width) in enumerate(shapes):
            x = places[n, q, h, level, p, 0] * width - 0.5
            y = places[n, q, h, level, p, 1] * height - 0.5
            for j in (math.floor(y), math.floor(y) + 1):
                for i in (math.floor(x), math.floor(x) + 1):
                    if 0 <= i < width and 0 <= j < height:
                        share = (1 - abs(x - i)) * (1 - abs(y - j))
                        out[n, q, h] += factors[n, q, h, level, p] * share * values[n, start + j * width + i, h]
            start += height * width
    return out.reshape(rows, queries, heads * dim)


def with_gradients(backend: str, inputs: tuple, pull: Tensor) -> list[Tensor]:
    """[output, gradients of value, locations, weights] under the loss Σ output · pull."""
    value, shapes, locations, weights = inputs
    leaves = [tensor.clone().requires_grad_() for tensor in (value, locations, weights)]
    out = deform_sample(leaves[0], shapes, leaves[1], leaves[2], backend=backend)
    out.backward(pull.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    worst = (actual.double() - expected.double()).abs().max().item()
    assert worst <= tolerance * expected.double().abs().max().item() + 1e-7


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("case", CASES)
def test_output_is_the_definition(case: str, backend: str) -> None:
    inputs = draw(case)
    out = deform_sample(*inputs, backend=backend)
    assert out.is_contiguous()
    assert_close(out, torch.from_numpy(by_hand(*inputs)), 2e-6)


@pytest.mark.parametrize("case", ["one-pixel levels", "two levels"])
def test_reference_gradients_are_finite_differences(case: str) -> None:
    value, shapes, locations, weights = draw(case, dtype=torch.float64)
    leaves = [
        tensor[:1, ..., :3, :].clone() if tensor is value else tensor[:1] for tensor in (value, locations, weights)
    ]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    heads = leaves[0].shape[2]

    def function(v: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return deform_sample(v, shapes, x[:, :2, :heads], w[:, :2, :heads])

    assert torch.autograd.gradcheck(function, tuple(leaves))


@pytest.mark.parametrize("case", CASES)
def test_numba_gradients_are_the_float64_reference(case: str) -> None:
    inputs = draw(case)
    pull = torch.randn(*inputs[3].shape[:2], inputs[0].shape[2] * inputs[0].shape[3])
    exact = with_gradients("torch", tuple(t.double() if isinstance(t, Tensor) else t for t in inputs), pull)
    single = with_gradients("torch", inputs, pull)
    for ours, torchs, truth in zip(with_gradients("numba", inputs, pull), single, exact, strict=True):
        floor = 1e-6 * truth.abs().max().item()
        assert (ours - truth).abs().max().item() <= 2 * (torchs - truth).abs().max().item() + floor


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_all_outside_is_zero_without_gradient(backend: str) -> None:
    value, shapes, locations, weights = draw("two levels")
    value[0, 0] = float("nan")  # never read
    inputs = (value, shapes, locations.abs() + 3.0, weights)
    out, *gradients = with_gradients(backend, inputs, torch.ones(2, 5, 24))
    assert not out.any()
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_nan_location_shows_in_its_query_only(backend: str) -> None:
    value, shapes, locations, weights = draw("two levels")
    locations[0, 2, 1, 0, 0, 0] = float("nan")
    bad = deform_sample(value, shapes, locations, weights, backend=backend).isnan().view(2, 5, 4, 6)
    assert bad[0, 2, 1].all()
    assert bad.sum() == 6


def test_weight_zero_hides_the_value() -> None:
    value, shapes, locations, weights = draw("many queries", spread=0.1)
    weights[..., 0] = 0.0
    few = deform_sample(value, shapes, locations[..., 1:, :], weights[..., 1:], backend="numba")
    assert torch.equal(deform_sample(value, shapes, locations, weights, backend="numba"), few)


def test_weight_gradient_where_the_weight_is_zero() -> None:
    value, shapes, locations, weights = draw("many queries", spread=0.1)
    pull = torch.randn(1, 64, 32)
    inputs = (value, shapes, locations, torch.zeros_like(weights))
    for ours, truth in zip(with_gradients("numba", inputs, pull), with_gradients("torch", inputs, pull), strict=True):
        assert_close(ours, truth, 2e-6)


def strided(tensor: Tensor) -> Tensor:
    """The same numbers with other strides."""
    return torch.stack([tensor, torch.full_like(tensor, float("nan"))], dim=-1)[..., 0]


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_non_contiguous_inputs(backend: str) -> None:
    value, shapes, locations, weights = draw("one point")
    pull = torch.randn(3, 4, 48)
    plain = with_gradients(backend, (value, shapes, locations, weights), pull)
    leaves = [strided(tensor).requires_grad_() for tensor in (value, locations, weights)]
    assert not any(leaf.is_contiguous() for leaf in leaves)
    out = deform_sample(leaves[0], shapes, leaves[1], leaves[2], backend=backend)
    out.backward(strided(pull))
    for actual, expected in zip([out, *(leaf.grad for leaf in leaves)], plain, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_negated_views(dtype: torch.dtype) -> None:
    """Tensors whose memory holds the opposite sign, in all three inputs and in the gradient that comes back."""
    value, shapes, locations, weights = draw("two levels", dtype=dtype)
    pull = torch.randn(2, 5, 24).to(dtype)
    plain = with_gradients("numba", (value, shapes, locations, weights), pull)
    leaves = [torch._neg_view(-tensor).requires_grad_() for tensor in (value, locations, weights)]
    out = deform_sample(leaves[0], shapes, leaves[1], leaves[2], backend="numba")
    found = torch.autograd.grad(out, leaves, torch._neg_view(-pull))
    assert all(leaf.is_neg() for leaf in leaves)
    for actual, expected in zip([out, *found], plain, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("cut", [lambda t: t[:, :0], lambda t: t[:0]], ids=["no query", "no row"])
def test_empty(cut: Callable[[Tensor], Tensor], backend: str) -> None:
    value, shapes, locations, weights = draw("two levels")
    value = (value if cut(value).shape[0] else value[:0]).requires_grad_()
    out = deform_sample(value, shapes, cut(locations), cut(weights), backend=backend)
    assert out.shape == (value.shape[0], cut(weights).shape[1], 24)
    out.sum().backward()
    assert value.grad is not None and not value.grad.any()


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_values_are_summed_in_float32(dtype: torch.dtype, backend: str) -> None:
    value, shapes, locations, weights = draw("more samples than a chunk")
    value = value.to(dtype)
    out = deform_sample(value, shapes, locations, weights, backend=backend)
    assert out.dtype == dtype
    exact = torch.from_numpy(by_hand(value, shapes, locations, weights))
    # one rounding at the end and nothing worse
    assert ((out.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-5).all()


@pytest.mark.parametrize(
    "case",
    [
        "many queries",
        "more samples than a chunk",
        "wide channels with a rest",
        "heads in groups with a rest",
        "maps copied in groups with a rest",
    ],
)
def test_numba_gives_equal_bits_for_any_neighbours_and_threads(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmi_kernels.numba_cpu.MIN_WORK_PER_THREAD", 1)  # even these small calls use all threads
    value, shapes, locations, weights = draw(case)
    pull = torch.randn(1, weights.shape[1], value.shape[2] * value.shape[3])
    alone = with_gradients("numba", (value, shapes, locations, weights), pull)
    crowd = [torch.cat([torch.randn_like(t), t, torch.full_like(t, float("nan"))]) for t in (value, locations, weights)]
    pulls = torch.cat([torch.randn_like(pull), pull, pull])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            together = with_gradients("numba", (crowd[0], shapes, crowd[1], crowd[2]), pulls)
            assert all(torch.equal(a[0], b[1]) for a, b in zip(alone, together, strict=True))
    finally:
        torch.set_num_threads(before)


def test_only_wanted_gradients_come_back() -> None:
    value, shapes, locations, weights = draw("two levels")
    weights.requires_grad_()
    deform_sample(value, shapes, locations, weights, backend="numba").sum().backward()
    assert value.grad is None and locations.grad is None and weights.grad is not None


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's own
def test_numba_inside_a_compiled_function() -> None:
    """The call breaks the graph: the addresses it takes are those of the tensors of each run."""
    value, shapes, locations, weights = draw("two levels")

    def function(value: Tensor) -> Tensor:
        return deform_sample(value, shapes, locations, weights, backend="numba").square().sum()

    compiled = torch.compile(function, backend="aot_eager")
    for scale in (1.0, 3.0):
        leaf = (value * scale).requires_grad_()
        truth, found = function(leaf), compiled(leaf)
        assert torch.equal(found, truth)
        assert torch.equal(*(torch.autograd.grad(out, leaf)[0] for out in (found, truth)))
