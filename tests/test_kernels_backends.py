"""Which backend serves a call, what cannot be served, and what is loaded when."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

import mmi_kernels
from mmi_kernels import (
    KernelUnavailable,
    backends,
    cuda_build,
    deform_sample,
    numba_cpu,
    numba_loops,
    numba_simd,
    numba_team,
    op,
    resolve,
)


def inputs(rows: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[tuple[int, int]], Tensor, Tensor]:
    """Two rows, levels 3 × 5 and 2 × 2, two heads of 16, seven queries, three points."""
    generator = torch.Generator().manual_seed(7)
    value = torch.randn(rows, 19, 2, 16, generator=generator, dtype=dtype)
    locations = torch.rand(rows, 7, 2, 2, 3, 2, generator=generator, dtype=dtype)
    weights = torch.rand(rows, 7, 2, 2, 3, generator=generator, dtype=dtype)
    return value, [(3, 5), (2, 2)], locations, weights


def test_auto_takes_numba_where_it_serves_and_torch_elsewhere() -> None:
    assert resolve() == "numba"
    assert resolve("auto", "cpu", torch.bfloat16) == "numba"
    assert resolve("auto", "cpu", torch.float64) == "torch"
    assert resolve("auto", "meta") == "torch"
    assert resolve("torch", "cuda") == "torch"


def test_auto_computes_float64_in_float64() -> None:
    value, shapes, locations, weights = inputs(dtype=torch.float64)
    out = deform_sample(value, shapes, locations, weights)
    assert torch.equal(out, deform_sample(value, shapes, locations, weights, backend="torch"))
    assert not torch.equal(out, out.float().double())


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "cause"),
    [
        ("cuda", "cpu", torch.float32, "serves CUDA tensors|no CUDA driver or device|no CUDA support"),
        ("numba", "cuda", torch.float32, "serves CPU tensors"),
        ("numba", "cpu", torch.float64, "computes in float32"),
    ],
)
def test_a_request_by_name_that_cannot_be_met_fails(backend: str, device: str, dtype: torch.dtype, cause: str) -> None:
    with pytest.raises(KernelUnavailable, match=cause) as caught:
        resolve(backend, device, dtype)
    assert caught.value.code == "kernel_unavailable"
    assert "torch" in caught.value.remedy and caught.value.remedy in str(caught.value)


def test_maps_beyond_exact_float32_positions_go_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmi_kernels.op._NUMBA_POSITIONS", 18)  # one less than the inputs have
    assert torch.equal(deform_sample(*inputs()), deform_sample(*inputs(), backend="torch"))
    with pytest.raises(KernelUnavailable, match="at most 18 positions, not 19"):
        deform_sample(*inputs(), backend="numba")


def test_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmi_kernels.op._numba_present", lambda: False)
    assert resolve() == "torch"
    assert not backends()["numba"].available
    with pytest.raises(KernelUnavailable, match="not installed.*pip install"):
        deform_sample(*inputs(), backend="numba")


def test_backends_tells_the_truth() -> None:
    for name, state in backends().items():
        assert state.reason
        if state.available:
            assert deform_sample(*inputs(), backend=name).isfinite().all()
        else:
            with pytest.raises(KernelUnavailable):
                deform_sample(*inputs(), backend=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, s, x, w: (v, [(3, 5)], x, w), "add up to another number"),
        (lambda v, s, x, w: (v, [(3, 5), (4, 0)], x, w), "spatial_shapes"),
        (lambda v, s, x, w: (v, [], x, w), "spatial_shapes"),
        (lambda v, s, x, w: (v[..., 0], s, x, w), r"value must be \[N, S, H, D\]"),
        (lambda v, s, x, w: (v, s, x, w[:1]), "weights must be"),
        (lambda v, s, x, w: (v, s, x[:, :, :1], w[:, :, :1]), "weights must be"),
        (lambda v, s, x, w: (v, s, x[..., :0, :], w[..., :0]), "at least one point"),
        (lambda v, s, x, w: (v, s, x[:, :6], w), "locations must be"),
        (lambda v, s, x, w: (v, s, x.to("meta"), w), "different devices"),
        (lambda v, s, x, w: (v.long(), s, x, w), "floating-point"),
    ],
)
def test_what_does_not_fit_is_named(change: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        deform_sample(*change(*inputs()))


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="unknown backend 'opencl'"):
        deform_sample(*inputs(), backend="opencl")


def test_import_loads_neither_numba_nor_cupy() -> None:
    code = (
        "import sys, mmi_kernels; mmi_kernels.backends(); mmi_kernels.resolve();"
        "sys.exit(any(name in sys.modules for name in ('numba', 'cupy')))"
    )
    path = os.path.dirname(os.path.dirname(mmi_kernels.__file__))
    assert subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}).returncode == 0


def test_loops_compile_where_no_cache_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    from numba.core import caching

    monkeypatch.setattr(caching.FunctionCache._impl_class, "_locator_classes", [])
    twice = numba_loops.compiled(lambda x: 2 * x)
    assert twice(21) == 42


def test_an_edited_source_is_compiled_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code is loaded from disk only while the file with the vector operations is as it was."""
    import numba

    def hits() -> int:
        twice = numba_loops.compiled(lambda x: 2 * x)
        assert twice(21) == 42
        return sum(twice.stats.cache_hits.values())

    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    edited = tmp_path / "numba_simd.py"
    edited.write_bytes(Path(numba_simd.__file__).read_bytes() + b"# edited\n")
    assert [hits(), hits()] == [0, 1]
    monkeypatch.setattr(numba_simd, "__file__", str(edited))
    assert [hits(), hits()] == [0, 1]


def as_with_two_threads(monkeypatch: pytest.MonkeyPatch, loop: str, in_worker: Callable[[], None]) -> None:
    """Calls use one worker, which does `in_worker`; an interrupt (Ctrl-C) meets the calling thread meanwhile."""
    started = threading.Event()

    def stand_in(*_: object) -> None:
        if threading.current_thread().name.startswith("mmi_kernels"):
            started.set()
            in_worker()
        else:
            started.wait(10)
            raise KeyboardInterrupt

    monkeypatch.setattr(numba_cpu, "MIN_WORK_PER_THREAD", 1)
    monkeypatch.setattr(numba_team, "available", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(numba_loops, loop, stand_in)


@pytest.mark.parametrize("loop", ["sample_lanes", "sample_lanes_backward"])
def test_an_interrupted_call_waits_for_its_workers(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[bool] = []
    value, *rest = inputs()
    out = deform_sample(value.requires_grad_(), *rest, backend="numba").sum()
    as_with_two_threads(monkeypatch, loop, lambda: (time.sleep(0.1), done.append(True)))
    with pytest.raises(KeyboardInterrupt):
        out.backward() if "backward" in loop else deform_sample(value, *rest, backend="numba")
    assert done == [True]


def test_workers_hold_the_tensors_they_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even when the wait for them is interrupted too."""
    left, done, seen, kept = threading.Event(), threading.Event(), [], []

    def tracked(tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        kept.append(weakref.ref(copy))
        return copy

    def look() -> None:
        left.wait(10)
        seen.extend(reference() is not None for reference in kept)
        done.set()

    def impatient(_: object) -> None:
        raise KeyboardInterrupt

    as_with_two_threads(monkeypatch, "sample_lanes", look)
    monkeypatch.setattr(numba_cpu, "plain", tracked)
    monkeypatch.setattr(numba_cpu, "wait", impatient)
    with suppress(KeyboardInterrupt):
        deform_sample(*inputs(), backend="numba")
    left.set()
    assert done.wait(10) and seen == [True] * 3


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor:UserWarning")  # said where 0 is given
def test_tensors_without_memory_are_refused() -> None:
    with FakeTensorMode():
        for backend in ("auto", "numba"):
            with pytest.raises(KernelUnavailable, match="not fake ones; use 'torch'"):
                deform_sample(*inputs(), backend=backend)
        assert deform_sample(*inputs(), backend="torch").shape == (2, 7, 32)


class Sampling(torch.nn.Module):
    """`deform_sample` of the 3 × 5 and 2 × 2 maps, to be exported."""

    def forward(self, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return deform_sample(value, [(3, 5), (2, 2)], locations, weights)


def test_an_export_is_refused() -> None:
    """By torch, at the first address that is asked for."""
    value, _, locations, weights = inputs()
    with pytest.raises(RuntimeError, match="Cannot access data pointer"):
        torch.export.export(Sampling(), (value, locations, weights), strict=False)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("place", [0, 2, 3])
@pytest.mark.parametrize("leaf", [False, True])
def test_forward_mode_derivatives_are_refused(place: int, leaf: bool) -> None:
    """By name; a tangent is never dropped."""
    with forward_ad.dual_level():
        arguments: list = list(inputs())
        assert torch.equal(deform_sample(*arguments), deform_sample(*inputs()))  # none here
        tensor = arguments[place].requires_grad_(leaf)
        arguments[place] = forward_ad.make_dual(tensor, torch.ones_like(tensor))
        with pytest.raises((NotImplementedError, RuntimeError), match="jvp"):
            deform_sample(*arguments, backend="numba")


def test_forward_mode_through_backward_is_refused() -> None:
    value, *rest = inputs()
    out = deform_sample(value.requires_grad_(), *rest, backend="numba")
    with forward_ad.dual_level(), pytest.raises(KernelUnavailable, match="use 'torch'"):
        torch.autograd.grad(out, value, forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out)))


def test_concurrent_calls_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmi_kernels.numba_cpu.MIN_WORK_PER_THREAD", 1)
    expected, results = deform_sample(*inputs(), backend="numba"), []

    def work() -> None:
        results.extend(deform_sample(*inputs(), backend="numba") for _ in range(20))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 80 and all(torch.equal(result, expected) for result in results)


def test_shares_are_filed_under_both_files_they_are_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    for changed in (None, numba_loops, numba_simd):
        with monkeypatch.context() as patch:
            if changed is not None:
                edited = tmp_path / "edited.py"
                edited.write_bytes(Path(changed.__file__).read_bytes() + b"# edited\n")
                patch.setattr(changed, "__file__", str(edited))
            patch.setattr(numba_team, "cfunc", lambda *_, **__: lambda function: function)

            def share() -> None: ...

            names.append(numba_team._compiled.__wrapped__(share).__qualname__)
    assert len(set(names)) == 3


def results(value: Tensor, *rest: object) -> list[Tensor]:
    """Output and all gradients."""
    leaves = [t.clone().requires_grad_() if isinstance(t, Tensor) else t for t in (value, *rest)]
    out = deform_sample(*leaves, backend="numba")
    out.backward(torch.linspace(-1, 1, out.numel()).reshape(out.shape))
    return [out.detach(), *(leaf.grad for leaf in leaves if isinstance(leaf, Tensor))]


@pytest.mark.parametrize("queries", [2, 40])  # few: not packed, so one lane is cut along its queries
@pytest.mark.parametrize("heads", [1, 3])
def test_threads_change_no_bit(heads: int, queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(1, 19, heads, 8, generator=generator)
    places = torch.rand(1, queries, heads, 2, 4, 2, generator=generator) * 1.4 - 0.2
    weights = torch.randn(1, queries, heads, 2, 4, generator=generator)
    case = (value, [(3, 5), (2, 2)], places, weights)
    monkeypatch.setattr(numba_cpu, "MIN_WORK_PER_THREAD", 1)
    asked: list[int] = []
    run = numba_team._run
    monkeypatch.setattr(numba_team, "_run", lambda *args: (asked.append(args[2]), run(*args)))
    found = []
    for team in (True, False):
        monkeypatch.setattr(numba_team, "available", lambda team=team: team)
        for threads in (1, 2, 5):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            found.append(results(*case))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    assert bool(asked) == (heads > 1 or queries == 2)


WITH_TEAM = """
import os, sys, torch
from mmi_kernels import numba_cpu, numba_team
from mmi_kernels.op import deform_sample
numba_cpu.MIN_WORK_PER_THREAD = 1
torch.set_num_threads(2)
torch.manual_seed(0)
case = torch.randn(2, 19, 4, 8), ((3, 5), (2, 2)), torch.rand(2, 40, 4, 2, 4, 2), torch.randn(2, 40, 4, 2, 4)
wanted = deform_sample(*case, backend="torch")
def check():
    torch.testing.assert_close(deform_sample(*case, backend="numba"), wanted, rtol=1e-4, atol=1e-5)
"""


def with_team(code: str, **environment: str) -> None:
    path = os.path.dirname(os.path.dirname(mmi_kernels.__file__))
    env = os.environ | {"PYTHONPATH": path} | environment
    subprocess.run([sys.executable, "-c", WITH_TEAM + code], env=env, check=True, timeout=300)


@pytest.mark.skipif(sys.platform != "linux", reason="torch's threads are reached on Linux only")
def test_a_smaller_team_than_asked_for_does_all_the_work() -> None:
    with_team("assert numba_team.available(); check()", OMP_THREAD_LIMIT="1")


@pytest.mark.skipif(sys.platform != "linux", reason="torch's threads are reached on Linux only")
def test_a_forked_process_does_not_wait_for_threads_it_has_not() -> None:
    code = """
check()
child = os.fork()
if child == 0:
    assert not numba_team.available()
    check()
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 and numba_team.available()
check()
"""
    with_team(code)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_starts_its_own_workers() -> None:
    numba_cpu._workers(1).submit(int).result()  # the pool runs before the fork
    before = numba_cpu._pool
    numba_cpu._forget_workers()  # what a fork does in the child
    assert numba_cpu._pool is None
    assert numba_cpu._workers(1).submit(int, "3").result() == 3
    assert numba_cpu._pool is not before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device(caplog: pytest.LogCaptureFixture) -> None:
    op._told.clear()
    caplog.set_level("WARNING", logger="mmi_kernels")  # a command run quietly in this process leaves it at errors
    assert resolve("auto", "cuda:0") == resolve("auto", "cuda") == "torch"
    assert len([record for record in caplog.records if "runs in torch" in record.message]) == 1  # said once
    with pytest.raises(KernelUnavailable, match="no CUDA (support|driver or device)"):
        resolve("cuda", "cuda")
    assert not backends()["cuda"].available


@pytest.mark.parametrize(
    ("broken", "cause", "remedy"),
    [
        ({"get_device_capability": lambda _: (6, 1)}, "compute capability 6.1, the kernel needs 7.0", "'torch'"),
        ({"installed": lambda: False}, "CuPy is not installed", r"pip install 'mmi\[cuda13\]'"),
        ({}, r"CuPy cannot compile or run a kernel here \(RuntimeError: broken\)", r"pip install 'mmi\[cuda13\]'"),
    ],
)
def test_why_the_kernel_cannot_serve_a_device(
    broken: dict[str, Callable], cause: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine with a device, one thing broken at a time."""

    def fails(device: int) -> None:
        raise RuntimeError("broken\nand more")

    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    found = {"is_available": lambda: True, "device_count": lambda: 1, "get_device_name": lambda _: "Card"}
    for name, answer in (found | {"get_device_capability": lambda _: (9, 0)} | broken).items():
        if name != "installed":
            monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(cuda_build, "installed", broken.get("installed", lambda: True))
    monkeypatch.setattr(cuda_build, "_probe", fails)
    cuda_build.state.cache_clear()
    try:
        with pytest.raises(KernelUnavailable, match=cause) as caught:
            resolve("cuda", "cuda:0")
        assert re.search(remedy, caught.value.remedy)
    finally:
        cuda_build.state.cache_clear()


@pytest.mark.parametrize("index", [0, 1, None])
def test_a_launch_makes_its_device_current_unless_it_is(index: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With device 0 current: stream and kernel are those of the tensor's device; only another is switched to."""
    told: list[tuple] = []

    class Switch:
        def __init__(self, device: int) -> None:
            told.append(("switch", device))

        def __enter__(self) -> None:
            told.append(("enter",))

        def __exit__(self, *_: object) -> None:
            told.append(("exit",))

    def kernel(*arguments: object, stream: object) -> None:
        told.append((*arguments, stream))

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", Switch)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=100 + device))
    monkeypatch.setattr(cuda_build, "_stream", lambda pointer: f"stream {pointer}")
    monkeypatch.setattr(cuda_build, "_kernel", lambda spec, device: kernel)
    spec = cuda_build.Spec(torch.float32, torch.float32, 64, 8, cuda_build.MMFS)
    cuda_build.launch(spec, torch.device("cuda", index) if index is not None else torch.device("cuda"), 7, (1, 2))
    call = ((7,), (cuda_build.THREADS,), (1, 2), f"stream {100 + (index or 0)}")
    assert told == ([("switch", 1), ("enter",), call, ("exit",)] if index == 1 else [call])
