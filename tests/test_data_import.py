"""Other people's formats, each written here as its authors publish it, and what becomes of its odd rows."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmi_cli.main import main
from mmi_engine.check import check
from mmi_engine.data.images import ImageLoader
from mmi_engine.data.importers import jsonstream
from mmi_engine.data.importers.formats import FORMATS
from mmi_engine.data.manifest import Manifest
from mmi_engine.errors import ManifestError


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "source"
    (folder / "val2014").mkdir(parents=True)
    for name in ("a.jpg", "b.jpg", "11.jpg", "12.png", "13.jpg", "14.jpg", "15.jpg"):
        Image.new("RGB", (12, 8), (50, 0, 0)).save(folder / name)
    for number in (1, 2):
        Image.new("RGB", (12, 8)).save(folder / f"val2014/COCO_val2014_{number:012d}.jpg")
    return folder


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def imported(form: str, path: Path, out: Path, *arguments: str) -> tuple[list[dict], dict[str, int]]:
    """The manifest's rows and what was dropped; every row is then read as a run would read it."""
    assert main(["data", "import", form, str(path), "--out", str(out), "-q", *arguments]) == 0
    rows = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    record = json.loads((out / "import.json").read_text())
    assert record["rows"] == len(rows) and len({row["id"] for row in rows}) == len(rows)
    return rows, record["dropped"]


def readable(out: Path) -> bool:
    manifest = Manifest(out / "manifest.jsonl")
    return check(manifest, None, ImageLoader(manifest.root)).failed == 0


def turn(role: str, *parts: Any) -> dict:
    return {"role": role, "content": list(parts)}


def test_chats_keep_the_place_of_their_pictures(source, tmp_path):
    text = {"type": "text", "text": "What is it?"}
    rows = [
        {"id": 1, "messages": [turn("user", {"type": "image", "image": "a.jpg"}, text)]},
        {
            "messages": [turn("user", {"type": "image"}, text, {"type": "image"})],
            "images": ["a.jpg", {"path": "b.jpg"}],
        },
        {"messages": [turn("user", {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}})]},
        {"messages": [turn("user", {"type": "image"})]},
        {"messages": [turn("user", text)], "images": ["a.jpg"]},
        {"messages": [turn("user", {"type": "image", "image": "gone.jpg"})]},
        {"messages": [turn("wizard", text)]},
        {"messages": []},
        ["no object"],
    ]
    (source / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made, dropped = imported("messages", source / "chats.jsonl", tmp_path / "out")
    assert dropped == {"placeholder_mismatch": 2, "image_not_found": 1, "bad_messages": 3}
    assert [row["id"] for row in made] == ["1", "000002", "000003"]
    kinds = [part.get("image") or part["text"] for part in made[1]["messages"][0]["content"]]
    assert kinds == ["../source/a.jpg", "What is it?", "../source/b.jpg"]


def test_llava_marks_are_filled_in_order(source, tmp_path):
    def talk(*texts: str) -> list[dict]:
        return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]

    rows = [
        {"id": "x", "image": "a.jpg", "conversations": talk("<image>\nWhat?", "A bus.", "And now?", "A car.")},
        {"id": "text", "conversations": talk("Hello", "Hi")},
        {"id": "two", "image": ["a.jpg", "b.jpg"], "conversations": talk("Left <image> right <image>", "yes")},
        {"id": "unmarked", "image": "a.jpg", "conversations": talk("What?", "A bus.")},
        {"id": "more marks", "image": "a.jpg", "conversations": talk("<image><image>", "x")},
        {"id": "gone", "image": "gone.jpg", "conversations": talk("<image>", "x")},
        {"id": "empty", "conversations": []},
        {"id": "x", "conversations": talk("again", "x")},
    ]
    made, dropped = imported("llava", write(source / "llava.json", rows), tmp_path / "out")
    assert dropped == {"placeholder_mismatch": 1, "image_not_found": 1, "no_turns": 1, "duplicate_id": 1}
    assert [row["id"] for row in made] == ["x", "text", "two", "unmarked"]
    content = [part.get("image", part.get("text")) for part in made[2]["messages"][0]["content"]]
    assert content == ["Left", "../source/a.jpg", "right", "../source/b.jpg"]
    assert made[3]["messages"][0]["content"][0]["type"] == "image"
    assert [message["role"] for message in made[0]["messages"]] == ["user", "assistant"] * 2
    assert readable(tmp_path / "out")  # answered chats are data for training


def test_coco_captions_are_gathered_per_picture(source, tmp_path):
    document = {
        "info": {"year": 2014},
        "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}, {"id": 3, "file_name": "c.jpg"}],
        "annotations": [
            {"image_id": 1, "id": 9, "caption": " A bus. "},
            {"image_id": 3, "caption": "x"},
            {"image_id": 1, "caption": "It rains."},
        ],
    }
    made, dropped = imported("coco", write(source / "captions.json", document), tmp_path / "out")
    assert made == [{"id": "1", "image": "../source/a.jpg", "captions": ["A bus.", "It rains."]}]
    assert dropped == {"no_caption": 1, "image_not_found": 1} and readable(tmp_path / "out")


def test_karpathy_splits(source, tmp_path):
    def entry(name: str, split: str, number: int, **more: Any) -> dict:
        return {"filename": name, "split": split, "imgid": number, "sentences": [{"raw": f"It is {name}."}], **more}

    images = [
        entry("COCO_val2014_000000000001.jpg", "test", 0, filepath="val2014", cocoid=1),
        entry("a.jpg", "train", 7, filepath="elsewhere"),
        entry("b.jpg", "test", 2),
    ]
    path = write(source / "dataset_coco.json", {"images": images, "dataset": "coco"})
    made, dropped = imported("coco", path, tmp_path / "test", "--split", "test")
    assert [(row["id"], row["image"]) for row in made] == [
        ("1", "../source/val2014/COCO_val2014_000000000001.jpg"),
        ("2", "../source/b.jpg"),
    ]
    assert dropped == {} and made[0]["meta"] == {"split": "test"}
    assert len(imported("coco", path, tmp_path / "all")[0]) == 3


def test_vqav2_questions_meet_their_answers(source, tmp_path):
    questions = [
        {"image_id": 1, "question": "What is it?", "question_id": 10},
        {"image_id": 2, "question": "How many?", "question_id": 20},
        {"image_id": 3, "question": "Gone?", "question_id": 30},
        {"image_id": 1, "question": " ", "question_id": 40},
    ]
    answers = [{"question_id": 10, "answers": [{"answer": "bus"}, {"answer": "car"}], "answer_type": "other"}]
    for name, document in (
        ("behind", {"questions": questions, "data_subtype": "val2014"}),
        ("before", {"data_subtype": "val2014", "questions": questions}),
    ):
        path = write(source / f"{name}.json", document)
        told = write(source / "answers.json", {"annotations": answers})
        images = ("--images", str(source / "val2014"))
        made, dropped = imported("vqa", path, tmp_path / name, *images, "--annotations", str(told))
        assert [(row["id"], row["answers"], row["meta"]) for row in made] == [
            ("10", ["bus", "car"], {"answer_type": "other"})
        ]
        assert dropped == {"no_answers": 1, "image_not_found": 1, "no_question": 1}
        made, dropped = imported("vqa", path, tmp_path / f"{name}-asked", *images)
        assert len(made) == 2 and "answers" not in made[0] and readable(tmp_path / f"{name}-asked")


def test_textvqa_and_vizwiz(source, tmp_path):
    data = {"data": [{"question_id": 5, "image_id": "a", "question": "What does it say?", "answers": ["stop"] * 10}]}
    made, _ = imported("vqa", write(source / "textvqa.json", data), tmp_path / "text")
    assert made == [{"id": "5", "image": "../source/a.jpg", "question": "What does it say?", "answers": ["stop"] * 10}]
    told = [{"answer": "unanswerable", "answer_confidence": "yes"}]
    rows = [{"image": "b.jpg", "question": "What?", "answers": told, "answerable": 0}]
    made, _ = imported("vqa", write(source / "vizwiz.json", rows), tmp_path / "vizwiz")
    assert (made[0]["id"], made[0]["answers"], made[0]["meta"]) == ("b", ["unanswerable"], {"answerable": 0})


def test_refcoco_boxes_become_corners_and_pickles_need_trust(source, tmp_path, capsys):
    instances = {
        "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "gone.jpg"}],
        "annotations": [{"id": 7, "bbox": [1, 2, 3, 4]}, {"id": 8, "bbox": [1, 2, 0, 4]}],
    }
    sentences = [{"sent_id": 70, "sent": "the left one"}, {"sent_id": 71, "sent": "red"}]
    refs = [
        {"ref_id": 1, "ann_id": 7, "image_id": 1, "split": "val", "sentences": sentences},
        {"ref_id": 2, "ann_id": 8, "image_id": 1, "split": "val", "sentences": [{"sent_id": 72, "sent": "flat"}]},
        {"ref_id": 3, "ann_id": 9, "image_id": 1, "split": "val", "sentences": [{"sent_id": 73, "sent": "lost"}]},
        {"ref_id": 4, "ann_id": 7, "image_id": 2, "split": "val", "sentences": [{"sent_id": 74, "sent": "x"}]},
        {"ref_id": 5, "ann_id": 7, "image_id": 1, "split": "train", "sentences": [{"sent_id": 75, "sent": "x"}]},
    ]
    folder = source / "refcoco"
    folder.mkdir()
    write(folder / "instances.json", instances)
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs))
    common = ("--images", str(source), "--split", "val")
    assert main(["data", "import", "refcoco", str(folder), "--out", str(tmp_path / "no"), *common]) == 2
    assert "may run any code" in capsys.readouterr().err
    made, dropped = imported("refcoco", folder, tmp_path / "out", *common, "--trust-pickle")
    assert [(row["id"], row["expression"], row["box"]) for row in made] == [
        ("70", "the left one", [1, 2, 4, 6]),
        ("71", "red", [1, 2, 4, 6]),
    ]
    assert dropped == {"bad_box": 1, "no_box": 1, "image_not_found": 1} and readable(tmp_path / "out")
    write(folder / "refs.json", refs)
    assert imported("refcoco", folder, tmp_path / "json", *common) == (made, dropped)


def test_referring_expressions_as_json_lines(source, tmp_path):
    rows = [
        {"img_path": "a.jpg", "sentence": "it", "bbox": [1, 2, 5, 6]},
        {"image": "a.jpg", "expression": "it", "box": "[1, 2, 5]"},
        {"image": "a.jpg", "box": [1, 2, 5, 6]},
    ]
    (source / "refs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made, dropped = imported("refcoco", source / "refs.jsonl", tmp_path / "out")
    assert made[0]["box"] == [1, 2, 5, 6] and dropped == {"bad_box": 1, "no_expression": 1}
    made, _ = imported("refcoco", source / "refs.jsonl", tmp_path / "xywh", "--boxes", "xywh")
    assert made[0]["box"] == [1, 2, 6, 8]


def test_folders_tables_and_texts(source, tmp_path):
    made, dropped = imported("folder", source, tmp_path / "folder")
    assert len(made) == 9 and made[0] == {"id": "11.jpg", "image": "../source/11.jpg"} and not dropped
    (source / "table.csv").write_text('id,image,question\nq1,a.jpg,"Yes, or no?"\nq2,gone.jpg,x\nq3,b.jpg\n')
    made, dropped = imported("csv", source / "table.csv", tmp_path / "csv")
    assert made == [{"id": "q1", "image": "../source/a.jpg", "question": "Yes, or no?"}]
    assert dropped == {"image_not_found": 1, "bad_row": 1}
    (source / "prompts.txt").write_text("\ufeffa bus\r\n\r\na car")
    made, _ = imported("text", source / "prompts.txt", tmp_path / "text")
    assert [row["prompt"] for row in made] == ["a bus", "a car"]


def test_vist_needs_five_pictures_in_their_order(source, tmp_path):
    def part(story: int, order: int, photo: int, text: str = "Then.") -> dict:
        place = {"story_id": str(story), "worker_arranged_photo_order": order, "photo_flickr_id": str(photo)}
        return {**place, "original_text": text, "text": "then ."}

    parts = [part(1, 4 - n, 15 - n, f"Text {4 - n}.") for n in range(5)]
    parts += [part(2, n, 11 + n) for n in range(4)] + [part(3, n, 21 + n) for n in range(5)]
    for name, listed in (("flat", parts), ("nested", [[one] for one in parts])):
        path = write(source / f"{name}.json", {"images": [{"id": "11"}], "annotations": listed})
        made, dropped = imported("vist", path, tmp_path / name)
        assert dropped == {"not_five": 1, "image_not_found": 1}
        (row,) = made
        assert [frame["text"] for frame in row["frames"]] == [f"Text {n}." for n in range(5)]
        assert [Path(frame["image"]).stem for frame in row["frames"]] == ["11", "12", "13", "14", "15"]
    (row,), _ = imported("vist", source / "nested.json", tmp_path / "last", "--given", "4")
    assert [frame["image"] is None for frame in row["frames"]] == [False] * 4 + [True]
    assert len(row["meta"]["images"]) == 5 and readable(tmp_path / "last")


def png(color: tuple[int, int, int], frames: int = 1) -> np.ndarray:
    """A strip of 128-px frames, the first one in this colour, as the bytes of a PNG."""
    strip = Image.new("RGB", (128, 128 * frames), (9, 9, 9))
    strip.paste(color, (0, 0, 128, 128))
    stream = io.BytesIO()
    strip.save(stream, format="PNG")
    return np.frombuffer(stream.getvalue(), np.uint8)


def test_story_hdf5_takes_the_first_frame_of_each_strip(source, tmp_path):
    import h5py

    with h5py.File(source / "pororo.h5", "w") as file:
        for split in ("train", "test"):
            group = file.create_group(split)
            for number in range(5):
                images = group.create_dataset(f"image{number}", (3,), dtype=h5py.vlen_dtype(np.dtype("uint8")))
                for row in range(3):
                    images[row] = png((number * 10, row, 0), frames=1 + number) if row < 2 else np.zeros(4, np.uint8)
            texts = group.create_dataset("text", (3,), dtype=h5py.string_dtype(encoding="utf-8"))
            texts[:] = ["a|b|c|d|é", "a|b", "a|b|c|d|e"]
    made, dropped = imported("story-h5", source / "pororo.h5", tmp_path / "out", "--split", "test", "--given", "1")
    assert dropped == {"texts_do_not_match": 1, "image_unreadable": 1}
    (row,) = made
    assert row["id"] == "test-000000" and [frame["text"] for frame in row["frames"]] == list("abcdé")
    assert [frame["image"] is None for frame in row["frames"]] == [False, True, True, True, True]
    for number, name in enumerate(row["meta"]["images"]):
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.size == (128, 128) and picture.getpixel((5, 5)) == (number * 10, 0, 0)
    assert readable(tmp_path / "out")


def test_webdataset_tars(source, tmp_path):
    with tarfile.open(source / "part.tar", "w") as tar:
        for name, content in (
            ("one.jpg", (source / "a.jpg").read_bytes()),
            ("one.txt", b"a bus\n"),
            ("one.json", b'{"question": "what?", "url": "x"}'),
            ("two.txt", b"no picture"),
            ("three.png", b"broken"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    made, dropped = imported("webdataset", source / "part.tar", tmp_path / "out")
    assert made == [
        {"id": "one", "image": "images/one.png", "captions": ["a bus"], "question": "what?", "meta": {"url": "x"}}
    ]
    assert dropped == {"no_image": 1, "image_unreadable": 1} and readable(tmp_path / "out")


def test_parquet_tables_and_documents(source, tmp_path):
    import pyarrow
    from pyarrow import parquet

    picture = (source / "a.jpg").read_bytes()
    columns = {"id": ["x", "y"], "image": [{"bytes": picture, "path": None}, {"bytes": b"?", "path": None}]}
    parquet.write_table(pyarrow.table({**columns, "text": ["a bus", "b"]}), source / "table.parquet")
    made, dropped = imported("parquet", source / "table.parquet", tmp_path / "table")
    assert made == [{"id": "x", "image": "images/x.png", "captions": ["a bus"]}] and dropped == {"image_unreadable": 1}
    documents = {"texts": [["Hello.", None], ["x"]], "images": [[None, "http://x/y.png"], [None, None]]}
    parquet.write_table(pyarrow.table(documents), source / "obelics.parquet")
    made, dropped = imported("parquet", source / "obelics.parquet", tmp_path / "documents")
    content = made[0]["messages"][0]["content"]
    assert content == [{"type": "text", "text": "Hello."}, {"type": "image", "image": "http://x/y.png"}]
    assert dropped == {"texts_do_not_match": 1}


def test_a_repeated_id_leaves_the_picture_of_the_first_row_alone(source, tmp_path):
    import pyarrow
    from pyarrow import parquet

    pictures = [bytes(png((200, 0, 0))), bytes(png((0, 0, 200)))]
    (source / "tars").mkdir()
    for number, content in enumerate(pictures):  # keys start again in every tar
        with tarfile.open(source / f"tars/{number}.tar", "w") as tar:
            for name in ("0.png", f"own{number}.png"):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    column = [{"bytes": content, "path": None} for content in pictures]
    parquet.write_table(pyarrow.table({"id": ["0", "0"], "image": column}), source / "twice.parquet")
    for form, path in (("webdataset", source / "tars"), ("parquet", source / "twice.parquet")):
        made, dropped = imported(form, path, tmp_path / form)
        assert dropped == {"duplicate_id": 1} and made[0]["id"] == "0"
        with Image.open(tmp_path / form / made[0]["image"]) as picture:
            assert picture.getpixel((5, 5)) == (200, 0, 0)
        assert json.loads((tmp_path / form / "import.json").read_text())["images"] == len(made)


def test_half_a_surrogate_pair_drops_its_row_alone(source, tmp_path):
    rows = [{"id": "x", "messages": [turn("user", {"type": "text", "text": text})]} for text in ("\ud800", "sound")]
    (source / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made, dropped = imported("messages", source / "chats.jsonl", tmp_path / "chats")
    assert dropped == {"bad_encoding": 1} and made[0]["messages"][0]["content"][0]["text"] == "sound"
    content = (source / "a.jpg").read_bytes()
    with tarfile.open(source / "names.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name in ("caf\udce9.jpg", "sound.jpg"):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    made, dropped = imported("webdataset", source / "names.tar", tmp_path / "names")
    assert dropped == {"bad_encoding": 1} and [row["id"] for row in made] == ["sound"]


# -- common to all -----------------------------------------------------------------------------------------------------


def test_copies_limits_and_missing_pictures(source, tmp_path):
    images = [{"id": n, "file_name": name} for n, name in enumerate(("a.jpg", "gone.jpg", "b.jpg"))]
    notes = [{"image_id": n, "caption": "x"} for n in range(3)]
    path = write(source / "c.json", {"images": images, "annotations": notes})
    made, _ = imported("coco", path, tmp_path / "copied", "--copy")
    assert [row["image"] for row in made] == ["images/a.jpg", "images/b.jpg"] and readable(tmp_path / "copied")
    made, dropped = imported("coco", path, tmp_path / "kept", "--keep-missing")
    assert len(made) == 3 and not dropped
    made, _ = imported("coco", path, tmp_path / "one", "--limit", "1")
    assert len(made) == 1
    again = ["data", "import", "coco", str(path), "--out", str(tmp_path / "one"), "-q"]
    assert main(again) == 2  # never over a manifest that is there


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"folder", "csv", "text", "webdataset", "parquet", "story-h5"}))
@pytest.mark.parametrize("content", [b"", b"{", b"[{}", b"\xff\xfe", b"plain text", b'{"images": [1, 2'])
def test_a_broken_source_is_refused_and_leaves_no_manifest(name, content, tmp_path, capsys):
    (tmp_path / "broken.json").write_bytes(content)
    assert main(["data", "import", name, str(tmp_path / "broken.json"), "--out", str(tmp_path / "out")]) == 2
    assert "Traceback" not in capsys.readouterr().err and not (tmp_path / "out/manifest.jsonl").exists()
    assert main(["data", "import", name, str(tmp_path / "gone.json"), "--out", str(tmp_path / "out")]) == 2


@pytest.mark.parametrize("block", [1, 2, 7, 2**20])
def test_json_is_read_piece_by_piece_whatever_the_size_of_the_pieces(block, tmp_path, monkeypatch):
    monkeypatch.setattr(jsonstream, "BLOCK", block)
    document = {"a": [1, {"x": [1, 2]}, "é\\u20ac"], "b": {"c": 12345}, "d": [], "e": [-1.5e3, None, True], "f": 12}
    path = write(tmp_path / "d.json", document)
    expected = (
        [("a", v) for v in document["a"]] + [("b", {"c": 12345})] + [("e", v) for v in document["e"]] + [("f", 12)]
    )
    assert list(jsonstream.items(path)) == expected
    path.write_text(json.dumps(document, indent=2))
    assert list(jsonstream.items(path)) == expected
    path.write_text("\ufeff" + json.dumps(list(range(100, 120))))
    assert [item for _, item in jsonstream.items(path)] == list(range(100, 120))
    path.write_text('{"a": 1}\n\n{"b": [2]}\n')
    assert [item for _, item in jsonstream.items(path)] == [{"a": 1}, {"b": [2]}]
    for broken in ('{"a": [1, 2}', '{"a" 1}', "[1 2]", "nothing", ""):
        path.write_text(broken)
        with pytest.raises(ManifestError):
            list(jsonstream.items(path))


def test_a_large_array_is_never_in_memory_as_a_whole(tmp_path):
    import tracemalloc

    path = tmp_path / "large.json"
    with path.open("w") as stream:
        stream.write("[" + ",".join(json.dumps({"id": n, "text": "x" * 1000}) for n in range(12_000)) + "]")
    tracemalloc.start()
    count = sum(1 for _ in jsonstream.items(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 12_000 and path.stat().st_size > 12_000_000 > 2 * peak
