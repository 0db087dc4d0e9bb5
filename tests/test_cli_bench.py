"""`mmi bench kernel` on a CPU: what it prints, writes and refuses; table and plot of its figures."""

from __future__ import annotations

import json
from typing import Any

import pytest
from torch import Tensor

from mmi_cli.main import main
from mmi_engine import kernel_bench
from mmi_kernels import bench, deform_sample, fused, numba_attention

SMALL = (bench.Case("small", 2, (4, 2), 2, 2, 16, 4, 3), bench.Case("decode", 1, (4,), 1, 2, 16, 1, 3, training=False))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "CASES", SMALL)
    monkeypatch.setattr(kernel_bench, "_CPU_LAYERS", (("layer", 8, 4, 1, (4, 2), 4),))


@pytest.mark.usefixtures("small")
def test_figures_go_to_stdout_and_files(tmp_path, capsys) -> None:
    files = ["--out", str(tmp_path / "figures.json"), "--plot", str(tmp_path / "figures.png")]
    assert main(["bench", "kernel", "--device", "cpu", "--seconds", "0", "--json", *files]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "figures.json").read_text())
    assert (tmp_path / "figures.png").read_bytes()[:4] == b"\x89PNG"
    seen = {(f["level"], f["case"], f["step"], f["name"]) for f in found["figures"]}
    timed = (("op", "small"), ("attention", "small"), ("module", "layer"))
    assert seen == {
        *((*where, step, name) for where in timed for step in ("forward", "training") for name in ("torch", "numba")),
        *((level, "decode", "forward", name) for level in ("op", "attention") for name in ("torch", "numba")),
    }
    assert found["machine"]["torch"] and not found["troubles"]


@pytest.mark.usefixtures("small")
def test_the_table_has_a_line_per_case_and_step(capsys) -> None:
    assert main(["bench", "kernel", "--device", "cpu", "--seconds", "0", "--level", "op"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert " ".join(lines[1].split()) == "level case dtype step numba ms spread of copy speed MiB torch"
    assert [line.split()[:4] for line in lines[2:]] == [
        ["op", "small", "float32", "forward"],
        ["op", "small", "float32", "training"],
        ["op", "decode", "float32", "forward"],
    ]


@pytest.mark.usefixtures("small")
def test_wrong_numbers_are_reported_and_the_exit_code_tells(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def wrong(*_: Any, **__: Any) -> dict[str, Any]:
        raise bench.VerificationError("numba, small: output off by 1.0e+00, allowed 1.0e-06")

    monkeypatch.setattr(bench, "run", wrong)
    assert main(["bench", "kernel", "--device", "cpu", "--seconds", "0", "--level", "op"]) == 1
    assert "output off by" in capsys.readouterr().err


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("broken", ["output", "logits gradient"])
def test_a_wrong_attention_is_not_timed(broken: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """One of numba's two ways: whole without gradients, by softmax and samples with them."""
    if broken == "output":
        right = numba_attention.attend
        monkeypatch.setattr("mmi_kernels.fused._numba_attend", lambda: lambda *args: 1.001 * right(*args))
    else:
        monkeypatch.setattr(fused, "deform_sample", _steeper)
    assert main(["bench", "kernel", "--device", "cpu", "--seconds", "0", "--level", "attention"]) == 1
    assert f"numba, small: {broken} off by" in capsys.readouterr().err


def _steeper(value: Tensor, shapes: Any, locations: Tensor, weights: Tensor, *, backend: str) -> Tensor:
    """The same samples; with numba the gradient of the weights is a tenth too large."""
    if backend == "numba":
        weights = weights + 0.1 * (weights - weights.detach())
    return deform_sample(value, shapes, locations, weights, backend=backend)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("wanted", [["--level", "whole"], ["--case", "no such case"]], ids=str)
def test_what_cannot_be_measured_is_refused(wanted: list[str], capsys) -> None:
    assert main(["bench", "kernel", "--device", "cpu", "--seconds", "0", *wanted]) == 2
    assert capsys.readouterr().err


def test_no_device_no_figures(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["bench", "kernel", "--device", "cuda"]) == 1
    assert "--device cpu" in capsys.readouterr().err


def test_ratios_are_times_over_ours(tmp_path) -> None:
    where = {"case": "c", "dtype": "bfloat16", "step": "forward"}
    times = (("op", "mmi", 2.0), ("op", "torch", 5.0), ("attention", "mmi", 1.0), ("attention", "deformable-detr", 0.5))
    figures = [{**where, "level": level, "name": name, "median_ms": ms} for level, name, ms in times]
    assert kernel_bench.table(figures) == [
        ("level", "case", "dtype", "step", "mmi ms", "torch", "deformable-detr"),
        ("attention", "c", "bfloat16", "forward", "1.000", "–", "0.500 (0.50×)"),
        ("op", "c", "bfloat16", "forward", "2.000", "5.000 (2.50×)", "–"),
    ]
    assert kernel_bench.markdown(figures).splitlines()[1] == "| --- | --- | --- | --- | --- | --- | --- |"
    kernel_bench.plot(figures, tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    assert "deformable-detr" in drawn and "torch" not in drawn  # the attention level alone, what the model calls
