"""The kernel on a CUDA device: every case against float64, streams, graphs, tracing, determinism, large addresses.

The errors found go into the report of the run (`pytest --junitxml`), as a property per test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from kernel_cases import CASES, assert_as_good_as_torch, draw, evaluate, operands, run, told
from torch import Tensor

from mmi_kernels import KernelUnavailable, backends, deform_sample, resolve

pytestmark = pytest.mark.gpu

SIXTEEN_BIT = ("mmfs, odd sizes", "mmfs, one query", "mmfs, tiles", "mmfs, toon", "attention, injector", "sample, wide")


@pytest.fixture(autouse=True)
def deterministic_off() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


def on_device(name: str, dtype: torch.dtype = torch.float32, device: str = "cuda", **more: torch.dtype) -> dict:
    return {key: tensor.to(device) for key, tensor in draw(CASES[name], dtype, **more).items()}


def kernel(name: str) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda inputs: run(CASES[name], inputs, "cuda")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in CASES]
    + [(name, dtype) for dtype in (torch.float16, torch.bfloat16) for name in SIXTEEN_BIT],
)
def test_errors(name: str, dtype: torch.dtype, record_property: Callable[[str, object], None]) -> None:
    given = on_device(name, dtype)
    found = assert_as_good_as_torch(CASES[name], given, evaluate(kernel(name), given))
    record_property("errors", told("cuda", name, dtype, found))


def test_auto_takes_the_kernel() -> None:
    assert resolve("auto", "cuda") == resolve("auto", "cuda:0") == resolve("cuda", "cuda") == "cuda"
    assert resolve("auto", "cuda", torch.float64) == "torch"
    assert backends()["cuda"].available
    with pytest.raises(KernelUnavailable, match="serves CUDA tensors"):
        resolve("cuda", "cpu")
    with pytest.raises(KernelUnavailable, match="computes in float32"):
        resolve("cuda", "cuda", torch.float64)
    with pytest.raises(KernelUnavailable, match="there is no CUDA device 99"):
        resolve("cuda", "cuda:99")


def test_finite_differences() -> None:
    """Of the kernel itself, in single precision along a random direction of each input."""
    name = "mmfs, toon"
    given = on_device(name)
    gradients = evaluate(kernel(name), given)
    for leaf, step in (("value", 0.5), ("logits", 0.02), ("table_logits", 0.02), ("token", 0.5)):
        direction = torch.randn_like(given[leaf])
        ahead, behind = (kernel(name)({**given, leaf: given[leaf] + s * direction}).double() for s in (step, -step))
        expected = ((ahead - behind) * given["pull"]).sum() / (2 * step)
        found = (gradients[f"grad {leaf}"].double() * direction).sum()
        scale = gradients[f"grad {leaf}"].double().norm()
        assert abs(found - expected) <= 2e-3 * scale, leaf


@pytest.mark.parametrize("name", ["mmfs, odd sizes", "attention, narrow", "sample, one point"])
def test_operators_pass_opcheck(name: str) -> None:
    torch.library.opcheck(torch.ops.mmi.sample.default, operands(CASES[name], on_device(name)))


def test_compiled_and_eager_agree() -> None:
    name = "mmfs, odd sizes"
    given = on_device(name)
    compiled = torch.compile(lambda inputs: kernel(name)(inputs) * 2, backend="aot_eager", fullgraph=True)
    plain = evaluate(lambda inputs: kernel(name)(inputs) * 2, given)
    for key, tensor in evaluate(compiled, given).items():
        torch.testing.assert_close(tensor, plain[key])


def test_work_is_queued_on_the_current_stream() -> None:
    name = "mmfs, toon"
    given = on_device(name)
    expected = kernel(name)(given)
    late = torch.zeros_like(given["value"])
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()) as _:
        stream = torch.cuda.current_stream()
        torch.cuda._sleep(50_000_000)  # some 30 ms in which another stream would read zeros
        late.copy_(given["value"])
        found = kernel(name)({**given, "value": late})
    stream.synchronize()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["mmfs, toon", "mmfs, one query"])
def test_graph_capture_and_replay(name: str) -> None:
    first, second = on_device(name), on_device(name)
    second = {k: t.flip(0) if t.is_floating_point() and k in ("value", "pull") else t for k, t in second.items()}
    expected = evaluate(kernel(name), second)
    held = {key: tensor.clone() for key, tensor in first.items()}
    leaves = {k: held[k].requires_grad_() for k in ("value", "offsets", "logits")}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            torch.autograd.grad(kernel(name)({**held, **leaves}), list(leaves.values()), held["pull"])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernel(name)({**held, **leaves})
        gradients = torch.autograd.grad(out, list(leaves.values()), held["pull"])
    with torch.no_grad():
        for key in ("value", "pull"):
            held[key].copy_(second[key])
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(out, expected["out"], rtol=1e-5, atol=1e-5)
    for key, gradient in zip(leaves, gradients, strict=True):
        torch.testing.assert_close(gradient, expected[f"grad {key}"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mmfs, tiles", "attention, injector", "sample, wide"])
def test_deterministic_mode_gives_equal_bits(name: str) -> None:
    case, given = CASES[name], on_device(name)
    torch.use_deterministic_algorithms(True)
    first = evaluate(kernel(name), given)
    for _ in range(5):
        again = evaluate(kernel(name), given)
        assert all(torch.equal(first[key], again[key]) for key in first)
    torch.use_deterministic_algorithms(False)
    assert_as_good_as_torch(case, given, first)


def test_gradient_that_is_not_finite_stays_so_in_deterministic_mode() -> None:
    given = on_device("sample, two levels")
    given["pull"][0, 0, 0] = float("inf")
    torch.use_deterministic_algorithms(True)
    assert evaluate(kernel("sample, two levels"), given)["grad value"].isnan().any()


def test_addresses_beyond_32_bits() -> None:
    """Values of 2.2 thousand million elements; the last row must be found."""
    rows, heads, dim, shape = 33, 256, 64, (64, 64)
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free device memory")
    value = torch.zeros(rows, shape[0] * shape[1], heads, dim, dtype=torch.bfloat16, device="cuda")
    assert value.numel() > 2**31
    value[-1].normal_()
    locations = torch.rand(rows, 3, heads, 1, 2, 2, device="cuda")
    weights = torch.rand(rows, 3, heads, 1, 2, device="cuda")
    whole = deform_sample(value, [shape], locations, weights, backend="cuda")
    alone = deform_sample(value[-1:], [shape], locations[-1:], weights[-1:], backend="cuda")
    assert torch.equal(whole[-1:], alone) and alone.any() and not whole[:-1].any()


def test_module_under_autocast() -> None:
    """The MMFS module in bf16 autocast: the kernel as far from float32 as torch is."""
    from mmi_engine.model.config import MMFSConfig
    from mmi_engine.model.mmfs import MMFS

    torch.manual_seed(0)
    config = MMFSConfig(heads=4, points=4, width=64, levels=(8, 4), max_images=5, offset_init=2.0)
    module = MMFS(config, d_query=48, d_value=40, d_out=48, base=8).cuda()
    query, features = torch.randn(2, 64, 48, device="cuda"), torch.randn(2, 3, 80, 40, device="cuda")
    reference, visible = torch.rand(1, 64, 2, device="cuda"), torch.randint(0, 2, (2, 64, 3), device="cuda")

    def gradients(backend: str, autocast: bool) -> list[Tensor]:
        module.backend = backend
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            out = module(query, reference, module.project_values(features), ((8, 8), (4, 4)), visible)
        parameters = [p for p in module.parameters() if p.requires_grad]
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), parameters)]

    truth = gradients("torch", False)
    for single, ours, torchs in zip(truth, gradients("cuda", True), gradients("torch", True), strict=True):
        scale = single.abs().max()
        bound = 2 * (torchs.float() - single).abs().max() + 1e-2 * scale
        assert (ours.float() - single).abs().max() <= bound
    for single, ours in zip(truth, gradients("cuda", False), strict=True):
        torch.testing.assert_close(ours, single, rtol=1e-3, atol=1e-4 * single.abs().max().item())


def test_second_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    name = "mmfs, toon"
    first, second = (evaluate(kernel(name), on_device(name, device=device)) for device in ("cuda:0", "cuda:1"))
    for key, tensor in first.items():
        torch.testing.assert_close(second[key].to("cuda:0"), tensor)
