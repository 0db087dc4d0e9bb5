"""Model directories, written and read with strict reporting.

    DIR/config.json          mmi_engine.model.config.ModelConfig (scheduler and generation defaults included)
    DIR/model.safetensors    all weights, in one storage dtype; beyond 5 GB several files and their index
    DIR/tokenizer.json       or tokenizer.model
    DIR/README.md            model card, where one was written (`mmi_engine.weights.card`)

``toon`` names the model inside the package. Weights may be stored in fp16 or bf16; they are computed in the dtype that
is asked for. A model is built without memory for its weights, and every tensor is read straight to where it stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mmi_engine.errors import ModelError
from mmi_engine.model.config import ModelConfig
from mmi_engine.model.interleaved import MMInterleaved
from mmi_engine.model.tokenizer import DirectoryTokenizer
from mmi_engine.model_info import locate, weight_files
from mmi_engine.weights import store

if TYPE_CHECKING:
    from mmi_engine.weights.placement import Placement

WEIGHTS = "model.safetensors"
RESTORE = "restore the model directory"
STRANGERS = "config.json and the weights do not belong together; restore the model directory"


def save_model(
    model: MMInterleaved,
    directory: Path,
    *,
    tokenizer: DirectoryTokenizer | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = store.SHARD_BYTES,
) -> Path:
    """Write ``model`` as a directory; every file appears complete or not at all.

    Args:
        model: the model; its ``tokenizer`` is copied unless another one is given.
        directory: made if absent.
        tokenizer: see ``model``.
        dtype: storage dtype of floating tensors, ``None`` keeps theirs.
        shard_bytes: largest weight file.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    planned = [store.Planned(name, tuple(value.shape), _stored(value, dtype)) for name, value in state.items()]
    files = store.split(planned, shard_bytes)
    store.save(files, directory, lambda tensor: state[tensor.name].detach().to("cpu", tensor.dtype))
    store.write_text(directory / "config.json", model.config.to_json())
    source = tokenizer or model.tokenizer
    if source is not None:
        source.copy_to(directory)
    return directory


def _stored(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def load_model(
    name: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    device_map: Placement | str | None = None,
    llm_bits: int | None = None,
) -> MMInterleaved:
    """Load a model directory for inference (eval mode, no gradients asked for nor dropped).

    Args:
        name: ``toon``, a directory of ours or a released one, or a hub id of either.
        device: where to put it.
        dtype: compute dtype; ``None`` is float32.
        device_map: ``auto``, or where the language model's layers go, when ``device`` is too small for all of them.
        llm_bits: 8 or 4 quantises the layers' linear maps.

    Raises:
        ModelError: a file is missing or damaged, tensors are missing, unexpected or of another shape, or the tokenizer
            does not fit the configuration.
        DeviceError: the device is too small even with the layers elsewhere.
        BackendError: ``llm_bits`` without the library for it, or together with ``device_map``.
    """
    from mmi_engine.weights import placement, quantize

    directory = locate(str(name))
    config = ModelConfig.load(directory)
    model = skeleton(config)
    index = check_files(directory, {k: v.shape for k, v in model.state_dict().items()})
    dtype = dtype or torch.float32
    tokenizer = fitting_tokenizer(directory, config)
    spread = placement.auto(model, dtype, str(device)) if device_map == "auto" else device_map
    if llm_bits is not None:
        quantize.require(spread)
        quantize.replace_linears(model, llm_bits, dtype)
    if spread is None:
        fill(model, index, lambda _: torch.device(device), dtype, llm_bits)
        model.to(device)
    else:
        assert isinstance(spread, placement.Placement)
        fill(model, index, spread.device_of, dtype)
        move_buffers(model, torch.device(spread.main))
        model.placement = spread
        placement.attach(model, spread, placement.DiskWeights(index, dtype))
    model.tokenizer = tokenizer
    return model.channels_last().eval()


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Put all buffers on ``device``; parameters stay where they are."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def skeleton(config: ModelConfig) -> MMInterleaved:
    """The model with its parameters on the meta device and its buffers (position tables, frequencies) computed."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False), SkipInit(), NoMemory():
        return MMInterleaved(config)


def fitting_tokenizer(directory: Path, config: ModelConfig) -> DirectoryTokenizer:
    """The directory's tokenizer.

    Raises:
        ModelError: it cannot be read, or has more entries than the model.
    """
    tokenizer = DirectoryTokenizer(directory)
    if tokenizer.vocabulary > config.tokens.vocab_size:
        raise ModelError(
            f"{directory}: the tokenizer has {tokenizer.vocabulary} entries, the model {config.tokens.vocab_size}",
            remedy="put the model's own tokenizer there",
        )
    return tokenizer


def fill(
    model: MMInterleaved,
    index: dict[str, Path],
    place: Callable[[str], torch.device],
    dtype: torch.dtype,
    llm_bits: int | None = None,
) -> None:
    """Read weight files into a skeleton, tensor by tensor; what is placed on ``meta`` is left out.

    Args:
        model: of :func:`skeleton`.
        index: of :func:`check_files`.
        place: tensor name → device.
        dtype: of floating tensors in memory.
        llm_bits: of the language model's linear maps, which are quantised as they arrive.

    Raises:
        ModelError: a file cannot be read.
    """
    from mmi_engine.weights.quantize import LINEAR, quantised

    for path in sorted(set(index.values())):
        with opened(path) as file:
            for name in sorted(file.keys()):
                if (device := place(name)).type == "meta":
                    continue
                tensor = file.get_tensor(name)
                if llm_bits is not None and name.endswith(".weight") and LINEAR.match(name[: -len(".weight")]):
                    holder, _, leaf = name.rpartition(".")
                    model.get_submodule(holder)._parameters[leaf] = quantised(tensor.to(dtype), llm_bits, device)
                else:
                    tensor = tensor.to(device)
                    assign(model, name, tensor.to(dtype) if tensor.is_floating_point() else tensor)


def assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put ``tensor`` itself in the place of a parameter or buffer; a parameter stays trainable or frozen as it was."""
    holder, _, leaf = name.rpartition(".")
    module = model.get_submodule(holder)
    if leaf in module._parameters:
        old = module._parameters[leaf]
        assert old is not None
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=old.requires_grad)
    else:
        module._buffers[leaf] = tensor


class SkipInit(torch.overrides.TorchFunctionMode):
    """While active, ``torch.nn.init`` functions return their tensor untouched."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        """Skip initialisers, run everything else."""
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


class NoMemory(torch.overrides.TorchFunctionMode):
    """While active, ``torch.empty`` allocates nothing: what modules make their large parameters with is on ``meta``.

    Moving a parameter there once it is made is too late: where freed blocks are kept (`runtime.keep_freed_memory`),
    blocks of all the weights' sizes tear the heap to many times the machine's memory, and then nothing forks.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        """Redirect ``torch.empty``, run everything else."""
        kwargs = kwargs or {}
        return func(*args, **({**kwargs, "device": "meta"} if func is torch.empty else kwargs))


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file; raises ModelError where it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read: {error}", remedy=RESTORE) from error


def stored_tensors(directory: Path) -> dict[str, tuple[Path, torch.Size]]:
    """Name → file and shape of every tensor of a model directory that `locate` found whole; from the headers.

    Raises:
        ModelError: a file is damaged, or a tensor stands in two.
    """
    found: dict[str, tuple[Path, torch.Size]] = {}
    for path in weight_files(directory):
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118
                if name in found:
                    raise ModelError(f"{path}: {name} stands in {found[name][0].name} too", remedy=RESTORE)
                found[name] = (path, torch.Size(file.get_slice(name).get_shape()))
    return found


def check_files(directory: Path, expected: dict[str, torch.Size]) -> dict[str, Path]:
    """Tensor name → file of a directory, whose headers together hold exactly the expected names and shapes.

    Raises:
        ModelError: as :func:`stored_tensors`; tensors are missing, unexpected or of another shape.
    """
    stored = stored_tensors(directory)
    shapes = {name: shape for name, (_, shape) in stored.items()}
    missing, unexpected = sorted(set(expected) - set(shapes)), sorted(set(shapes) - set(expected))
    wrong = sorted(name for name, shape in shapes.items() if expected.get(name, shape) != shape)
    for label, found in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong)):
        if found:
            raise ModelError(
                f"{directory}: {len(found)} tensors {label}, first {found[0]}",
                remedy=STRANGERS,
            )
    return {name: path for name, (path, _) in stored.items()}
