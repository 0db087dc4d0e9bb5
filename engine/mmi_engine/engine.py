"""The model behind the `Engine` protocol of `batches.py`: choices resolved first, weights loaded when there is work.

Place in the flow: `mmi_cli` builds one `ModelEngine` per run from the options; `run.py` asks it who it is, then for
values. Everything that could change an item's output is resolved here to something definite (device, dtype, kernel,
threads, batch size, steps …) and recorded with its origin. ``auto`` is resolved once; a resumed run takes over what the
first one chose.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from mmi_engine import versions
from mmi_engine.errors import BackendError, DeviceError, UsageError
from mmi_engine.tasks import Job, Piece

log = logging.getLogger(__name__)

AUTO_BATCH = {"cpu": 4, "cuda": 16}  # upper bounds; never more than the manifest has rows


@dataclass(frozen=True)
class Choices:
    """What the user chose; None and ``auto`` leave the choice to model and machine.

    Attributes:
        model: ``toon`` or a directory.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``; local_rank: the device of this process when launched.
        dtype: ``auto``, ``fp32``, ``bf16``, ``fp16``.
        kernel: ``auto``, ``cuda``, ``torch``, ``numba``.
        threads, batch_size: numbers or None.
        fast: the model's quick steps and guidance.
        settings: field of `generate.settings.Settings` → value, only those that were named.
        origins: option → where its value comes from.
    """

    model: str = "toon"
    device: str = "auto"
    dtype: str = "auto"
    kernel: str = "auto"
    threads: int | None = None
    batch_size: int | None = None
    fast: bool = False
    local_rank: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)


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
        self.image_size = 0
        self.batch_size = 1
        self.resolved: dict[str, Any] = {}
        self._directory = Path()
        self._device = "cpu"
        self._settings: Any = None
        self._model: Any = None

    def identity(self, rows: int, recorded: dict[str, Any]) -> dict[str, Any]:
        """Model fingerprint and definite settings; see `Engine.identity`."""
        from mmi_engine.model.config import ModelConfig
        from mmi_engine.model_info import fingerprint, locate

        self._directory = locate(self.choices.model)
        config = ModelConfig.load(self._directory)
        self.image_size = config.image_decoder.vae.image_size
        before = recorded.get("settings", {})
        self._device = self._resolve_device()
        kind = self._device.split(":")[0]
        dtype = self._resolve_dtype(kind)
        self.batch_size = self.choices.batch_size or before.get("batch_size") or max(1, min(rows, AUTO_BATCH[kind]))
        generation = self._resolve_generation(config.generation)
        self.resolved = {
            "device": kind,
            "dtype": dtype,
            "kernel": self._resolve_kernel(kind, dtype),
            "threads": self.choices.threads or before.get("threads") or versions.physical_cores(),
            "batch_size": self.batch_size,
            **generation,
        }
        return {"model": fingerprint(self._directory), "settings": dict(self.resolved)}

    def record(self) -> dict[str, Any]:
        """Settings with their origin, model and versions, for run.json. Call after `identity`."""
        chosen = self.choices.origins
        settings = {
            name: {"value": value, "origin": chosen.get(name, "model" if name in self._from_model else "default")}
            for name, value in self.resolved.items()
        }
        return {"model": self.choices.model, "settings": settings, "versions": versions.versions()}

    _from_model: frozenset[str] = frozenset({"steps", "guidance", "scheduler"})

    def _resolve_device(self) -> str:
        import torch

        wanted = self.choices.device
        if wanted == "auto":
            return f"cuda:{self.choices.local_rank}" if torch.cuda.is_available() else "cpu"
        if wanted == "cpu":
            return wanted
        index = int(wanted.partition(":")[2] or 0)
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if index >= count:
            found = f"{count} CUDA devices" if count else "no CUDA device"
            raise DeviceError(f"--device {wanted}: {found} here", remedy="use --device cpu or auto; see mmi doctor")
        return f"cuda:{index}"

    def _resolve_dtype(self, kind: str) -> str:
        import torch

        if self.choices.dtype != "auto":
            return self.choices.dtype
        if kind == "cpu":
            return "fp32"
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"

    def _resolve_kernel(self, kind: str, dtype: str) -> str:
        from mmi_kernels import KernelUnavailable, resolve

        try:
            return resolve(self.choices.kernel, kind, _torch_dtype(dtype))
        except KernelUnavailable as error:
            raise BackendError(str(error)) from error

    def _resolve_generation(self, defaults: Any) -> dict[str, Any]:
        """Every field of Settings with a definite value; also sets `_settings`."""
        from mmi_engine.generate.settings import Settings

        chosen = {
            "steps": defaults.fast_steps if self.choices.fast else defaults.steps,
            "guidance": defaults.fast_guidance if self.choices.fast else defaults.guidance,
            "scheduler": defaults.scheduler,
            **self.choices.settings,
        }
        known = {entry.name for entry in fields(Settings)}
        unknown = set(chosen) - known
        if unknown:
            raise UsageError(f"no setting called {sorted(unknown)[0]}")
        self._settings = Settings(**chosen)
        return {name: getattr(self._settings, name) for name in sorted(known)}

    def load(self) -> None:
        """Read the weights onto the device."""
        from mmi_engine.model.checkpoint import load_model
        from mmi_engine.runtime import tune_cpu

        tune_cpu(self.resolved["threads"])
        resolved = self.resolved
        threads = f", {resolved['threads']} threads" if resolved["device"] == "cpu" else ""
        self.notice(
            f"{self.choices.model} on {self._device}, {resolved['dtype']}, kernel {resolved['kernel']}{threads}, "
            f"batch size {self.batch_size}"
        )
        self._model = load_model(self._directory, device=self._device, dtype=_torch_dtype(resolved["dtype"]))
        self._model.set_backend(resolved["kernel"])

    def shape(self, job: Job) -> Hashable:
        """Kind, padded context length and images before every missing piece; a text yet to be made counts as empty."""
        from mmi_engine import sequence
        from mmi_engine.generate.interleave import padded

        config = self._model.config
        known = [sequence.Piece(piece.kind, piece.value or "") for piece in job.pieces]
        shape: list[Hashable] = [job.free]
        for index, piece in enumerate(job.pieces):
            if piece.value is None:
                before = sequence.tokenize(known[:index], self._model.tokenizer, config.tokens, config.tokens_per_image)
                images = sum(earlier.kind == "image" for earlier in known[:index])
                shape.append((piece.kind, padded(len(before.ids) + (piece.kind == "image")), images))
        return tuple(shape)

    def fill(self, jobs: Sequence[Job], seeds: Sequence[int], batch_size: int) -> list[list[Piece]]:
        """See `Engine.fill`."""
        import torch

        from mmi_engine import sequence
        from mmi_engine.generate import interleave

        items = [[sequence.Piece(piece.kind, piece.value) for piece in job.pieces] for job in jobs]
        try:
            with torch.no_grad():
                filled = interleave.fill(
                    self._model, items, list(seeds), self._settings, batch_size, [job.free for job in jobs]
                )
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            raise
        return [[Piece(piece.kind, piece.value) for piece in item] for item in filled]


def _torch_dtype(name: str) -> Any:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
