"""What the `mmi model` commands ask for, in the terms of the command line.

Place in the flow: `mmi_cli/commands/model.py` → here → `importing.py`, `assemble.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmi_engine.errors import ConfigError, ModelError
from mmi_engine.model.config import ModelConfig
from mmi_engine.model.presets import released_config
from mmi_engine.weights.find import describes_ours, from_hub
from mmi_engine.weights.importing import Imported, Progress, import_released
from mmi_engine.weights.parts import BASE, locate_part


def torch_dtype(name: str) -> Any:
    """torch dtype of ``fp32``, ``bf16``, ``fp16``; ``None`` for ``stored``."""
    import torch

    return {"stored": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def import_command(
    source: str,
    out: Path,
    *,
    dtype: str = "stored",
    tokenizer: str | None = None,
    image_size: int = 224,
    config_file: str | None = None,
    bases: tuple[str, ...] = (),
    new_rows: str | None = None,
    progress: Progress | None = None,
) -> Imported:
    """``mmi model import``.

    Args:
        source: folder, file or hub id.
        image_size: 224 or 448, pixels of the pictures that the released model reads.
        config_file: ``config.json`` that replaces the built-in description.
        bases: folders or hub ids of base models.
        new_rows: see `importing.import_released`.

    Raises:
        ModelError, OutputError: see `importing.import_released`.
        ConfigError: ``config_file`` cannot be read, or contradicts ``image_size``.
    """
    path = Path(source)
    if not path.exists():
        path = from_hub(source) if source.count("/") == 1 and not path.parent.is_dir() else path
    if not path.exists():
        raise ModelError(f"{source} not found", remedy="name a folder with shards, a file or a hub id")
    config = None
    if config_file is not None:
        config = _config(Path(config_file))
    elif not (path.is_dir() and describes_ours(path)):
        config = released_config(input_size=image_size)
    if image_size != 224 and (config is None or config.vision.image_size != image_size):
        raise ConfigError("--image-size is for the released sizes", remedy="write vision.image_size into the config")
    return import_released(
        path,
        out,
        dtype=torch_dtype(dtype),
        tokenizer=tokenizer,
        config=config,
        bases=tuple(locate_part(base, BASE) for base in bases),
        new_rows=new_rows,
        progress=progress,
    )


def _config(path: Path) -> ModelConfig:
    try:
        return ModelConfig.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} cannot be read: {error}", remedy="give a config.json of a model directory"
        ) from error
