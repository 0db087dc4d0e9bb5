"""Recipes: TOML file + ``key=value`` overrides → one frozen :class:`Recipe`, with the origin of each value.

Place in the flow: the first thing `mmi train` reads and the only source of numbers for everything behind it. The
resolved recipe is written into the run directory (``recipe.json``), so that a run can be repeated without guessing.
Precedence: command line > recipe file > default. Unknown keys are errors that name the nearest. No torch here.
Source of the values in the shipped files: paper Tables 11 to 15, and measurements for the embedded model.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
import types
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from mmi_engine.errors import ConfigError
from mmi_engine.train import layers
from mmi_engine.train.sections import (
    DataConfig,
    LoopConfig,
    LoraConfig,
    LossConfig,
    MeasureConfig,
    OptimConfig,
    require,
)


@dataclass(frozen=True)
class Recipe:
    """Everything a training run depends on except the code and the data's content."""

    task: str
    """``vae`` (the image codec alone), ``interleaved`` (the whole model, L_NTP + λ L_NIP) or ``image_decoder`` (L_NIP
    on contexts and features that the rest of the model, frozen, has computed before)."""
    name: str = ""
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    model: dict[str, Any] = field(default_factory=dict)
    """``vae``: the fields of ``VAEConfig``, or ``base`` alone, the model whose codec is trained further.
    The others: see :mod:`mmi_engine.train.foundation`."""
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)

    def __post_init__(self) -> None:
        known = ("vae", "interleaved", "image_decoder")
        require(self.task in known, f"task must be one of {', '.join(known)}")
        manifests = self.task == "interleaved" and self.data.source == "manifests"
        require(manifests or self.loop.shard == "no", "loop.shard fsdp needs data.source manifests")
        graph = self.loop.cuda_graph
        require(not graph or self.task == "image_decoder", "loop.cuda_graph is for the task image_decoder")
        world = self.task in ("interleaved", "image_decoder") and self.data.source == "toon"
        require(self.task != "image_decoder" or world, "the task image_decoder needs data.source toon")
        require(not self.loss.words or world, "loss.words needs data.source toon")
        shifted = self.loss.timestep_shift != 1
        require(not shifted or self.task == "image_decoder", "loss.timestep_shift is for the task image_decoder")
        balance = self.loss.class_balance
        require(not balance or self.task == "image_decoder", "loss.class_balance is for the task image_decoder")
        require(0 <= balance <= 1, "loss.class_balance must be between 0 and 1")
        emphasis = self.loss.emphasis
        require(not emphasis or balance > 0, "loss.emphasis needs loss.class_balance above 0")
        require(all(factor > 0 for factor in emphasis.values()), "loss.emphasis: factors must be above 0")
        if emphasis:  # what knows the classes needs numpy, which most recipes can do without
            from mmi_engine.train.balance import check_classes

            check_classes(emphasis)
        kept = self.task == "image_decoder" and self.loss.words > 0
        require(not self.loss.keep or kept, "loss.keep needs loss.words and the task image_decoder")

    @property
    def measurable(self) -> bool:
        """Whether there are held-out rows for ``measure``: named ones, or drawn ones where all training data are."""
        drawn = bool(self.measure.toon) and all(entry.toon for entry in self.data.sets)
        return bool(self.measure.manifest) or drawn


@dataclass(frozen=True)
class Resolved:
    """A recipe and, for every leaf key, where its value comes from: ``default``, a file, or ``command line``."""

    recipe: Recipe
    origins: dict[str, str]

    def to_json(self) -> str:
        """``{"recipe": …, "origins": {"loop.steps": "command line", …}}`` as indented text."""
        return json.dumps({"recipe": dataclasses.asdict(self.recipe), "origins": self.origins}, indent=2) + "\n"


def shipped() -> dict[str, Path]:
    """Name → file of the recipes inside the package."""
    folder = Path(str(resources.files("mmi_engine.train"))) / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def find(name_or_file: str) -> Path:
    """The recipe file that a name or path means.

    Raises:
        ConfigError: neither a file nor a shipped name; the message names the nearest one.
    """
    known = shipped()
    if name_or_file in known:
        return known[name_or_file]
    path = Path(name_or_file)
    if path.is_file():
        return path
    near = difflib.get_close_matches(name_or_file, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"recipes that ship: {', '.join(known)}"
    raise ConfigError(f"recipe {name_or_file!r} is neither a file nor the name of a shipped recipe", remedy=hint)


def resolve(
    name_or_file: str, overrides: Iterable[str] = (), *, profile: str = "", data: Sequence[str] = ()
) -> Resolved:
    """Read a recipe and apply ``key=value`` overrides (dotted keys, TOML values; a bare word is a string).

    Args:
        name_or_file: a shipped name or a TOML file.
        overrides: ``key=value`` texts.
        profile: ``toon`` for the recipe's scaled profile.
        data: manifests, see :func:`mmi_engine.train.layers.with_data`.

    Raises:
        ConfigError: file missing or not TOML, unknown key, value of the wrong type or out of range.
    """
    path = find(name_or_file)
    if not profile and layers.has_profile(path, find):  # the profile's keys are checked even where it does not serve
        _build(Recipe, layers.read(path, find, layers.PROFILE)[0], "", _Origin(f"{path} [{layers.PROFILE}]"))
    table, from_files = layers.read(path, find, profile)
    table.setdefault("name", path.stem)
    from_line: set[str] = set()
    if data:
        table = layers.with_data(table, data)
        from_line |= {"data.sets", "data.source"}
    table, overridden = _apply(table, overrides)
    from_line |= overridden
    recipe = _build(Recipe, table, "", _Origin(path, overridden))
    origins = {}
    for leaf in _leaves(dataclasses.asdict(recipe)):
        origins[leaf] = "command line" if leaf in from_line else from_files.get(leaf, "default")
    return Resolved(recipe, origins)


def resumed(directory: Path, overrides: Iterable[str] = ()) -> Resolved:
    """The recipe that ``directory`` was trained with (``recipe.json``), with further overrides.

    Raises:
        ConfigError: no recipe there, or as for :func:`resolve`.
    """
    path = directory / "recipe.json"
    if not path.is_file():
        raise ConfigError(f"{directory} holds no training run", remedy="name a recipe with --recipe")
    data = json.loads(path.read_text(encoding="utf-8"))
    table, from_line = _apply(data["recipe"], overrides)
    recipe = _build(Recipe, table, "", _Origin(path, from_line))
    origins = {
        leaf: "command line" if leaf in from_line else data["origins"].get(leaf, "default")
        for leaf in _leaves(dataclasses.asdict(recipe))
    }
    return Resolved(recipe, origins)


def _apply(table: dict[str, Any], overrides: Iterable[str]) -> tuple[dict[str, Any], set[str]]:
    """``table`` with overrides in place, and the leaves that they set."""
    from_line: set[str] = set()
    for text in overrides:
        key, value = parse_override(text)
        _assign(table, key, value)
        from_line |= {leaf for leaf in _leaves(table) if leaf == key or leaf.startswith(key + ".")}
    return table, from_line


def parse_override(text: str) -> tuple[str, Any]:
    """``"optim.lr=1e-3"`` → ``("optim.lr", 0.001)``.

    Raises:
        ConfigError: no ``=`` or an empty key.
    """
    key, separator, value = text.partition("=")
    key = key.strip()
    if not separator or not key:
        raise ConfigError(f"{text!r} is not of the form key=value", remedy="for example optim.lr=1e-4")
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value.strip()


def _leaves(table: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys of everything that is not a table."""
    found: list[str] = []
    for key, value in table.items():
        found += _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [f"{prefix}{key}"]
    return found


def _assign(table: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        child = table.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{key!r}: {parent!r} is a value, not a table", remedy="see `mmi recipe show`")
        table = child
    table[last] = value


@dataclass(frozen=True)
class _Origin:
    """Who is to blame for a key: the command line for what it set, else the file."""

    file: Path | str
    from_line: Set[str] = frozenset()

    def __call__(self, key: str) -> str:
        def related(leaf: str) -> bool:
            return key == leaf or leaf.startswith(f"{key}.") or key.startswith((f"{leaf}.", f"{leaf}["))

        return "command line" if any(related(leaf) for leaf in self.from_line) else str(self.file)


def _build(cls: type, table: dict[str, Any], prefix: str, where: _Origin) -> Any:
    """Frozen dataclass from a table; every key must exist and every value must have the field's type."""
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1, cutoff=0.5)
            hint = (
                f"did you mean {prefix + near[0]!r}?" if near else f"valid keys: {', '.join(prefix + h for h in hints)}"
            )
            raise ConfigError(f"{where(prefix + key)}: unknown key {prefix + key!r}", remedy=hint)
        values[key] = _convert(hints[key], value, prefix + key, where)
    missing = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
    for name in missing:
        if name not in values:
            raise ConfigError(
                f"{where(prefix + name)}: key {prefix + name!r} is missing", remedy="add it to the recipe"
            )
    return cls(**values)


def _convert(hint: Any, value: Any, key: str, where: _Origin) -> Any:
    """``value`` as the type ``hint`` (dataclass, number, str, bool, tuple, dict, optional)."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, key, where)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _build(hint, value, f"{key}.", where)  # type: ignore[arg-type]
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_convert(arguments[0], item, f"{key}[{i}]", where) for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        if arguments[1] is Any:
            return value
        return {k: _convert(arguments[1], v, f"{key}.{k}", where) for k, v in value.items()}
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint in (int, str, bool) and type(value) is hint:
        return value
    name = getattr(hint, "__name__", str(hint))
    raise ConfigError(f"{where(key)}: {key!r} must be of type {name}, found {value!r}", remedy="correct the value")
