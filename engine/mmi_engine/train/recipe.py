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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from mmi_engine.errors import ConfigError
from mmi_engine.train import layers
from mmi_engine.train.sections import AUGMENTS, LoraConfig, MeasureConfig, SetConfig


@dataclass(frozen=True)
class DataConfig:
    """Where training samples come from."""

    source: str = "toon"
    """``toon``: the built-in world, drawn once into a cache directory; ``manifests``: rows of ``sets``."""
    cache: str = ""
    """Cache directory; empty means ``$MMI_CACHE/toon`` or ``~/.cache/mmi/toon``."""
    stories: int = 3000
    """Stories (five pictures each) of the training split to draw."""
    workers: int = 2
    """Processes that draw missing pictures."""
    loaders: int = 0
    """Processes that build batches, per training process; 0 builds them in a thread. Never changes a result."""
    codec: str = ""
    """A trained codec (``interleaved`` only), whose latents are the image targets: a run's ``model`` directory, or
    a whole model to take it from (``toon``: the one that ships)."""
    crop: int = 0
    """Side of random square crops in pixels (``vae`` only); 0 trains on whole pictures."""
    mixture: dict[str, float] = field(default_factory=dict)
    """Task → probability weight (``interleaved`` only)."""
    row_tokens: int = 256
    """Longest row of packed documents in tokens (``interleaved`` only); a longer document stands alone."""
    row_images: int = 0
    """Exactly this many images in every row, blank ones at its end where its documents hold fewer, and every row
    padded to ``row_tokens``: shapes repeat, which GPUs want. 0 lets every batch be as large as it is."""
    kept_rows: int = 2000
    """Rows whose contexts and image features are computed at a time and kept on the device (``image_decoder``)."""
    kept_steps: int = 1000
    """Optimizer steps until they are replaced by those of the next rows."""
    redrawn: float = 0.0
    """Share of pictures that the encoder sees as the codec draws them, as it will its own (``interleaved`` only)."""
    sets: tuple[SetConfig, ...] = ()
    """The data sets of ``source = "manifests"``; all that follows belongs to it as well."""
    root: str = ""
    """Folder in which a set without ``manifest`` is looked for as ``NAME/manifest.jsonl``."""
    pack: bool = True
    """Several documents of one set in a row of ``row_tokens``; False: one document a row."""
    image_first: float = 0.5
    """How often a picture stands before its text (``pair`` and ``document``)."""
    encoder_px: int = 0
    """Side of the pictures that the visual tokenizer reads (0: the model's own)."""
    decoder_px: int = 0
    """Side of the pictures that the image decoder learns from (0: the model's own)."""
    augment: str = "none"
    """``none`` and ``centre_crop`` show the centre square as every command does; ``flip`` mirrors half of the rows,
    with boxes, maps and the words left and right."""
    palette: str = "voc"
    """Colours of semantic maps."""
    held_out: float = 0.01
    """Share of the rows of every set that is not trained on but measured (drawn data has a split of its own)."""

    def __post_init__(self) -> None:
        _require(0 <= self.redrawn <= 1, "data.redrawn must be in [0, 1]")
        _require(self.source in ("toon", "manifests"), "data.source must be 'toon' or 'manifests'")
        _require(0 <= self.held_out < 1, "data.held_out must be in [0, 1)")
        _require(0 <= self.image_first <= 1, "data.image_first must be in [0, 1]")
        _require(self.augment in AUGMENTS, f"data.augment must be one of {', '.join(AUGMENTS)}")
        names = [entry.name for entry in self.sets]
        _require(len(set(names)) == len(names), "data.sets: two sets have the same name")
        _require(self.stories > 0 and self.workers > 0, "data.stories and data.workers must be positive")
        _require(self.loaders >= 0, "data.loaders must not be negative")
        _require(self.row_tokens > 0, "data.row_tokens must be positive")
        _require(self.row_images >= 0, "data.row_images must not be negative")
        _require(self.kept_rows > 0 and self.kept_steps > 0, "data.kept_rows and data.kept_steps must be positive")
        _require(all(weight >= 0 for weight in self.mixture.values()), "data.mixture weights must not be negative")


@dataclass(frozen=True)
class LossConfig:
    """Weights of the losses; which of them apply depends on the recipe's ``task``."""

    l1: float = 1.0
    mse: float = 1.0
    edge: float = 0.0
    """L1 on horizontal and vertical differences of neighbouring pixels (``vae``)."""
    kl: float = 1e-6
    latent_noise: float = 0.0
    """Most noise on latents, relative to their spread (``vae``; each picture gets between none and this much): the
    decoder learns to undo errors of sampling."""
    text: float = 1.0
    """L_NTP, next-token prediction (``interleaved``)."""
    image: float = 10.0
    """λ of L_NTP + λ L_NIP (paper Eq. 5); 0 leaves the image decoder out altogether."""
    noise_repeats: int = 1
    """Noise levels drawn per image and step; the context is computed once for all of them."""
    guidance_dropout: float | None = None
    """Share of pictures that learn without their context; ``None`` leaves the model's own (0.1)."""


@dataclass(frozen=True)
class GroupConfig:
    """A parameter group: the first whose pattern matches a name wins, as in the released parameter groups."""

    pattern: str
    """Regular expression searched in the parameter's full name."""
    lr: float | None = None
    """Absolute peak learning rate; ``None`` means ``lr_scale`` × ``optim.lr``."""
    lr_scale: float = 1.0
    decay: bool = True
    """False switches weight decay off for the group (biases and norms never decay)."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW (Loshchilov & Hutter 2019) with a cosine schedule after a linear warm-up."""

    lr: float = 1e-4
    betas: tuple[float, ...] = (0.9, 0.995)
    eps: float = 1e-6
    weight_decay: float = 0.05
    warmup: int = 1000
    min_lr_ratio: float = 0.0
    """Learning rate at the last step relative to the peak."""
    clip: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    groups: tuple[GroupConfig, ...] = ()
    freeze: tuple[str, ...] = ()
    """Regular expressions of parameters that are not trained."""
    frozen_dtype: str = "fp32"
    """``bf16`` keeps the frozen parameters in half the memory (``manifests`` only)."""

    def __post_init__(self) -> None:
        _require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "optim.betas must be two numbers in [0, 1)"
        )
        _require(self.lr > 0 and self.eps > 0, "optim.lr and optim.eps must be positive")
        _require(self.warmup >= 0 and self.clip >= 0, "optim.warmup and optim.clip must not be negative")
        _require(self.frozen_dtype in ("fp32", "bf16"), "optim.frozen_dtype must be fp32 or bf16")


@dataclass(frozen=True)
class LoopConfig:
    """How long, how much at once, and what is written when."""

    steps: int = 15000
    """Optimizer steps; the cosine ends here."""
    batch_size: int = 16
    """Samples per process and micro-batch."""
    accumulate: int = 1
    """Micro-batches per optimizer step."""
    global_batch: int = 0
    """Rows per optimizer step over all processes; where it is set, ``accumulate`` follows from it."""
    precision: str = "fp32"
    """``fp32``, ``bf16`` (autocast) or ``bf16-pure`` (forward and backward pass in bf16 throughout; ``interleaved``
    only). Weights and optimizer stay fp32 in all of them."""
    cuda_graph: bool = False
    """Record the forward and backward pass once and replay it (``image_decoder`` on CUDA only): the host no longer
    decides how fast small models train. Same numbers."""
    ema: float = 0.999
    """Decay of the averaged weights that are evaluated and exported; 0 switches averaging off."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    log_every: int = 20
    checkpoint_minutes: float = 5.0
    checkpoint_steps: int = 0
    """Checkpoint every so many steps as well (0: by the clock only)."""
    keep_checkpoints: int = 2
    eval_every: int = 500
    eval_samples: int = 64
    sample_every: int = 0
    """Sample generations as a contact sheet every so many steps, ``samples/step-N.png`` (0: none)."""
    keep_best: str = ""
    """A held-out figure (``text``, ``image`` …); the weights with its lowest value are kept as ``model-best``."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    shard: str = "no"
    """``fsdp`` spreads parameters, gradients and optimizer state over the processes (``manifests`` only, ``ema`` 0)."""
    trackers: tuple[str, ...] = ()
    """``tensorboard``, ``wandb`` … through accelerate."""

    def __post_init__(self) -> None:
        positive = ("steps", "batch_size", "accumulate", "log_every", "keep_checkpoints", "eval_every", "eval_samples")
        for name in positive:
            _require(getattr(self, name) > 0, f"loop.{name} must be positive")
        known = ("fp32", "bf16", "bf16-pure")
        _require(self.precision in known, f"loop.precision must be one of {', '.join(known)}")
        _require(0 <= self.ema < 1, "loop.ema must be in [0, 1)")
        _require(self.shard in ("no", "fsdp"), "loop.shard must be no or fsdp")
        _require(self.shard == "no" or not self.ema, "loop.shard fsdp keeps no averaged weights: set loop.ema=0.0")


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
    ``interleaved``: ``base`` (model directory or preset) and overrides."""
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)

    def __post_init__(self) -> None:
        known = ("vae", "interleaved", "image_decoder")
        _require(self.task in known, f"task must be one of {', '.join(known)}")
        manifests = self.task == "interleaved" and self.data.source == "manifests"
        _require(manifests or self.loop.shard == "no", "loop.shard fsdp needs data.source manifests")
        graph = self.loop.cuda_graph
        _require(not graph or self.task == "image_decoder", "loop.cuda_graph is for the task image_decoder")


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
        _build(Recipe, layers.read(path, find, layers.PROFILE)[0], "", f"{path} [{layers.PROFILE}]")
    table, from_files = layers.read(path, find, profile)
    table.setdefault("name", path.stem)
    from_line: set[str] = set()
    if data:
        table = layers.with_data(table, data)
        from_line |= {"data.sets", "data.source"}
    table, overridden = _apply(table, overrides)
    from_line |= overridden
    recipe = _build(Recipe, table, "", str(path))
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
    recipe = _build(Recipe, table, "", str(path))
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


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message, remedy="correct the recipe or the override")


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


def _build(cls: type, table: dict[str, Any], prefix: str, where: str) -> Any:
    """Frozen dataclass from a table; every key must exist and every value must have the field's type."""
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1, cutoff=0.5)
            hint = (
                f"did you mean {prefix + near[0]!r}?" if near else f"valid keys: {', '.join(prefix + h for h in hints)}"
            )
            raise ConfigError(f"{where}: unknown key {prefix + key!r}", remedy=hint)
        values[key] = _convert(hints[key], value, prefix + key, where)
    missing = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
    for name in missing:
        if name not in values:
            raise ConfigError(f"{where}: key {prefix + name!r} is missing", remedy="add it to the recipe")
    return cls(**values)


def _convert(hint: Any, value: Any, key: str, where: str) -> Any:
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
    raise ConfigError(f"{where}: {key!r} must be of type {name}, found {value!r}", remedy="correct the value")
