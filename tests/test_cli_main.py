"""The door: help without heavy imports, versions, the small commands, and a console that knows its place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from mmi_cli import console
from mmi_cli.main import COMMANDS, cli, main
from mmi_engine import __version__, errors, versions
from mmi_engine.model.presets import released_config
from mmi_engine.model_info import fingerprint

REPOSITORY = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "transformers", "diffusers", "accelerate", "numpy", "numba", "matplotlib", "rich", "PIL")


def in_child(code: str) -> str:
    path = os.pathsep.join(str(REPOSITORY / name) for name in (".", "engine", "kernels"))
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()[-1]


def leaves(group: click.Group, words: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        path = (*words, name)
        found += leaves(command, path) if isinstance(command, click.Group) else [path]
    return found


def test_no_help_page_imports_a_heavy_package():
    pages = [["-h"], *[[*path, "--help"] for path in leaves(cli)]]
    code = f"import sys; from mmi_cli.main import main; assert all(main(page) == 0 for page in {pages!r}); "
    code += f"print([name for name in {HEAVY!r} if name in sys.modules])"
    assert in_child(code) == "[]"


def test_the_group_help_imports_no_command_and_names_them_all(capsys):
    code = "import sys; from mmi_cli.main import main; main(['--help']); "
    code += "print([name for name in sys.modules if name.startswith('mmi_cli.commands.')])"
    assert in_child(code) == "[]"
    assert main(["-h"]) == 0
    text = capsys.readouterr().out
    for name, (_, _, line) in COMMANDS.items():
        assert f"\n  {name} " in text and line in text


def test_every_command_has_short_help_and_a_runnable_example(capsys):
    for path in leaves(cli):
        assert main([*path, "-h"]) == 0
        text = capsys.readouterr().out
        assert f"mmi {' '.join(path)}" in text.replace("Usage: mmi", "", 1), (
            f"no example in mmi {' '.join(path)} --help"
        )


def test_a_mistyped_command_is_guessed(capsys):
    assert main(["captoin", "x"]) == 2
    assert "Did you mean 'caption'?" in capsys.readouterr().err
    assert main(["zzzz"]) == 2
    assert "Did you mean" not in capsys.readouterr().err


def test_a_prompt_in_place_of_a_manifest_is_told_how(capsys):
    assert main(["t2i", "a red bus", "--out", "nowhere"]) == 2
    assert "mmi t2i - --out DIR" in capsys.readouterr().err


def test_a_bad_value_from_the_environment_names_the_variable(monkeypatch, capsys):
    monkeypatch.setenv("MMI_STEPS", "many")
    assert main(["t2i", "rows.jsonl"]) == 2
    assert "It comes from the environment: MMI_STEPS." in capsys.readouterr().err
    monkeypatch.setenv("MMI_T2I_STEPS", "few")
    assert main(["t2i", "rows.jsonl"]) == 2
    assert "'few'" in (told := capsys.readouterr().err) and "MMI_T2I_STEPS." in told
    assert main(["t2i", "rows.jsonl", "--steps", "lots"]) == 2
    assert "environment" not in capsys.readouterr().err


def test_version(capsys):
    assert main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


def test_shell_completion_is_there(monkeypatch, capsys):
    monkeypatch.setenv("_MMI_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "mmi st")
    monkeypatch.setenv("COMP_CWORD", "1")
    with pytest.raises(SystemExit):
        main([])
    assert "story" in capsys.readouterr().out


def test_every_error_has_a_code_an_exit_code_and_keeps_its_remedy():
    kinds = [errors.MMIError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    assert {kind.exit_code for kind in kinds} == {1, 2, 3, 130}
    for kind in {kind for kind in kinds if kind.__module__ == "mmi_engine.errors"}:
        error = kind("cause", remedy="do this")
        assert str(error) == "cause; do this" and kind.code and kind.__name__ in errors.__doc__
    assert len({kind.code for kind in kinds}) == len(kinds)


@pytest.mark.parametrize(("bad", "expected"), [(False, 0), (True, 3)])
def test_data_check_and_dry_run_agree(tmp_path, capsys, bad, expected):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = [{"frames": [{"image": "a.png"}, {}]}, {"image": "gone.png"} if bad else {"frames": [{}]}]
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "check", str(manifest)]) == expected
    assert ("image_not_found 1" in capsys.readouterr().err) == bad
    assert main(["data", "check", str(manifest), "--task", "story", "-q"]) == expected
    assert ("no_frames 1" in capsys.readouterr().err) == bad


def test_data_check_knows_the_rows_of_all_commands(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = [
        {"image": "a.png", "question": "what?", "answers": ["x"]},
        {
            "images": ["a.png", "a.png"],
            "question": "which?",
            "shots": [{"image": "a.png", "question": "what?", "answer": "x"}],
        },
        {"segmentation": "a.png", "prompt": "a room"},
        {"prompt": "a bus"},
        {"prompt": 3},
        {"images": "a.png"},
        {},
    ]
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "check", str(manifest)]) == 3
    assert "7 rows, 3 with errors, bad_row 3; 5 images read" in capsys.readouterr().err


def test_recipes_are_listed_shown_and_copied(tmp_path, capsys):
    assert main(["recipe", "ls"]) == 0
    name = capsys.readouterr().out.split()[0]
    assert main(["recipe", "show", name]) == 0
    shown = capsys.readouterr().out
    assert main(["recipe", "copy", name, str(tmp_path)]) == 0
    assert (tmp_path / f"{name}.toml").read_text().rstrip("\n") == shown.rstrip("\n")
    assert main(["recipe", "copy", name, str(tmp_path)]) == 2  # never over a file that may have been changed
    assert main(["recipe", "show", "no-such-recipe"]) == 2


def test_model_info_counts_what_the_files_hold(tmp_path, capsys):
    tensors = {"a.x": np.zeros((3, 4), np.float16), "a.y": np.zeros(5, np.float16), "b.z": np.zeros((), np.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert main(["model", "info", str(tmp_path)]) == 1  # no config.json
    (tmp_path / "config.json").write_text(released_config().to_json())
    assert main(["model", "info", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["parameters"], found["tensors"], found["image_size"]) == (18, 3, 512)
    assert found["parts"] == {"a": 17, "b": 1} and found["stored"] == ["F16", "F32"]
    assert found["memory_bytes"] == {dtype: needs["total"] for dtype, needs in found["needs"].items()}
    assert found["needs"]["fp32"]["weights"] == 18 * 4 == 2 * found["needs"]["bf16"]["weights"]
    assert main(["model", "info", str(tmp_path)]) == 0
    assert found["fingerprint"] in capsys.readouterr().out


def test_a_fingerprint_sees_every_file_and_no_path(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text("{}")
        (tmp_path / folder / "model.safetensors").write_bytes(b"weights")
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    (tmp_path / "b/tokenizer.json").write_text("{}")
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")


def test_missing_and_damaged_models_are_refused_with_1(tmp_path, capsys):
    assert main(["model", "info", str(tmp_path / "missing")]) == 1
    (tmp_path / "config.json").write_text(released_config().to_json())
    for damage in (b"", b"\xff" * 64, b"\x05\0\0\0\0\0\0\0{bad}"):
        (tmp_path / "model.safetensors").write_bytes(damage)
        assert main(["model", "info", str(tmp_path)]) == 1
        assert "restore the model directory" in capsys.readouterr().err


def test_doctor_turns_a_broken_part_into_a_finding_with_a_remedy():
    def broken():
        raise ImportError("libcuda.so: no such file")

    (finding,) = versions._guarded("torch", broken)
    assert finding.problem and "libcuda" in finding.value and finding.remedy


@pytest.mark.parametrize(
    ("working", "told"),
    [
        ((True, "CuPy kernel on NVIDIA X", ""), "cuda: CuPy kernel on NVIDIA X"),
        ((False, "CuPy is not installed", "pip install it"), "torch: CuPy is not installed; pip install it"),
    ],
    ids=["works", "no CuPy"],
)
def test_doctor_names_the_kernel_of_each_device_and_why(working, told, monkeypatch):
    import torch

    from mmi_kernels import op

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(op, "_cuda_state", lambda index: working)
    monkeypatch.setattr(op, "_numba_present", lambda: False)
    found = {finding.name: finding.value for finding in versions._kernels()}
    assert found["kernel on cuda:0"] == found["kernel on cuda:1"] == told
    assert (
        found["kernel on cpu"] == "torch: numba is not installed; pip install 'mmi[fast]', or use 'torch' (or 'auto')"
    )


def test_the_cuda_kernel_asked_for_without_a_device_fails_with_the_remedy(monkeypatch, capsys):
    from mmi_kernels import op

    state = (False, "no CUDA driver or device", "run `nvidia-smi` to see the driver, or use 'torch' (or 'auto')")
    monkeypatch.setattr(op, "_cuda_state", lambda index: state)
    assert main(["verify", "--kernel", "cuda"]) == 1
    told = capsys.readouterr().err
    assert "no CUDA driver or device" in told and "nvidia-smi" in told


@pytest.mark.parametrize(
    ("said", "threads"), [("1", 1), (" 3 ", 3), ("7,2", 7), ("", 0), ("many", 0), ("0", 0), ("-2", 0)]
)
def test_the_environment_says_how_many_threads(monkeypatch: pytest.MonkeyPatch, said: str, threads: int) -> None:
    """Nested teams are a list in OpenMP, outermost first; what is no number above 0 counts as not said."""
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    monkeypatch.setattr(versions, "physical_cores", lambda: 5)
    assert versions.default_threads() == (threads or 5)
    assert f"{threads or 5} without --threads" in {f.name: f.value for f in versions.examine()}["threads"]


def test_cores_and_memory_are_plausible():
    assert 1 <= versions.physical_cores() <= (os.cpu_count() or 1)
    free = versions.free_memory_bytes()
    assert free is None or 0 < free < 2**50
    assert versions.versions()["mmi"] == __version__


class Terminal:
    """A stderr that claims to be a terminal."""

    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_colours_only_on_a_terminal_and_not_with_no_color(monkeypatch, no_color, coloured):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm")
    console.Console().warning("careful")
    assert "careful" in terminal.text and ("\x1b[" in terminal.text) == coloured


def test_many_item_errors_are_cut_short(capsys):
    reporter = console.RunReporter(console.Console(), "story")
    reporter.begin(100, 0)
    for number in range(100):
        reporter.item(f"m:{number}", errors.RowError("bad"))
    assert len(capsys.readouterr().err.splitlines()) == console.SHOWN_ITEM_ERRORS + 1


def test_what_a_newcomer_tries_first_is_answered_with_the_way(tmp_path, capsys):
    assert main(["vqa", str(tmp_path), "--out", str(tmp_path / "o")]) == 2
    assert "vqa --question and ground --expression" in capsys.readouterr().err
    (tmp_path / "m.jsonl").write_text("a red bus\n")
    assert main(["t2i", str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "o"), "--dry-run"]) == 3
    assert "read from a file named .txt" in capsys.readouterr().err
    (tmp_path / "m.jsonl").write_text('{"prompt": "a red bus"\n')
    assert main(["t2i", str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "o"), "--dry-run"]) == 3
    assert ".txt" not in capsys.readouterr().err
