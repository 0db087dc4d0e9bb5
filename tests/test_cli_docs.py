"""The docs are true: their examples and the example scripts run, the help is the program's, links lead somewhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from help_text import page
from hostile import CASES

from mmi_cli.main import COMMANDS, cli
from mmi_engine.check import task_of
from mmi_engine.data.importers.formats import FORMATS

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
# ```sh blocks are run; ```bash blocks need data, hardware or time that a test has not
RUN = (
    "caption",
    "vqa",
    "ground",
    "t2i",
    "seg2img",
    "story",
    "data",
    "output",
    "pipelines",
    "recipe",
    "model",
    "model-info",
    "model-new",
    "eval",
)
SCRIPTS = sorted((ROOT / "examples").glob("*.sh"))


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    """Runs a script by bash in a folder of its own, with `mmi` on the path and the examples beside it."""
    programs = tmp_path_factory.mktemp("bin")
    wrapper = f'#!/bin/sh\nexec "{sys.executable}" "{ROOT / "tests/fake_mmi.py"}" "$@"\n'
    (programs / "mmi").write_text(wrapper)
    (programs / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "TERM": "dumb"}
    environment["PYTHONPATH"] = os.pathsep.join(str(ROOT / name) for name in (".", "engine", "kernels"))

    def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
        folder = tmp_path_factory.mktemp("shell")
        (folder / "examples").symlink_to(ROOT / "examples")
        command = ["bash", "-euo", "pipefail", "-c", script, "bash", *arguments]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)

    return run


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", RUN)
def test_the_examples_of_a_page_run(name, shell):
    found = blocks((DOCS / f"{name}.md").read_text(encoding="utf-8"), "sh")
    assert found, f"docs/{name}.md has no example"
    script = "\n".join(found)
    if "jq" in script and subprocess.run(["bash", "-c", "command -v jq"], capture_output=True).returncode:
        pytest.skip("jq is not installed here")
    done = shell(script)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_example_scripts_run(script, shell):
    if "jq" in script.read_text() and subprocess.run(["bash", "-c", "command -v jq"], capture_output=True).returncode:
        pytest.skip("jq is not installed here")
    assert os.access(script, os.X_OK)
    done = shell('"$1" out/here', str(script))
    assert done.returncode == 0, done.stderr


def test_every_command_has_a_page_and_an_example_script():
    pages = {"train": "training", "model": "model-info", "bench": "kernel"}
    for name in COMMANDS:
        assert (DOCS / f"{pages.get(name, name)}.md").is_file(), name
    for name in ("caption", "vqa", "ground", "t2i", "seg2img", "story", "data"):
        assert (ROOT / f"examples/{name}.sh").is_file(), name


def test_the_help_page_is_what_the_program_says():
    assert (DOCS / "help.md").read_text(encoding="utf-8") == page(), "run: make docs"


@pytest.mark.parametrize("name", ["caption", "vqa", "ground", "t2i", "seg2img", "story"])
def test_rows_in_the_docs_are_rows_of_that_command(name):
    for block in blocks((DOCS / f"{name}.md").read_text(encoding="utf-8"), "json"):
        for line in block.splitlines():
            row = json.loads(line)
            assert "status" in row or "error" in row or task_of(row).name in (name, "story"), line


def test_every_error_code_is_explained():
    text = (DOCS / "output.md").read_text(encoding="utf-8")
    for code in {case.code for case in CASES if case.code} | {"text_too_long", "no_box", "not_finite", "out_of_memory"}:
        assert f"`{code}`" in text, code


def test_every_format_and_every_shared_option_is_explained():
    text = (DOCS / "data.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in FORMATS)
    told = (DOCS / "output.md").read_text(encoding="utf-8")
    story = cli.get_command(None, "story")  # type: ignore[arg-type]
    own = {"--free", "--help"}
    options = {max(option.opts, key=len) for option in story.params if option.param_type_name == "option"} - own
    missing = [option for option in sorted(options) if f"`{option}" not in told]
    assert not missing


def test_links_between_pages_lead_somewhere():
    for path in [*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name}: {target}"
