"""`mmi model new`: families of parts put together compute what they computed before, draw, write, and learn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tiny_parts import COMBINATIONS, make_parts
from transformers import AutoModelForCausalLM, CLIPTextModel

from mmi_cli.main import main
from mmi_engine.errors import ConfigError, ModelError
from mmi_engine.generate.interleave import fill
from mmi_engine.generate.settings import Settings
from mmi_engine.model.checkpoint import load_model
from mmi_engine.sequence import Piece
from mmi_engine.weights.assemble import Spec


@pytest.fixture(scope="module", params=COMBINATIONS, ids="-".join)
def assembled(request, tmp_path_factory) -> Path:
    """A folder with the parts and, as ``out``, what the command made of them."""
    folder = tmp_path_factory.mktemp("assembled")
    spec = make_parts(folder, *request.param, text_encoder=request.param[0] == "clip")
    assert main(["model", "new", str(spec), "--out", str(folder / "out"), "-q"]) == 0
    return folder


def visual(model, count: int = 1):
    """What MMFS of the language model sees of ``count`` random images."""
    features = model.visual_tokenizer(torch.rand(count, 3, 32, 32)).features
    return model.language.visual_context([m[None] for m in features], torch.ones(1, 9, count))


@torch.no_grad()
def test_the_language_model_computes_exactly_what_it_computed(assembled) -> None:
    library = AutoModelForCausalLM.from_pretrained(assembled / "language", attn_implementation="sdpa").eval()
    model = load_model(assembled / "out")
    ids = torch.randint(3, 600, (1, 9))
    mask = torch.ones_like(ids)
    hidden = model.language(model.language.embed(ids), mask, visual(model, 2))
    expected = library.model(ids, attention_mask=mask).last_hidden_state
    assert len(model.language.mmfs_layers) == 2 and torch.equal(hidden, expected)
    logits = model.text_head(hidden)
    rows = library.lm_head.weight.shape[0]
    assert torch.equal(logits[..., :rows], library(ids, attention_mask=mask).logits)
    assert (logits[..., rows:] == -5).all()  # −100 + 95: hardly ever an image before it has learnt to
    for cross in model.language.mmfs_layers:
        cross.gate.fill_(0.5)
    assert not torch.allclose(model.language(model.language.embed(ids), mask, visual(model, 2)), expected, atol=1e-3)


@torch.no_grad()
def test_the_unet_computes_exactly_what_it_computed(assembled) -> None:
    library = UNet2DConditionModel.from_pretrained(assembled / "image", subfolder="unet").eval()
    model = load_model(assembled / "out").to(memory_format=torch.contiguous_format)
    latents, steps = torch.randn(2, 4, 16, 16), torch.tensor([3, 700])
    context = torch.randn(2, 77, library.config.cross_attention_dim)
    features = [m[:, None] for m in model.visual_tokenizer(torch.rand(2, 3, 32, 32)).features]
    looked = model.image_decoder.unet.look(features, torch.ones(2, 1))
    ours = model.image_decoder.unet(latents, steps, context, looked)
    assert torch.equal(ours, library(latents, steps, context).sample)
    for block in model.image_decoder.unet.mmfs_blocks:
        block.zero_conv.weight.normal_(std=0.1)
    assert not torch.allclose(model.image_decoder.unet(latents, steps, context, looked), ours, atol=1e-4)


@torch.no_grad()
def test_sizes_tokens_and_schedule_come_from_the_parts(assembled) -> None:
    model = load_model(assembled / "out")
    config = model.config
    vision, language, kind = config.name.split("-")
    assert config.language.transformers["model_type"] == language and vision in config.vision.family
    tokens = config.tokens
    assert (tokens.bos, tokens.eos, tokens.pad, tokens.boi, tokens.image) == (1, 2, 639, 640, 641)
    assert config.vision.feature_sizes == config.image_decoder.mmfs.levels == (16, 8, 4, 2)
    assert config.language.mmfs.levels == (8, 4, 2) and config.language.mmfs_base == 4
    assert config.image_decoder.vae.image_size == 32
    scheduler = model.image_decoder.scheduler.config
    assert scheduler.prediction_type == ("v_prediction" if kind == "sd21" else "epsilon")
    assert (scheduler.beta_schedule, scheduler.steps_offset) == ("scaled_linear", 1)
    embedding = model.language.body.embed_tokens.weight
    assert torch.allclose(embedding[640:], embedding[:640].mean(0).expand(2, -1), atol=1e-6)
    if (assembled / "image/text_encoder").is_dir():
        encoder = CLIPTextModel.from_pretrained(assembled / "image/text_encoder")
        expected = encoder(torch.tensor([[4] + [5] * 76])).last_hidden_state
        assert torch.allclose(model.image_decoder.unconditional, expected, atol=1e-5)


def test_it_writes_and_draws(assembled) -> None:
    model = load_model(assembled / "out")
    pieces = [Piece("text", "Pip is on the beach."), Piece("image", None), Piece("text", None)]
    done = fill(model, [pieces], [0], Settings(steps=2, max_new_tokens=4), 1)[0]
    assert done[1].value.size == (32, 32) and isinstance(done[2].value, str)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return make_parts(tmp_path_factory.mktemp("plain"))


def refused(spec: Path, tmp_path: Path, capsys) -> str:
    """What the command says; nothing may be left."""
    assert main(["model", "new", str(spec), "--out", str(tmp_path / "made/out")]) in (1, 2)
    assert not list((tmp_path / "made").glob("*")) if (tmp_path / "made").exists() else True
    return capsys.readouterr().err


def edited(plain: Path, old: str, new: str) -> Path:
    text = plain.read_text()
    assert old in text
    path = plain.with_name("edited.toml")
    path.write_text(text.replace(old, new, 1))
    return path


def test_mistakes_in_the_specification(plain, tmp_path, capsys) -> None:
    assert "unknown key vision.modell" in refused(edited(plain, "model =", "modell ="), tmp_path, capsys)
    assert "unknown key visio" in refused(edited(plain, "[vision]", "[visio]"), tmp_path, capsys)
    assert "cannot be read" in refused(plain.with_name("absent.toml"), tmp_path, capsys)
    assert "unknown key 'pints'" in refused(edited(plain, "points", "pints"), tmp_path, capsys)
    assert 'vision trunk "nowhere" not found' in refused(edited(plain, '"vision"', '"nowhere"'), tmp_path, capsys)
    assert "hub does not give it" in refused(edited(plain, '"language"', '"nobody/llm"'), tmp_path, capsys)
    assert "is no language model that MMFS fits" in refused(edited(plain, '"language"', '"vision"'), tmp_path, capsys)
    assert "is no vision trunk" in refused(edited(plain, '"vision"', '"language"'), tmp_path, capsys)
    same = edited(plain, 'model = "language"', 'model = "language"\nbos = 2')
    assert "three different ids" in refused(same, tmp_path, capsys)
    odd = edited(plain, 'model = "image"', 'model = "image"\nimage_size = 33')
    assert "image.image_size 33 is no multiple of 2" in refused(odd, tmp_path, capsys)
    with pytest.raises(ConfigError, match=r"image\.model is missing"):
        Spec.load(edited(plain, 'model = "image"', 'unet = "image"'))


def test_other_picture_sizes_are_a_choice(plain, tmp_path) -> None:
    text = plain.read_text().replace('model = "vision"', 'model = "vision"\nimage_size = 64')
    path = plain.with_name("large.toml")
    path.write_text(text.replace('model = "image"', 'model = "image"\nimage_size = 24'))
    assert main(["model", "new", str(path), "--out", str(tmp_path / "out"), "-q"]) == 0
    model = load_model(tmp_path / "out")
    assert model.visual_tokenizer.trunk.position_embedding.shape[0] == 65
    assert model.config.image_decoder.unet["sample_size"] == 12 and model.config.image_decoder.vae.image_size == 24


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("vision/model.safetensors", "pre_layrnorm.bias"),
        ("language/model.safetensors", "model.norm.weight"),
        ("image/unet/diffusion_pytorch_model.safetensors", "conv_in.weight"),
        ("image/vae/diffusion_pytorch_model.safetensors", "decoder.conv_in.bias"),
    ],
)
def test_a_part_with_missing_weights_is_never_filled_with_random_ones(tmp_path, capsys, file, name) -> None:
    spec = make_parts(tmp_path / "parts")
    capsys.readouterr()
    path = spec.parent / file
    tensors = load_file(path)
    (found,) = [key for key in tensors if key.endswith(name)]
    del tensors[found]
    save_file(tensors, path, metadata={"format": "pt"})
    told = refused(spec, tmp_path, capsys)
    assert "lacks 1 weights" in told and name in told
    path.write_bytes(path.read_bytes()[:500])
    assert "cannot be read" in refused(spec, tmp_path, capsys)


def test_parts_that_do_not_fit_each_other(tmp_path, capsys) -> None:
    spec = make_parts(tmp_path / "parts")
    vae = spec.parent / "image/vae"
    described = json.loads((vae / "config.json").read_text())
    from diffusers import AutoencoderKL

    AutoencoderKL(**{k: v for k, v in described.items() if k[0] != "_"} | {"latent_channels": 8}).save_pretrained(vae)
    capsys.readouterr()
    assert "the U-Net reads 4 channels, the VAE makes 8" in refused(spec, tmp_path, capsys)
    (spec.parent / "image/scheduler/scheduler_config.json").unlink()
    assert "scheduler_config.json" in refused(spec, tmp_path, capsys)


def test_an_existing_model_is_not_replaced(plain, tmp_path, capsys) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes").write_text("mine")
    assert main(["model", "new", str(plain), "--out", str(tmp_path / "out")]) == 1
    assert "is there already" in capsys.readouterr().err and (tmp_path / "out/notes").read_text() == "mine"
    with pytest.raises(ModelError, match="no MM-Interleaved model|holds no"):
        load_model(plain.parent / "language")


def test_parts_come_from_the_hubs_cache(plain, tmp_path, monkeypatch) -> None:
    root, download = tmp_path / "hub", huggingface_hub.snapshot_download
    for part in ("vision", "language", "image"):
        repository = root / f"models--lab--{part}"
        shutil.copytree(plain.parent / part, repository / "snapshots/abc")
        (repository / "refs").mkdir()
        (repository / "refs/main").write_text("abc")
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **options: download(name, cache_dir=root, **options)
    )
    text = plain.read_text()
    for part in ("vision", "language", "image"):
        text = text.replace(f'model = "{part}"', f'model = "lab/{part}"')
    (tmp_path / "parts.toml").write_text(text.replace("clip-llama-sd21", "hub"))
    assert main(["model", "new", str(tmp_path / "parts.toml"), "--out", str(tmp_path / "out"), "-q"]) == 0
    assert main(["model", "new", str(plain), "--out", str(tmp_path / "local"), "-q"]) == 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "local"))
    assert all(torch.equal(one[name], other[name]) for name in other)  # new weights come from the seed


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("vision = 5", "vision must be a table"),
        ('seed = "a"', "seed must be a number"),
        ("seed = -1", "seed must be a number"),
        ("config = 5", "config must be a table"),
        ("name = 5", "name must be a string"),
        ("[vision]\nmodel = 3", r"vision\.model must be a string"),
        ('[vision]\nmodel = "v"\nimage_size = "224"', r"vision\.image_size must be a number"),
        ('[language]\nmodel = "l"\nbos = true', r"language\.bos must be a number"),
    ],
)
def test_values_of_another_type_are_told_before_a_part_is_loaded(tmp_path, text, told) -> None:
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(ConfigError, match=told):
        Spec.load(tmp_path / "s.toml")
