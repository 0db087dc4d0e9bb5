"""The wheel: what is inside, and that the installed program runs away from the source tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DATA = ("*.json", "*.toml", "*.safetensors", "*.cu")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel. The sources are copied first: a build leaves folders behind in the tree it builds."""
    source = tmp_path_factory.mktemp("source")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in listed:
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    built = subprocess.run(
        [*command, "--wheel-dir", str(out), str(source)], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts folder of a new environment that holds the wheel and borrows this one's dependencies."""
    home = tmp_path_factory.mktemp("installed")
    venv.create(home, with_pip=False, symlinks=os.name != "nt")
    (site,) = home.glob("lib/python*/site-packages") if os.name != "nt" else [home / "Lib/site-packages"]
    command = [sys.executable, "-m", "pip", "--python", str(home), "install", "--quiet", "--no-deps", "--no-index"]
    done = subprocess.run([*command, str(wheel)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # appended after the new environment's own folder, and without running its .pth files (an editable mmi is one)
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    (site / "borrowed.pth").write_text("\n".join(borrowed), encoding="utf-8")
    return home / ("Scripts" if os.name == "nt" else "bin")


def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_top_level_names_are_ours_alone(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in names(wheel)}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"mmi_cli", "mmi_engine", "mmi_kernels"}


def test_all_modules_and_data_are_inside(wheel: Path) -> None:
    inside = set(names(wheel))
    for base in ("mmi_cli", "engine/mmi_engine", "kernels/mmi_kernels"):
        for pattern in ("*.py", *DATA):
            for path in (ROOT / base).rglob(pattern):
                name = path.relative_to((ROOT / base).parent).as_posix()
                assert name in inside, f"{name} is missing from the wheel"


def test_licence_and_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
    assert "License-Expression: Apache-2.0" in text
    assert f"Version: {PROJECT['version']}" in text
    assert "+cpu" not in text


@pytest.mark.parametrize(("option", "expected"), [("--help", "Usage:"), ("--version", PROJECT["version"])])
def test_the_installed_program_answers(installed: Path, tmp_path: Path, option: str, expected: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(
        [installed / "mmi", option], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert expected in run.stdout


def test_the_installed_kernels_compute(installed: Path, tmp_path: Path) -> None:
    code = (
        "import torch, mmi_kernels; assert 'installed' in mmi_kernels.__file__, mmi_kernels.__file__;"
        "out = mmi_kernels.deform_sample(torch.ones(1, 4, 1, 16), [(2, 2)], torch.full((1, 1, 1, 1, 1, 2), 0.5),"
        " torch.ones(1, 1, 1, 1, 1), backend='torch'); assert out.eq(1).all()"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(
        [installed / "python", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
