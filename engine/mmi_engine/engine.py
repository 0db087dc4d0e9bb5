"""The model behind the `Engine` protocol of `batches.py`: choices resolved first, weights loaded when there is work.

Place in the flow: `mmi_cli` builds one `ModelEngine` per run from the options; `run.py` asks it who it is, then for
values. Everything that could change an item's output is resolved here to something definite (device, dtype, kernel,
threads, batch size, steps …) and recorded with its origin. ``auto`` is resolved once; a resumed run takes over what the
first one chose.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from mmi_engine import versions
from mmi_engine.batches import WINDOW, as_item_error
from mmi_engine.choices import Choices, device_of, dtype_of, generation_of, kernel_of, torch_dtype
from mmi_engine.data.manifest import item_seed
from mmi_engine.errors import UsageError, is_out_of_memory
from mmi_engine.pieces import Piece
from mmi_engine.probe import together
from mmi_engine.tasks import Job

log = logging.getLogger(__name__)

AUTO_BATCH = {"cpu": 4, "cuda": 16}  # upper bounds, on a CPU at least the threads; never more than there are rows


class ModelEngine:
    """See module. Attributes `image_size` and `batch_size` are set by `identity`.

    Args:
        choices: what the user chose.
        notice: told once what ``auto`` came to.

    Raises (all methods):
        ModelError, DeviceError, BackendError, UsageError.
    """

    def __init__(self, choices: Choices, notice: Callable[[str], None] | None = None) -> None:
        self.choices = choices
        self.notice = notice or (lambda text: None)
        self.image_size = self.input_side = 0
        self.batch_size = 1
        self.undecided = False
        self.resolved: dict[str, Any] = {}
        self._directory = Path()
        self._device = "cpu"
        self._settings: Any = None
        self._model: Any = None
        self._clip: Any = None
        self._pictures: Any = None  # encoded pictures of this model, across batches
        self._probing = False
        self._unit = 1

    def identity(
        self, rows: int, recorded: dict[str, Any], sample: Callable[[], Job | None] | None = None
    ) -> dict[str, Any]:
        """Model fingerprint and definite settings; see `Engine.identity`."""
        from mmi_engine.model.config import ModelConfig
        from mmi_engine.model_info import fingerprint, locate

        self._directory = locate(self.choices.model)
        config = ModelConfig.load(self._directory)
        self.image_size = config.image_decoder.vae.image_size
        self.input_side = max(self.image_size, config.vision.image_size)
        before = recorded.get("settings", {})
        self._device = device_of(self.choices, before.get("device"))
        if self.choices.llm_bits:
            from mmi_engine.weights.quantize import require

            require(self.choices.device_map)
        kind = self._device.split(":")[0]
        same = before if before.get("device") == kind else {}
        dtype = dtype_of(self.choices, kind, same.get("dtype"))
        threads = self.choices.threads or before.get("threads") or versions.default_threads()
        self._unit = threads if kind == "cpu" else 1
        known = self.choices.batch_size or before.get("batch_size")
        self.batch_size = known or together(min(rows, max(AUTO_BATCH[kind], self._unit)), self._unit)
        self.undecided = known is None and self.batch_size > 1 and sample is None
        self._settings, self._from_task = generation_of(self.choices, config)
        generation = {entry.name: getattr(self._settings, entry.name) for entry in fields(self._settings)}
        self.resolved = {
            "device": kind,
            "dtype": dtype,
            "kernel": kernel_of(self.choices, kind, dtype, same.get("kernel")),
            "threads": threads,
            "batch_size": self.batch_size,
            **({"llm_bits": self.choices.llm_bits} if self.choices.llm_bits else {}),
            **({"compile": True} if self.choices.compile else {}),
            **({"cuda_graphs": True} if self.choices.cuda_graphs else {}),
            **({"batching": "continuous"} if self._continuous else {}),
            **dict(sorted(generation.items())),
        }
        if self.choices.cuda_graphs:
            from mmi_engine.generate.graphs import refuse_elsewhere

            unfit = {name: getattr(self.choices, name) for name in ("compile", "llm_bits", "device_map")}
            refuse_elsewhere(kind, self.resolved["kernel"], unfit)
        if self.choices.compile and self.choices.writes and self.choices.device_map:
            raise UsageError("--compile does not go together with --device-map", remedy="leave out one of them")
        if self._continuous and self._settings.beams > 1:
            raise UsageError("--batching continuous writes without beams", remedy="add --beams 1")
        if known is None and self.batch_size > 1 and sample is not None:
            self._probe(sample())
        return {"model": fingerprint(self._directory), "settings": dict(self.resolved)}

    @property
    def _continuous(self) -> bool:
        return self.choices.batching == "continuous"

    @property
    def at_once(self) -> int:
        """Items `fill` would like to have: with continuous batching enough to take the places of finished ones."""
        return self.batch_size * (WINDOW if self._continuous else 1)

    def _probe(self, job: Job | None) -> None:
        """Settle ``--batch-size auto`` by running the first item; see `probe.py`."""
        if job is None:
            return
        from mmi_engine.probe import CudaMeter, HostMeter, choose

        self._probing = True
        self.load()
        full, bound = self._settings, self.batch_size
        short = min(4, full.max_new_tokens)
        self._settings = replace(full, steps=1, max_new_tokens=short, min_new_tokens=min(full.min_new_tokens, short))
        meter = HostMeter() if self._device == "cpu" else CudaMeter(self._device)
        single = self._last_piece_of(job)
        try:
            size = choose(lambda size: self._try(single, size), bound, meter, unit=self._unit)
        finally:
            self._settings = full
        self.batch_size = self.resolved["batch_size"] = size
        self.notice(f"batch size {size} (auto: at most {bound} here, and what the first item leaves room for)")

    def _last_piece_of(self, job: Job) -> Job:
        """The job with all missing pieces but the last filled in: that one has the longest context."""
        from PIL import Image

        missing = [index for index, piece in enumerate(job.pieces) if piece.value is None]
        blank = {"text": "", "image": Image.new("RGB", (self.image_size, self.image_size), (128, 128, 128))}
        pieces = [
            replace(piece, value=blank[piece.kind]) if index in missing[:-1] else piece
            for index, piece in enumerate(job.pieces)
        ]
        return replace(job, pieces=pieces, free=0 if missing else min(job.free, 1), candidates=1, rank=None)

    def _try(self, job: Job, size: int) -> None:
        """The sample in a batch of `size`; a fault of the item is none of the probe's."""
        if self._model is not None and self._model.graphs is not None:
            self._model.graphs.clear()  # of the size before: each is to be measured alone
        try:
            self.fill([job], [0], size)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            as_item_error(error)  # raises what is the model's or the device's fault
            log.debug("the probe's item fails", exc_info=True)

    def record(self) -> dict[str, Any]:
        """Settings with their origin, model and versions, for run.json. Call after `identity`."""
        chosen = self.choices.origins
        settings = {
            name: {"value": value, "origin": chosen.get(name, self._default_of(name))}
            for name, value in self.resolved.items()
        }
        if self.choices.device_map:
            settings["device_map"] = {"value": self.choices.device_map, "origin": chosen.get("device_map", "default")}
        rows = together(self.batch_size, self._unit)
        settings["rows_together"] = {"value": rows, "origin": "batch_size and threads"}
        return {"model": self.choices.model, "settings": settings, "versions": versions.versions()}

    _from_model: frozenset[str] = frozenset({"steps", "guidance", "scheduler"})
    _from_task: frozenset[str] = frozenset()

    def _default_of(self, name: str) -> str:
        return "model" if name in self._from_model else "task" if name in self._from_task else "default"

    def load(self) -> None:
        """Read the weights onto the device; once."""
        if self._model is not None:
            return
        from mmi_engine.model.checkpoint import load_model
        from mmi_engine.runtime import tune_cpu

        tune_cpu(self.resolved["threads"])
        resolved = self.resolved
        count = resolved["threads"]
        threads = f", {count} thread{'s' * (count != 1)}" if resolved["device"] == "cpu" else ""
        self.notice(
            f"{self.choices.model} on {self._device}, {resolved['dtype']}, kernel {resolved['kernel']}{threads}, "
            f"batch size {'to be tried' if self._probing else self._batches()}"
        )
        self._model = load_model(
            self._directory,
            device=self._device,
            dtype=torch_dtype(resolved["dtype"]),
            device_map=self.choices.device_map,
            llm_bits=self.choices.llm_bits,
        )
        if self._model.placement is not None:
            self.notice(f"language model: {self._model.placement}")
        self._model.set_backend(resolved["kernel"])
        if self.choices.compile:
            self._compile()
        if self.choices.cuda_graphs:
            from mmi_engine.generate.graphs import Graphs, refuse_model

            refuse_model(self._model)
            self._model.graphs = Graphs(self._model.device)

    def _compile(self) -> None:
        from mmi_engine.generate.compiled import compile_text, compile_unet

        parts = {"the language model's step": self.choices.writes, "the U-Net": self.choices.draws}
        self.notice(f"compiling {' and '.join(part for part in parts if parts[part])}, which may take minutes")
        if self.choices.writes:
            # Several rows are alike to the compiler, and the batch size may be yet to be tried.
            few = min(self.batch_size, max(2, self._unit))
            if not compile_text(self._model, few, beams=self._settings.beams):
                self.notice("the language model's step is not compiled: the one written for this model is faster")
        if self.choices.draws:
            compile_unet(self._model, together(self.batch_size, self._unit), guided=self._settings.guidance != 1.0)

    def _batches(self) -> str:
        """The batch size, and how many rows of it are computed at a time where these are fewer."""
        rows = together(self.batch_size, self._unit)
        if rows == self.batch_size:
            return str(rows)
        why = "fewer than" if rows == 1 else "a multiple of"
        return f"{self.batch_size}, {rows} computed at a time ({why} the {self._unit} threads)"

    def shape(self, job: Job) -> Hashable:
        """Kind, padded context length and images before every missing piece; a text yet to be made counts as empty.

        Raises:
            TextTooLongError: it is clear already that the item does not fit.
        """
        from mmi_engine import sequence
        from mmi_engine.generate.reading import check_room, padded

        config = self._model.config
        known = [piece if piece.value is not None else replace(piece, value="") for piece in job.pieces]
        shape: list[Hashable] = [job.free, job.candidates]
        for index, piece in enumerate(job.pieces):
            if piece.value is None:
                before = sequence.tokenize(known[:index], self._model.tokenizer, config.tokens, config.tokens_per_image)
                images = sum(earlier.kind == "image" for earlier in known[:index])
                kind = "options" if piece.options else piece.kind
                length = len(before.ids) + (piece.kind == "image")
                check_room(config, index, length + (self._settings.max_new_tokens if kind == "text" else 0), images)
                shape.append((kind, padded(length), images))
        return "any" if self._continuous else tuple(shape)

    def fill(self, jobs: Sequence[Job], seeds: Sequence[int], batch_size: int) -> list[list[Piece]]:
        """See `Engine.fill`: every candidate is a document of its own, from a seed of its own."""
        import torch

        from mmi_engine.generate import interleave

        items, item_seeds, free = [], [], []
        for job, seed in zip(jobs, seeds, strict=True):
            for number in range(job.candidates):
                items.append(job.pieces)
                item_seeds.append(seed if number == 0 else item_seed(seed, f"candidate {number}"))
                free.append(job.free)
        try:
            with torch.no_grad():
                if self._pictures is None:
                    self._pictures = interleave.PictureStore()
                filled = interleave.fill(
                    self._model,
                    items,
                    item_seeds,
                    self._settings,
                    batch_size,
                    free,
                    self._pictures,
                    self._continuous,
                )
                return self._gather(jobs, filled, batch_size)
        except torch.OutOfMemoryError:
            if self._model.graphs is not None:
                self._model.graphs.clear()
            torch.cuda.empty_cache()
            raise

    def _gather(self, jobs: Sequence[Job], made: list[list[Piece]], batch_size: int) -> list[list[Piece]]:
        """One list of pieces per job: its own, then the further candidates, with the scores that rank them."""
        gathered = []
        for job in jobs:
            documents, made = made[: job.candidates], made[job.candidates :]
            if job.candidates == 1:
                gathered.append(documents[0])
                continue
            pictures = [document[-1] for document in documents]
            if job.rank is not None:
                scores = self._rank(job, [piece.value for piece in pictures], batch_size)
                pictures = [replace(piece, scores=(score,)) for piece, score in zip(pictures, scores, strict=True)]
            gathered.append([*documents[0][:-1], *pictures])
        return gathered

    def _rank(self, job: Job, pictures: list[Any], batch_size: int) -> list[float]:
        from mmi_engine.generate.interleave import Maker
        from mmi_engine.generate.rank import ClipScorer, caption_scores

        if job.rank == "self":
            return caption_scores(Maker(self._model, self._settings, batch_size), pictures, job.note)
        if self._clip is None:
            self._clip = ClipScorer(str(job.rank), self._device)
        return list(self._clip.scores(pictures, job.note))
