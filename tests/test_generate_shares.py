"""Shares of a prediction on threads, and recorded paths: the same bits as the whole in one thread, and nothing left."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Iterator

import pytest
import torch
from test_generate_image import request_of
from tiny import tiny_model
from torch import Tensor

from mmi_engine.generate import recorded, shares
from mmi_engine.generate.image import Denoising, denoise
from mmi_engine.generate.recorded import Traced
from mmi_engine.generate.shares import cut, on_threads
from mmi_engine.model import packed as packing
from mmi_engine.model.interleaved import MMInterleaved
from mmi_engine.model.packed import packed
from mmi_engine.model.rows import steady

PLAN = Denoising(3, 2.0, "ddpm")
needs_layout = pytest.mark.skipif(not packing.available(), reason="this processor or torch has no oneDNN layout")


@pytest.fixture
def model() -> MMInterleaved:
    return packed(steady(tiny_model(seed=3)))


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def drawn(model: MMInterleaved, rows: int = 1, seen: list[int] | None = None, guidance: float = 2.0) -> Tensor:
    request = request_of(rows, list(range(rows)), seen or [1] * rows)
    return denoise(model, request, Denoising(PLAN.steps, guidance, PLAN.scheduler))


def recordings(model: MMInterleaved) -> list[Traced]:
    entry = model.image_decoder.unet.kept.entry
    return [] if entry is None else [found for found in entry[2].values() if isinstance(found, Traced)]


def test_every_row_and_condition_is_in_one_share_and_all_are_alike() -> None:
    for threads in range(1, 9):
        for rows in range(1, 17):
            for conditions in (1, 2):
                found = cut(rows, conditions, threads)
                pairs = [(r, c) for own, some in found for r in range(rows)[own] for c in range(conditions)[some]]
                assert sorted(pairs) == [(r, c) for r in range(rows) for c in range(conditions)]
                assert len({(a.stop - a.start, b.stop - b.start) for a, b in found}) == 1
                assert len(found) <= threads and (len(found) > 1) == (
                    threads > 1 and (rows % threads == 0 or (rows == 1 and conditions == 2))
                )


@pytest.mark.parametrize(("rows", "seen"), [(1, [1]), (1, [0]), (2, [1, 0]), (4, [0, 1, 1, 1])])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_two_threads_draw_what_one_draws(
    model: MMInterleaved,
    two_threads: None,
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    seen: list[int],
    guidance: float,
) -> None:
    names: set[str] = set()
    forward = model.image_decoder.unet.forward

    def noted(*given: object) -> Tensor:
        names.add(threading.current_thread().name)
        return forward(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(model.image_decoder.unet, "forward", noted)
    running = threading.active_count()
    got = drawn(model, rows, seen, guidance)
    assert len(names) == (1 if rows == 1 and guidance == 1 else 2)
    assert torch.get_num_threads() == 2 and threading.active_count() == running
    torch.set_num_threads(1)
    torch.testing.assert_close(got, drawn(model, rows, seen, guidance), rtol=1e-5, atol=1e-5)
    torch.set_num_threads(2)
    assert torch.equal(drawn(model, rows, seen, guidance), got)


def test_a_picture_does_not_depend_on_its_neighbours_among_shares(model: MMInterleaved, two_threads: None) -> None:
    whole = denoise(model, request_of(4, [0, 1, 2, 3], [1, 1, 0, 1]), PLAN)
    turned = request_of(4, [0, 1, 2, 3], [1, 1, 0, 1])
    order = [3, 0, 1, 2]
    turned.tokens, turned.visible = turned.tokens[order], turned.visible[order]
    turned.features, turned.generators = [f[order] for f in turned.features], [turned.generators[i] for i in order]
    assert torch.equal(denoise(model, turned, PLAN), whole[order])


@pytest.mark.parametrize("main", [False, True])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_a_share_raises_is_raised_and_nothing_is_left(
    model: MMInterleaved, two_threads: None, monkeypatch: pytest.MonkeyPatch, main: bool, error: type[BaseException]
) -> None:
    unet, running = model.image_decoder.unet, threading.active_count()
    forward = unet.forward

    def failing(*given: object) -> Tensor:
        if (threading.current_thread() is threading.main_thread()) == main:
            raise error("of a share")
        return forward(*given)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(error, match="of a share"):
        patch.setattr(unet, "forward", failing)
        drawn(model)
    assert torch.get_num_threads() == 2 and threading.active_count() == running
    assert not any("forward" in vars(module) for module in unet.unet.modules())
    drawn(model)


def test_a_job_has_its_part_of_the_threads_and_no_gradients(two_threads: None) -> None:
    def state() -> Tensor:
        return torch.tensor([torch.get_num_threads(), torch.is_grad_enabled(), threading.get_ident() % 2**31])

    with on_threads(2) as run, torch.no_grad():
        one, other = run([state, state])
    assert one[:2].tolist() == other[:2].tolist() == [1, 0] and one[2] != other[2]
    seen: list[int] = []
    late = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    late.start()
    late.join()
    assert seen == [2], "a thread that starts later has what was set before"


def test_a_large_model_has_one_share(model: MMInterleaved, two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = model.image_decoder.unet
    assert shares._threads(unet) == 2
    monkeypatch.setattr(shares, "LAID_OUT_TWICE", 1000)
    assert shares._threads(unet) == 1


@needs_layout
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("rows", "seen"), [(1, [1]), (2, [1, 0])])
def test_recorded_paths_draw_the_same_bits(
    model: MMInterleaved, two_threads: None, monkeypatch: pytest.MonkeyPatch, threads: int, rows: int, seen: list[int]
) -> None:
    torch.set_num_threads(threads)
    expected = drawn(model, rows, seen)
    assert not recordings(model), "a few steps are not worth one"
    monkeypatch.setattr(recorded, "AFTER", 1)
    for _ in range(2):
        assert torch.equal(drawn(model, rows, seen), expected) and len(recordings(model)) == 1
    other = denoise(model, request_of(rows, [9] * rows, seen), PLAN)
    monkeypatch.setattr(recorded, "_fit", lambda unet: False)
    assert torch.equal(denoise(model, request_of(rows, [9] * rows, seen), PLAN), other)


@needs_layout
def test_no_more_shapes_are_recorded_than_are_kept(model: MMInterleaved, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "AFTER", 1)
    monkeypatch.setattr(recorded, "MOST", 2)
    for _ in range(2):
        for rows in (1, 2, 3):
            drawn(model, rows)
    assert len(recordings(model)) == 2


@pytest.mark.parametrize("rows", [1, 2])
def test_threads_under_autocast_draw_what_one_draws(model: MMInterleaved, two_threads: None, rows: int) -> None:
    """As the contact sheets of a training in bf16 are drawn."""
    with torch.autocast("cpu", torch.bfloat16):
        found = drawn(model, rows)
        torch.set_num_threads(1)
        assert torch.equal(drawn(model, rows), found)


@needs_layout
def test_a_recording_serves_as_long_as_the_weights_are_the_same(
    model: MMInterleaved, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorded, "AFTER", 1)
    drawn(model)
    first = drawn(model)
    assert recordings(model)
    with torch.no_grad():
        model.image_decoder.unet.unet.conv_in.weight.mul_(2)
    changed = drawn(model)
    assert not recordings(model) and not torch.equal(changed, first)
    assert torch.equal(drawn(model), changed) and recordings(model)
    twin = copy.deepcopy(model)
    assert not recordings(twin) and torch.equal(drawn(twin), changed)
    buffer = io.BytesIO()
    torch.save(model.image_decoder.unet, buffer)
    model.train().eval()
    assert not recordings(model)


@needs_layout
def test_what_cannot_be_recorded_runs_as_ever(model: MMInterleaved, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = drawn(model)
    monkeypatch.setattr(recorded, "AFTER", 1)

    def refused(*given: object, **named: object) -> None:
        raise RuntimeError("not to be recorded")

    with monkeypatch.context() as patch:
        patch.setattr(torch.jit, "trace", refused)
        assert torch.equal(drawn(model), expected) and not recordings(model)
    model.train().eval()
    drawn(model)
    handle = model.image_decoder.unet.unet.mid_block.register_forward_hook(lambda module, given, made: None)
    assert torch.equal(drawn(model), expected) and not recordings(model), "hooks are heard in every step"
    handle.remove()
    assert torch.equal(drawn(model), expected) and recordings(model)
