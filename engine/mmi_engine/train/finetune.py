"""Training on manifests: every recipe of the paper, on the user's data or, scaled down, on the built-in world.

    manifests ─ rows ─ documents ─ packing ─ collate ─▶ Loop over InterleavedObjective ─▶ model directory
    held-out rows ─ measure before ──────────────────────────────────────── measure after ─▶ measure.json

Place in the flow: ``start.train`` hands a recipe with ``data.source = "manifests"`` to :func:`run`. Data are found
before any model is loaded.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmi_engine.data.maps import Palette
from mmi_engine.errors import ConfigError
from mmi_engine.model_info import family_of, weight_files
from mmi_engine.train import adapters, cache, foundation, frozen, memory, sharding, sources
from mmi_engine.train.claim import Claim
from mmi_engine.train.collate import Feed, ManifestBatch, Sizes, describe
from mmi_engine.train.documents import Choices
from mmi_engine.train.interleaved import InterleavedObjective, codec_key
from mmi_engine.train.moments import Moments
from mmi_engine.train.optim import freeze
from mmi_engine.train.packing import Blend, Layout, Stream
from mmi_engine.train.processes import process_state
from mmi_engine.train.recipe import Recipe
from mmi_engine.train.rows import RowIndex
from mmi_engine.train.sections import DataConfig
from mmi_engine.weights import quantize

Report = Callable[[dict[str, Any]], None]
Sets = list[RowIndex]
EVALUATION_BATCH = 8
HELD_OUT_STORIES = 60
STORED = {"fp32": torch.float16, "bf16": torch.bfloat16, "bf16-pure": torch.bfloat16}


class ManifestTask:
    """Implements :class:`mmi_engine.train.task.Task` for manifests.

    Args:
        recipe: with ``data.source = "manifests"``.
        train, val: rows of every set of the recipe, in its order.
        directory: run directory; row counts of the plan and the drops are kept there.
    """

    def __init__(self, recipe: Recipe, train: Sets, val: Sets, directory: Path) -> None:
        self.recipe, self.directory = recipe, directory
        check_numbers(recipe)
        self.base = foundation.load(recipe)
        self.model = self.base.model
        kind = sharding.WholeObjective if recipe.loop.shard == "fsdp" else InterleavedObjective
        self.module: nn.Module = kind(self.model, recipe.loss.noise_repeats)
        freeze(self.module, recipe.optim.freeze)
        if recipe.lora.rank:
            adapters.adapt(self.model, recipe.lora)
        if recipe.optim.frozen_dtype == "int8":
            frozen.eight_bits(self.model)
        if recipe.optim.frozen_dtype != "fp32":
            frozen.halve(self.module, besides=self.model.codec if self._keeps_latents else None)
        if recipe.loop.activation_checkpointing:
            adapters.checkpoint_activations(self.model)
        self.moments = self._moments() if self._keeps_latents else None
        self.train = self._feed(train, recipe.seed, directory / "plan")
        self.val = self._feed(val, recipe.seed + 1, None)
        self.dropped: Counter[str] = Counter()

    @property
    def _keeps_latents(self) -> bool:
        """Whether the codec encodes into the cache, in float32 as it is."""
        return bool(self.recipe.data.keep_latents and self.recipe.loss.image)

    def _feed(self, sets: Sets, seed: int, folder: Path | None) -> Feed:
        data, config = self.recipe.data, self.model.config
        layout = Layout(self.model.tokenizer, config.tokens, config.tokens_per_image, data.row_tokens, pack=data.pack)
        choices = Choices(family_of(config.name), data.image_first, flip=data.augment == "flip" and folder is not None)
        streams = [
            Stream(index, entry, number, layout, choices, seed, folder)
            for number, (index, entry) in enumerate(zip(sets, data.sets, strict=True))
        ]
        sizes = Sizes(
            data.encoder_px or config.vision.image_size,
            (data.decoder_px or config.image_decoder.vae.image_size) if self.recipe.loss.image else 0,
        )
        blend = Blend(streams, [entry.weight for entry in data.sets], seed)
        return Feed(blend, layout, sizes, Palette.find(data.palette), self.moments)

    def _moments(self) -> Moments:
        """Kept latents of the codec, which must be frozen; raises ConfigError."""
        codec = self.model.codec
        if any(parameter.requires_grad for parameter in codec.parameters()):
            raise ConfigError("data.keep_latents needs a frozen codec", remedy="add 'codec\\.' to optim.freeze")
        data = self.recipe.data
        root = Path(data.cache) if data.cache else cache.default_root().parent
        side = data.decoder_px or self.model.config.image_decoder.vae.image_size
        return Moments(root / "latents", codec, side, codec_key(codec))

    def batch(self, index: int) -> ManifestBatch:
        """Micro-batch ``index``."""
        return self.train.batch(index, self.recipe.loop.batch_size)

    def to_device(self, batch: ManifestBatch, device: Any) -> ManifestBatch:
        """The batch on ``device``; what was dropped for it is counted and kept in ``dropped.json``."""
        if batch.dropped:
            self.dropped += batch.dropped
            rank = process_state().process_index
            path = self.directory / ("dropped.json" if rank == 0 else f"dropped-{rank}.json")
            path.write_text(json.dumps(dict(sorted(self.dropped.items())), indent=2) + "\n", encoding="utf-8")
        return self.train.encoded(batch).to(device)

    def ids(self, batch: ManifestBatch) -> list[str]:
        """``set:id`` of every document."""
        return batch.names

    def size(self, batch: ManifestBatch) -> int:
        """Pictures that the model looks at."""
        return len(batch.inputs.images)

    def tokens(self, batch: ManifestBatch) -> int:
        """Tokens without padding."""
        return batch.tokens

    @torch.no_grad()
    def evaluate(self, samples: int) -> dict[str, float]:
        """Held-out L_NTP and L_NIP over about ``samples`` rows, with the same noise every time."""
        state = torch.get_rng_state()
        totals: dict[str, list[float]] = {}
        size = min(EVALUATION_BATCH, self.recipe.loop.batch_size)
        for index in range(max(1, samples // size)):
            torch.manual_seed(index)
            batch = self.val.encoded(self.val.batch(index, size)).to(self.model.device)
            with self.precision():
                _, parts = self.module(batch)
            for name, value in parts.items():
                totals.setdefault(name, []).append(float(value))
        torch.set_rng_state(state)
        return {name: sum(values) / len(values) for name, values in totals.items()}

    @torch.no_grad()
    def preview(self, path: Path) -> None:
        """Held-out documents as the model completes them, one a row."""
        from mmi_engine.train.sheet import contact_sheet

        with self.precision():
            sheet = contact_sheet(self.model, self.val, self.recipe.measure.settings.get("steps", 20))
        sheet.save(path)

    def precision(self) -> AbstractContextManager[Any]:
        """What the training step computes in, for what is computed beside it."""
        halves = self.recipe.loop.precision == "bf16"
        return torch.autocast(self.model.device.type, torch.bfloat16) if halves else nullcontext()

    def export(self, directory: Path) -> None:
        """Model directory with adapters folded in and the base's unloaded parts beside the trained ones."""
        self._write(directory, adapters.merged_state(self.model, stored=self.base.stored))

    def export_state(self, directory: Path, state: dict[str, Tensor]) -> None:
        """As :meth:`export`, from the objective's whole weights gathered from several processes."""
        prefix = "model."
        gathered = {name.removeprefix(prefix): value for name, value in state.items()}
        self._write(directory, adapters.merged_state(self.model, gathered, self.base.stored))

    def _write(self, directory: Path, state: dict[str, Tensor]) -> None:
        foundation.export(self.base, state, directory, STORED[self.recipe.loop.precision])
        text = json.dumps(describe(self.train), indent=2) + "\n"
        (directory / "data.json").write_text(text, encoding="utf-8")


def check(recipe: Recipe) -> None:
    """Refuse what cannot work before anything is loaded or written; raises ConfigError, UsageError, ModelError."""
    sources.locate(recipe.data)
    check_numbers(recipe)
    foundation.configuration(recipe)
    Palette.find(recipe.data.palette)


def check_numbers(recipe: Recipe) -> None:
    """Numbers that contradict each other; raises ConfigError."""
    kept = recipe.optim.frozen_dtype
    if kept != "fp32" and recipe.loop.precision != "bf16":
        remedy = "add optim.frozen_dtype=fp32, or train with loop.precision=bf16, which a CPU can as well"
        raise ConfigError(f"optim.frozen_dtype {kept} needs loop.precision bf16", remedy=remedy)
    if kept == "int8" and recipe.loop.shard == "fsdp":
        raise ConfigError("8-bit weights are not sharded", remedy="optim.frozen_dtype=bf16, or loop.shard=no")
    if kept == "int8":
        quantize.library()
    if recipe.data.keep_latents and recipe.loop.shard == "fsdp":
        raise ConfigError("data.keep_latents needs a whole codec in every process", remedy="leave it, or loop.shard=no")
    if not recipe.loss.text and not recipe.loss.image:
        raise ConfigError("loss.text and loss.image are both 0", remedy="give one a weight")


def run(resolved: Any, claim: Claim, *, report: Report | None) -> dict[str, float]:
    """Measure, train, measure; returns the last evaluation's figures and the benchmark figures.

    Args:
        resolved: recipe with origins.
        claim: on the run directory, held; told the loop.
        report: see :func:`mmi_engine.train.start.train`.

    Raises:
        as :func:`mmi_engine.train.start.train`; UsageError where data are missing.
    """
    from mmi_engine.runtime import tune_cpu
    from mmi_engine.train.loop import Loop

    report = report or (lambda _: None)
    recipe: Recipe = resolved.recipe
    directory = claim.directory
    found = sources.locate(recipe.data)
    state = process_state()
    tune_cpu(recipe.loop.threads)
    with state.main_process_first():
        train, val = sets_of(recipe.data, found, report)
    benchmark = Benchmark(recipe, directory, report)
    if state.is_main_process:
        benchmark.before()
    state.wait_for_everyone()
    task = ManifestTask(recipe, train, val, directory)
    loop = Loop(settled(recipe, state.num_processes), task, directory, report if state.is_main_process else None)
    claim.loop = loop
    figures = loop.run(resume=claim.resume)
    if state.is_main_process:
        figures |= benchmark.after()
    state.wait_for_everyone()
    return figures


def estimate(recipe: Recipe) -> memory.Estimate:
    """What a step of the recipe needs in memory, as far as that can be told without training; nothing is written.

    Raises:
        as :func:`check`.
    """
    check(recipe)
    _, directory = foundation.configuration(recipe)
    if sum(path.stat().st_size for path in weight_files(directory)) > memory.TRIAL_BYTES:
        return memory.before_loading(recipe)
    train, val = sets_of(recipe.data, sources.locate(recipe.data), lambda _: None)
    with tempfile.TemporaryDirectory() as folder:
        return memory.tried(ManifestTask(recipe, train, val, Path(folder)), recipe)


def settled(recipe: Recipe, processes: int) -> Recipe:
    """The recipe as the loop runs it: accumulation from the global batch, freezing done already.

    Raises:
        ConfigError: the global batch does not divide.
    """
    loop = recipe.loop
    if loop.global_batch:
        once = loop.batch_size * processes
        if loop.global_batch % once:
            raise ConfigError(
                f"loop.global_batch {loop.global_batch} is no multiple of {loop.batch_size} rows × "
                f"{processes} processes",
                remedy="change loop.batch_size or the number of processes",
            )
        loop = dataclasses.replace(loop, accumulate=loop.global_batch // once)
    return dataclasses.replace(recipe, loop=loop, optim=dataclasses.replace(recipe.optim, freeze=()))


def sets_of(data: DataConfig, found: dict[str, Path], report: Report) -> tuple[Sets, Sets]:
    """Training and held-out rows of every set, drawn ones drawn."""

    def progress(stage: str) -> Callable[[int, int], None]:
        return lambda done, total: report({"stage": stage, "done": done, "total": total})

    names = {entry.toon for entry in data.sets if entry.toon}
    folders: dict[str, Path] = {}
    if names:
        folders["train"] = sources.drawn(data, names, "train", data.stories, progress("drawing training pictures"))
        folders["val"] = sources.drawn(data, names, "val", HELD_OUT_STORIES, progress("drawing validation pictures"))
    train: Sets = []
    val: Sets = []
    for entry in data.sets:
        if entry.toon:
            train.append(RowIndex(sources.manifest_of(folders["train"], entry.toon)))
            val.append(RowIndex(sources.manifest_of(folders["val"], entry.toon)))
        else:
            path = found[entry.name]
            train.append(RowIndex(path, held_out=data.held_out))
            val.append(RowIndex(path, held_out=data.held_out, inverse=bool(data.held_out)))
    return train, val


class Benchmark:
    """The figure before and after, kept in ``measure.json`` of the run directory.

    Args:
        recipe: whose ``[measure]`` table says what; directory: of the run; report: told the stage.
    """

    def __init__(self, recipe: Recipe, directory: Path, report: Report) -> None:
        self.recipe, self.directory, self.report = recipe, directory, report
        self.config = recipe.measure
        self.path = directory / "measure.json"

    @property
    def wanted(self) -> bool:
        """Whether there is a metric and something to measure it on."""
        return bool(self.config.task) and self.recipe.measurable

    def _manifest(self, split: str) -> Path:
        if self.config.manifest:
            return Path(self.config.manifest)
        folder = sources.drawn(self.recipe.data, {self.config.toon}, split, self.config.items, lambda done, total: None)
        return sources.manifest_of(folder, self.config.toon)

    def _measured(self, name: str, model: str | Path, split: str) -> dict[str, Any]:
        from mmi_engine.train.measure import measure

        self.report({"stage": f"measuring {name}", "done": 0, "total": 1})
        out = self.directory / "measured" / name
        base = str(self.recipe.model["base"])
        return measure(model, self.config, self._manifest(split), out, self.recipe.loop.threads or None, base)

    def _kept(self) -> dict[str, Any]:
        return json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {}

    def _keep(self, **figures: Any) -> None:
        self.path.write_text(json.dumps({**self._kept(), **figures}, indent=2) + "\n", encoding="utf-8")

    def before(self) -> None:
        """Measure the base, unless that was done before the run was interrupted."""
        if self.wanted and "before" not in self._kept():
            self._keep(before=self._measured("before", str(self.recipe.model["base"]), "val"), paper=self.config.paper)

    def after(self) -> dict[str, float]:
        """Measure the result; on drawn data also on the test split. Returns figures for the last line."""
        if not self.wanted:
            return {}
        model = self.directory / "model"
        figures = {"after": self._measured("after", model, "val")}
        if not self.config.manifest:
            figures["test"] = self._measured("test", model, "test")
        self._keep(**figures)
        kept = self._kept()
        return {name: kept[name]["value"] for name in ("before", "after", "test") if name in kept}
