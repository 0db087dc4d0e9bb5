"""Numbers of the model, and nothing else: every size the other modules of this package are built from.

Two sets of numbers exist in the product, the embedded ``toon`` model and the released 13B layout; both are instances
of :class:`ModelConfig`, which is what ``config.json`` of a model directory holds. Unknown keys are errors.
Source: paper section 3 and Table 11; the released checkpoint's configuration.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast, get_type_hints

from mmi_engine.errors import ModelError

T = TypeVar("T")
RESAMPLED_TOKENS = 32
"""Tokens that the transition of ``mmfs.attention = "resampled"`` leaves of one image (paper Table 6)."""
LAID_OUT_TWICE = 128 * 2**20
"""A CPU lays weights of up to so many bytes in all out a second time (`packed.py`, `generate/step.py`); a larger model
keeps its own alone."""


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids with a meaning of their own. ``pad`` is an ordinary vocabulary id, as in the released checkpoint."""

    bos: int = 1
    eos: int = 2
    pad: int = 31999
    boi: int = 32000
    image: int = 32001

    def __post_init__(self) -> None:
        _require(self.image == self.boi + 1, "tokens.image must follow tokens.boi (the two new rows of the text head)")

    @property
    def vocab_size(self) -> int:
        """Rows of the text head: the language model's own vocabulary plus ``<BoI>`` and the image placeholder."""
        return self.image + 1


@dataclass(frozen=True)
class VisionConfig:
    """CLIP-ViT trunk and ViT-Adapter (paper section 3.2). Defaults: CLIP ViT-L/14 at 224 px."""

    image_size: int = 224
    patch_size: int = 14
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_layers: int = 24
    num_heads: int = 16
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    groups: int = 4
    """Interactions between trunk and adapter; the trunk's layers are split into as many equal groups."""
    extra_extractors: int = 2
    stem_channels: int = 64
    """Spatial prior: stem width; the three stages after it have 2×, 4× and 4× as many channels."""
    deform_points: int = 4
    value_ratio: float = 0.5
    ffn_ratio: float = 0.25
    family: str = "clip_vision_model"
    """The trunk's ``model_type`` in the transformers library: CLIP, SigLIP, ViT or DINOv2 (`trunk.FAMILIES`)."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """Normalisation per colour channel that the trunk was trained with."""
    table_grid: int | None = None
    """Grid the fixed sine-cosine table is made for, then resized (bicubic); ``None`` is the patch grid. The released
    model at 448 px keeps its table of 16 × 16."""

    def __post_init__(self) -> None:
        _require(self.image_size % self.patch_size == 0, "vision.image_size must be a multiple of vision.patch_size")
        _require(self.groups == 4, "vision.groups must be 4: one group feeds each of the feature maps F1 to F4")
        _require(self.num_layers % self.groups == 0, "vision.num_layers must be a multiple of vision.groups")
        _require(self.hidden_size % self.num_heads == 0, "vision.hidden_size must be a multiple of vision.num_heads")
        _require(self.grid % 2 == 0, "the patch grid must be even: the coarsest feature map is half of it")

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size

    @property
    def positions_grid(self) -> int:
        """Side of the fixed position table in cells."""
        return self.table_grid or self.grid

    @property
    def feature_sizes(self) -> tuple[int, int, int, int]:
        """Side lengths of the feature maps F1..F4 in cells."""
        return (self.grid * 4, self.grid * 2, self.grid, self.grid // 2)


@dataclass(frozen=True)
class QFormerConfig:
    """A Q-Former used as a resampler. Defaults: the visual resampler of the released model."""

    num_queries: int = 64
    hidden_size: int = 768
    encoder_hidden_size: int = 1024
    cross_attention_frequency: int = 2
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    qk_norm: bool = True
    dropout: float = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        _require(self.hidden_size % self.num_heads == 0, "Q-Former hidden_size must be a multiple of num_heads")


@dataclass(frozen=True)
class MMFSConfig:
    """One multi-image multi-scale feature synchronizer (paper section 3.3, Eq. 4)."""

    heads: int = 16
    points: int = 8
    width: int = 1024
    """Inner width of the sampled values (all heads together)."""
    levels: tuple[int, ...] = (32, 16, 8)
    """Configured side lengths s_l of the feature maps, finest first."""
    max_images: int = 50
    """Rows of the relative-image-index embedding; row 0 means hidden, row 1 the nearest visible image."""
    offset_init: float = 3.0
    """Sampling-offset biases start uniform in ±offset_init cells of the base grid."""
    keep_relative_distance: bool = False
    """When real maps are larger than ``levels`` say: True keeps offsets relative to the picture, False (released) keeps
    them in cells of the real map."""

    attention: str = "deformable"
    """``deformable`` (the paper's); for ablations ``dense``, every query attends to every cell, or ``resampled``, to
    what a Q-Former leaves of each image (paper Table 6). See `model/dense.py`."""

    def __post_init__(self) -> None:
        kinds = ("deformable", "dense", "resampled")
        _require(self.attention in kinds, f"mmfs.attention must be one of {', '.join(kinds)}")
        _require(self.width % self.heads == 0, "mmfs.width must be a multiple of mmfs.heads")
        _require(self.max_images >= 2, "mmfs.max_images must be at least 2")


@dataclass(frozen=True)
class LanguageConfig:
    """A decoder-only language model of Hugging Face shape with MMFS between attention and FFN of every n-th layer."""

    transformers: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the library's configuration, with ``model_type`` (``llama``, ``mistral``, ``qwen2`` …)."""
    mmfs: MMFSConfig | None = field(default_factory=MMFSConfig)
    """``None`` switches MMFS off in the language model."""
    mmfs_every: int = 4
    mmfs_base: int = 16
    """Base grid in whose cells the sampling offsets are measured."""
    finest_map: int = 1
    """Index of the finest feature map shown to the language model: 1 takes F2, F3, F4."""


@dataclass(frozen=True)
class VAEConfig:
    """A diffusers ``AutoencoderKL`` behind an optional pixel-unshuffle of ``patch`` (1 in the released model)."""

    diffusers: dict[str, Any] = field(default_factory=dict)
    patch: int = 1
    image_size: int = 512

    @property
    def downsampling(self) -> int:
        """Pixels per latent cell and side."""
        return self.patch * 2 ** (len(self.diffusers["block_out_channels"]) - 1)

    @property
    def latent_size(self) -> int:
        """Side length of the latent in cells."""
        return self.image_size // self.downsampling

    @property
    def latent_channels(self) -> int:
        """Channels of the latent."""
        return int(self.diffusers.get("latent_channels", 4))


@dataclass(frozen=True)
class ImageDecoderConfig:
    """Context resampler, U-Net with MMFS, VAE and noise schedule."""

    context_resampler: QFormerConfig = field(default_factory=QFormerConfig)
    unet: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of diffusers' ``UNet2DConditionModel``."""
    vae: VAEConfig = field(default_factory=VAEConfig)
    scheduler: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of diffusers' ``DDPMScheduler``; ``prediction_type`` epsilon or v_prediction."""
    mmfs: MMFSConfig | None = field(
        default_factory=lambda: MMFSConfig(levels=(64, 32, 16, 8), max_images=10, offset_init=1.0)
    )
    """``None`` switches MMFS off in the image decoder."""
    context_images: int = 1
    """How many preceding images of the document the U-Net's MMFS sees (released: 1; the paper allows all)."""
    maps: tuple[int, ...] = (0, 1, 2, 3)
    """Which of the feature maps F1 … F4 the U-Net's MMFS sees, one for each of ``mmfs.levels``; finest is 0."""
    unconditional_probability: float = 0.1
    """Share of training images whose context tokens are replaced by the learnt unconditional embedding."""
    min_snr_gamma: float | None = None
    """Min-SNR weighting of the image loss; ``None`` (released) weighs all time steps alike."""


@dataclass(frozen=True)
class GenerationDefaults:
    """What image generation uses when the user names nothing."""

    steps: int = 250
    guidance: float = 3.5
    scheduler: str = "ddpm"
    fast_steps: int = 30
    fast_guidance: float = 7.5


@dataclass(frozen=True)
class ModelConfig:
    """The whole model. ``to_json`` / ``from_json`` are the ``config.json`` of a model directory."""

    name: str
    tokens: SpecialTokens
    vision: VisionConfig
    visual_resampler: QFormerConfig
    language: LanguageConfig
    image_decoder: ImageDecoderConfig
    generation: GenerationDefaults = field(default_factory=GenerationDefaults)
    loss_text_weight: float = 1.0
    loss_image_weight: float = 10.0
    image_loss_mean: str = "all"
    """``all``: the mean runs over all images (released); ``counted``: over those with a context."""

    def __post_init__(self) -> None:
        decoder = self.image_decoder
        _require(
            decoder.mmfs is None or 1 <= decoder.context_images < decoder.mmfs.max_images,
            "image_decoder.context_images must be at least 1 and below image_decoder.mmfs.max_images",
        )
        _require(
            decoder.mmfs is None or len(decoder.maps) == len(decoder.mmfs.levels),
            "image_decoder.maps must name one feature map for each of image_decoder.mmfs.levels",
        )
        _require(
            len(set(decoder.maps)) == len(decoder.maps) and set(decoder.maps) <= {0, 1, 2, 3},
            "image_decoder.maps must be different numbers from 0 (finest) to 3",
        )
        _require(self.image_loss_mean in ("all", "counted"), "image_loss_mean must be 'all' or 'counted'")
        unet_cells = self.image_decoder.unet.get("sample_size")
        _require(
            unet_cells in (None, self.image_decoder.vae.latent_size),
            f"image_decoder.unet.sample_size is {unet_cells}, the VAE makes {self.image_decoder.vae.latent_size} cells",
        )

    @property
    def tokens_per_image(self) -> int:
        """Visual tokens that one image takes in a sequence, ``<BoI>`` not counted."""
        return self.visual_resampler.num_queries

    def to_json(self) -> str:
        """The configuration as indented JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        """Inverse of :meth:`to_json`.

        Raises:
            ModelError: the text is no JSON object, a key is unknown, or values contradict each other.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ModelError(f"config.json is not JSON: {error}", remedy="restore the model directory") from error
        return _build(cls, data, "config")

    @classmethod
    def load(cls, directory: Path) -> ModelConfig:
        """Read ``config.json`` of a model directory."""
        path = Path(directory) / "config.json"
        if not path.is_file():
            raise ModelError(f"{path} not found", remedy="give a model directory made by mmi, or 'toon'")
        return cls.from_json(path.read_text(encoding="utf-8"))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ModelError(message, remedy="correct the configuration")


def _build(cls: type[T], data: Any, where: str) -> T:
    """Dataclass from nested dictionaries; lists become tuples where the field is a tuple."""
    if not isinstance(data, dict):
        raise ModelError(f"{where} must be an object, found {type(data).__name__}", remedy="correct the configuration")
    hints = get_type_hints(cls)
    unknown = sorted(set(data) - set(hints))
    if unknown:
        raise ModelError(f"{where}: unknown key {unknown[0]!r}", remedy=f"known keys: {', '.join(sorted(hints))}")
    values: dict[str, Any] = {}
    for key, value in data.items():
        nested = [t for t in (hints[key], *getattr(hints[key], "__args__", ())) if dataclasses.is_dataclass(t)]
        if nested and value is not None:
            value = _build(cast(type, nested[0]), value, f"{where}.{key}")
        elif isinstance(value, list) and "tuple" in str(hints[key]):
            value = tuple(value)
        values[key] = value
    try:
        return cls(**values)
    except TypeError as error:
        raise ModelError(f"{where}: {error}", remedy="correct the configuration") from error
