"""The decode step of `--compile`: traced as it is compiled, run by torch itself; one test goes through the compiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import emulator
import pytest
import torch
from command_data import make_data
from torch import Tensor

from mmi_cli.main import main
from mmi_engine.errors import BackendError
from mmi_engine.generate import compiled, fixed
from mmi_engine.generate.compiled import CompiledToken, compile_text
from mmi_engine.generate.graphs import Graphs
from mmi_engine.generate.interleave import fill
from mmi_engine.generate.settings import Settings
from mmi_engine.generate.text import generate_text
from mmi_engine.model.interleaved import MMInterleaved
from mmi_kernels import fused, op
from tests.test_generate_continuous import SETTINGS, items
from tests.test_generate_graphs import CLOSE, ROWS, continued
from tests.test_generate_text import prompt_of
from tests.tiny import tiny_config, tiny_model


class Traces:
    """A backend of `torch.compile` that runs what was traced as it is, and counts how often that was asked of it."""

    def __init__(self, most: int = 1000) -> None:
        self.count, self.most = 0, most

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.count += 1
        if self.count > self.most:
            raise RuntimeError("the compiler is broken")
        return graph.forward


@pytest.fixture(scope="module")
def model() -> MMInterleaved:
    return tiny_model(seed=2)


@contextmanager
def with_compiler(model: MMInterleaved, backend: Any) -> Iterator[None]:
    model.graphs = Graphs(model.device, CompiledToken(backend))
    try:
        yield
    finally:
        model.graphs = None


@pytest.mark.parametrize(("kernel", "columns"), [("numba", 8), ("torch", 8), ("torch", 12)])
def test_the_same_tokens_and_few_compilations(
    model, kernel: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy, sampled, beams, continuous batching; one to nine rows, none to three images, buffers that grow. Twelve
    columns are as many as a head has channels, two rows as many as there are heads."""
    monkeypatch.setattr(fixed, "COLUMNS", columns)
    ways = [
        Settings(max_new_tokens=12, min_new_tokens=12, repetition_penalty=1.3),
        Settings(max_new_tokens=5, temperature=1.0, top_p=0.9),
        Settings(max_new_tokens=5, beams=3),
    ]

    def write() -> list[Any]:
        found: list[Any] = []
        for which, settings in [(which, settings) for which in ROWS for settings in ways]:
            prompt = prompt_of(model, *ROWS[which])
            generators = [torch.Generator().manual_seed(row) for row in range(len(prompt.ids))]
            found.append(generate_text(model, prompt, settings, generators=generators).ids)
        for settings in SETTINGS.values():
            filled = fill(model, items(), list(range(len(items()))), settings, 3, continuous=True)
            found.append([piece.value for document in filled for piece in document if piece.kind == "text"])
        return found

    model.set_backend(kernel)
    expected, traces = write(), Traces()
    monkeypatch.setattr(model.language, "lean", False)
    kinds, call = set(), CompiledToken.__call__

    def noted(self: CompiledToken, *arguments: Any) -> Tensor:
        seen = arguments[-1]
        kinds.add((min(len(arguments[1]), 2), 0 if seen is None else min(seen.visible.shape[-1], 2)))
        return call(self, *arguments)

    monkeypatch.setattr(CompiledToken, "__call__", noted)
    assert compile_text(model, 2, backend=traces)  # as a command begins: one picture, and as many rows as heads
    try:
        assert write() == expected
    finally:
        model.graphs = None
        model.set_backend("auto")
    assert traces.count == len(kinds) >= 3


@pytest.mark.skipif(emulator.COMPILER is None, reason="needs a C++ compiler")
def test_the_kernel_for_cuda_is_part_of_the_graph(model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its source runs on the CPU; what is traced is what a device gets."""
    emulator.install()
    expected = {which: continued(model, which, 3) for which in ROWS}
    for module in (fused, op):
        monkeypatch.setattr(module, "backend_for", lambda backend, *_, **__: "cuda")
    traces = Traces()
    with with_compiler(model, traces):
        for which, logits in expected.items():
            for ours, plain in zip(continued(model, which, 3), logits, strict=True):
                torch.testing.assert_close(ours, plain, **CLOSE)
    assert traces.count == 3


@pytest.mark.skipif(emulator.COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own
def test_through_the_compiler() -> None:
    """One layer with MMFS, which takes seconds."""
    config = tiny_config()
    body = {**config.language.transformers, "num_hidden_layers": 1}
    small = tiny_model(2, replace(config, language=replace(config.language, transformers=body)))
    expected = continued(small, "padded", 3)
    plain_loops = torch._inductor.config.patch({"cpp.simdlen": 1})
    with plain_loops, with_compiler(small, "inductor"):
        for ours, plain in zip(continued(small, "padded", 3), expected, strict=True):
            torch.testing.assert_close(ours, plain, **CLOSE)


def test_what_cannot_be_compiled_is_said_at_once_and_later(model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.language, "lean", False)
    with pytest.raises(BackendError, match="the language model's step cannot be compiled here: .*leave out --compile"):
        compile_text(model, 2, backend="no such backend")
    assert model.graphs is None
    assert compile_text(model, 2, backend=Traces(most=1))
    prompt, settings = prompt_of(model, *ROWS["no image"]), Settings(max_new_tokens=3, min_new_tokens=3)
    with pytest.raises(BackendError, match="cannot be compiled here: .*the compiler is broken"):
        generate_text(model, prompt, settings)
    model.graphs = None


def test_the_step_written_by_hand_stays_where_it_serves(model) -> None:
    assert not compile_text(model, 2, backend="no such backend")
    assert model.graphs is None


def test_language_models_without_fixed_shapes_are_refused() -> None:
    config = tiny_config()
    body = {**config.language.transformers, "model_type": "mistral", "sliding_window": 8}
    other = tiny_model(2, replace(config, language=replace(config.language, transformers=body)))
    with pytest.raises(BackendError, match="--compile does not serve this language model: .*sliding window"):
        compile_text(other, 2)


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """A command that writes compiles the step alone; its results are the same, its settings are not."""
    traces, seen = Traces(), []
    monkeypatch.setattr(
        compiled, "compile_text", lambda model, rows, **named: compile_text(model, rows, **named, backend=traces)
    )
    monkeypatch.setattr(compiled, "compile_unet", lambda *arguments, **named: seen.append("unet"))
    data = make_data(tmp_path)
    common = [
        "vqa",
        str(data / "vqa.jsonl"),
        "--model",
        str(data / "model"),
        "--device",
        "cpu",
        "--batch-size",
        "2",
        "--threads",
        "1",
    ]
    for name in ("plain", "by hand", "compiled"):
        extra = [] if name == "plain" else ["--compile"]
        if name == "compiled":
            monkeypatch.setattr(compiled, "token_step", lambda model, cache: None)
        assert main([*common, "--out", str(tmp_path / name), *extra]) == 3  # one row asks nothing
        told = capsys.readouterr().err
        assert ("compiling the language model's step, which" in told) == bool(extra)
        assert ("the one written for this model is faster" in told) == (name == "by hand")
        assert (tmp_path / name / "results.jsonl").read_text() == (tmp_path / "plain" / "results.jsonl").read_text()
        assert bool(traces.count) == (name == "compiled") and not seen
    assert main([*common, "--out", str(tmp_path / "compiled")]) == 2
    assert main([*common, "--out", str(tmp_path / "map"), "--compile", "--device-map", "auto"]) == 2
    assert "--compile does not go together with --device-map" in capsys.readouterr().err
