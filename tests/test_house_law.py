"""The rules of the house that a machine can check: who may import whom, what stays light, how files look."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "mmi_cli": ROOT / "mmi_cli",
    "mmi_engine": ROOT / "engine/mmi_engine",
    "mmi_kernels": ROOT / "kernels/mmi_kernels",
}
# What each package may see of the other two.
MAY_IMPORT = {"mmi_cli": {"mmi_engine"}, "mmi_engine": {"mmi_kernels"}, "mmi_kernels": set()}
KERNELS_MAY_IMPORT = {"torch", "numpy", "numba", "llvmlite", "cupy"}
HEAVY = {"torch", "transformers", "diffusers", "accelerate", "matplotlib", "tokenizers", "numba"}
LIGHT_ENGINE = ["errors.py", "data/manifest.py", "run.py", "gallery.py", "tasks/__init__.py"]
LONGEST_FILE = 450


def sources() -> dict[str, Path]:
    """Dotted module name → file, of all three packages."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
        assert package in found
    return found


SOURCES = sources()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported(path: Path, *, only_module_level: bool) -> Iterator[str]:
    """Dotted names that a file imports; `from a import b` gives a.b. Type-checking blocks do not count."""
    waiting: list[ast.AST] = [tree(path)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting.extend(node.orelse)
        elif not (only_module_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
            waiting.extend(ast.iter_child_nodes(node))


def top(name: str) -> str:
    return name.partition(".")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package: str) -> None:
    for name, path in SOURCES.items():
        if top(name) == package:
            ours = {top(target) for target in imported(path, only_module_level=False)} & PACKAGES.keys()
            assert ours <= MAY_IMPORT[package] | {package}, f"{path} imports {ours}"


def test_kernels_know_array_libraries_alone() -> None:
    for name, path in SOURCES.items():
        if top(name) == "mmi_kernels":
            others = {top(target) for target in imported(path, only_module_level=False)} - sys.stdlib_module_names
            assert others <= KERNELS_MAY_IMPORT | {"mmi_kernels"}, f"{path} imports {others}"


def test_no_import_circles() -> None:
    """At module level, among the modules of all three packages."""
    edges: dict[str, set[str]] = {}
    for name, path in SOURCES.items():
        targets = set(imported(path, only_module_level=True))
        # `from package import thing` is an edge to the module that thing is, else to the package
        found = {target if target in SOURCES else target.rpartition(".")[0] for target in targets}
        edges[name] = (found & SOURCES.keys()) - {name}
    finished: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        assert name not in path, "import circle: " + " → ".join([*path[path.index(name) :], name])
        if name not in finished:
            for target in sorted(edges[name]):
                visit(target, [*path, name])
            finished.add(name)

    for name in edges:
        visit(name, [])


def test_light_modules_import_nothing_heavy() -> None:
    light = [path for name, path in SOURCES.items() if top(name) == "mmi_cli"]
    light += [PACKAGES["mmi_engine"] / name for name in LIGHT_ENGINE]
    light += sorted((PACKAGES["mmi_engine"] / "tasks").glob("*.py"))
    for path in light:
        heavy = {top(target) for target in imported(path, only_module_level=True)} & HEAVY
        assert not heavy, f"{path} imports {heavy} at module level"


def test_no_help_page_imports_torch() -> None:
    """Every command's --help, in one fresh interpreter."""
    code = """
import sys
import click
from click.testing import CliRunner
from mmi_cli.main import cli

def pages(command, words):
    yield words
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            yield from pages(command.get_command(context, name), [*words, name])

count = 0
for words in pages(cli, []):
    result = CliRunner().invoke(cli, [*words, "--help"])
    assert result.exit_code == 0 and "Usage" in result.output, (words, result.output, result.exception)
    count += 1
print(count, *sorted({"torch", "transformers", "diffusers", "numba"} & sys.modules.keys()))
"""
    paths = [str(ROOT), str(ROOT / "engine"), str(ROOT / "kernels")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    pages, *heavy = run.stdout.split()
    assert int(pages) > 5 and not heavy, f"help imports {heavy}"


@pytest.mark.parametrize("name", SOURCES)
def test_a_module_tells_its_place_and_stays_short(name: str) -> None:
    path = SOURCES[name]
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(tree(path)), f"{path} has no docstring"
    assert len(text.splitlines()) <= LONGEST_FILE, f"{path} is too long"
    unfinished = re.search(r"\b(TODO|FIXME|XXX|NotImplementedError)\b", text)
    assert not unfinished, f"{path} holds {unfinished and unfinished.group()}"


def test_only_the_console_prints() -> None:
    for path in SOURCES.values():
        if path != PACKAGES["mmi_cli"] / "console.py":
            calls = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
            names = {node.func.id for node in calls if isinstance(node.func, ast.Name)}
            assert "print" not in names, f"{path} prints"


def test_tests_are_flat_and_say_what_they_test() -> None:
    for path in sorted((ROOT / "tests").rglob("*.py")):
        assert path.parent == ROOT / "tests", path
        assert not path.stem.startswith("test") or re.fullmatch(r"test_[a-z0-9]+_[a-z0-9_]+", path.stem), path
        assert ast.get_docstring(tree(path)), f"{path} has no docstring"


def test_versions_agree() -> None:
    """The lock pins every direct dependency at a version that pyproject.toml admits, and torch without a build name."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    locked = {canonicalize_name(pin.name): str(pin.specifier) for pin in pins}
    assert all(re.fullmatch(r"==[\w.!]+", version) for version in locked.values())
    wanted = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    for line in wanted:
        requirement = Requirement(line)
        if requirement.name.startswith("nvidia-"):  # a CUDA build of torch asks for its own version of it
            continue
        version = locked[canonicalize_name(requirement.name)].removeprefix("==")
        assert requirement.specifier.contains(version), f"{line}: locked {version}"
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{project['version']}]" in changelog
