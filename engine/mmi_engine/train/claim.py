"""Who owns a run directory: claimed when a run begins, given back when it never got anywhere.

Place in the flow: ``start.train`` holds a :class:`Claim` around everything it does in the directory. A claim is the
file ``recipe.json``. A fresh run that fails before its first step takes away what it made, so that the corrected
command may use the same ``--out``; a run with a checkpoint goes on only with the data and the base it began with.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmi_engine.errors import ConfigError, Interrupted, OutputError
from mmi_engine.train.recipe import Recipe, Resolved, resumed

OF_OTHER_DATA = ("measure.json", "measured", "metrics.jsonl", "plan", "dropped*.json")


class Claim:
    """Context in which ``directory`` belongs to this run; only the main process touches the disk.

    Args:
        resolved: recipe with origins; directory: of the run, made when missing.
        resume: go on with the run there, or start one.

    Raises:
        OutputError: (on entering) it holds a run that is not to be resumed.
        ConfigError: (on entering) its checkpoints come from other data or another base than the recipe names.
    """

    def __init__(self, resolved: Resolved, directory: Path, *, resume: bool) -> None:
        self.resolved, self.directory, self.resume = resolved, directory, resume
        self.loop: Any = None
        """The loop as soon as there is one; its position tells whether a step was done."""

    def __enter__(self) -> Claim:
        from mmi_engine.train.processes import process_state

        self.main = process_state().is_main_process
        if not self.main:
            return self
        self.made = not self.directory.is_dir()
        self.before = set() if self.made else set(self.directory.iterdir())
        self.fresh = not (self.directory / "recipe.json").exists()
        if not self.fresh and not self.resume:
            raise OutputError(
                f"{self.directory} already holds a training run", remedy="add --resume or choose another --out"
            )
        if not self.fresh:
            self._compare()
        self.directory.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        failed = isinstance(error, Exception) and not isinstance(error, Interrupted)
        begun = self.loop is not None and self.loop.position.step > 0
        if not self.main or not self.fresh or not failed or begun:
            return
        for path in set(self.directory.iterdir()) - self.before:
            _remove(path)
        if self.made:
            with suppress(OSError):  # another process still writes there
                self.directory.rmdir()

    def _compare(self) -> None:
        from mmi_engine.train import checkpoints

        found = list(_differences(resumed(self.directory).recipe, self.resolved.recipe))
        if found and checkpoints.complete(self.directory / "checkpoints"):
            key, old, new = found[0]
            raise ConfigError(
                f"--resume: the run in {self.directory} began with {key} = {old!r}, now it is {new!r}",
                remedy="resume with --out alone, which takes the run's own data and base, or train on other data in "
                f"a new run from its model: --model {self.directory / 'model'} and another --out",
            )
        if found:  # nothing was learnt: what was planned, measured and logged belongs to the old data
            for pattern in OF_OTHER_DATA:
                for path in self.directory.glob(pattern):
                    _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _differences(old: Recipe, new: Recipe) -> Iterator[tuple[str, Any, Any]]:
    """Key and both values of everything that says what is trained on and from, where it differs."""
    if old.data.source != new.data.source:
        yield "data.source", old.data.source, new.data.source
    names = [[entry.name for entry in recipe.data.sets] for recipe in (old, new)]
    if names[0] != names[1]:
        yield "data.sets", names[0], names[1]
    for first, second in zip(old.data.sets, new.data.sets, strict=False):
        places = old.data.place(first), new.data.place(second)
        if not _same_place(*places):
            yield f"data.sets {first.name}.manifest", *places
        for field in dataclasses.fields(first):
            values = getattr(first, field.name), getattr(second, field.name)
            if field.name != "manifest" and values[0] != values[1]:
                yield f"data.sets {first.name}.{field.name}", *values
    bases = [str(recipe.model.get("base", "")) for recipe in (old, new)]
    if not _same_place(*bases):
        yield "model.base", *bases
    for key in sorted({*old.model, *new.model} - {"base"}):
        values = [recipe.model.get(key) for recipe in (old, new)]
        if json.dumps(values[0]) != json.dumps(values[1]):  # tuples and lists are one thing there
            yield f"model.{key}", *values


def _same_place(first: str, second: str) -> bool:
    """Whether two names, or paths relative and absolute, mean one thing."""
    return first == second or bool(first and second and Path(first).resolve() == Path(second).resolve())
