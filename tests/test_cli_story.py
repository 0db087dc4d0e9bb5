"""`mmi story` from the outside: options, exit codes, messages, signals; a fake engine in place of the model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from PIL import Image

from mmi_cli import generating
from mmi_cli.main import main
from mmi_engine import run as run_module

REPOSITORY = Path(__file__).resolve().parent.parent

# a child process in which `mmi` runs with the fake engine, 0.15 s per picture
CHILD = """
import sys
sys.path[:0] = [{paths}]
from fake_engine import FakeEngine
from mmi_cli import generating, main
generating.make_engine = lambda options, defaults: FakeEngine(batch_size=2, delay=0.15)
sys.exit(main.main())
"""


@pytest.fixture
def engine(monkeypatch):
    """Every engine the command makes, with the options it was made from."""
    made = []

    def make(options, defaults):
        made.append((FakeEngine(), generating_options(options)))
        return made[-1][0]

    monkeypatch.setattr(generating, "make_engine", make)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name in [name for name in os.environ if name.startswith("MMI_")]:
        monkeypatch.delenv(name)
    return made


def generating_options(options):
    return {name: options[name] for name in ("model", "device", "dtype", "kernel", "batch_size", *generating.SETTINGS)}


@pytest.fixture
def manifest(tmp_path) -> Path:
    Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "a.png")
    rows = [{"id": "s0", "frames": [{"text": "A.", "image": "a.png"}, {"text": None}]}, {"id": "s1", "frames": [{}]}]
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_run_makes_the_promised_files_and_returns_0(tmp_path, manifest, engine, capsys):
    out = tmp_path / "out"
    assert main(["story", str(manifest), "--out", str(out)]) == 0
    names = {path.name for path in out.iterdir()}
    assert names == {"results.jsonl", "errors.jsonl", "run.json", "index.html", "s0", "s1"}
    streams = capsys.readouterr()
    assert streams.out == ""
    assert "2 of 2 done" in streams.err
    assert "\x1b[" not in streams.err  # no terminal, no colours
    assert main(["story", str(manifest), "--out", str(out), "-q"]) == 0
    assert capsys.readouterr().err == ""


def test_failed_items_return_3_and_are_named_with_their_place(tmp_path, manifest, engine, capsys):
    with manifest.open("a") as stream:
        stream.write('{"id": "s2", "frames": [{"image": "gone.png"}]}\n')
    assert main(["story", str(manifest), "--out", str(tmp_path / "out"), "-q"]) == 3
    assert "1 failed (image_not_found 1)" in capsys.readouterr().err
    assert main(["story", str(manifest), "--out", str(tmp_path / "out"), "--retry-errors"]) == 3
    assert 'm.jsonl:3: image "gone.png" not found (looked in ' in capsys.readouterr().err
    assert main(["story", str(manifest), "--out", str(tmp_path / "stop"), "--on-error", "stop"]) == 3


@pytest.mark.parametrize(
    "arguments",
    [
        ["story"],
        ["story", "missing.jsonl", "--out", "out"],
        ["story", ".", "--out", "out"],
        ["story", "m.jsonl"],
        ["story", "m.jsonl", "--out", "-"],
        ["story", "m.jsonl", "--out", "out", "--shard", "3/2"],
        ["story", "m.jsonl", "--out", "out", "--device", "gpu"],
        ["story", "m.jsonl", "--out", "out", "--batch-size", "0"],
        ["story", "m.jsonl", "--out", "out", "--kernel", "magic"],
        ["story", "m.jsonl", "--out", "out", "--steps", "0"],
        ["story", "m.jsonl", "--out", "out", "--seed", "-1"],
        ["story", "m.jsonl", "--out", "out", "--ids", "missing.txt"],
        ["story", "m.jsonl", "--out", "out", "--root", "missing"],
        ["story", "m.jsonl", "--out", "out", "--nonsense"],
        ["no-such-command"],
    ],
)
def test_usage_errors_return_2_and_leave_no_directory(tmp_path, manifest, engine, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert not (tmp_path / "out").exists()
    message = capsys.readouterr().err
    assert "rror" in message and "Traceback" not in message


def test_fatal_errors_return_1_and_show_a_traceback_only_with_vv(tmp_path, manifest, monkeypatch, capsys):
    def broken(options, defaults):
        raise RuntimeError("the sky fell")

    monkeypatch.setattr(generating, "make_engine", broken)
    assert main(["story", str(manifest), "--out", str(tmp_path / "out")]) == 1
    plain = capsys.readouterr().err
    assert "the sky fell" in plain and "Traceback" not in plain
    assert main(["story", str(manifest), "--out", str(tmp_path / "out"), "-vv"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_directory_that_cannot_be_written_returns_1(tmp_path, manifest, engine, capsys):
    (tmp_path / "file").write_text("x")
    assert main(["story", str(manifest), "--out", str(tmp_path / "file")]) == 1
    assert "cannot write" in capsys.readouterr().err


def test_another_seed_is_refused_with_2_until_overwritten(tmp_path, manifest, engine, capsys):
    command = ["story", str(manifest), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    assert main([*command, "--seed", "7"]) == 2
    assert "seed was 0, now 7" in capsys.readouterr().err
    assert main([*command, "--seed", "7", "--overwrite"]) == 0


def test_the_command_line_beats_the_environment_which_beats_the_default(tmp_path, manifest, engine, monkeypatch):
    command = ["story", str(manifest), "--out", str(tmp_path / "out"), "--overwrite"]
    main(command)
    monkeypatch.setenv("MMI_STEPS", "5")
    main(command)
    monkeypatch.setenv("MMI_STORY_STEPS", "6")
    main(command)
    main([*command, "--steps", "7"])
    assert [options["steps"] for _, options in engine] == [None, 5, 6, 7]


def test_all_shared_options_reach_the_engine(tmp_path, manifest, engine):
    wanted = {
        "model": "m", "device": "cuda:1", "dtype": "bf16", "kernel": "torch", "batch_size": 3, "steps": 9,
        "guidance": 2.5, "scheduler": "dpm++", "beams": 4, "temperature": 0.5, "top_p": 0.9, "max_new_tokens": 20,
        "min_new_tokens": 2, "repetition_penalty": 1.3,
    }  # fmt: skip
    arguments = [word for name, value in wanted.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["story", str(manifest), "--out", str(tmp_path / "out"), *arguments]) == 0
    assert engine[0][1] == wanted


def test_stdin_limit_ids_and_root(tmp_path, manifest, engine, monkeypatch):
    import io

    class Piped(io.TextIOWrapper):
        pass

    def pipe():
        monkeypatch.setattr(sys, "stdin", Piped(io.BytesIO(manifest.read_bytes())))

    (tmp_path / "ids.txt").write_text("s1\r\nunknown\n\n")
    monkeypatch.chdir("/")
    pipe()
    assert main(["story", "-", "--out", str(tmp_path / "a"), "--root", str(tmp_path), "--limit", "1"]) == 0
    assert [row["id"] for row in rows(tmp_path / "a")] == ["s0"]
    assert main(["story", str(manifest), "--out", str(tmp_path / "b"), "--ids", str(tmp_path / "ids.txt")]) == 0
    assert [row["id"] for row in rows(tmp_path / "b")] == ["s1"]


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_json_log_is_json_on_stderr_alone(tmp_path, manifest, engine, capsys):
    with manifest.open("a") as stream:
        stream.write("broken\n")
    assert main(["story", str(manifest), "--out", str(tmp_path / "out"), "--log-format", "json"]) == 3
    streams = capsys.readouterr()
    events = [json.loads(line) for line in streams.err.splitlines()]
    assert streams.out == ""
    failed = next(event for event in events if event.get("event") == "item_failed")
    assert failed["code"] == "bad_json"
    summary = events[-1]
    assert (summary["event"], summary["done"], summary["failed"], summary["errors"]) == (
        "summary",
        2,
        1,
        {"bad_json": 1},
    )


def test_no_gallery_writes_none(tmp_path, manifest, engine):
    main(["story", str(manifest), "--out", str(tmp_path / "out"), "--no-gallery"])
    assert not (tmp_path / "out/index.html").exists()


def test_the_same_run_from_two_processes_of_a_launcher(tmp_path, manifest, engine, monkeypatch):
    for rank in (1, 0):
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 2)):
            monkeypatch.setenv(name, str(value))
        assert main(["story", str(manifest), "--out", str(tmp_path / "out")]) == 0
    assert [row["id"] for row in rows(tmp_path / "out")] == ["s0", "s1"]


def test_a_launched_process_with_failed_items_waits_for_the_others_but_not_for_ever(
    tmp_path, manifest, engine, monkeypatch
):
    monkeypatch.setattr(run_module, "LAUNCH_GRACE_S", 0.5)
    with manifest.open("a") as stream:
        stream.write('{"id": "s2", "frames": [{"image": "gone.png"}]}\n')
    for rank, code in ((0, 3), (1, 0)):  # the first one finds nobody: it gives up and returns
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 2)):
            monkeypatch.setenv(name, str(value))
        assert main(["story", str(manifest), "--out", str(tmp_path / "out")]) == code
    assert [row["id"] for row in rows(tmp_path / "out")] == ["s0", "s1"]


def start(manifest: Path, out: Path) -> subprocess.Popen:
    paths = ", ".join(repr(str(REPOSITORY / name)) for name in ("tests", ".", "engine", "kernels"))
    command = [sys.executable, "-c", CHILD.format(paths=paths), "story", str(manifest), "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(out.glob("s*/00.png")) and time.monotonic() < deadline:
        time.sleep(0.01)
    return process


def test_ctrl_c_finishes_the_batch_and_the_same_command_resumes(tmp_path, manifest, engine):
    manifest.write_text("".join(json.dumps({"id": f"s{n}", "frames": [{}]}) + "\n" for n in range(40)))
    out = tmp_path / "out"
    process = start(manifest, out)
    process.send_signal(signal.SIGINT)
    message = process.communicate(timeout=120)[1]
    assert process.returncode == 130
    assert "same command again" in message and "Traceback" not in message
    done = len(rows(out))
    assert 0 < done < 40 and done % 2 == 0  # whole batches
    assert not (out / ".mmi").exists()
    assert json.loads((out / "run.json").read_text())["parts"]["1-of-1"]["state"] == "interrupted"
    page = (out / "index.html").read_text()  # of what there is
    assert page.count("<section") == done and all(f"{row['id']}/00.png" in page for row in rows(out))
    assert main(["story", str(manifest), "--out", str(out)]) == 0
    assert len(rows(out)) == 40
    assert (out / "index.html").read_text().count("<section") == 40


def test_a_second_run_on_a_busy_directory_is_refused_at_once(tmp_path, manifest, engine, capsys):
    manifest.write_text("".join(json.dumps({"id": f"s{n}", "frames": [{}]}) + "\n" for n in range(400)))
    process = start(manifest, tmp_path / "out")
    try:
        assert main(["story", str(manifest), "--out", str(tmp_path / "out")]) == 1
        assert "another run works" in capsys.readouterr().err
    finally:
        process.kill()
        process.communicate()
