"""The CUDA source on the CPU, from torch down to the kernel, against the float64 reference; see tests/emulator.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import emulator
import pytest
import torch
from kernel_cases import CASES, KernelCase, assert_as_good_as_torch, draw, evaluate, operands, run, told
from torch import Tensor

from mmi_kernels import bench, bench_cuda, fused, op

pytestmark = pytest.mark.skipif(emulator.COMPILER is None, reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Backend "cuda" means the emulator, and fresh memory holds NaN."""
    emulator.install()
    for module in (fused, op):
        monkeypatch.setattr(module, "backend_for", lambda backend, *_, **__: backend)
    empty, new_empty = torch.empty, Tensor.new_empty

    def poisoned(tensor: Tensor) -> Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poisoned(empty(*args, **kwargs)))
    monkeypatch.setattr(Tensor, "new_empty", lambda *args, **kwargs: poisoned(new_empty(*args, **kwargs)))
    yield
    torch.use_deterministic_algorithms(False)


def amid_poison(value: Tensor) -> Tensor:
    """The same values between two stretches of NaN, at a multiple of 16 bytes."""
    room = torch.full((value.numel() + 512,), float("nan"), dtype=value.dtype)
    inside = room[256 : 256 + value.numel()].view(value.shape)
    inside.copy_(value)
    return inside


def emulate(case: KernelCase, given: dict[str, Tensor]) -> dict[str, Tensor]:
    return evaluate(lambda inputs: run(case, {**inputs, "value": inputs["value"]}, "cuda"), given)


@pytest.mark.parametrize("name", CASES)
def test_single_precision(name: str, record_property: Callable[[str, object], None]) -> None:
    case = CASES[name]
    given = draw(case, torch.float32)
    found = assert_as_good_as_torch(case, given, emulate(case, given))
    record_property("errors", told("cuda emulated", name, torch.float32, found))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("mmfs, odd sizes", torch.float16),
        ("sample, wide", torch.float16),
        ("mmfs, odd sizes", torch.bfloat16),
        ("mmfs, tiles", torch.bfloat16),
        ("attention, injector", torch.bfloat16),
        ("sample, wide", torch.bfloat16),
    ],
)
def test_half_precision(name: str, dtype: torch.dtype, record_property: Callable[[str, object], None]) -> None:
    case = CASES[name]
    given = draw(case, dtype)
    found = assert_as_good_as_torch(case, given, emulate(case, given))
    record_property("errors", told("cuda emulated", name, dtype, found))


@pytest.mark.parametrize("name", ["mmfs, odd sizes", "attention, narrow", "sample, two levels"])
def test_deterministic_value_gradient(name: str) -> None:
    case = CASES[name]
    given = draw(case, torch.float32)
    torch.use_deterministic_algorithms(True)
    assert_as_good_as_torch(case, given, emulate(case, given))


def test_query_side_in_another_precision() -> None:
    case = CASES["mmfs, odd sizes"]
    for value, query in ((torch.bfloat16, torch.float32), (torch.float32, torch.float16)):
        given = draw(case, value, query)
        assert_as_good_as_torch(case, given, emulate(case, given))


@pytest.mark.parametrize("name", ["mmfs, odd sizes", "mmfs, one query", "attention, one level", "sample, one point"])
def test_nothing_outside_the_values_is_read(name: str) -> None:
    case = CASES[name]
    given = draw(case, torch.float32)
    plain = emulate(case, given)
    room = amid_poison(given["value"])
    leaves = {**given, "value": room}
    assert torch.equal(run(case, leaves, "cuda"), plain["out"])


def test_hidden_images_and_cells_off_the_map_are_not_read() -> None:
    case = CASES["mmfs, odd sizes"]
    given = draw(case, torch.float32)
    given["visible"][:, :, 1] = 0
    expected = run(case, given, "cuda")
    cells = given["value"].shape[1] // 3
    given["value"][:, cells : 2 * cells] = float("nan")
    assert torch.equal(run(case, given, "cuda"), expected)

    case = CASES["sample, two levels"]
    given = draw(case, torch.float32)
    given["value"][0, 0] = float("nan")
    given["offsets"] = given["offsets"].abs() + 3.0
    found = emulate(case, given)
    assert not any(tensor.any() for tensor in found.values())


def test_a_query_that_sees_nothing_gets_the_token() -> None:
    case = CASES["mmfs, token and rows"]
    given = draw(case, torch.float32)
    given["visible"][:] = 0
    out = run(case, given, "cuda")
    assert torch.equal(out, given["token"].expand_as(out))


def test_nan_location_shows_in_its_query_only() -> None:
    case = CASES["sample, two levels"]
    given = draw(case, torch.float32)
    given["offsets"][0, 2, 1, 0, 0, 0] = float("nan")
    bad = run(case, given, "cuda").isnan().view(2, 5, 4, 6)
    assert bad[0, 2, 1].all() and bad.sum() == 6


def test_more_visible_images_than_the_table_has_rows_show() -> None:
    case = CASES["mmfs, odd sizes"]
    given = draw(case, torch.float32)
    given["visible"][:] = 0
    given["visible"][0, 3, :] = 1
    given["table_offsets"], given["table_logits"] = given["table_offsets"][:3], given["table_logits"][:3]
    bad = run(case, given, "cuda").isnan()
    assert bad[0, 3].all() and bad.sum() == bad[0, 3].numel()


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float32])
def test_visibility_in_any_type_and_stride(dtype: torch.dtype) -> None:
    case = CASES["mmfs, odd sizes"]
    given = draw(case, torch.float32)
    expected = run(case, given, "cuda")
    seen = given["visible"].to(dtype)
    given["visible"] = torch.stack([seen, (seen == 0).to(dtype)], dim=-1)[..., 0]
    assert torch.equal(run(case, given, "cuda"), expected)


def test_projections_may_be_slices_of_one() -> None:
    case = CASES["mmfs, odd sizes"]
    given = draw(case, torch.float32)
    expected = run(case, given, "cuda")
    wide = torch.cat([given["offsets"], given["logits"], given["logits"][..., :3]], dim=-1)
    n = given["offsets"].shape[-1]
    given["offsets"], given["logits"] = wide[..., :n], wide[..., n : n + given["logits"].shape[-1]]
    assert not given["logits"].is_contiguous()
    assert torch.equal(run(case, given, "cuda"), expected)


@pytest.mark.parametrize("name", ["mmfs, token and rows", "sample, one point"])
def test_operators_pass_opcheck(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the check compares fresh memory too
    for module in (fused, op):
        monkeypatch.setattr(module, "backend_for", lambda backend, *_, **__: backend)
    torch.library.opcheck(torch.ops.mmi.sample.default, operands(CASES[name], draw(CASES[name], torch.float32)))


def test_compiled_and_eager_agree() -> None:
    case = CASES["mmfs, odd sizes"]
    given = draw(case, torch.float32)
    compiled = torch.compile(lambda inputs: run(case, inputs, "cuda") * 2, backend="aot_eager", fullgraph=True)
    found = evaluate(compiled, given)
    plain = evaluate(lambda inputs: run(case, inputs, "cuda") * 2, given)
    for name, tensor in plain.items():
        torch.testing.assert_close(found[name], tensor)


@pytest.mark.parametrize("cut", ["no query", "no row"])
def test_empty(cut: str) -> None:
    case = CASES["sample, two levels"]
    given = draw(case, torch.float32)
    if cut == "no query":
        given |= {name: given[name][:, :0] for name in ("offsets", "logits", "pull")}
    else:
        given |= {name: given[name][:0] for name in ("value", "offsets", "logits", "pull")}
    found = emulate(case, given)
    assert found["out"].numel() == 0 and not found["grad value"].any()


def test_a_location_on_a_cell_centre_has_two_derivatives_and_the_benchmark_compares_neither() -> None:
    """bf16 locations fall on cell centres often: at −1 grid_sample takes the derivative inside, the kernel outside."""
    case = bench.Case("kinks", 1, (8, 4), 1, 2, 16, 64, 4)
    leaves = bench_cuda.draw(case, "op", torch.bfloat16, "cpu")
    pull = torch.randn(1, 64, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = bench_cuda._results(bench_cuda.op_by(bench_cuda.torchs, case), exact, pull.double(), True)[2]
    found = bench_cuda._results(bench_cuda.op_by(bench_cuda.ours, case), leaves, pull, True)[2].double()
    settled = bench_cuda._settled(exact[1].detach(), case.spatial_shapes)
    wrong = (found - truth).abs() > 0.02 * truth.abs().max()
    assert wrong.any() and not (wrong & settled).any()
    cells = exact[1].detach() * torch.tensor([8.0, 4.0])[:, None, None] - 0.5
    assert (cells[wrong] == -1).all()
    assert 0.9 < settled.double().mean() < 1
