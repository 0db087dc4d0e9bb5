"""Tables of a recipe that fine-tuning adds: data sets, adapters, what is measured. Frozen dataclasses, no torch.

Place in the flow: ``recipe.py`` builds these from TOML; ``documents.py`` and ``packing.py`` read :class:`SetConfig`,
``adapters.py`` reads :class:`LoraConfig`, ``measure.py`` reads :class:`MeasureConfig`.
Source of the data rules: paper appendix B.1 and Table 11; docs/training.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mmi_engine.errors import ConfigError

KINDS = ("auto", "pair", "document", "caption", "vqa", "ground", "t2i", "seg2img", "story", "chat")
AUGMENTS = ("none", "centre_crop", "flip")


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(message, remedy="correct the recipe or the override")


@dataclass(frozen=True)
class SetConfig:
    """One data set of a recipe (``[[data.sets]]``)."""

    name: str
    kind: str = "auto"
    """What its rows become; ``auto`` goes by the fields of each row. ``pair`` is a caption and a picture in either
    order, ``document`` interleaved text and pictures without a prompt."""
    weight: float = 1.0
    """Share of the packed rows that come from this set, relative to the other sets."""
    manifest: str = ""
    """JSON lines; empty means ``data.root/NAME/manifest.jsonl``."""
    origin: str = ""
    """Where the data set comes from, for people who do not have it."""
    importer: str = ""
    """The command that makes the manifest of what was downloaded."""
    prompt: str = ""
    """Template in place of the task's own."""
    lower: bool = False
    """Lower-case the captions of pairs."""
    skip_imageless: bool = False
    """No text loss where no picture stands between ``<s>`` and the word (LAION-2B and LAION-COCO)."""
    min_caption: int = 0
    """Shorter captions of pairs drop the row (characters)."""
    min_similarity: float = 0.0
    """Pictures of documents whose ``similarity`` is lower are left out."""
    max_images: int = 0
    """Pictures kept of one document, the first ones (0: all)."""
    row_images: int = 0
    """Pictures in one packed row (0: no limit)."""
    drop_imageless: bool = False
    drop_single: float = 0.0
    """Share of the documents with exactly one picture that is dropped."""
    split: bool = False
    """A document that does not fit into a row goes on in the next; pictures move whole. Else it is dropped."""
    toon: str = ""
    """Rows of the built-in world: the name of a manifest that `mmi data make toon` draws."""

    def __post_init__(self) -> None:
        require(self.kind in KINDS, f"data.sets {self.name!r}: kind must be one of {', '.join(KINDS)}")
        require(self.weight >= 0, f"data.sets {self.name!r}: weight must not be negative")
        require(0 <= self.drop_single <= 1, f"data.sets {self.name!r}: drop_single must be in [0, 1]")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters through peft (Hu et al. 2021). Matched layers are frozen and adapted; MMFS, resamplers and
    whatever else ``optim.freeze`` leaves stay fully trained."""

    rank: int = 0
    """0 switches adapters off."""
    alpha: float = 16.0
    dropout: float = 0.0
    parts: tuple[str, ...] = ("language.body", "image_decoder.unet.unet")
    """Modules whose layers are adapted; one that the run does not load is passed over."""
    layers: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "to_q", "to_k", "to_v", "to_out.0")
    """Last parts of the names of the linear layers to adapt."""
    merge: bool = True
    """Fold the adapters into the weights of the exported model."""

    def __post_init__(self) -> None:
        require(self.rank >= 0 and self.alpha > 0, "lora.rank must not be negative and lora.alpha be positive")
        require(0 <= self.dropout < 1, "lora.dropout must be in [0, 1)")


@dataclass(frozen=True)
class MeasureConfig:
    """A benchmark figure before and after training, generated and scored as `mmi eval` does it."""

    task: str = ""
    """Command that makes the results (``vqa``, ``caption`` …); empty measures nothing."""
    metric: str = ""
    ask: dict[str, Any] = field(default_factory=dict)
    """The command's own options."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Decoding settings (``steps``, ``guidance`` …)."""
    manifest: str = ""
    """Held-out rows; empty with the toon profile means the validation split, and the test split at the end."""
    toon: str = ""
    """Rows of the built-in world, as in :class:`SetConfig`."""
    items: int = 50
    paper: str = ""
    """The paper's figure, to be printed beside ours."""

    def __post_init__(self) -> None:
        require(self.items > 0, "measure.items must be positive")
        require(bool(self.task) == bool(self.metric), "measure.task and measure.metric belong together")
