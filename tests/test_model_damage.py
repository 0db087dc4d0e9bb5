"""What an import must refuse: damage, truncation, other shapes, other models, code; and that nothing is left behind."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from released_layout import released_state, small_model, write_shards
from safetensors.torch import save_file

from mmi_cli.main import main
from mmi_engine.errors import ModelError
from mmi_engine.model.checkpoint import save_model
from mmi_engine.toon.tokenizer import PATH as TOKENIZER
from mmi_engine.weights.importing import import_released
from mmi_engine.weights.shards import Shard, list_shards


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture
def refused(tmp_path, model):
    """Import ``tmp_path/src`` with the command, expect exit code 1, return what was said; nothing may be left."""
    (tmp_path / "small.json").write_text(model.config.to_json())

    def go(capsys, *options: str) -> str:
        before = sorted(path.name for path in tmp_path.iterdir())
        command = ["model", "import", str(tmp_path / "src"), "--out", str(tmp_path / "out")]
        fixed = ["--config", str(tmp_path / "small.json"), "--tokenizer", str(TOKENIZER)]
        assert main([*command, *fixed, *options]) == 1
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        told = capsys.readouterr().err
        assert "Traceback" not in told and len(told.strip().splitlines()) == 1, told
        return told

    return go


def shards(tmp_path, model, ending: str = "bin") -> list[Path]:
    return sorted(write_shards(released_state(model), tmp_path / "src", ending=ending).iterdir())


@pytest.mark.parametrize("ending", ["bin", "safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_shard(tmp_path, model, refused, capsys, ending, kept) -> None:
    path = shards(tmp_path, model, ending)[1]
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    told = refused(capsys)
    assert path.name in told and "fetch this file again" in told


def test_a_flipped_bit_in_a_shards_numbers(tmp_path, model, refused, capsys) -> None:
    path = shards(tmp_path, model)[2]
    numbers = max(torch.load(path, weights_only=True).values(), key=torch.Tensor.numel).numpy().tobytes()
    data = bytearray(path.read_bytes())
    data[data.index(numbers) + len(numbers) // 2] ^= 0x10
    path.write_bytes(data)
    told = refused(capsys)
    assert path.name in told and "damaged" in told


def test_a_shard_that_is_no_file_of_tensors(tmp_path, model, refused, capsys) -> None:
    path = shards(tmp_path, model)[0]
    path.write_bytes(b"<html>sign in to download</html>" * 50)
    assert "no file of tensors" in refused(capsys)
    torch.save([torch.zeros(2)], path)
    assert "no state dictionary" in refused(capsys)
    torch.save({"epoch": 3, "soi_token": torch.zeros(2)}, path)
    assert "'epoch' is no tensor" in refused(capsys)


class Evil:
    """Makes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("form", ["zip", "old", "plain"])
def test_code_in_a_pickle_is_not_run(tmp_path, model, refused, capsys, form) -> None:
    path = shards(tmp_path, model)[1]
    trap = tmp_path / "trap"
    content = {"soi_token": torch.zeros(1, 24), "extra": Evil(trap)}
    if form == "plain":
        path.write_bytes(pickle.dumps({"extra": Evil(trap)}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    told = refused(capsys)
    assert path.name in told and "could run code" in told and "posix.mkdir" in told
    assert not trap.exists()


def test_wrong_shape_missing_unexpected_and_doubled_are_told_together(tmp_path, model, refused, capsys) -> None:
    state = released_state(model)
    state["soi_token"] = torch.zeros(1, 25)
    state["mm_decoder.norm.scale"] = state.pop("mm_decoder.norm.weight")
    write_shards(state, tmp_path / "src")
    told = refused(capsys)
    assert "1 missing (first: mm_decoder.norm.weight)" in told
    assert "1 unexpected (first: mm_decoder.norm.scale)" in told
    assert "1 mismatched (first: soi_token: [1, 25] instead of [1, 24])" in told
    write_shards(released_state(model), tmp_path / "src")
    torch.save({"soi_token": torch.zeros(1, 24)}, tmp_path / "src/pytorch_model-00009-of-00003.bin")
    assert "soi_token: in pytorch_model-" in refused(capsys)


def test_integers_nans_overflow_and_other_tables(tmp_path, model, refused, capsys) -> None:
    def change(**tensors) -> str:
        write_shards(
            {**released_state(model), **{k.replace("__", "."): v for k, v in tensors.items()}}, tmp_path / "src"
        )
        return refused(capsys, "--dtype", "fp16")

    assert "torch.int64 instead of torch.float32" in change(soi_token=torch.ones(1, 24, dtype=torch.int64))
    assert "not finite" in change(soi_token=torch.full((1, 24), float("nan")))
    assert "beyond torch.float16" in change(soi_token=torch.full((1, 24), 1e6))
    (table,) = [n for n in released_state(model) if n.endswith("mmfs_mid_block.pos_embed")]
    assert "another fixed table" in change(
        **{table.replace(".", "__"): torch.zeros(released_state(model)[table].shape)}
    )


def test_missing_shards_and_foreign_models(tmp_path, model, refused, capsys) -> None:
    path = shards(tmp_path, model)[2]
    names = {f"n{n}": p.name for n, p in enumerate(shards(tmp_path, model))}
    (tmp_path / "src/pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    path.unlink()
    assert f"1 of 3 shards are not there, first {path.name}" in refused(capsys)
    (tmp_path / "src/pytorch_model.bin.index.json").write_text("{")
    assert "no index of shards" in refused(capsys)
    (tmp_path / "src/pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "../../a.bin"}}')
    assert "outside its folder" in refused(capsys)
    for rest in (tmp_path / "src").iterdir():
        rest.unlink()
    assert "holds no *.safetensors or *.bin" in refused(capsys)
    torch.save({"model.embed_tokens.weight": torch.zeros(4, 4)}, tmp_path / "src/pytorch_model.bin")
    assert "mmi model new assembles" in refused(capsys)


def test_a_model_directory_is_told_to_be_one(tmp_path, model, refused, capsys) -> None:
    save_model(model, tmp_path / "src")
    assert "a model directory already" in refused(capsys)


def test_no_or_another_tokenizer(tmp_path, model, refused, capsys) -> None:
    shards(tmp_path, model)
    (tmp_path / "small.json").write_text(model.config.to_json())
    assert "name the tokenizer by --tokenizer" in refused(capsys, "--tokenizer", str(tmp_path))
    (tmp_path / "bad.json").write_text("{}")
    assert "cannot be read" in refused(capsys, "--tokenizer", str(tmp_path / "bad.json"))
    with pytest.raises(ModelError, match="name the tokenizer"):
        import_released(tmp_path / "src", tmp_path / "out", config=model.config)


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, model, refused, capsys, monkeypatch) -> None:
    import shutil
    from collections import namedtuple

    shards(tmp_path, model)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 5, 5))
    assert "the model needs" in refused(capsys)


def test_training_state_beside_the_shards_is_not_read(tmp_path, model) -> None:
    found = shards(tmp_path, model)
    (tmp_path / "src/training_args.bin").write_bytes(b"x")
    (tmp_path / "src/optimizer.bin").write_bytes(b"x")
    assert [shard.path for shard in list_shards(tmp_path / "src")] == found
    with pytest.raises(ModelError, match="cannot be read"):
        Shard(tmp_path / "nowhere.bin")


@pytest.mark.parametrize("ending", ["bin", "safetensors"])
def test_number_formats_that_cannot_be_kept_are_named(tmp_path, ending) -> None:
    path, odd = tmp_path / f"a.{ending}", {"a": torch.zeros(4, dtype=torch.float8_e4m3fn)}
    torch.save(odd, path) if ending == "bin" else save_file(odd, path)
    with pytest.raises(ModelError, match=r"(?i)a\.\w+: a is stored as .*f(loat)?8_e4m3\w*, which is not supported"):
        Shard(path).entries()


def test_a_layout_that_cannot_be_kept_is_named(tmp_path) -> None:
    torch.save({"a": torch.eye(3).to_sparse()}, tmp_path / "a.bin")
    with pytest.raises(ModelError, match=r"torch\.sparse_coo, which is not supported"):
        Shard(tmp_path / "a.bin").entries()


def test_an_index_that_lists_numbers(tmp_path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": 5}}')
    with pytest.raises(ModelError, match="no index of shards"):
        list_shards(tmp_path)


def test_a_folder_of_the_users_is_not_taken_for_an_unfinished_import(tmp_path, model, refused, capsys) -> None:
    shards(tmp_path, model)
    own = tmp_path / "out.partial"
    own.mkdir()
    (own / "thesis.tex").write_text("x")
    assert "thesis.tex is no part of an unfinished model" in refused(capsys)
    assert (own / "thesis.tex").read_text() == "x"
    (own / "thesis.tex").unlink()
    (own / "config.json").write_text("{}")  # as a kill leaves it before the plan is written
    import_released(tmp_path / "src", tmp_path / "out", config=model.config, tokenizer=str(TOKENIZER))
    assert not own.exists() and not (tmp_path / "out/plan.json").exists()
