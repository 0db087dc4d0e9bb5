"""Memory estimates against what tensors take; layers in main memory, on disk, on several devices, in 8 and 4 bits."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image
from tiny import tiny_config, tiny_model

from mmi_cli.main import main
from mmi_engine.errors import BackendError, DeviceError
from mmi_engine.generate.interleave import fill
from mmi_engine.generate.settings import Settings
from mmi_engine.model.checkpoint import load_model, save_model, skeleton
from mmi_engine.model.presets import released_config
from mmi_engine.sequence import Piece
from mmi_engine.weights.estimate import Device, fits, layer_linear_weights, need
from mmi_engine.weights.placement import LAYER, Placement, auto, layer_bytes, plan
from mmi_engine.weights.quantize import LINEAR


def wide_config():
    """The tiny model with a language model whose maps the 4-bit kernels accept."""
    config = tiny_config()
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    decoder = config.image_decoder
    return replace(
        config,
        language=replace(config.language, transformers={**config.language.transformers, **sizes}),
        image_decoder=replace(decoder, context_resampler=replace(decoder.context_resampler, encoder_hidden_size=64)),
    )


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_model(tiny_model(config=wide_config()), tmp_path_factory.mktemp("placement") / "m", shard_bytes=90_000)


def story(model) -> tuple[str, bytes]:
    """A text and a picture after an image, with beams, so that caches are reordered."""
    given = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
    pieces = [Piece("image", given), Piece("text", "Pip naps."), Piece("image", None), Piece("text", None)]
    done = fill(model, [pieces], [0], Settings(steps=2, max_new_tokens=6, beams=2), 1)[0]
    return done[3].value, done[2].value.tobytes()


def test_weights_cache_and_features_are_estimated_exactly(directory) -> None:
    model = load_model(directory)
    config = model.config
    parameters = sum(p.numel() for p in model.state_dict().values())
    needed = need(config, parameters, "fp32")
    assert needed.weights == sum(p.numel() * p.element_size() for p in model.state_dict().values())
    ids = torch.randint(3, 90, (1, 11))
    cache = model.language.new_cache()
    with torch.no_grad():
        model.language(model.language.embed(ids), torch.ones_like(ids), None, cache=cache)
        visual = model.visual_tokenizer(torch.rand(1, 3, 32, 32))
        context = model.language.visual_context([m[None] for m in visual.features], torch.ones(1, 1, 1))
        looked = model.image_decoder.unet.look([m[None] for m in visual.features], torch.ones(1, 1))
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert kept == 11 * needed.cache_per_token
    assert needed.per_image == sum(m.nbytes for m in visual.features) + sum(v.nbytes for v in context.values)
    assert needed.per_picture == sum(v.nbytes for v in looked.values)
    linear = [m for n, m in model.named_modules() if LINEAR.match(n)]
    assert len(linear) == 3 * 7
    assert layer_linear_weights(config) == sum(m.weight.numel() for m in linear)
    assert needed.total == needed.weights + needed.context + needed.working


def test_the_released_size_is_told_for_every_kind_of_machine() -> None:
    config, count = released_config(), 14_912_865_561
    assert layer_linear_weights(config) == 12_687_769_600
    gib = 2**30
    bf16 = need(config, count, "bf16")
    assert bf16.weights == 2 * count and bf16.cache_per_token == 2 * 40 * 5120 * 2

    def told(free: float, name: str = "cuda:0") -> str:
        return fits(config, count, [Device(name, int(free * gib))])[0][1]

    assert told(78) == "fits in fp32, bf16, fp16"
    assert told(38) == "fits in bf16, fp16"
    assert told(24) == "fits in bf16 with the language model in 8 bits or 4 bits: --llm-bits"
    assert told(16) == "fits in bf16 with the language model in 4 bits: --llm-bits"
    assert told(14) == "fits with layers on other devices or in main memory: --device-map auto"
    assert told(4) == "does not fit; bf16 lacks 27.8 GiB"
    assert told(38, "cpu") == "fits in bf16"


def test_a_plan_fills_devices_in_order() -> None:
    layers = [10] * 6
    assert plan(layers, 30, 5, {"cuda:0": 100}).layers == ("cuda:0",) * 6
    assert plan(layers, 30, 5, {"cuda:0": 65, "cuda:1": 40, "cpu": 99}).layers == ("cuda:0",) * 3 + ("cuda:1",) * 3
    # one layer's room is kept free for those that visit
    assert plan(layers, 30, 5, {"cuda:0": 65, "cpu": 99}).layers == ("cuda:0",) * 2 + ("memory",) * 4
    spread = plan(layers, 30, 5, {"cuda:0": 65, "cpu": 25})
    assert spread.layers == ("cuda:0", "cuda:0", "memory", "memory", "disk", "disk")
    assert str(spread) == "2 layers on cuda:0, 2 layers in memory, 2 layers on disk"
    assert plan(layers, 30, 5, {"cpu": 60}).layers == ("cpu", "disk", "disk", "disk", "disk", "disk")
    with pytest.raises(DeviceError, match="all but its language model's layers need"):
        plan(layers, 30, 5, {"cuda:0": 30, "cpu": 1000})


def test_every_byte_belongs_to_a_layer_or_the_core() -> None:
    model = skeleton(wide_config())
    layers, core = layer_bytes(model, 4)
    assert len(layers) == 3 and len(set(layers)) == 1
    assert sum(layers) + core == sum(v.numel() * 4 for v in model.state_dict().values())
    assert not any(LAYER.match(name) for name, _ in model.named_parameters() if "cross" in name)


@pytest.mark.parametrize("places", [("cpu", "disk", "disk"), ("disk",) * 3])
def test_layers_on_disk_compute_the_same(directory, places) -> None:
    whole, spread = load_model(directory), load_model(directory, device_map=Placement("cpu", places))
    held = [p for n, p in spread.named_parameters() if LAYER.match(n) and not p.is_meta]
    assert len(held) == 9 * places.count("cpu")
    assert story(spread) == story(whole)
    layers = [(LAYER.match(name), parameter) for name, parameter in spread.named_parameters()]
    assert all(p.is_meta == (places[int(found[1])] == "disk") for found, p in layers if found)


def test_auto_keeps_what_fits_and_says_what_does_not(directory, monkeypatch) -> None:
    model = skeleton(wide_config())
    layers, core = layer_bytes(model, 4)
    assert auto(model, torch.float32, "cpu").layers == ("cpu",) * 3
    needed = need(model.config, 0, "fp32")
    room = core + needed.context + needed.working + 2 * layers[0]
    assert auto(model, torch.float32, "cpu", {"cpu": room}).layers == ("cpu", "disk", "disk")
    with pytest.raises(DeviceError, match="cuda:9 is not here"):
        auto(model, torch.float32, "cuda:9")
    assert story(load_model(directory, device_map="auto")) == story(load_model(directory))


@pytest.mark.parametrize(
    "placement",
    [
        Placement("cpu", ("memory", "disk", "memory")),  # kept elsewhere, brought to the main device
        Placement("cpu", ("cpu", "cpu:0", "cpu:0")),  # computed where they are, as on a second GPU
    ],
    ids=["offloaded", "elsewhere"],
)
def test_layers_on_a_device_of_another_name_compute_the_same(directory, placement) -> None:
    """The CPU under its second name stands for another device: every hook of accelerate's is at work."""
    assert story(load_model(directory, device_map=placement)) == story(load_model(directory))
    hooked = load_model(directory, device_map=placement).language.body.layers[2].layer.mlp
    assert hasattr(hooked, "_hf_hook") or hasattr(hooked.up_proj, "_hf_hook")


@pytest.mark.gpu
def test_layers_in_main_memory_and_on_another_device_compute_the_same(directory) -> None:
    whole = story(load_model(directory, device="cuda:0"))
    offloaded = load_model(directory, device="cuda:0", device_map=Placement("cuda:0", ("cuda:0", "memory", "disk")))
    assert story(offloaded) == whole


def test_without_bitsandbytes_the_remedy_is_named(directory, monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(BackendError, match=r"bitsandbytes.*mmi\[bits\].*--llm-bits"):
        load_model(directory, llm_bits=4)
    (tmp_path / "m.jsonl").write_text('{"id": "x", "prompt": "a ball"}\n')
    command = ["t2i", str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "out"), "--model", str(directory)]
    assert main([*command, "--device", "cpu", "--llm-bits", "8", "--batch-size", "1"]) == 1
    assert "pip install" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()  # which would refuse the same command without --llm-bits


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize(("bits", "error", "bytes_"), [(8, 0.03, 1.0), (4, 0.25, 0.5)])
def test_a_quantised_language_model_stays_close(directory, bits, error, bytes_) -> None:
    whole, small = load_model(directory), load_model(directory, llm_bits=bits)
    linear = [m for n, m in small.named_modules() if LINEAR.match(n)]
    assert sum(m.weight.nbytes for m in linear) == layer_linear_weights(small.config) * bytes_
    ids = torch.randint(3, 90, (2, 9))
    with torch.no_grad():
        a, b = (m.language(m.language.embed(ids), torch.ones_like(ids), None) for m in (whole, small))
    assert 0 < float((a - b).norm() / a.norm()) < error
    story(small)
    with pytest.raises(BackendError, match="one device"):
        load_model(directory, llm_bits=bits, device_map="auto")


def test_the_command_tells_needs_and_devices(directory, capsys) -> None:
    assert main(["model", "info", str(directory)]) == 0
    told = capsys.readouterr().out
    assert "cache per token" in told and "cpu  fits in fp32, bf16" in told
    assert main(["model", "info", str(directory), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["needs"]["fp32"]["weights"] == 4 * found["parameters"] and "cpu" in found["devices"]


def test_a_run_records_the_bits_and_spreads_on_request(directory, tmp_path, capsys) -> None:
    (tmp_path / "m.jsonl").write_text('{"id": "x", "prompt": "a ball"}\n')
    fixed = ["--model", str(directory), "--device", "cpu", "--batch-size", "1", "--steps", "1", "--threads", "1"]
    assert main(["t2i", str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "a"), *fixed]) == 0
    assert main(["t2i", str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "b"), *fixed, "--device-map", "auto"]) == 0
    recorded = {name: json.loads((tmp_path / name / "run.json").read_text()) for name in "ab"}
    assert recorded["a"]["identity"] == recorded["b"]["identity"]  # it changes no output
    assert "device_map" not in recorded["a"]["settings"]
    assert recorded["b"]["settings"]["device_map"] == {"value": "auto", "origin": "command line"}
    assert "3 layers on cpu" in capsys.readouterr().err
    assert (tmp_path / "a/x.png").read_bytes() == (tmp_path / "b/x.png").read_bytes()
    assert "llm_bits" not in recorded["a"]["settings"]
