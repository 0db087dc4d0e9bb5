"""What the user chose about model and machine, and what ``auto`` comes to.

Place in the flow: `mmi_cli` fills in `Choices`; `engine.py` asks the functions here for something definite, which it
records and keeps. What a resumed run chose before is taken over where it can be.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from mmi_engine.errors import BackendError, DeviceError, UsageError

if TYPE_CHECKING:
    import torch

    from mmi_engine.generate.settings import Settings
    from mmi_engine.model.config import ModelConfig


@dataclass(frozen=True)
class Choices:
    """What the user chose; None and ``auto`` leave the choice to model and machine.

    Attributes:
        model: ``toon`` or a directory.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``; local_rank: the device of this process when launched.
        dtype: ``auto``, ``fp32``, ``bf16``, ``fp16``.
        kernel: ``auto``, ``cuda``, ``torch``, ``numba``.
        threads, batch_size: numbers or None.
        llm_bits: 8, 4 or None for the language model as it is; device_map: ``auto`` or None, see `load_model`.
        fast: the model's quick steps and guidance.
        writes, draws: whether the command makes texts, pictures.
        compile: what makes these, see `generate/compiled.py`; cuda_graphs: record steps, see `generate/graphs.py`.
        batching: ``fixed`` or ``continuous``, see `generate/continuous.py`.
        decoding: key of `tasks.prompts.DECODING`: the task's own settings, below `settings`.
        settings: field of `generate.settings.Settings` → value, only those that were named.
        origins: option → where its value comes from.
    """

    model: str = "toon"
    device: str = "auto"
    dtype: str = "auto"
    kernel: str = "auto"
    threads: int | None = None
    batch_size: int | None = None
    llm_bits: int | None = None
    device_map: str | None = None
    fast: bool = False
    writes: bool = True
    draws: bool = True
    compile: bool = False
    cuda_graphs: bool = False
    batching: str = "fixed"
    decoding: str | None = None
    local_rank: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)


def device_of(choices: Choices, before: str | None) -> str:
    """``cpu`` or ``cuda:N``.

    Args:
        choices: what the user chose.
        before: of the run that is resumed, taken over where it can be.

    Raises:
        DeviceError: the device that was named is not here.
    """
    import torch

    wanted = choices.device
    if wanted == "auto":
        if before == "cpu":
            return before
        return f"cuda:{choices.local_rank}" if torch.cuda.is_available() else "cpu"
    if wanted == "cpu":
        return wanted
    index = int(wanted.partition(":")[2] or 0)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= count:
        found = f"{count} CUDA devices" if count else "no CUDA device"
        raise DeviceError(f"--device {wanted}: {found} here", remedy="use --device cpu or auto; see mmi doctor")
    return f"cuda:{index}"


def dtype_of(choices: Choices, kind: str, before: str | None) -> str:
    """``fp32``, ``bf16`` or ``fp16``; `kind`: ``cpu`` or ``cuda``, `before` as of :func:`device_of`."""
    import torch

    if choices.dtype != "auto":
        return choices.dtype
    if before is not None:
        return before
    if kind == "cpu":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"


def kernel_of(choices: Choices, kind: str, dtype: str, before: str | None) -> str:
    """The sampling kernel's name; `kind` and `before` as of :func:`dtype_of`.

    Raises:
        BackendError: the kernel that was named cannot serve here.
    """
    from mmi_kernels import KernelUnavailable, resolve

    if choices.kernel == "auto" and before is not None:
        with contextlib.suppress(KernelUnavailable):
            return resolve(before, kind, torch_dtype(dtype))
    try:
        return resolve(choices.kernel, kind, torch_dtype(dtype))
    except KernelUnavailable as error:
        raise BackendError(str(error)) from error


def generation_of(choices: Choices, config: ModelConfig) -> tuple[Settings, frozenset[str]]:
    """Settings of generation, and which of them the task decides unless the user does.

    Raises:
        UsageError: settings that contradict each other, or that do not exist.
    """
    from mmi_engine.generate.settings import Settings
    from mmi_engine.model_info import family_of
    from mmi_engine.tasks.prompts import decoding

    defaults, key = config.generation, choices.decoding
    own = decoding(key, family_of(config.name)) if key else {}
    from_task = frozenset(own)
    named = choices.settings
    if named.get("temperature", 0) > 0 and "beams" not in named:
        own.pop("beams", None)  # who asks for sampling does not want the task's beams
    if named.get("beams", 1) > 1 and "temperature" not in named:
        own.pop("temperature", None)
    if "max_new_tokens" in named:
        own["min_new_tokens"] = min(own.get("min_new_tokens", 0), named["max_new_tokens"])
    elif "min_new_tokens" in named and "max_new_tokens" in own:
        own["max_new_tokens"] = max(own["max_new_tokens"], named["min_new_tokens"])
    if named.get("top_p", 1.0) < 1.0 and not (named.get("temperature") or own.get("temperature")):
        raise UsageError("--top-p needs sampled text", remedy="add --temperature 1")
    chosen = {
        **own,
        "steps": defaults.fast_steps if choices.fast else defaults.steps,
        "guidance": defaults.fast_guidance if choices.fast else defaults.guidance,
        "scheduler": defaults.scheduler,
        **choices.settings,
    }
    known = {entry.name for entry in fields(Settings)}
    unknown = set(chosen) - known
    if unknown:
        raise UsageError(f"no setting called {sorted(unknown)[0]}")
    return Settings(**chosen), from_task


def torch_dtype(name: str) -> torch.dtype:
    """What ``fp32``, ``bf16``, ``fp16`` are called in torch."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
