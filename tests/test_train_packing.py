"""The data path: shuffling, documents, packing, batches; the same rows for any number of workers, bad rows counted."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmi_engine.data.manifest import Row
from mmi_engine.data.maps import Palette
from mmi_engine.errors import ConfigError, RowError
from mmi_engine.model.config import SpecialTokens
from mmi_engine.sequence import NO_LOSS, language_visibility
from mmi_engine.tasks.prompts import TOON
from mmi_engine.train.collate import Feed, Sizes, describe
from mmi_engine.train.documents import Choices, View, box_text, draft, kind_of, mirrored_words
from mmi_engine.train.loader import stream as loaded
from mmi_engine.train.packing import CHUNK, Blend, Layout, Stream, encode
from mmi_engine.train.rows import RowIndex, shuffled
from mmi_engine.train.sections import SetConfig

TOKENS = SpecialTokens(bos=1, eos=2, pad=299, boi=300, image=301)
PER_IMAGE = 3


class Letters:
    """One id per character, so that lengths can be counted by hand."""

    def encode(self, text: str) -> list[int]:
        return [3 + ord(letter) % 250 for letter in text]

    def decode(self, ids: list[int]) -> str:
        return ""


def layout(room: int = 60, *, pack: bool = True) -> Layout:
    return Layout(Letters(), TOKENS, PER_IMAGE, room, pack)


def write(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def picture(folder: Path, name: str, size: tuple[int, int] = (40, 24)) -> str:
    """Left half dark, right half light."""
    folder.mkdir(parents=True, exist_ok=True)
    array = np.full((size[1], size[0], 3), 30, np.uint8)
    array[:, size[0] // 2 :] = 220
    Image.fromarray(array).save(folder / name)
    return name


def make_stream(path: Path, entry: SetConfig, plan: Layout, **choices: Any) -> Stream:
    return Stream(RowIndex(path), entry, 0, plan, Choices(TOON, **choices), 7)


def feed_of(path: Path, entry: SetConfig, plan: Layout, decoder: int = 16, **choices: Any) -> Feed:
    blend = Blend([make_stream(path, entry, plan, **choices)], [1.0], 7)
    return Feed(blend, plan, Sizes(8, decoder), Palette.find("toon"))


def made(data: dict[str, Any], kind: str = "auto", seed: int = 0, **rules: Any) -> Any:
    flip = rules.pop("flip", False)
    entry = SetConfig("set", kind, **rules)
    return draft(Row(1, "a", data), entry, Choices(TOON, flip=flip), np.random.default_rng(seed))


# ------------------------------------------------------------------ order


@pytest.mark.parametrize("count", [1, 2, 7, 64, 1000])
def test_every_epoch_is_an_order_of_its_own(count: int) -> None:
    epochs = [[shuffled(e * count + i, count, (3, 0)) for i in range(count)] for e in range(3)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    if count > 60:
        assert epochs[0] != epochs[1] and epochs[0] != list(range(count))
        moved = np.abs(np.array(epochs[0]) - np.arange(count)).mean()
        assert moved == pytest.approx(count / 3, rel=0.25)  # of a random order


def test_rows_by_number_with_held_out_ones_apart(tmp_path: Path) -> None:
    path = write(tmp_path, [{"id": f"r{i}", "prompt": "x"} for i in range(10)] + ["", "  ", "{broken"])
    rows = RowIndex(path)
    assert [rows[i].id for i in range(3)] == ["r0", "r1", "r2"] and rows[10] is None
    assert rows[11].error is not None and rows[11].line == 13
    kept, apart = RowIndex(path, held_out=0.25), RowIndex(path, held_out=0.25, inverse=True)
    assert [apart[i].id for i in range(2)] == ["r0", "r4"] and len(kept) + len(apart) == len(rows)
    with pytest.raises(ConfigError, match="holds no rows"):
        RowIndex(write(tmp_path, [], "empty.jsonl"))


def test_sets_get_their_shares_and_no_row_twice(tmp_path: Path) -> None:
    path = write(tmp_path, [{"prompt": "a", "image": "x.png"}])
    streams = [make_stream(path, SetConfig(name, "t2i"), layout()) for name in ("a", "b", "c")]
    blend = Blend(streams, [2.0, 1.0, 1.0], 5)
    places = [blend.place(number) for number in range(1024)]
    assert Counter(chosen for chosen, _ in places) == {0: 512, 1: 256, 2: 256}
    for chosen in range(3):
        assert [inside for c, inside in places if c == chosen] == list(range(512 if chosen == 0 else 256))
    with pytest.raises(ConfigError, match="positive weight"):
        Blend(streams, [0.0, 0.0, 0.0], 5)


# ------------------------------------------------------------------ documents


def test_kinds_by_their_fields() -> None:
    rows = {
        "story": {"frames": []}, "chat": {"messages": []}, "seg2img": {"segmentation": "m", "prompt": "p"},
        "ground": {"expression": "e"}, "vqa": {"question": "q"}, "caption": {"captions": ["c"]}, "t2i": {"prompt": "p"},
    }  # fmt: skip
    assert {kind: kind_of(data) for kind, data in rows.items()} == {kind: kind for kind in rows}
    with pytest.raises(RowError):
        kind_of({"image": "a.png"})


def test_a_question_is_silent_and_its_answer_is_not() -> None:
    document = made({"image": "a.png", "question": "how many?", "answers": ["two"]})
    encoded = encode(document, layout(200))
    spoken = [i for i, flag in zip(encoded.ids, encoded.silent, strict=True) if not flag]
    assert spoken == [*Letters().encode(" two"), TOKENS.eos]
    assert encoded.ids[encoded.starts[0] : encoded.starts[0] + 4] == [300, 301, 301, 301]


def test_a_chat_learns_the_assistant_alone() -> None:
    turns = [("user", "what?"), ("assistant", "this"), ("user", "and?"), ("assistant", "that")]
    document = made({"messages": [{"role": role, "content": text} for role, text in turns]})
    encoded = encode(document, layout(200))
    spoken = [i for i, flag in zip(encoded.ids, encoded.silent, strict=True) if not flag]
    assert spoken == [*Letters().encode(" this"), *Letters().encode(" that"), TOKENS.eos]
    with pytest.raises(RowError) as caught:
        made({"messages": [{"role": "user", "content": "hello"}]})
    assert caught.value.code == "no_answers"


def test_a_mirrored_picture_mirrors_box_and_words() -> None:
    data = {"image": "a.png", "expression": "the LEFT dog, leftmost of all", "box": [10, 20, 30, 40]}
    seeds = {made(data, seed=seed, flip=True).flip: seed for seed in range(20)}
    plain, mirrored = made(data, seed=seeds[False], flip=True), made(data, seed=seeds[True], flip=True)
    words = [" ".join(p.value for p in d.pieces if p.kind == "text") for d in (plain, mirrored)]
    assert "the LEFT dog, leftmost" in words[0] and "the RIGHT dog, rightmost" in words[1]
    assert mirrored_words("upright bright Right") == "upright bright Left"
    assert box_text((10, 20, 30, 40), 100, 200, flip=False) == "(100,100)(300,200)"
    assert box_text((10, 20, 30, 40), 100, 200, flip=True) == "(700,100)(900,200)"
    assert box_text((0, 0, 100, 200), 100, 200, flip=True) == "(000,000)(999,999)"


def page(similarities: list[float]) -> dict[str, Any]:
    content: list[dict[str, Any]] = []
    for number, value in enumerate(similarities):
        content.append({"type": "image", "image": f"{number}.png", "similarity": value})
        content.append({"type": "text", "text": f"s{number}"})
    return {"messages": [{"role": "user", "content": content or [{"type": "text", "text": "x"}]}]}


def test_documents_follow_the_rules_of_mmc4() -> None:
    rules = {"min_similarity": 0.24, "max_images": 2, "drop_imageless": True, "drop_single": 0.5}
    document = made(page([0.3, 0.2, 0.25, 0.9]), "document", **rules)
    assert [p.value.reference for p in document.pieces if p.kind == "image"] == ["0.png", "2.png"]
    assert not any(document.silent) and document.drawn == [True, True]
    for data, code in ((page([]), "no_images_left"), (page([0.1, 0.2]), "no_images_left")):
        with pytest.raises(RowError) as caught:
            made(data, "document", **rules)
        assert caught.value.code == code
    dropped = 0
    for seed in range(400):
        try:
            made(page([0.3]), "document", seed, **rules)
        except RowError as error:
            assert error.code == "single_image"
            dropped += 1
    assert 160 <= dropped <= 240


@pytest.mark.parametrize(("kind", "data"), [("pair", {"caption": "a red ball", "image": "a"}), ("document", page([1]))])
def test_pictures_come_first_half_the_time(kind: str, data: dict[str, Any]) -> None:
    first = sum(made(data, kind, seed).pieces[0].kind == "image" for seed in range(400))
    assert 160 <= first <= 240


def test_pairs_are_lowered_and_short_ones_dropped() -> None:
    document = made({"caption": "A Red Ball", "image": "a"}, "pair", lower=True, min_caption=10)
    assert {p.value for p in document.pieces if p.kind == "text"} == {"a red ball"}
    with pytest.raises(RowError) as caught:
        made({"caption": "A Ball", "image": "a"}, "pair", lower=True, min_caption=10)
    assert caught.value.code == "short_caption"


def test_stories_take_hidden_pictures_from_meta() -> None:
    frames = [{"text": "one", "image": "0.png"}, {"text": "two", "image": None}]
    document = made({"frames": frames, "meta": {"images": ["0.png", "1.png"]}})
    assert [p.value for p in document.pieces] == ["one", View("0.png"), "two", View("1.png")]
    with pytest.raises(RowError):
        made({"frames": frames})


# ------------------------------------------------------------------ packing


def test_packing_uses_every_document_once_and_fills_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [{"id": str(i), "prompt": "x" * int(rng.integers(5, 40)), "image": "a.png"} for i in range(CHUNK)]
    stream = make_stream(write(tmp_path, rows), SetConfig("s", "t2i"), layout(128))
    planned, number = [], 0
    while sum(len(row.slots) for row in planned) < CHUNK:
        planned.append(stream.row(number))
        number += 1
    positions = sorted(slot.position for row in planned for slot in row.slots)
    assert positions == list(range(CHUNK))
    assert all(row.tokens <= 128 for row in planned)
    assert sum(row.tokens for row in planned) / (128 * len(planned)) > 0.95


def test_rows_hold_no_more_pictures_than_allowed(tmp_path: Path) -> None:
    rows = [{"prompt": "x", "image": "a.png"} for _ in range(40)]
    stream = make_stream(write(tmp_path, rows), SetConfig("s", "t2i", row_images=2), layout(200))
    assert max(stream.row(n).images for n in range(20)) == 2


def test_split_documents_lose_nothing_and_pictures_move_whole(tmp_path: Path) -> None:
    similar = [page([1.0] * 4) | {"id": str(i)} for i in range(CHUNK)]
    stream = make_stream(write(tmp_path, similar), SetConfig("s", "document", split=True), layout(21))
    seen: dict[int, list[int]] = {}
    for number in range(60):
        row = stream.row(number)
        assert row.tokens <= 21
        for slot in row.slots:
            _, document = stream.document(slot.position)
            encoded = encode(document, stream.layout)
            part = encoded.ids[slot.first : slot.last]
            assert part.count(301) == 3 * part.count(300)  # no picture without its <BoI>, none cut
            seen.setdefault(slot.position, []).extend(range(slot.first, slot.last or 0))
    lengths = {p: len(encode(stream.document(p)[1], stream.layout).ids) for p in seen}
    whole = [position for position, places in seen.items() if sorted(places) == list(range(lengths[position]))]
    assert len(whole) > 5
    tight = make_stream(tmp_path / "rows.jsonl", SetConfig("s", "document", split=True), layout(3))
    with pytest.raises(ConfigError, match="no room for a picture"):
        tight.row(0)


def test_long_and_broken_rows_are_dropped_and_counted_once(tmp_path: Path) -> None:
    rows = [{"id": "long", "prompt": "x" * 99, "image": "a.png"}, "{broken", {"id": "ok", "prompt": "x", "image": "a"}]
    stream = make_stream(write(tmp_path, rows), SetConfig("s", "t2i"), layout(60, pack=False))
    dropped = sum((stream.row(n).dropped for n in range(5)), Counter())
    assert dropped == {"text_too_long": 5, "bad_json": 5}  # one row an epoch is left
    hopeless = make_stream(write(tmp_path, ["{broken"], "bad.jsonl"), SetConfig("s", "t2i"), layout())
    with pytest.raises(ConfigError, match="no usable row"):
        hopeless.row(0)


def test_a_plan_is_kept_for_a_resumed_run(tmp_path: Path) -> None:
    path = write(tmp_path, [{"id": str(i), "prompt": "x" * (i % 30), "image": "a"} for i in range(90)])
    first, again = (
        Stream(RowIndex(path), SetConfig("s", "t2i"), 0, layout(), Choices(), 7, tmp_path / "plan") for _ in range(2)
    )
    far = first.row(400)
    planned: list[int] = []
    pack = again._pack
    again._pack = lambda chunk: planned.append(chunk) or pack(chunk)  # type: ignore[method-assign,func-returns-value]
    assert again.row(400) == far and len(planned) == 1  # what is past was not planned again


# ------------------------------------------------------------------ batches


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    rows = [{"id": f"p{i}", "caption": f"a ball number {i}", "image": picture(tmp_path, f"{i}.png")} for i in range(24)]
    (tmp_path / "5.png").write_bytes(b"not a picture")
    (tmp_path / "11.png").unlink()
    return write(tmp_path, rows)


def test_batches_do_not_depend_on_who_makes_them(pairs: Path) -> None:
    def batches(workers: int) -> list[Any]:
        feed = feed_of(pairs, SetConfig("s", "pair"), layout(100))
        return [batch for _, batch in loaded(lambda i: feed.batch(i, 2), range(3, 9), workers=workers, pin=False)]

    alone, many = batches(0), batches(2)
    for left, right in zip(alone, many, strict=True):
        assert left.names == right.names and left.dropped == right.dropped
        for name in ("text_ids", "target_ids", "images", "images_dec", "image_loss_mask", "image_counts"):
            assert torch.equal(getattr(left.inputs, name), getattr(right.inputs, name)), name


def test_a_broken_picture_drops_its_document_and_nothing_takes_its_place(pairs: Path) -> None:
    feed = feed_of(pairs, SetConfig("s", "pair"), layout(100, pack=False))
    batch = feed.batch(0, 24)
    assert len(batch.names) == 22 and {"s:p5", "s:p11"}.isdisjoint(batch.names)
    assert batch.dropped == {"image_unreadable": 1, "image_not_found": 1}
    assert len(batch.inputs.text_ids) == 22 and len(batch.inputs.images) == 22


def test_a_batch_of_which_nothing_is_left_has_no_loss(tmp_path: Path) -> None:
    path = write(tmp_path, [{"caption": "a ball", "image": "missing.png"}])
    batch = feed_of(path, SetConfig("s", "pair"), layout()).batch(0, 2)
    blank = [1, 300, 301, 301, 301, 2]  # the visual tokenizer must have something to read
    assert batch.inputs.text_ids.tolist() == [[1, 2, 299, 299, 299, 299], blank] and batch.names == []
    assert (batch.inputs.target_ids == NO_LOSS).all() and batch.inputs.image_counts.tolist() == [0, 1]
    assert batch.inputs.images.shape == (1, 8, 8, 3) and batch.inputs.image_loss_mask.tolist() == [0.0]


def test_both_sizes_come_from_one_mirrored_view(tmp_path: Path) -> None:
    name = picture(tmp_path, "wide.png", (60, 20))
    path = write(tmp_path, [{"id": str(i), "caption": "ball", "image": name} for i in range(16)])
    batch = feed_of(path, SetConfig("s", "pair"), layout(pack=False), flip=True).batch(0, 16)
    dark_left = batch.inputs.images[:, :, 0].float().mean((1, 2)) < 100
    assert 0 < int(dark_left.sum()) < 16
    assert torch.equal(dark_left, batch.inputs.images_dec[:, :, 0].float().mean((1, 2)) < 100)
    assert batch.inputs.images.shape[1:3] == (8, 8) and batch.inputs.images_dec.shape[1:3] == (16, 16)


def test_boxes_are_written_for_the_squeezed_and_mirrored_picture(tmp_path: Path) -> None:
    name = picture(tmp_path, "wide.png", (80, 20))
    row = {"image": name, "expression": "the dark half", "box": [0, 0, 40, 20]}
    path = write(tmp_path, [{**row, "id": str(i)} for i in range(12)])
    feed = feed_of(path, SetConfig("s", "ground"), layout(300, pack=False), decoder=0, flip=True)
    letters = Letters()
    for index in range(12):
        batch = feed.batch(index, 1)
        dark_left = bool(batch.inputs.images[0, :, 0].float().mean() < 100)
        answer = "(000,000)(500,999)" if dark_left else "(500,000)(999,999)"
        ids = batch.inputs.text_ids[0].tolist()
        assert ids[-1 - len(answer) : -1] == letters.encode(answer)
        assert batch.inputs.images_dec is None
        assert bool((batch.inputs.images[0, :, :2].float().std() < 60).item())  # squeezed, not cropped


def test_documents_of_a_row_do_not_see_each_other(pairs: Path) -> None:
    feed = feed_of(pairs, SetConfig("s", "pair"), layout(100), image_first=1.0)
    inputs = feed.batch(0, 1).inputs
    count = int(inputs.image_counts[0])
    assert count > 2
    visible = language_visibility(inputs.text_ids, TOKENS, count)[0]
    starts = (inputs.text_ids[0] == TOKENS.bos).nonzero().flatten().tolist()
    bounds = [*starts, inputs.text_ids.shape[1]]
    for number, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        assert not visible[begin:end, [m for m in range(count) if m != number]].any()
        assert visible[end - 1, number]


def test_text_before_any_picture_is_skipped_for_laion_alone(pairs: Path) -> None:
    targets = {}
    for skip in (False, True):
        entry = SetConfig("s", "pair", skip_imageless=skip)
        targets[skip] = feed_of(pairs, entry, layout(100), image_first=0.0).batch(0, 1).inputs.target_ids
    words = [int(((t != NO_LOSS) & (t != TOKENS.boi) & (t != TOKENS.eos)).sum()) for t in targets.values()]
    assert words[0] > 20 and words[1] == 0
    assert int((targets[True] == TOKENS.boi).sum()) == int((targets[False] == TOKENS.boi).sum()) > 0


def test_description_counts_documents_and_filling(pairs: Path) -> None:
    found = describe(feed_of(pairs, SetConfig("s", "pair"), layout(100)), rows=4)
    assert found["documents"]["s"] >= 8 and 0.5 < found["filled"] <= 1
