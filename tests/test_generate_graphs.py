"""Steps over fixed buffers as `--cuda-graphs` records them, here called on a CPU: against the other path."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_data import make_data
from torch import Tensor

from mmi_cli.main import main
from mmi_engine.errors import BackendError, UsageError
from mmi_engine.generate import fixed
from mmi_engine.generate.graphs import Graphs, refuse_elsewhere, refuse_model
from mmi_engine.generate.image import Denoising, denoise
from mmi_engine.generate.interleave import fill
from mmi_engine.generate.reuse import LITERAL
from mmi_engine.generate.settings import Settings
from mmi_engine.generate.text import Decoder, generate_text
from mmi_engine.model.interleaved import MMInterleaved
from tests.test_generate_continuous import SETTINGS, items
from tests.test_generate_image import request_of
from tests.test_generate_text import prompt_of
from tests.tiny import tiny_config, tiny_model

ROWS = {
    "alone": ([[7, 8, 9]], [1]),
    "no image": ([[7, 8, 9], [4]], [0, 0]),
    "padded": ([[7, 8, 9, 10, 11, 12], [5], [6, 7]], [1, 2, 0]),  # the last row sees nothing
}
CLOSE = {"rtol": 1e-5, "atol": 2e-6}


@pytest.fixture(scope="module")
def model() -> MMInterleaved:
    return tiny_model(seed=2)


@contextmanager
def with_graphs(model: MMInterleaved) -> Iterator[Graphs]:
    model.graphs = Graphs(model.device)
    try:
        yield model.graphs
    finally:
        model.graphs = None


@torch.no_grad()
def continued(model: MMInterleaved, which: str, steps: int, *, copies: int = 1, rows: int = 0) -> list[Tensor]:
    """Logits of some steps with tokens that are told; beams change places after the third."""
    model.language.lean = False  # the library's forward pass on both sides
    decoder = Decoder(model, prompt_of(model, *ROWS[which]), copies=copies, rows=rows)
    model.language.lean = True
    found = []
    for step in range(steps):
        count = len(decoder.logits)
        if step == 3 and copies > 1:
            decoder.reorder(torch.arange(count).view(-1, copies).flip(1).flatten())
        found.append(decoder.step(torch.arange(count) + 5 + step))
    return found


@pytest.mark.parametrize("columns", [4, 64], ids=["grows", "has room"])
@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("which", ROWS)
def test_the_same_logits(model, monkeypatch, which: str, copies: int, columns: int) -> None:
    """``columns`` 4: the buffers are full after at most four tokens, and the state moves on."""
    monkeypatch.setattr(fixed, "COLUMNS", columns)
    expected = continued(model, which, 9, copies=copies)
    with with_graphs(model) as graphs:
        found = continued(model, which, 9, copies=copies, rows=copies * 4)
    assert graphs.made == (3 if columns == 4 else 1)
    for step, (ours, library) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(ours, library, **CLOSE, msg=lambda text, step=step: f"step {step}: {text}")


def test_logits_of_a_step_stay_what_they_were(model) -> None:
    with with_graphs(model):
        found = continued(model, "padded", 1)
        kept = found[0].clone()
        continued(model, "padded", 3)
    assert torch.equal(found[0], kept)


@torch.no_grad()
def test_what_an_earlier_batch_left_does_not_count(model) -> None:
    """Buffers full of NaN and ones, and rows that the next batch does not have."""
    expected = continued(model, "no image", 4)
    with with_graphs(model) as graphs:
        continued(model, "no image", 1, rows=5)
        (step,) = graphs._kept.values()
        for whole in (*step._states(), step.bias):
            whole.fill_(float("nan"))
        step.position.fill_(99)
        found = continued(model, "no image", 4, rows=5)
        assert graphs.made == 1
    for ours, library in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, library, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("which", ["padded", "no image"])
def test_rows_leave_and_the_state_comes_back(model, which: str) -> None:
    """`keep`, `settle`, going on without graphs: all the same as never having used them."""

    def path(graphs: bool) -> list[Tensor]:
        model.language.lean = False
        model.graphs = Graphs(model.device) if graphs else None
        decoder = Decoder(model, prompt_of(model, *ROWS[which]), rows=4)
        model.language.lean, model.graphs = True, None
        found = [decoder.step(torch.arange(len(decoder.logits)) + 5)]
        kept = torch.tensor([len(decoder.logits) - 1, 0])
        decoder.keep(kept)
        found += [decoder.logits, decoder.step(torch.tensor([9, 11]))]
        decoder.settle(copy=True)
        found.append(decoder.mask)
        decoder.graphs = None
        return [*found, decoder.step(torch.tensor([4, 6]))]

    for ours, library in zip(path(True), path(False), strict=True):
        torch.testing.assert_close(ours, library, **CLOSE)


@torch.no_grad()
def test_two_decoders_in_turns_share_a_recording(model) -> None:
    def path(graphs: bool) -> list[Tensor]:
        model.language.lean, model.graphs = False, Graphs(model.device) if graphs else None
        rows, images = ROWS["padded"]
        prompts = [prompt_of(model, rows, images), prompt_of(model, [[n + 3 for n in row] for row in rows], images)]
        both = [Decoder(model, prompt) for prompt in prompts]
        found = [d.step(torch.arange(3) + 5 * step + n) for step in range(3) for n, d in enumerate(both)]
        if graphs:
            assert model.graphs.made == 1
        model.language.lean, model.graphs = True, None
        return found

    for ours, library in zip(path(True), path(False), strict=True):
        torch.testing.assert_close(ours, library, **CLOSE)


@pytest.mark.parametrize(
    "settings",
    [
        Settings(max_new_tokens=12, min_new_tokens=12, repetition_penalty=1.3),
        Settings(max_new_tokens=10, temperature=1.0, top_p=0.9),
        Settings(max_new_tokens=8, beams=3),
    ],
    ids=["greedy", "sampled", "beams"],
)
@pytest.mark.parametrize("which", ROWS)
def test_the_same_tokens(model, settings: Settings, which: str) -> None:
    def write() -> list[list[int]]:
        prompt = prompt_of(model, *ROWS[which])
        generators = [torch.Generator().manual_seed(row) for row in range(len(prompt.ids))]
        return generate_text(model, prompt, settings, generators=generators).ids

    expected = write()
    with with_graphs(model):
        assert write() == expected


def test_the_literal_form_takes_no_graphs(model) -> None:
    with with_graphs(model) as graphs:
        generate_text(model, prompt_of(model, *ROWS["padded"]), Settings(max_new_tokens=3), reuse=LITERAL)
        denoise(model, request_of(1, [4], [1]), Denoising(2, 2.0, "ddim"), reuse=LITERAL)
        assert not len(graphs)


@pytest.mark.parametrize("scheduler", ["ddpm", "dpm++"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_same_pictures(model, scheduler: str, guidance: float) -> None:
    """Also the second and third batch of a shape, where other rows see and other things are seen."""
    plan = Denoising(3, guidance, scheduler)

    def batches() -> list[Tensor]:
        turned = request_of(2, [5, 6], [1, 0])
        turned.tokens, turned.features = turned.tokens.flip(0), [m.flip(0, -1) for m in turned.features]
        nobody = request_of(2, [5, 6], [0, 0])
        requests = (request_of(2, [1, 2], [0, 1]), turned, nobody, request_of(2, [3, 4], [1, 1]))
        return [denoise(model, request, plan) for request in requests]

    expected = batches()
    with with_graphs(model) as graphs:
        for ours, other in zip(batches(), expected, strict=True):
            torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)
        assert graphs.made == 3  # one, none and two rows that see


@pytest.mark.parametrize("kind", SETTINGS)
def test_documents_and_continuous_batching(model, kind: str) -> None:
    seeds, settings = list(range(len(items()))), SETTINGS[kind]

    def texts(*, continuous: bool) -> list[list[str]]:
        filled = fill(model, items(), seeds, settings, 3, continuous=continuous)
        return [[piece.value for piece in document if piece.kind == "text"] for document in filled]

    expected = texts(continuous=False)
    with with_graphs(model) as graphs:
        assert texts(continuous=True) == expected
        assert {key[1] for key in graphs._kept if key[0] == "token"} == {3}, "rows that leave change no shape"
        assert texts(continuous=False) == expected


def test_recordings_are_bounded(model) -> None:
    class Thing:
        def __init__(self, size: int) -> None:
            self.bytes = size

    graphs = Graphs(model.device)
    graphs.limit = 10
    for key in "abc":
        graphs.get(key, lambda: Thing(4))
    assert list(graphs._kept) == ["b", "c"] and graphs.made == 3
    graphs.get("b", lambda: pytest.fail("made twice"))
    graphs.get("d", lambda: Thing(4))
    assert list(graphs._kept) == ["b", "d"], "the least recently used goes first"
    graphs.get("e", lambda: Thing(99))
    assert list(graphs._kept) == ["e"], "the newest stays, however large"
    graphs.limit = 10**9
    for number in range(40):
        graphs.get(number, lambda: Thing(1))
    assert len(graphs) == 16
    assert copy.deepcopy(graphs) is None and pickle.loads(pickle.dumps(graphs)) is None
    graphs.clear()
    assert not len(graphs)


@pytest.mark.parametrize(
    ("device", "kernel", "others", "error", "match"),
    [
        ("cpu", "numba", {}, BackendError, "needs a CUDA device, the run is on cpu; leave out --cuda-graphs"),
        ("cuda", "torch", {}, BackendError, "needs the CUDA kernel"),
        ("cuda", "cuda", {"compile": True}, UsageError, "--compile; leave out one"),
        ("cuda", "cuda", {"llm_bits": 8}, UsageError, "--llm-bits"),
        ("cuda", "cuda", {"device_map": "auto"}, UsageError, "--device-map"),
    ],
)
def test_where_it_cannot_be_met_it_is_refused(device, kernel, others, error, match) -> None:
    unset = {"compile": False, "llm_bits": None, "device_map": None}
    with pytest.raises(error, match=match):
        refuse_elsewhere(device, kernel, unset | others)
    refuse_elsewhere("cuda", "cuda", unset)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"model_type": "mistral", "sliding_window": 8}, "sliding window"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rotary positions"),
    ],
)
def test_language_models_without_fixed_shapes_are_refused(model, changed: dict, match: str) -> None:
    refuse_model(model)
    config = tiny_config()
    body = {**config.language.transformers, **changed}
    other = tiny_model(2, replace(config, language=replace(config.language, transformers=body)))
    with pytest.raises(BackendError, match=match):
        refuse_model(other)


def test_a_command_on_a_cpu_says_so(tmp_path: Path, capsys) -> None:
    data = make_data(tmp_path)
    for command in ("vqa", "t2i"):
        arguments = [command, str(data / f"{command}.jsonl"), "--model", str(data / "model"), "--device", "cpu"]
        assert main([*arguments, "--out", str(tmp_path / "out"), "--cuda-graphs"]) == 1
        assert "--cuda-graphs needs a CUDA device" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
