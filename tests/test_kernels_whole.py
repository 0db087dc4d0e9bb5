"""Both attentions whole on the CPU (no gradients): against float64 torch, and what raw addresses must never allow."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from kernel_cases import CASES, KernelCase, draw, precise, run
from torch import Tensor

from mmi_kernels import mmfs_attention, numba_attention, numba_cpu

WHOLE = [name for name, case in CASES.items() if case.mode != "sample"]


@pytest.fixture(autouse=True)
def whole(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Counts the calls of the compiled attention, so that no test passes by taking another path."""
    calls: list[int] = []
    attend = numba_attention.attend
    monkeypatch.setattr("mmi_kernels.fused._numba_attend", lambda: lambda *args: (calls.append(1), attend(*args))[1])
    with torch.no_grad():
        yield calls
    assert calls


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", WHOLE)
def test_output_is_the_reference(name: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmi_kernels.numba_attention.MIN_WORK_PER_THREAD", 1)
    monkeypatch.setattr("mmi_kernels.numba_cpu.MIN_WORK_PER_THREAD", 1)
    given, before = draw(CASES[name], torch.float32), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = run(CASES[name], given, "numba")
    finally:
        torch.set_num_threads(before)
    truth = run(CASES[name], precise(given))
    error = (found.double() - truth).abs().max() / truth.abs().max()
    assert error < 3e-6, f"off by {error:.1e}"
    assert found.is_contiguous() and found.shape == truth.shape


@pytest.mark.parametrize("name", ["mmfs, odd sizes", "mmfs, token and rows"])
def test_a_traced_function_holds_it_as_one_operator(name: str, whole: list[int]) -> None:
    case, given, graphs = CASES[name], draw(CASES[name], torch.float32), []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append((graph, inputs))
        return graph

    found = torch.compile(lambda inputs: run(case, inputs, "numba"), backend=keep, fullgraph=True)(given)
    assert len(whole) == 1 and torch.equal(found, run(case, given, "numba"))
    operands: list[tuple[object, ...]] = []

    class Operands(torch.fx.Interpreter):
        def call_function(self, target, args, kwargs):  # type: ignore[no-untyped-def]
            if target is torch.ops.mmi.mmfs.default:
                operands.append(args)
            return super().call_function(target, args, kwargs)

    ((graph, inputs),) = graphs
    Operands(graph).run(*inputs)
    torch.library.opcheck(torch.ops.mmi.mmfs.default, *operands)


@pytest.mark.parametrize("name", ["mmfs, tiles", "mmfs, token and rows", "attention, injector"])
def test_small_tiles_and_other_threads_give_equal_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given, before = draw(CASES[name], torch.float32), torch.get_num_threads()
    expected = run(CASES[name], given, "numba")
    monkeypatch.setattr("mmi_kernels.numba_attention.MIN_WORK_PER_THREAD", 1)
    monkeypatch.setattr("mmi_kernels.numba_cpu.MIN_WORK_PER_THREAD", 1)
    try:
        for threads, tile in ((1, 1), (2, 100), (3, 10**6)):
            torch.set_num_threads(threads)
            monkeypatch.setattr("mmi_kernels.numba_attention.TILE", tile)
            assert torch.equal(run(CASES[name], given, "numba"), expected)
    finally:
        torch.set_num_threads(before)


def test_a_row_has_its_bits_among_any_others() -> None:
    case = KernelCase("mmfs", 3, 40, 4, 16, 4, ((8, 8), (4, 4)), 2, "row", token=True)
    given = draw(case, torch.float32)
    together = run(case, given, "numba")
    alone = {
        name: tensor[1:2] if len(tensor) == 3 and name not in ("table_offsets", "table_logits") else tensor
        for name, tensor in given.items()
    }
    assert torch.equal(run(case, alone, "numba")[0], together[1])


def test_hidden_images_are_not_read_and_a_blind_query_gets_the_token() -> None:
    case = CASES["mmfs, toon"]
    given = draw(case, torch.float32)
    given["visible"][:, :, 0] = 0
    given["visible"][1] = 0
    cells = given["value"].shape[1] // 2
    given["value"][:, :cells] = float("nan")
    found = run(case, given, "numba")
    assert not found.isnan().any()
    assert torch.equal(found[1], given["token"].expand_as(found[1]))


@pytest.mark.parametrize("shift", [-300.0, 0.0, 80.0, 300.0])
def test_the_softmax_holds_for_any_logits(shift: float) -> None:
    case = CASES["mmfs, toon"]
    given = draw(case, torch.float32)
    given["logits"] = given["logits"] * 10 + shift
    torch.testing.assert_close(run(case, given, "numba").double(), run(case, precise(given)), rtol=1e-4, atol=2e-5)


def test_a_weight_is_exp_to_single_precision() -> None:
    """One sample and the ignore slot: the output is the sigmoid of the logit."""
    logits = torch.linspace(-86, 20, 4001).view(1, -1, 1)
    queries = logits.shape[1]
    out = mmfs_attention(
        torch.ones(1, 1, 1, 1), [(1, 1)], torch.zeros(1, queries, 2), logits, (torch.zeros(2, 2), torch.zeros(2, 1)),
        torch.full((1, queries, 2), 0.5), [(1.0, 1.0)], torch.ones(1, 1, 1), torch.zeros(1), backend="numba",
    )  # fmt: skip
    truth = torch.sigmoid(logits.double())
    assert ((out.double() - truth).abs() / truth).max() < 1e-5  # of the logit's own rounding, 86 · 6e-8, mostly


@pytest.mark.parametrize("name", ["offsets", "logits"])
def test_nan_shows_in_its_query_only(name: str) -> None:
    case = CASES["mmfs, toon"]
    given = draw(case, torch.float32)
    given["visible"][:] = 1
    given[name][0, 3] = float("nan")
    found = run(case, given, "numba")
    assert found[0, 3].isnan().all() and found.isnan().sum() == found[0, 3].numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_values(dtype: torch.dtype) -> None:
    given = draw(CASES["mmfs, toon"], dtype, torch.float32)
    found = run(CASES["mmfs, toon"], given, "numba")
    truth = run(CASES["mmfs, toon"], precise(given))
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), truth, rtol=2 ** (-8 if dtype == torch.bfloat16 else -10), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_visibility_and_strides_of_any_kind(dtype: torch.dtype) -> None:
    case = CASES["mmfs, odd sizes"]
    given = draw(case, torch.float32)
    expected = run(case, given, "numba")
    given["visible"] = given["visible"].to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
    both = torch.cat([given["offsets"], given["logits"]], dim=2)
    given["offsets"], given["logits"] = both.split([given["offsets"].shape[2], given["logits"].shape[2]], dim=2)
    assert torch.equal(run(case, given, "numba"), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torchs_default_type_does_not_matter(dtype: torch.dtype) -> None:
    case = CASES["mmfs, toon"]
    given = draw(case, torch.float32)
    expected = run(case, given, "numba")
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(run(case, given, "numba"), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("cut", ["no query", "no row"])
def test_empty(cut: str) -> None:
    case = CASES["mmfs, toon"]
    given = draw(case, torch.float32)
    names = ("offsets", "logits", "visible", "reference") if cut == "no query" else ("value", "offsets", "logits")
    rows = {**{name: given[name][:, :0] for name in names}} if cut == "no query" else {}
    if cut == "no row":
        rows = {name: given[name][:0] for name in (*names, "visible", "reference")}
        rows["reference"] = given["reference"][:1]
    assert run(case, {**given, **rows}, "numba").numel() == 0


def spoil(given: dict[str, Tensor], name: str) -> None:
    """Makes one input not fit, by name of the fault."""
    changes = {
        "cells": ("value", given["value"][:, 1:]),
        "heads": ("value", given["value"][:, :, 1:]),
        "sequences": ("value", given["value"][:1]),
        "offsets": ("offsets", given["offsets"][..., 1:]),
        "logits": ("logits", given["logits"][..., 1:]),
        "table": ("table_logits", given["table_logits"][:, 1:]),
        "fewer table rows": ("table_logits", given["table_logits"][1:]),
        "reference": ("reference", given["reference"][:, 1:]),
        "visible": ("visible", given["visible"][:, 1:]),
        "token": ("token", given["token"][1:]),
    }
    given.update([changes[name]])


@pytest.mark.parametrize(
    "fault",
    ["cells", "heads", "sequences", "offsets", "logits", "table", "fewer table rows", "reference", "visible", "token"],
)
def test_what_does_not_fit_is_refused(fault: str) -> None:
    case = CASES["mmfs, toon"]
    given = draw(case, torch.float32)
    spoil(given, fault)
    with pytest.raises(ValueError, match="fit"):
        run(case, given, "numba")


def test_more_images_than_the_table_tells_apart() -> None:
    case = CASES["mmfs, odd sizes"]
    given = draw(case, torch.float32)
    given["visible"][:] = 1
    for name in ("table_offsets", "table_logits"):
        given[name] = given[name][:3]
    with pytest.raises(IndexError, match="which is 2"):
        run(case, given, "numba")
    given["visible"][:, :, 1] = 0
    run(case, given, "numba")


@pytest.mark.parametrize("row", [-1, 2])
def test_rows_that_are_not_there(row: int) -> None:
    case = CASES["mmfs, token and rows"]
    given = draw(case, torch.float32)
    given["rows"][1] = row
    with pytest.raises(IndexError, match=r"within \[0, 2\)"):
        run(case, given, "numba")


def test_one_row_of_visibility_serves_all_sequences() -> None:
    case = CASES["mmfs, toon"]
    given = draw(case, torch.float32)
    given["visible"] = given["visible"][:1]
    alike = {**given, "visible": given["visible"].repeat(2, 1, 1)}
    assert torch.equal(run(case, given, "numba"), run(case, alike, "numba"))


@pytest.fixture
def no_plans() -> Iterator[None]:
    """What shapes decide is worked out in the test, and not kept after it."""
    for when in ("before", "after"):
        numba_cpu.plan_of.cache_clear()
        numba_attention._form.cache_clear()
        if when == "before":
            yield


@pytest.mark.usefixtures("no_plans")
def test_maps_in_bands_give_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bands of one level each, several queries at a time, some images hidden."""
    monkeypatch.setattr("mmi_kernels.numba_cpu.BAND", 1)
    monkeypatch.setattr("mmi_kernels.numba_attention.LINGERS", 0)
    made: list[int] = []
    bands = numba_cpu._bands
    monkeypatch.setattr(numba_cpu, "_bands", lambda *given: made.append(len(given[-1]) - 1) or bands(*given))
    case = KernelCase("mmfs", 2, 150, 3, 32, 9, ((8, 8), (4, 4)), 4, "some", token=True)
    given = draw(case, torch.float32)
    found, truth = run(case, given, "numba"), run(case, precise(given))
    assert max(made) > 1, "no map was cut"
    assert (found.double() - truth).abs().max() / truth.abs().max() < 3e-6
    monkeypatch.setattr("mmi_kernels.numba_attention.TILE", 100)
    assert torch.equal(run(case, given, "numba"), found)
