"""Import of released checkpoints: every name at full size, every spelling of a small one, 448 px, resumption."""

from __future__ import annotations

import json
import lzma
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from released_layout import POSITION_IDS, released_state, small_config, small_model, write_shards
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmi_cli.main import main
from mmi_engine.errors import ModelError, OutputBusyError, OutputError
from mmi_engine.model.checkpoint import load_model, skeleton
from mmi_engine.model.names import NameTable
from mmi_engine.model.names_vision import is_dropped
from mmi_engine.model.positions import sincos_2d
from mmi_engine.model.presets import released_config
from mmi_engine.toon.tokenizer import PATH as TOKENIZER
from mmi_engine.verify.bundle import Bundle
from mmi_engine.verify.cases import SHIPPED, verify
from mmi_engine.weights import importing, store
from mmi_engine.weights.importing import import_released
from mmi_engine.weights.released import HEAD_BIAS, Placed, fitted
from mmi_engine.weights.shards import Entry

GIVEN = Path(os.environ.get("GOLDEN_BUNDLE", "/nowhere"))


def official_keys() -> dict[str, tuple[tuple[int, ...], str]]:
    text = lzma.decompress((Path(__file__).parent / "official_keys.tsv.xz").read_bytes()).decode()
    rows = [line.split("\t") for line in text.splitlines()]
    return {name: (tuple(int(n) for n in shape.split("x") if n), kind) for name, shape, kind in rows}


def test_the_full_released_layout_maps_without_gaps() -> None:
    keys, config = official_keys(), released_config()
    assert len(keys) == 2659
    model, table = skeleton(config), NameTable(config)
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    every = own | {name: tuple(value.shape) for name, value in model.named_buffers()}
    assert all(value.is_meta for value in model.parameters())
    found, dropped = {}, []
    for name, (shape, _) in keys.items():
        ours = table.to_ours(name)
        if ours is None:
            dropped.append(name)
        else:
            assert every[ours] == shape, name
            assert table.to_released(ours) == name
            found[ours] = name
    assert len(found) + len(dropped) == 2659 and dropped == [POSITION_IDS] and is_dropped(POSITION_IDS)
    assert own.keys() <= found.keys()
    assert sum(torch.Size(shape).numel() for shape, kind in keys.values() if kind != "buffer") == 14_912_865_561


class Allocated(TorchDispatchMode):
    """Collects the bytes of every tensor with memory that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        real = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor) and not leaf.is_meta]
        self.bytes += [leaf.untyped_storage().nbytes() for leaf in real]
        return result


def test_the_full_model_without_memory_never_holds_a_weight_not_even_for_a_moment() -> None:
    # its largest fixed table has 21 MB, its smallest of 40 layers' matrices 105 MB
    with Allocated() as seen:
        model = skeleton(released_config())
    assert max(seen.bytes) < 50e6 and all(buffer.device.type == "cpu" for buffer in model.buffers())


@pytest.fixture(scope="module")
def model():
    return small_model()


def assert_same(directory: Path, model, dtype: torch.dtype = torch.float32) -> None:
    loaded = load_model(directory).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[name], tensor.to(dtype).float()), name


def as_is(state):
    return state


def wrapped(state):
    return {f"module.module.{name}": value for name, value in state.items()}


def with_position_ids(state):
    return {**state, POSITION_IDS: torch.arange(17)[None], **_post_norm(state)}


def _post_norm(state):
    prefix = "visual_tokenizer.encoder.vision_model.post_layernorm."
    return {f"{prefix}{leaf}": torch.ones(16) for leaf in ("weight", "bias")}


@pytest.mark.parametrize("ending", ["bin", "safetensors"])
@pytest.mark.parametrize("spelling", [as_is, wrapped, with_position_ids])
def test_every_spelling_of_a_checkpoint_gives_the_same_model(tmp_path, model, ending, spelling) -> None:
    source = write_shards(spelling(released_state(model)), tmp_path / "src", ending=ending)
    done = import_released(source, tmp_path / "out", tokenizer=str(TOKENIZER), config=model.config)
    assert done.files == 1 and done.resumed == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "src"]
    assert len(done.dropped) == (3 if spelling is with_position_ids else 0)
    assert_same(tmp_path / "out", model)


def test_half_precision_and_one_old_pickle(tmp_path, model) -> None:
    state = {
        name: value.half() if value.is_floating_point() else value for name, value in released_state(model).items()
    }
    torch.save({"module": state}, tmp_path / "model.bin", _use_new_zipfile_serialization=False)
    import_released(tmp_path / "model.bin", tmp_path / "kept", tokenizer=str(TOKENIZER), config=model.config)
    assert_same(tmp_path / "kept", model, torch.float16)
    import_released(
        tmp_path / "model.bin", tmp_path / "bf16", tokenizer=str(TOKENIZER), config=model.config, dtype=torch.bfloat16
    )
    stored = load_file(tmp_path / "bf16/model.safetensors")
    assert {tensor.dtype for name, tensor in stored.items() if "clip_" not in name and "positions" not in name} == {
        torch.bfloat16
    }
    assert stored["visual_tokenizer.clip_mean"].dtype == torch.float16  # constants keep what precision they have


def test_several_files_with_an_index_load_like_one(tmp_path, model) -> None:
    source = write_shards(released_state(model), tmp_path / "src")
    done = import_released(source, tmp_path / "out", tokenizer=str(TOKENIZER), config=model.config, shard_bytes=60_000)
    index = json.loads((tmp_path / "out" / store.INDEX).read_text())
    names = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert len(names) == done.files > 5 and set(index["weight_map"].values()) == names
    assert index["weight_map"].keys() == model.state_dict().keys()
    assert all(path.stat().st_size < 90_000 for path in (tmp_path / "out").glob("*.safetensors"))
    assert_same(tmp_path / "out", model)


def test_an_interrupted_import_goes_on_where_it_stopped(tmp_path, model, monkeypatch) -> None:
    source = write_shards(released_state(model), tmp_path / "src")
    arguments = {"tokenizer": str(TOKENIZER), "config": model.config, "shard_bytes": 60_000}
    calls = []

    def stop(done: int, total: int) -> None:
        calls.append(done)
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_released(source, tmp_path / "out", progress=stop, **arguments)
    staging = tmp_path / "out.partial"
    assert not (tmp_path / "out").exists() and not list(staging.glob("*.safetensors.partial"))
    finished = {path: path.stat().st_mtime_ns for path in staging.glob("*.safetensors")}
    assert finished
    monkeypatch.setattr(importing.Shard, "check", None)  # what was verified is not verified again
    done = import_released(source, tmp_path / "out", **arguments)
    assert done.resumed == len(finished) < done.files
    for path, time in finished.items():
        assert (tmp_path / "out" / path.name).stat().st_mtime_ns == time
    assert_same(tmp_path / "out", model)
    with pytest.raises(OutputError, match="is there already"):
        import_released(source, tmp_path / "out", **arguments)


def test_another_request_does_not_go_on_from_a_started_one(tmp_path, model) -> None:
    source = write_shards(released_state(model), tmp_path / "src")
    arguments = {"tokenizer": str(TOKENIZER), "config": model.config, "shard_bytes": 60_000}

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_released(source, tmp_path / "out", progress=stop, **arguments)
    done = import_released(source, tmp_path / "out", dtype=torch.bfloat16, **arguments)
    assert done.resumed == 0
    loaded = load_model(tmp_path / "out").state_dict()
    assert torch.equal(loaded["boi_embedding"], model.boi_embedding.detach().bfloat16().float())


def test_two_imports_into_one_place_are_refused(tmp_path, model) -> None:
    with importing._alone(tmp_path / "out", wait=False), pytest.raises(OutputBusyError):
        import_released(tmp_path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_at_448_px_the_trunks_positions_are_resized_as_released(tmp_path, model) -> None:
    base = small_config()
    large = replace(base, vision=replace(base.vision, image_size=64, table_grid=4))
    source = write_shards(released_state(model), tmp_path / "src")
    import_released(source, tmp_path / "small", tokenizer=str(TOKENIZER), config=base)
    import_released(source, tmp_path / "large", tokenizer=str(TOKENIZER), config=large)
    small, big = load_model(tmp_path / "small"), load_model(tmp_path / "large")
    table, old = big.visual_tokenizer.trunk.position_embedding, small.visual_tokenizer.trunk.position_embedding
    assert table.shape == (65, 16) and torch.equal(table[0], old[0])
    image = old[1:].reshape(1, 4, 4, 16).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(image, size=(8, 8), mode="bicubic", align_corners=False)
    assert torch.allclose(table[1:], resized[0].flatten(1).T, atol=1e-6)
    # the fixed table stays that of the small grid, so the feature maps' positions are resized once, not twice
    assert torch.equal(big.visual_tokenizer.positions[1:], sincos_2d(4, 4, 16))
    pixels = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        one, other = small.visual_tokenizer(pixels), big.visual_tokenizer(pixels)
    assert torch.allclose(one.tokens, other.tokens, atol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one.features, other.features, strict=True))


def test_what_a_checkpoint_lacks_can_come_from_its_base_models(tmp_path, model) -> None:
    state = released_state(model)
    absent = ("mm_decoder.layers.1.", "image_decoder.decoder.vae.")
    source = write_shards({k: v for k, v in state.items() if not k.startswith(absent)}, tmp_path / "src")
    arguments = {"tokenizer": str(TOKENIZER), "config": model.config}
    with pytest.raises(ModelError, match=r"missing.*--base \(the language model, the VAE\)"):
        import_released(source, tmp_path / "out", **arguments)
    llama = {k.replace("mm_decoder.", "model."): v for k, v in state.items() if k.startswith("mm_decoder.layers.1.")}
    write_shards(llama, tmp_path / "llama", shards=1)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    vae = {k.removeprefix(absent[1]): v for k, v in state.items() if k.startswith(absent[1])}
    for new, name in old.items():
        vae = {k.replace(f".{new}.", f".{name}."): v for k, v in vae.items()}
    assert any(".query." in name for name in vae)
    write_shards(vae, tmp_path / "sd" / "vae", shards=1, ending="safetensors")
    import_released(source, tmp_path / "out", bases=(tmp_path / "llama", tmp_path / "sd"), **arguments)
    assert_same(tmp_path / "out", model)


def language_base(model, folder: Path, rows: int | None = None) -> Path:
    """The language model alone, under its library's names, with the tokens it knows or ``rows``; frequencies in it."""
    rows = model.config.tokens.boi if rows is None else rows
    state = released_state(model)
    body = {k.replace("mm_decoder.", "model."): v for k, v in state.items() if k.startswith("mm_decoder.")}
    llama = {k: v for k, v in body.items() if "llama_cross_attn" not in k}
    llama["model.embed_tokens.weight"] = llama["model.embed_tokens.weight"][:rows].clone()
    llama["lm_head.weight"] = state["text_decoder.head.weight"][:rows].clone()
    llama["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    return write_shards(llama, folder, shards=1)


def test_an_absent_language_model_comes_from_a_base_with_fewer_tokens(tmp_path, model, capsys) -> None:
    state, boi = released_state(model), model.config.tokens.boi
    trained = ("llama_cross_attn", "head_new", "soi_token")
    kept = {
        name: value
        for name, value in state.items()
        if not name.startswith(("mm_decoder.", "text_decoder.")) or any(part in name for part in trained)
    }
    kept["mm_decoder.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # as older libraries stored it
    source, base = write_shards(kept, tmp_path / "src"), language_base(model, tmp_path / "llama")
    (tmp_path / "small.json").write_text(model.config.to_json())
    command = ["model", "import", str(source), "--config", str(tmp_path / "small.json"), "--tokenizer", str(TOKENIZER)]
    assert main([*command, "--out", str(tmp_path / "out")]) == 1
    assert "--base (the language model)" in capsys.readouterr().err
    command += ["--base", str(base)]
    assert main([*command, "--out", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    assert "1 missing (first: mm_decoder.embed_tokens.weight)" in told and "--new-rows mean" in told
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    assert main([*command, "--out", str(tmp_path / "out"), "--new-rows", "mean"]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "embed_tokens.weight: the rows of the new tokens are the mean of the others" in told
    assert "head.weight: the rows of the new tokens are zero" in told and "inv_freq is not needed" in told
    loaded, own = load_model(tmp_path / "out").state_dict(), model.state_dict()
    made = ("language.body.embed_tokens.weight", "text_head.head.weight", "text_head.head.bias")
    assert all(torch.equal(loaded[name], value) for name, value in own.items() if name not in made)
    embedding, head, bias = (loaded[name] for name in made)
    assert torch.equal(embedding[:boi], own[made[0]][:boi]) and torch.equal(head[:boi], own[made[1]][:boi])
    torch.testing.assert_close(embedding[boi:], embedding[:boi].mean(0).expand(2, -1), rtol=0, atol=1e-7)
    assert not head[boi:].any() and not bias[:boi].any() and (bias[boi:] == -100).all()


def test_a_base_widened_before_brings_its_own_rows_and_another_width_none(tmp_path, model) -> None:
    absent = ("mm_decoder.embed_tokens.", "text_decoder.head.")
    kept = {name: value for name, value in released_state(model).items() if not name.startswith(absent)}
    source, size = write_shards(kept, tmp_path / "src"), model.config.tokens.vocab_size
    arguments = {"tokenizer": str(TOKENIZER), "config": model.config}
    done = import_released(source, tmp_path / "out", bases=(language_base(model, tmp_path / "a", size),), **arguments)
    loaded, own = load_model(tmp_path / "out").state_dict(), model.state_dict()
    for name in ("language.body.embed_tokens.weight", "text_head.head.weight"):
        assert torch.equal(loaded[name], own[name])
    assert list(done.made) == ["text_head.head.bias"]
    other = language_base(model, tmp_path / "b", size - 3)
    with pytest.raises(ModelError, match=r"3 missing.*--base \(the language model\)"):
        import_released(source, tmp_path / "no", bases=(other,), new_rows="mean", **arguments)


def test_what_is_asked_for_is_what_is_still_missing(tmp_path, model) -> None:
    state, arguments = released_state(model), {"tokenizer": str(TOKENIZER), "config": model.config}
    base = language_base(model, tmp_path / "llama")
    absent = ("mm_decoder.embed_tokens.", "image_decoder.decoder.vae.")
    source = write_shards({k: v for k, v in state.items() if not k.startswith(absent)}, tmp_path / "a")
    with pytest.raises(ModelError, match=r"--new-rows mean; fetch the missing shards, or .* --base \(the VAE\)$"):
        import_released(source, tmp_path / "out", bases=(base,), **arguments)
    source = write_shards({k: v for k, v in state.items() if not k.startswith("text_decoder.head.")}, tmp_path / "b")
    with pytest.raises(ModelError, match=r"--base \(the language model\)$"):
        import_released(source, tmp_path / "out", **arguments)


def test_the_bias_of_every_new_token_is_made() -> None:
    place = Placed(None, "", HEAD_BIAS, Entry((12, 4), torch.float32), (12,), False, made="bias", known=9)
    assert fitted(place, torch.ones(12, 4)).tolist() == [0.0] * 9 + [-100.0] * 3


def _bundle(directory: Path, tmp_path: Path) -> Bundle:
    """The bundle's weights in the released layout, imported, loaded, and put in the place of the bundle's own model."""
    bundle = Bundle(directory)
    config = tmp_path / "config.json"
    config.write_text(bundle.config.to_json())
    shards = write_shards(bundle.weights, tmp_path / "src")
    command = ["model", "import", str(shards), "--out", str(tmp_path / "out"), "--config", str(config)]
    assert main([*command, "--tokenizer", str(tmp_path / "tokenizer.json")]) == 0
    return bundle


@pytest.mark.skipif(not GIVEN.is_dir(), reason="GOLDEN_BUNDLE names no full golden bundle")
def test_a_full_golden_bundle_imports_and_passes_the_self_check(tmp_path, monkeypatch) -> None:
    _small_tokenizer(tmp_path / "tokenizer.json")
    _bundle(GIVEN, tmp_path)
    imported = load_model(tmp_path / "out").to(memory_format=torch.contiguous_format)
    before = Bundle.model.func

    def instead(bundle: Bundle):
        before(bundle)  # for its report
        return imported

    monkeypatch.setattr(Bundle, "model", property(instead))
    reports = [report for report in verify(GIVEN, backend="torch") if report.case.split("_")[0] in ("case3", "case5")]
    assert reports and all(row.passed for report in reports for row in report.rows)


def test_the_shipped_bundle_is_a_part_and_refused_as_such(tmp_path, capsys) -> None:
    bundle = Bundle(SHIPPED)
    (tmp_path / "config.json").write_text(bundle.config.to_json())
    _small_tokenizer(tmp_path / "tokenizer.json")
    shards = write_shards(bundle.weights, tmp_path / "src")
    command = ["model", "import", str(shards), "--out", str(tmp_path / "out")]
    options = ["--config", str(tmp_path / "config.json"), "--tokenizer", str(tmp_path)]
    assert main([*command, *options]) == 1
    told = capsys.readouterr().err
    assert "missing" in told and "--base" in told
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def _small_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>")).save(str(path))


def test_the_folder_one_stands_in_may_become_the_model(tmp_path, model, monkeypatch) -> None:
    source = write_shards(released_state(model), tmp_path / "src")
    (tmp_path / "m").mkdir()
    monkeypatch.chdir(tmp_path / "m")
    import_released(source, Path("."), config=model.config, tokenizer=str(TOKENIZER))
    assert (tmp_path / "m/config.json").is_file() and not (tmp_path / "m.partial").exists()
