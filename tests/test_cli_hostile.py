"""Bad input never takes other items down: the corpus of hostile.py through the command line, with a fake model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command_data import FIXED, make_data
from fake_engine import FakeEngine
from hostile import CASES, GOOD, SECTIONS, Case, lines_of, noise, ordinary_user, secret, secret_folder, table
from PIL import Image

from mmi_cli import generating
from mmi_cli.main import main

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    monkeypatch.setattr(generating, "make_engine", lambda options, decoding: FakeEngine(answer="(1,2)(300,400)"))


def everything(folder: Path, besides: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if besides not in (path, *path.parents)}


def results(out: Path, kind: str = "results") -> list[dict]:
    return [json.loads(line) for line in (out / f"{kind}.jsonl").read_bytes().decode("utf-8").splitlines()]


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """The good rows alone, once per command: what the others must still come to."""
    done: dict[str, tuple[list[dict], dict[str, bytes]]] = {}

    def of(command: str):
        if command not in done:
            folder = prepare(tmp_path_factory.mktemp("clean"))
            rows = [json.dumps({"id": name, **GOOD[command]}) for name in ("first", "last")]
            (folder / "m.jsonl").write_text("\n".join(rows))
            assert main([command, str(folder / "m.jsonl"), "--out", str(folder / "out"), "-q"]) == 0
            media = {p.relative_to(folder / "out").as_posix(): p.read_bytes() for p in (folder / "out").rglob("*.png")}
            done[command] = results(folder / "out"), media
        return done[command]

    return of


def prepare(folder: Path) -> Path:
    noise().save(folder / "good.png")
    Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4)).save(folder / "map.png")
    return folder


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_has_its_code_and_the_others_are_unharmed(case, tmp_path, clean):
    expected = clean(case.command)
    if case.make in (secret, secret_folder):
        with ordinary_user() as own:
            check(case, own, expected)
    else:
        check(case, tmp_path, expected)


def check(case: Case, tmp_path: Path, clean: tuple[list[dict], dict[str, bytes]]) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    prepare(folder)
    if case.make:
        case.make(folder)
    (folder / case.manifest).write_bytes(lines_of(case))
    out = tmp_path / "deep" / "out"
    before = everything(tmp_path, out)
    code = main([case.command, str(folder / case.manifest), "--out", str(out), "-q"])
    assert everything(tmp_path, out) - before == {out.parent}, "something was written outside the directory"
    errors = results(out, "errors")
    assert code == (3 if case.code else 0)
    assert [error["error"] for error in errors] == ([case.code] if case.code else [])
    assert all(error["message"] and str(tmp_path) not in error["message"] for error in errors)
    rows = {row["id"]: row for row in results(out)}
    assert len(rows) == (2 if case.code else 3)
    expected, media = clean
    assert [rows[row["id"]] for row in expected] == expected
    assert all((out / name).read_bytes() == content for name, content in media.items())
    (page,) = out.glob("index*.html")
    assert page.read_bytes().decode("utf-8")


def test_the_corpus_is_large_and_the_docs_hold_its_table():
    assert len(CASES) >= 60 and len({case.name for case in CASES}) == len(CASES)
    assert {case.kind for case in CASES} == set(SECTIONS)
    assert table().strip() in (DOCS / "bad-input.md").read_text(encoding="utf-8"), "run python tests/hostile.py"


@pytest.mark.parametrize("content", [b"\xff\xfe{\0}\0", b"\xfe\xff\0{\0}"], ids=["UTF-16 LE", "UTF-16 BE"])
def test_a_manifest_in_utf_16_is_refused_as_a_whole(tmp_path, content):
    (tmp_path / "m.jsonl").write_bytes(content)
    assert main(["caption", str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "out"), "-q"]) == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"], ids=["empty", "blank lines", "a byte order mark"])
def test_a_manifest_without_rows_is_done_at_once(tmp_path, content):
    (tmp_path / "m.jsonl").write_bytes(content)
    assert main(["caption", str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "out"), "-q"]) == 0
    assert results(tmp_path / "out") == []


def test_a_byte_order_mark_and_a_missing_last_line_end_are_no_errors(tmp_path):
    prepare(tmp_path)
    (tmp_path / "m.jsonl").write_bytes(
        b'\xef\xbb\xbf{"id": "x", "image": "good.png"}\n{"id": "y", "image": "good.png"}'
    )
    assert main(["caption", str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "out"), "-q"]) == 0
    assert [row["id"] for row in results(tmp_path / "out")] == ["x", "y"]


def test_what_only_a_model_can_tell(tmp_path, monkeypatch):
    """Text beyond the context and more images than the model tells apart; a tiny real model."""
    monkeypatch.undo()
    data = make_data(tmp_path)
    rows = [
        {"id": "long", "image": "a.png", "question": "what is near the ball? " * 60},
        {"id": "options", "image": "a.png", "question": "what?", "options": ["x", "a red ball " * 100]},
        {"id": "many", "images": ["a.png"] * 60, "question": "what?"},
        {"id": "good", "image": "a.png", "question": "what?"},
    ]
    (data / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["vqa", str(data / "bad.jsonl"), "--out", str(tmp_path / "out"), "--model", str(data / "model"), *FIXED]
    assert main([*command, "--batch-size", "2", "-q"]) == 3
    assert {row["error"] for row in results(tmp_path / "out", "errors")} == {"text_too_long"}
    assert [row["id"] for row in results(tmp_path / "out")] == ["good"]
