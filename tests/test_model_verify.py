"""The self-check: the shipped golden bundle passes; what is damaged, missing or unknown fails."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmi_engine.errors import VerifyError
from mmi_engine.verify.bundle import Bundle
from mmi_engine.verify.cases import SHIPPED, verify
from mmi_engine.verify.compare import GRADIENT, CaseReport
from mmi_kernels import backends


@pytest.mark.parametrize("backend", [name for name, state in backends().items() if state.available and name != "cuda"])
def test_shipped_bundle_passes_with_every_kernel_here(backend: str) -> None:
    reports = list(verify(SHIPPED, backend=backend))
    assert [r.case.split("_")[0] for r in reports] == ["case1", "case2", "case3", "case5"]
    failed = [(row.case, row.tensor, row.relative) for report in reports for row in report.rows if not row.passed]
    assert failed == []


@pytest.fixture
def small(tmp_path):
    """Case 1 of the shipped bundle alone."""
    for suffix in ("json", "safetensors"):
        shutil.copyfile(SHIPPED / f"case1_mmfs_op.{suffix}", tmp_path / f"case1_mmfs_op.{suffix}")
    return tmp_path


def change(folder, edit) -> list:
    path = folder / "case1_mmfs_op.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    return [row.tensor for report in verify(folder, backend="torch") for row in report.rows if not row.passed]


def test_a_changed_value_fails_that_tensor(small) -> None:
    def nudge(tensors: dict) -> None:
        tensors["0.output"][0, 0, 0] += 1e-3

    assert change(small, nudge) == ["0.output"]


def test_an_unknown_tensor_fails(small) -> None:
    assert change(small, lambda tensors: tensors.update({"0.novel": torch.zeros(2)})) == ["0.novel"]


def test_another_shape_fails(small) -> None:
    def cut(tensors: dict) -> None:
        tensors["1.output"] = tensors["1.output"][:, :-1].clone()

    assert change(small, cut) == ["1.output"]


def test_broken_bundles_are_refused(small, tmp_path) -> None:
    with pytest.raises(VerifyError, match="not a directory"):
        list(verify(small / "absent"))
    (small / "case9_novel.safetensors").write_bytes((small / "case1_mmfs_op.safetensors").read_bytes())
    with pytest.raises(VerifyError, match="unknown kind"):
        list(verify(small))
    (small / "case9_novel.safetensors").unlink()
    (small / "case1_mmfs_op.safetensors").write_bytes(b"torn")
    with pytest.raises(VerifyError, match="cannot be read"):
        list(verify(small))


def test_missing_weights_fail(tmp_path) -> None:
    shutil.copytree(SHIPPED, tmp_path / "b")
    for path in (tmp_path / "b").glob("case[125]*"):
        path.unlink()
    weights = load_file(tmp_path / "b" / "model.safetensors")
    weights.pop("visual_tokenizer.pos_ln.weight")
    save_file(weights, tmp_path / "b" / "model.safetensors")
    failed = [row.tensor for report in verify(tmp_path / "b") for row in report.rows if not row.passed]
    assert "visual_tokenizer.pos_ln.weight" in failed


def test_names_of_the_bundle_map_both_ways() -> None:
    from mmi_engine.model.names import NameTable

    bundle = Bundle(SHIPPED)
    table = NameTable(bundle.config)
    for name in bundle.weights:
        ours = table.to_ours(name)
        if ours is not None:
            assert table.to_released(ours) == name
        else:
            assert name.endswith("position_ids")


def test_tolerances() -> None:
    report = CaseReport("c")
    golden = torch.tensor([1.0, -2.0])
    report.check("close", golden + 3e-5, golden)
    report.check("far", golden + 5e-5, golden)
    report.check("gradient", golden + 1.9e-3, golden, GRADIENT)
    report.check("nan", golden * float("nan"), golden)
    report.check("ids", torch.tensor([1, 2]), torch.tensor([1, 3]))
    assert [row.passed for row in report.rows] == [True, False, True, False, False]
    assert not CaseReport("empty").finish({}, set()).passed
