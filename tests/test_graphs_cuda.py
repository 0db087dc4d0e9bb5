"""`--cuda-graphs` on a CUDA device: recorded and replayed steps against the same steps computed as they come.

What needs no device (buffers, growth, refusals) is in test_generate_graphs.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command_data import make_data
from PIL import Image
from torch import Tensor

from mmi_cli.main import main
from mmi_engine.generate import fixed
from mmi_engine.generate.graphs import Graphs, Recording
from mmi_engine.generate.image import Denoising, ImageRequest, denoise
from mmi_engine.generate.interleave import fill
from mmi_engine.generate.reading import Prompt
from mmi_engine.generate.settings import Settings
from mmi_engine.generate.text import Decoder, generate_text
from mmi_engine.model.interleaved import MMInterleaved
from tests.test_generate_continuous import SETTINGS, items
from tests.test_generate_graphs import with_graphs
from tests.test_generate_image import request_of
from tests.test_generate_text import prompt_of
from tests.tiny import tiny_model

pytestmark = pytest.mark.gpu

BATCHES = {
    "no image": ([[7, 8, 9], [4, 5, 6]], [0, 0]),
    "one image": ([[7, 8, 9], [4, 5, 6]], [1, 1]),
    "another image": ([[17, 18], [14]], [1, 1]),
    "two, one": ([[7, 8], [5]], [2, 1]),
    "one row blind": ([[7, 8], [5, 9, 9]], [0, 1]),
}
BF16_TOLERANCE = 0.04  # of the largest number: ten units of the last place, after a few layers


@pytest.fixture(autouse=True)
def no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="module")
def models() -> dict[torch.dtype, MMInterleaved]:
    return {dtype: tiny_model(seed=2).to("cuda", dtype) for dtype in (torch.float32, torch.bfloat16)}


def recorded(graphs: Graphs) -> int:
    """How many of the steps are recorded; all must be."""
    recordings = [step._recording for step in graphs._kept.values()]
    assert recordings and all(one._graph is not None for one in recordings), "nothing was recorded"
    return len(recordings)


def prompt(model: MMInterleaved, which: str) -> Prompt:
    """Made on a CPU, where `prompt_of` works, and moved."""
    made, dtype = prompt_of(tiny_model(seed=2), *BATCHES[which]), model.boi_embedding.dtype
    visual = made.visual
    if visual is not None:
        features = tuple(m.to("cuda", dtype) for m in visual.features)
        visual = replace(visual, tokens=visual.tokens.to("cuda", dtype), features=features)
    return Prompt(made.ids.cuda(), made.mask.cuda(), visual, made.counts.cuda())


def request(model: MMInterleaved, seeds: list[int], seen: list[int], shift: int = 0) -> ImageRequest:
    made, dtype = request_of(len(seeds), seeds, seen), model.boi_embedding.dtype
    features = [m.roll(shift, 0).flip(-1).to("cuda", dtype) if shift else m.to("cuda", dtype) for m in made.features]
    return ImageRequest(
        made.tokens.roll(shift, 0).to("cuda", dtype), features, made.visible.cuda(), list(made.generators)
    )


def assert_near(found: Tensor, expected: Tensor, where: str) -> None:
    """float32: 2e-5 of the largest number (100, for logits with a bias of −100, does not count); bf16: see above."""
    usual = expected.float().abs()
    scale = max(1.0, float(usual[usual < 50].max()))
    gap = float((found.float() - expected.float()).abs().max())
    bound = scale * (2e-5 if expected.dtype == torch.float32 and not where.startswith("bf16") else BF16_TOLERANCE)
    assert gap <= bound, f"{where}: {gap:.3g} apart, at most {bound:.3g} allowed (largest number {scale:.3g})"


@torch.no_grad()
def logits_of(model: MMInterleaved, which: str, *, copies: int = 1, rows: int = 0) -> list[Tensor]:
    """Of seven steps with tokens that are told; after three the beams change places."""
    decoder = Decoder(model, prompt(model, which), copies=copies, rows=rows)
    found = []
    for step in range(7):
        count = len(decoder.logits)
        if step == 3 and copies > 1:
            decoder.reorder(torch.arange(count, device="cuda").view(-1, copies).flip(1).flatten())
        found.append(decoder.step(torch.arange(count, device="cuda") + 5 + step))
    decoder.check()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("columns", [8, 64], ids=["grows", "has room"])
@pytest.mark.parametrize("copies", [1, 3])
def test_logits(models, monkeypatch, dtype, columns: int, copies: int) -> None:
    """Batch after batch through the same store: recordings are shared, states are not."""
    monkeypatch.setattr(fixed, "COLUMNS", columns)
    model, name = models[dtype], "bf16" if dtype == torch.bfloat16 else "fp32"
    expected = {which: logits_of(model, which, copies=copies) for which in BATCHES}
    with with_graphs(model) as graphs:
        for turn in range(2):
            for which in BATCHES:
                found = logits_of(model, which, copies=copies, rows=4 * copies)
                for step, (ours, plain) in enumerate(zip(found, expected[which], strict=True)):
                    assert_near(ours, plain, f"{name}, {which}, turn {turn}, step {step}")
            if columns == 64:
                assert graphs.made == 3, f"0, 1 and 2 images: three recordings, not {graphs.made}"
        recorded(graphs)


def test_replay_is_deterministic_and_outputs_are_not_overwritten(models) -> None:
    model = models[torch.float32]
    with with_graphs(model):
        first = logits_of(model, "two, one")
        kept = [one.clone() for one in first]
        logits_of(model, "one row blind")
        second = logits_of(model, "two, one")
    for step, (one, before, again) in enumerate(zip(first, kept, second, strict=True)):
        assert torch.equal(one, before), f"step {step}: a later batch wrote into these logits"
        torch.testing.assert_close(again, before, rtol=1e-6, atol=1e-6, msg=lambda text, s=step: f"step {s}: {text}")


@pytest.mark.parametrize(
    "settings",
    [
        Settings(max_new_tokens=70, min_new_tokens=70, repetition_penalty=1.2),
        Settings(max_new_tokens=12, temperature=1.0, top_p=0.9),
        Settings(max_new_tokens=10, beams=3),
    ],
    ids=["greedy", "sampled", "beams"],
)
@pytest.mark.parametrize("which", BATCHES)
def test_tokens(models, settings: Settings, which: str) -> None:
    """float32; seventy tokens pass from one capacity to the next."""
    model = models[torch.float32]

    def write() -> list[list[int]]:
        generators = [torch.Generator().manual_seed(row) for row in range(2)]
        return generate_text(model, prompt(model, which), settings, generators=generators).ids

    expected = write()
    with with_graphs(model) as graphs:
        for turn in range(2):
            found = write()
            assert found == expected, f"turn {turn}: {found} instead of {expected}"
        recorded(graphs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("scheduler", ["ddim", "dpm++"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_latents(models, dtype, scheduler: str, guidance: float) -> None:
    model, plan = models[dtype], Denoising(3, guidance, scheduler)
    name = "bf16" if dtype == torch.bfloat16 else "fp32"
    cases = [([1, 2], [1, 0], 0), ([5, 6], [0, 1], 1), ([3, 4], [1, 1], 0), ([3, 4], [0, 0], 1), ([1, 2], [1, 0], 0)]

    def draw(seeds: list[int], seen: list[int], shift: int) -> Tensor:
        return denoise(model, request(model, seeds, seen, shift), plan)

    expected = [draw(*case) for case in cases]
    with with_graphs(model) as graphs:
        for number, case in enumerate(cases):
            assert_near(draw(*case), expected[number], f"{name}, batch {number} of {cases}")
        assert graphs.made == recorded(graphs) == 3, "recordings for one, two and no rows that see"
    assert not torch.equal(expected[0], expected[1]), "the batches are to differ"


@pytest.mark.parametrize("kind", SETTINGS)
def test_documents_and_continuous_batching(models, kind: str) -> None:
    model, settings = models[torch.float32], SETTINGS[kind]
    documents = items()

    def texts(*, continuous: bool) -> list[list[str]]:
        filled = fill(model, documents, list(range(len(documents))), settings, 3, continuous=continuous)
        return [[piece.value for piece in document if piece.kind == "text"] for document in filled]

    expected = texts(continuous=False)
    with with_graphs(model) as graphs:
        for continuous in (False, True, False):
            found = texts(continuous=continuous)
            assert found == expected, f"continuous {continuous}: {found} instead of {expected}"
        recorded(graphs)


def test_the_embedded_model_in_bf16_writes_mostly_the_same() -> None:
    from mmi_engine.generate_bench import Case, _pieces, load

    model = load("toon", "cuda", None)
    settings = Settings(max_new_tokens=16, min_new_tokens=16)
    documents = [_pieces(model, Case("text", "images", "text", images=n % 3), n) for n in range(6)]

    def ids() -> list[list[int]]:
        filled = fill(model, documents, list(range(6)), settings, 2)
        return [model.tokenizer.encode(document[-1].value) for document in filled]

    expected = ids()
    with with_graphs(model) as graphs:
        found = ids()
        recorded(graphs)
    same = [sum(a == b for a, b in zip(one, other, strict=False)) for one, other in zip(found, expected, strict=True)]
    share = sum(same) / max(1, sum(map(len, expected)))
    assert share >= 0.7, f"{share:.0%} of the tokens agree: {found} instead of {expected}"


def test_memory_is_bounded_and_given_back(models) -> None:
    model = models[torch.float32]
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    with with_graphs(model) as graphs:
        logits_of(model, "one image")
        one = sum(step.bytes for step in graphs._kept.values())
        assert one > 0
        graphs.limit = 0
        for which in BATCHES:
            logits_of(model, which)
            assert len(graphs) == 1, f"{which}: only the newest is to be kept"
        graphs.clear()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for _ in range(3):
        with with_graphs(model):
            logits_of(model, "one image")
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + 32 * 2**20, "recordings that were dropped still hold memory"


def test_what_cannot_be_recorded_is_said() -> None:
    from mmi_engine.errors import BackendError

    number = torch.ones((), device="cuda")

    def asks_the_device() -> Tensor:
        return number * (2 if number.item() > 0 else 3)

    with pytest.raises(BackendError, match="cannot be recorded as a CUDA graph here: .*; leave out --cuda-graphs"):
        Recording(asks_the_device, torch.device("cuda"), torch.nn.Module())
    torch.cuda.synchronize()
    assert float(number + 1) == 2, "the device works on"


def test_commands(tmp_path: Path, capsys) -> None:
    """Answers and pictures of whole runs, and another path may not resume them."""
    data = make_data(tmp_path)

    def go(command: str, out: str, *options: str, code: Callable[[int], bool] = lambda code: code == 3) -> None:
        where = [str(data / f"{command}.jsonl"), "--model", str(data / "model"), "--out", str(tmp_path / out)]
        found = main([command, *where, "--device", "cuda", "--dtype", "fp32", "--batch-size", "2", *options])
        assert code(found), f"exit code {found}: {capsys.readouterr().err}"

    def rows(out: str) -> dict[str, dict]:
        lines = (tmp_path / out / "results.jsonl").read_text().splitlines()
        return {row["id"]: row for row in map(json.loads, lines)}

    for command, options in (
        ("vqa", ["--max-new-tokens", "6"]),
        ("caption", ["--beams", "2", "--max-new-tokens", "5"]),
        ("t2i", []),
    ):
        go(command, f"{command} plain", *options)
        go(command, f"{command} graphs", *options, "--cuda-graphs")
        plain, graphs = rows(f"{command} plain"), rows(f"{command} graphs")
        assert plain.keys() == graphs.keys(), command
        for key in ("answer", "caption"):
            texts = [{name: row.get(key) for name, row in side.items()} for side in (plain, graphs)]
            assert texts[0] == texts[1], f"{command}: {texts[1]} instead of {texts[0]}"
    for picture in (tmp_path / "t2i plain").rglob("*.png"):
        other = tmp_path / "t2i graphs" / picture.relative_to(tmp_path / "t2i plain")
        gap = np.abs(np.asarray(Image.open(picture), int) - np.asarray(Image.open(other), int)).max()
        assert gap <= 2, f"{picture.name}: {gap} of 255 levels apart"
    settings = json.loads((tmp_path / "vqa graphs" / "run.json").read_text())["settings"]
    assert settings["cuda_graphs"]["value"] is True, settings
    go("vqa", "vqa graphs", "--max-new-tokens", "6", code=lambda found: found == 2)
    go("vqa", "refused", "--kernel", "torch", "--cuda-graphs", code=lambda found: found == 1)
    go("t2i", "refused", "--compile", "--cuda-graphs", code=lambda found: found == 2)
