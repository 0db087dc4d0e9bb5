"""Model directories: ``config.json`` + ``model.safetensors`` + tokenizer, written and read with strict reporting.

    DIR/config.json          mmi_engine.model.config.ModelConfig (scheduler and generation defaults included)
    DIR/model.safetensors    all weights, in one storage dtype
    DIR/tokenizer.json       or tokenizer.model

``toon`` names the model inside the package. Weights may be stored in fp16 or bf16; they are computed in the dtype that
is asked for.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmi_engine.errors import ModelError
from mmi_engine.model.config import ModelConfig
from mmi_engine.model.interleaved import MMInterleaved
from mmi_engine.model.tokenizer import DirectoryTokenizer
from mmi_engine.model_info import locate

WEIGHTS = "model.safetensors"


def save_model(
    model: MMInterleaved,
    directory: Path,
    *,
    tokenizer: DirectoryTokenizer | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write ``model`` as a directory; every file appears complete or not at all.

    Args:
        model: the model; its ``tokenizer`` is copied unless another one is given.
        directory: made if absent.
        tokenizer: see ``model``.
        dtype: storage dtype of floating tensors, ``None`` keeps theirs.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {k: _stored(v, dtype) for k, v in model.state_dict().items()}
    partial = directory / f"{WEIGHTS}.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.chmod(0o644)  # the library writes files that only their owner may read
    os.replace(partial, directory / WEIGHTS)
    text = directory / "config.json.partial"
    text.write_text(model.config.to_json(), encoding="utf-8")
    os.replace(text, directory / "config.json")
    source = tokenizer or model.tokenizer
    if source is not None:
        source.copy_to(directory)
    return directory


def _stored(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    tensor = tensor.detach().cpu().contiguous()
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def load_model(
    name: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> MMInterleaved:
    """Load a model directory for inference (eval mode, no gradients asked for nor dropped).

    Args:
        name: ``toon`` or a directory.
        device: where to put it.
        dtype: compute dtype; ``None`` is float32.

    Raises:
        ModelError: a file is missing or damaged, tensors are missing, unexpected or of another shape, or the tokenizer
            does not fit the configuration.
    """
    directory = locate(str(name))
    config = ModelConfig.load(directory)
    with torch.device("meta"):
        skeleton = MMInterleaved(config)
    expected = {k: v.shape for k, v in skeleton.state_dict().items()}
    tensors = _read(directory / WEIGHTS, expected, dtype or torch.float32)
    model = _materialise(config, tensors)
    model.tokenizer = DirectoryTokenizer(directory)
    if model.tokenizer.vocabulary > config.tokens.vocab_size:
        raise ModelError(
            f"{directory}: the tokenizer has {model.tokenizer.vocabulary} entries, the model "
            f"{config.tokens.vocab_size}",
            remedy="put the model's own tokenizer there",
        )
    return model.to(device).channels_last().eval()


def _materialise(config: ModelConfig, tensors: dict[str, Tensor]) -> MMInterleaved:
    """The model with ``tensors`` in place.

    Non-persistent buffers (position tables, rotary frequencies) must be computed, which the meta device cannot do; so
    the model is constructed for real, with the costly random initialisation of its weights left out.
    """
    with SkipInit():
        model = MMInterleaved(config)
    model.load_state_dict(tensors, strict=True, assign=True)
    return model


class SkipInit(torch.overrides.TorchFunctionMode):
    """While active, ``torch.nn.init`` functions return their tensor untouched."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        """Skip initialisers, run everything else."""
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _read(path: Path, expected: dict[str, torch.Size], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of a safetensors file, checked against the model before anything is built."""
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            missing, unexpected = sorted(set(expected) - names), sorted(names - set(expected))
            shapes = {k: torch.Size(file.get_slice(k).get_shape()) for k in names & set(expected)}
            wrong = sorted(k for k, shape in shapes.items() if shape != expected[k])
            for label, found in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong)):
                if found:
                    raise ModelError(
                        f"{path}: {len(found)} tensors {label}, first {found[0]}",
                        remedy="config.json and the weights do not belong together; restore the model directory",
                    )
            return {k: _computed(file.get_tensor(k), dtype) for k in sorted(names)}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read: {error}", remedy="restore the model directory") from error


def _computed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
