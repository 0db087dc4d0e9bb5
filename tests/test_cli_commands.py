"""The six generating commands from the outside: streams, folders, tables, dry runs, environment; a fake model."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from PIL import Image

from mmi_cli import generating
from mmi_cli.main import COMMANDS, main

GENERATING = ("caption", "vqa", "ground", "t2i", "seg2img", "story")
BOX = "(100,200)(500,600)"


@pytest.fixture(autouse=True)
def engines(monkeypatch):
    """Every engine the commands make, with its options."""
    made = []

    def make(options, decoding):
        made.append((decoding, dict(options)))
        return FakeEngine(batch_size=3, answer=BOX if decoding == "ground" else None)

    monkeypatch.setattr(generating, "make_engine", make)
    return made


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures/more").mkdir(parents=True)
    for name in ("b.png", "a.jpg", "more/c.webp"):
        Image.new("RGB", (40, 20)).save(tmp_path / "pictures" / name)
    (tmp_path / "pictures/notes.txt").write_text("no picture")
    (tmp_path / "pictures/.hidden.png").write_bytes(b"")
    return tmp_path


def write(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def results(out: str) -> list[dict]:
    return [json.loads(line) for line in (Path(out) / "results.jsonl").read_text().splitlines()]


def test_all_six_are_there():
    assert set(GENERATING) <= COMMANDS.keys()


def test_rows_stream_to_stdout_in_order_and_errors_to_stderr(folder, capfdbinary):
    rows = [
        {"id": f"r{n}", "image": "b.png" if n != 4 else "gone.png", "question": "x" * (n % 3 + 1)} for n in range(9)
    ]
    manifest = write(folder / "pictures/m.jsonl", *rows)
    assert main(["vqa", manifest, "--out", "-"]) == 3
    streams = capfdbinary.readouterr()
    lines = [json.loads(line) for line in streams.out.decode().splitlines()]
    assert [row["id"] for row in lines] == ["r0", "r1", "r2", "r3", "r5", "r6", "r7", "r8"]
    assert b'm.jsonl:5: image "gone.png" not found' in streams.err and b"8 of 9 done, 1 failed" in streams.err
    assert not list(folder.glob("**/.mmi")) and not list(folder.glob("**/results.jsonl"))
    assert main(["vqa", manifest, "--out", "kept"]) == 3
    assert results("kept") == lines  # the same rows as in a folder


@pytest.mark.parametrize("arguments", [["t2i"], ["seg2img"], ["story"], ["ground", "--draw"]])
def test_pictures_do_not_fit_on_stdout(folder, arguments, capsys):
    manifest = write(folder / "m.jsonl", {"prompt": "x"})
    assert main([arguments[0], manifest, *arguments[1:], "--out", "-"]) == 2
    assert "name a folder" in capsys.readouterr().err


def test_stdin_names_pictures_relative_to_the_working_directory(folder, monkeypatch):
    class Pipe:
        buffer = io.BytesIO(b'{"id": "x", "image": "pictures/a.jpg"}\n')

    monkeypatch.setattr(sys, "stdin", Pipe())
    assert main(["caption", "-", "--out", "out", "-q"]) == 0
    assert results("out")[0]["id"] == "x"


def test_a_folder_is_a_manifest_of_its_pictures(folder, capsys):
    assert main(["caption", "pictures", "--out", "out"]) == 0
    assert [row["id"] for row in results("out")] == ["a.jpg", "b.png", "more/c.webp"]
    Image.new("RGB", (4, 4)).save(folder / "pictures/d.png")
    assert main(["caption", "pictures", "--out", "out"]) == 2  # another manifest
    assert "the manifest is another one, or has changed since" in capsys.readouterr().err
    assert main(["vqa", "pictures", "--out", "vqa"]) == 2  # what should be asked?
    assert main(["vqa", "pictures", "--question", "What?", "--out", "vqa"]) == 0
    assert main(["ground", "pictures", "--expression", "it", "--out", "ground"]) == 0
    assert results("ground")[0]["box"] == [4, 4, 20, 12]
    drawn = ["ground", "pictures", "--expression", "it", "--draw", "--out"]
    assert main([*drawn, "pictures/"]) == 2  # pictures with boxes would become rows
    assert "folder of the pictures" in capsys.readouterr().err and not Path("pictures/run.json").exists()
    assert main([*drawn, "pictures/boxes"]) == 0
    for _ in range(2):
        assert main(["caption", "pictures/more", "--out", "pictures/more"]) == 0


def test_a_manifest_without_rows_is_said_to_have_none(folder, capsys):
    Path("none.jsonl").write_text("")
    assert main(["caption", "none.jsonl", "--out", "none"]) == 0
    assert "none.jsonl holds no rows" in capsys.readouterr().err


def test_an_output_folder_among_the_pictures_is_no_input(folder, monkeypatch):
    monkeypatch.chdir("pictures")
    assert main(["ground", ".", "--expression", "it", "--draw", "--out", "drawn"]) == 0
    assert main(["ground", ".", "--expression", "it", "--draw", "--out", "drawn"]) == 0  # resumed, the same manifest
    assert [row["id"] for row in results("drawn")] == ["a.jpg", "b.png", "more/c.webp"]


def test_process_substitution_of_the_shell(folder):
    """`mmi vqa <(jq …)`: a pipe that can be read once, pictures relative to the working directory."""
    os.mkfifo(folder / "pipe")
    writer = threading.Thread(target=lambda: (folder / "pipe").write_text('{"id": "x", "image": "pictures/b.png"}\n'))
    writer.start()
    assert main(["caption", "pipe", "--out", "out", "-q"]) == 0
    writer.join()
    assert results("out")[0]["id"] == "x"


def test_a_single_picture_is_a_manifest_of_one_row(folder, capsys):
    assert main(["caption", "pictures/a.jpg", "--out", "out", "-q"]) == 0
    assert [row["id"] for row in results("out")] == ["a.jpg"]
    assert main(["ground", "pictures/a.jpg", "--expression", "it", "--out", "-", "-q"]) == 0
    assert main(["vqa", "pictures/a.jpg", "--out", "vqa"]) == 2  # what is asked?
    assert "no text file" in capsys.readouterr().err


def test_what_is_no_manifest_is_refused_as_a_whole(folder, capsys):
    for name, content, said in (
        ("rows.json", b'[\n{"image": "x"}]', "jq -c '.[]' rows.json"),
        ("rows.parquet", b"PAR1....", "mmi data import"),
        ("rows.jsonl.gz", b"\x1f\x8b\x08\0", "no text file"),
    ):
        (folder / name).write_bytes(content)
        assert main(["caption", name, "--out", "out"]) == 2
        assert said in capsys.readouterr().err and not (folder / "out").exists()


def test_tables_and_text_files_are_manifests(folder):
    table = 'id,image,question,options\nq1,a.jpg,"What, then?","[""x"", ""y""]"\n\nq2,b.png,Who?,\nq3,b.png\n'
    (folder / "pictures/q.csv").write_text(table)
    assert main(["vqa", "pictures/q.csv", "--out", "out", "-q"]) == 3
    first, second = results("out")
    assert (first["id"], second["id"]) == ("q1", "q2") and sorted(first["ranks"]) == [1, 2]
    errors = [json.loads(line) for line in Path("out/errors.jsonl").read_text().splitlines()]
    assert [(error["line"], error["error"]) for error in errors] == [(5, "bad_row")]
    (folder / "p.txt").write_text("a bus\n\na car\r\n")
    assert main(["t2i", "p.txt", "--out", "t2i", "-q"]) == 0
    assert [row["id"] for row in results("t2i")] == ["000001", "000003"]
    (folder / "pictures/list.txt").write_text("b.png\nmore/c.webp\n")
    assert main(["caption", "pictures/list.txt", "--out", "listed", "-q"]) == 0
    assert main(["story", "p.txt", "--out", "story", "-q"]) == 2


@pytest.mark.parametrize("command", GENERATING)
def test_a_dry_run_checks_everything_and_writes_nothing(folder, command, engines, capsys):
    good = {
        "caption": {"image": "a.jpg"},
        "vqa": {"image": "a.jpg", "question": "what?"},
        "ground": {"image": "a.jpg", "expression": "it"},
        "t2i": {"prompt": "a bus"},
        "seg2img": {"segmentation": "b.png", "prompt": "a bus"},
        "story": {"frames": [{"image": "a.jpg"}, {}]},
    }[command]
    manifest = write(folder / "pictures/m.jsonl", good, {"image": "gone.png"}, {})
    before = set(folder.rglob("*"))
    assert main([command, manifest, "--dry-run"]) == 3
    assert "3 rows, 2 would fail" in capsys.readouterr().err
    assert set(folder.rglob("*")) == before and not engines
    assert main([command, manifest, "--dry-run", "--limit", "1", "--out", "out"]) == 0
    assert main(["data", "check", manifest, "--task", command, "-q"]) == 3


def test_task_options_are_part_of_who_a_run_is(folder, capsys):
    manifest = write(
        folder / "pictures/m.jsonl", {"image": "a.jpg", "expression": "it", "question": "x", "prompt": "y"}
    )
    for command, option in (
        ("caption", ["--style", "long"]),
        ("caption", ["--template", "{image} say:"]),
        ("vqa", ["--form", "vizwiz"]),
        ("ground", ["--fit", "crop"]),
        ("t2i", ["--candidates", "2"]),
    ):
        assert main([command, manifest, "--out", f"out-{command}", "-q"]) == 0
        assert main([command, manifest, "--out", f"out-{command}", "-q", *option]) == 2
        assert "was made with other inputs: task." in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["caption", "m.jsonl", "--out", "o", "--template", "{nobody}"],
        ["caption", "m.jsonl", "--out", "o", "--style", "huge"],
        ["t2i", "m.jsonl", "--out", "o", "--rerank", "self"],
        ["t2i", "m.jsonl", "--out", "o", "--candidates", "2", "--rerank", "nowhere"],
        ["t2i", "m.jsonl", "--out", "o", "--keep-all"],
        ["seg2img", "m.jsonl", "--out", "o", "--palette", "nowhere.json"],
        ["vqa", "m.jsonl", "--out", "o", "--steps", "3"],  # no picture is drawn
        ["t2i", "m.jsonl", "--out", "o", "--beams", "3"],  # no text is written
        ["caption", "gone.csv", "--out", "o"],
    ],
)
def test_what_cannot_be_meant_returns_2_and_leaves_nothing(folder, arguments, capsys):
    write(folder / "m.jsonl", {"prompt": "x"})
    assert main(arguments) == 2
    assert not (folder / "o").exists() and "Traceback" not in capsys.readouterr().err


def test_the_environment_sets_what_the_command_line_leaves_open(folder, monkeypatch, engines):
    manifest = write(folder / "pictures/m.jsonl", {"image": "a.jpg", "question": "x"})
    monkeypatch.setenv("MMI_VQA_FORM", "short")
    monkeypatch.setenv("MMI_BEAMS", "4")
    monkeypatch.setenv("MMI_OUT", "from-environment")
    assert main(["vqa", manifest, "-q"]) == 0
    record = json.loads(Path("from-environment/run.json").read_text())
    assert engines[-1][1]["beams"] == 4 and engines[-1][1]["form"] == "short"
    assert record["identity"]["task"]["template"].endswith("{question} The answer is:")
    assert main(["vqa", manifest, "--form", "long", "--out", "named", "-q"]) == 0
    assert engines[-1][1]["form"] == "long"


def test_json_logs_are_json_whatever_happens(folder, capsys):
    manifest = write(folder / "pictures/m.jsonl", {"image": "a.jpg"}, {"image": "gone.png"})
    for command in (
        ["caption", manifest, "--out", "out"],
        ["caption", manifest, "--out", "out", "--style", "long"],  # refused
        ["caption", manifest, "--dry-run"],
        ["data", "check", manifest],
    ):
        assert main([*command, "--log-format", "json"]) in (2, 3)
        events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
        assert events and all({"time", "level", "message"} <= event.keys() for event in events)
