"""Raw stories, maps, web documents, benchmarks and the released project's lists, each as their authors publish it."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmi_cli.main import main
from mmi_engine.data.manifest import Manifest
from mmi_engine.train.documents import Choices, draft
from mmi_engine.train.sections import SetConfig


def imported(form: str, path: Path, out: Path, *arguments: str) -> tuple[list[dict[str, Any]], dict[str, int]]:
    assert main(["data", "import", form, str(path), "--out", str(out), "-q", *arguments]) == 0
    rows = [json.loads(line) for line in (out / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    return rows, json.loads((out / "import.json").read_text(encoding="utf-8"))["dropped"]


def learnt(out: Path, kind: str = "auto") -> list[Any]:
    """Every row as training reads it."""
    entry, rng = SetConfig("s", kind), np.random.default_rng(0)
    return [draft(row, entry, Choices(), rng) for row in Manifest(out / "manifest.jsonl").rows()]


def picture(path: Path, colour: tuple[int, int, int] = (9, 9, 9), size: tuple[int, int] = (16, 12)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def test_pororo_as_published(tmp_path: Path) -> None:
    source = tmp_path / "pororo"
    frames = [f"ep1/{n}.png" for n in range(6)]
    for number, frame in enumerate(frames):
        strip = Image.new("RGB", (128, 256), (number * 10, 0, 0))
        (source / frame).parent.mkdir(parents=True, exist_ok=True)
        strip.save(source / frame)
    np.save(source / "img_cache4.npy", np.array([frames[0].encode(), f"b'{frames[1]}'", "gone.png"], object))
    following = np.array([frames[1:5], frames[2:6], frames[1:5]], object)
    np.save(source / "following_cache4.npy", following)
    np.save(source / "descriptions.npy", np.array({f"ep1/{n}": [f"text {n}"] for n in range(6)}, object))
    splits = np.empty(3, object)
    splits[:] = [np.array([0, 2]), np.array([]), np.array([1, 7])]
    np.save(source / "train_seen_unseen_ids.npy", splits)
    assert main(["data", "import", "pororo", str(source), "--out", str(tmp_path / "no"), "-q"]) == 2
    rows, dropped = imported("pororo", source, tmp_path / "out", "--trust-pickle")
    assert [row["id"] for row in rows] == ["train-000000", "test-000001"]
    assert dropped == {"texts_do_not_match": 1, "bad_row": 1}
    assert [frame["text"] for frame in rows[1]["frames"]] == [f"text {n}" for n in range(1, 6)]
    with Image.open(tmp_path / "out" / rows[1]["frames"][2]["image"]) as first:
        assert first.size == (128, 128) and first.getpixel((5, 5)) == (30, 0, 0)
    assert all(len(document.drawn) == 5 for document in learnt(tmp_path / "out"))
    given, _ = imported("pororo", source, tmp_path / "given", "--trust-pickle", "--split", "test", "--given", "1")
    assert [frame["image"] is None for frame in given[0]["frames"]] == [False, True, True, True, True]


def test_flintstones_as_published(tmp_path: Path) -> None:
    source = tmp_path / "flint"
    names = [f"s_{n}" for n in range(6)]
    (source / "video_frames_sampled").mkdir(parents=True)
    for number, name in enumerate(names[:5]):
        video = np.zeros((3, 8, 8, 3), np.uint8)
        video[1] = number * 20
        np.save(source / "video_frames_sampled" / f"{name}.npy", video)
    (source / "following_cache4.pkl").write_bytes(pickle.dumps({names[0]: names[1:5], names[1]: names[2:6]}))
    write(source / "train-val-test_split.json", {"train": [names[0]], "val": [], "test": [names[1], names[2]]})
    notes = [{"globalID": name, "description": f"about {name}"} for name in names]
    write(source / "flintstones_annotations_v1-0.json", notes)
    rows, dropped = imported("flintstones", source, tmp_path / "out", "--trust-pickle")
    assert [row["id"] for row in rows] == ["s_0"] and dropped == {"image_not_found": 1, "not_five": 1}
    with Image.open(tmp_path / "out" / rows[0]["frames"][3]["image"]) as middle:
        assert middle.getpixel((0, 0)) == (60, 60, 60)
    (source / "following_cache4.pkl").write_bytes(b"no pickle")
    assert main(["data", "import", "flintstones", str(source), "--out", str(tmp_path / "x"), "--trust-pickle"]) == 2


def test_ade20k_pairs_maps_with_pictures_and_captions(tmp_path: Path) -> None:
    source = tmp_path / "ADEChallengeData2016"
    for split, name in (("training", "T1"), ("training", "T2"), ("validation", "V1"), ("validation", "V2")):
        map_path = source / "annotations" / split / f"{name}.png"
        map_path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.array([[0, 1], [2, 150]], np.uint8)).save(map_path)
        if name != "V2":
            picture(source / "images" / split / f"{name}.jpg")
    (source / "sceneCategories.txt").write_text("T1 dining_room\nV1 beach\nV2 beach\n", encoding="utf-8")
    rows, dropped = imported("ade20k", source, tmp_path / "out")
    assert [(row["id"], row["prompt"]) for row in rows] == [("T1", "dining room"), ("V1", "beach")]
    assert dropped == {"no_caption": 1, "image_not_found": 1}
    captions = tmp_path / "captions.jsonl"
    told = [{"image": "T2.jpg", "caption": "a room with a view"}, {"image": "T9.jpg", "caption": "x"}]
    captions.write_text("".join(json.dumps(one) + "\n" for one in told), encoding="utf-8")
    rows, _ = imported(
        "ade20k", source, tmp_path / "two", "--split", "training", "--annotations", str(captions), "--limit", "9"
    )
    assert [(row["id"], row["prompt"]) for row in rows] == [("T1", "dining room"), ("T2", "a room with a view")]
    assert [piece.kind for piece in learnt(tmp_path / "two")[0].pieces] == ["image", "text", "image"]


def page(similar: list[tuple[str, int, float]]) -> dict[str, Any]:
    info = [{"image_name": n, "matched_text_index": i, "matched_sim": s, "raw_url": "http://x"} for n, i, s in similar]
    return {"text_list": ["one", "two", "three"], "image_info": info, "url": "http://page"}


@pytest.mark.parametrize("zipped", [False, True])
def test_mmc4_documents_keep_similarities_for_training(tmp_path: Path, zipped: bool) -> None:
    for name in ("a.jpg", "b.jpg"):
        picture(tmp_path / "pictures" / name)
    pages = [page([("b.jpg", 2, 0.3), ("a.jpg", 0, 0.2), ("gone.jpg", 1, 0.9)]), page([]), {"text_list": "no"}]
    text = "\n".join(json.dumps(one) for one in pages) + "\n\n{broken\n"
    source = tmp_path / ("docs.jsonl.zip" if zipped else "docs.jsonl")
    if zipped:
        with zipfile.ZipFile(source, "w") as archive:
            archive.writestr("docs_no_face_shard_0.jsonl", text)
    else:
        source.write_text(text, encoding="utf-8")
    rows, dropped = imported("mmc4", source, tmp_path / "out", "--images", str(tmp_path / "pictures"))
    assert dropped == {"picture_left_out": 1, "bad_row": 2} and len(rows) == 2
    content = rows[0]["messages"][0]["content"]
    assert [part.get("text") or Path(part["image"]).name for part in content] == [
        "a.jpg",
        "one",
        "two",
        "b.jpg",
        "three",
    ]
    assert [part["similarity"] for part in content if part["type"] == "image"] == [0.2, 0.3]
    entry = SetConfig("s", "document", min_similarity=0.24)
    row = next(Manifest(tmp_path / "out" / "manifest.jsonl").rows())
    document = draft(row, entry, Choices(), np.random.default_rng(0))
    assert [Path(p.value.reference).name for p in document.pieces if p.kind == "image"] == ["b.jpg"]


def test_visdial_rounds_with_dense_relevance(tmp_path: Path) -> None:
    picture(tmp_path / "VisualDialog_val2018_000000000007.jpg")
    turns = [
        {"question": 0, "answer": 0, "answer_options": [0, 1], "gt_index": 0},
        {"question": 1, "answer": 1, "answer_options": [1, 0], "gt_index": 0},
    ]
    dialogs = [{"image_id": 7, "caption": "a dog", "dialog": turns}, {"image_id": 8, "caption": "x", "dialog": turns}]
    data = {"questions": ["is it big", "what colour"], "answers": ["yes", "brown"], "dialogs": dialogs}
    source = write(tmp_path / "visdial_1.0_val.json", {"data": data, "split": "val2018", "version": "1.0"})
    rows, dropped = imported("visdial", source, tmp_path / "all")
    assert [row["id"] for row in rows] == ["7-1", "7-2"] and dropped == {"image_not_found": 1}
    assert rows[1]["history"] == [{"question": "is it big", "answer": "yes"}] and rows[1]["options"] == ["brown", "yes"]
    dense = write(tmp_path / "dense.json", [{"image_id": 7, "round_id": 2, "gt_relevance": [1, 0.5]}])
    rows, _ = imported("visdial", source, tmp_path / "dense", "--annotations", str(dense))
    assert [(row["id"], row["relevance"]) for row in rows] == [("7-2", [1.0, 0.5])]
    assert main(["data", "import", "visdial", str(dense), "--out", str(tmp_path / "bad"), "-q"]) == 2


def test_paragraphs_narratives_and_gqa(tmp_path: Path) -> None:
    picture(tmp_path / "11.jpg")
    picture(tmp_path / "000000000011.jpg")
    entries = [{"image_id": 11, "paragraph": " A long text. "}, {"image_id": 12, "paragraph": "x"}, {"image_id": 11}]
    paragraphs = write(tmp_path / "paragraphs.json", entries)
    rows, dropped = imported("paragraph", paragraphs, tmp_path / "p")
    assert rows[0]["captions"] == ["A long text."] and dropped == {"image_not_found": 1, "no_caption": 1}
    chosen = write(tmp_path / "test_split.json", [12])
    assert imported("paragraph", paragraphs, tmp_path / "q", "--annotations", str(chosen))[0] == []
    lines = tmp_path / "ln.jsonl"
    told = {"image_id": "11", "annotator_id": 3, "caption": "In this picture …"}
    lines.write_text(json.dumps(told) + "\n" + json.dumps({"image_id": "11"}) + "\n", encoding="utf-8")
    rows, dropped = imported("narratives", lines, tmp_path / "n")
    assert rows[0]["id"] == "11-3" and rows[0]["prompt"] == "In this picture …" and dropped == {"no_caption": 1}
    assert rows[0]["image"].endswith("000000000011.jpg")
    questions = {
        "q1": {"question": "is it?", "imageId": "11", "answer": "yes"},
        "q2": {"question": "", "imageId": "11"},
    }
    rows, dropped = imported("gqa", write(tmp_path / "gqa.json", questions), tmp_path / "g")
    assert rows[0] == {"id": "q1", "image": "../11.jpg", "question": "is it?", "answers": ["yes"]}
    assert dropped == {"no_question": 1}


def test_the_released_lists_are_json_or_python_literals(tmp_path: Path) -> None:
    for name in ("a.jpg", "m.png"):
        picture(tmp_path / name)
    lines = [
        "{'image': 'a.jpg', 'caption': 'a \"red\" ball', 'id': 1}",
        '{"image": "a.jpg", "question": "why?", "answers": ["so"], "question_id": 2}',
        "{'source': 'm.png', 'target': 'a.jpg', 'prompt': 'a room', 'id': 'm'}",
        "{'img_path': 'a.jpg', 'expression': 'it', 'bbox': [1, 2, 3, 4], 'id': 4}",
        "__import__('os').system('touch " + str(tmp_path / "ran") + "')",
        "{'image': 'a.jpg', 'id': 5}",
    ]
    source = tmp_path / "pairs.txt"
    source.write_text("\n".join(lines), encoding="utf-8")
    rows, dropped = imported("released", source, tmp_path / "out")
    assert [row["id"] for row in rows] == ["1", "2", "m", "4"] and not (tmp_path / "ran").exists()
    assert rows[0]["captions"] == ['a "red" ball'] and rows[3]["box"] == [1, 2, 3, 4]
    assert rows[2]["segmentation"].endswith("m.png") and rows[2]["image"].endswith("a.jpg")
    assert dropped == {"bad_row": 1, "no_caption": 1}
    kinds = [len(document.drawn) for document in learnt(tmp_path / "out")]
    assert kinds == [1, 1, 2, 1]
    whole = write(tmp_path / "annt.json", [{"image": "a.jpg", "captions": ["x", "y"]}])
    assert imported("released", whole, tmp_path / "two")[0][0]["captions"] == ["x", "y"]
