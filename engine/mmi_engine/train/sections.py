"""The tables of a recipe: data and its sets, losses, optimizer, loop, adapters, what is measured. No torch here.

Place in the flow: ``recipe.py`` builds these frozen dataclasses from TOML; each is read by the modules that it names
(``[optim]`` by ``optim.py``, ``[[data.sets]]`` by ``documents.py`` and ``packing.py``, ``[lora]`` by ``adapters.py``).
Source of the data rules: paper appendix B.1 and Table 11; of the other values Tables 11 to 15; docs/training.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
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
    keep_latents: bool = False
    """Keep the frozen codec's posterior of every picture to be drawn and never encode one twice (``manifests``)."""
    held_out: float = 0.01
    """Share of the rows of every set that is not trained on but measured (drawn data has a split of its own)."""

    def __post_init__(self) -> None:
        require(0 <= self.redrawn <= 1, "data.redrawn must be in [0, 1]")
        require(self.source in ("toon", "manifests"), "data.source must be 'toon' or 'manifests'")
        require(0 <= self.held_out < 1, "data.held_out must be in [0, 1)")
        require(0 <= self.image_first <= 1, "data.image_first must be in [0, 1]")
        require(self.augment in AUGMENTS, f"data.augment must be one of {', '.join(AUGMENTS)}")
        names = [entry.name for entry in self.sets]
        require(len(set(names)) == len(names), "data.sets: two sets have the same name")
        require(self.stories > 0 and self.workers > 0, "data.stories and data.workers must be positive")
        require(self.loaders >= 0, "data.loaders must not be negative")
        require(self.row_tokens > 0, "data.row_tokens must be positive")
        require(self.row_images >= 0, "data.row_images must not be negative")
        require(self.kept_rows > 0 and self.kept_steps > 0, "data.kept_rows and data.kept_steps must be positive")
        require(all(weight >= 0 for weight in self.mixture.values()), "data.mixture weights must not be negative")

    def place(self, entry: SetConfig) -> str:
        """Where the manifest of a set is looked for; empty where nothing says so."""
        return entry.manifest or (str(Path(self.root) / entry.name / "manifest.jsonl") if self.root else "")


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
    timestep_shift: float = 1.0
    """Above 1 more of the drawn time steps are noisy ones (``image_decoder``), as in Esser et al. 2024."""
    class_balance: float = 0.0
    """Cells of a picture count the more, the rarer what they show: share of the class to the power of minus this, 0 to
    1 (``image_decoder``, built-in world only), see :mod:`mmi_engine.train.balance`."""
    emphasis: dict[str, float] = field(default_factory=dict)
    """Beside ``class_balance``: class of the semantic map → how many times more its cells count."""
    words: float = 0.0
    """Weight of telling the words of a text from visual tokens and maps (``interleaved``) or from context tokens
    (``image_decoder``) through a throw-away head, see :mod:`mmi_engine.train.words`; of the built-in world only."""
    keep: float = 0.0
    """Weight of the squared distance of context tokens to those of the base, beside ``words`` (``image_decoder``): the
    U-Net goes on understanding what it understood."""


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
    """``bf16`` keeps the frozen matrices in half the memory, ``int8`` those of the decoder layers in a quarter (through
    bitsandbytes) and the others in half (``manifests`` only)."""

    def __post_init__(self) -> None:
        require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "optim.betas must be two numbers in [0, 1)"
        )
        require(self.lr > 0 and self.eps > 0, "optim.lr and optim.eps must be positive")
        require(self.warmup >= 0 and self.clip >= 0, "optim.warmup and optim.clip must not be negative")
        require(self.frozen_dtype in ("fp32", "bf16", "int8"), "optim.frozen_dtype must be fp32, bf16 or int8")


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
    reshard: bool = True
    """Free gathered weights behind a unit's forward pass and gather them again for its backward pass (``fsdp``)."""
    offload: bool = False
    """Keep shards and moments in the host's memory (``fsdp``)."""
    trackers: tuple[str, ...] = ()
    """``tensorboard``, ``wandb`` … through accelerate."""

    def __post_init__(self) -> None:
        positive = ("steps", "batch_size", "accumulate", "log_every", "keep_checkpoints", "eval_every", "eval_samples")
        for name in positive:
            require(getattr(self, name) > 0, f"loop.{name} must be positive")
        known = ("fp32", "bf16", "bf16-pure")
        require(self.precision in known, f"loop.precision must be one of {', '.join(known)}")
        require(0 <= self.ema < 1, "loop.ema must be in [0, 1)")
        require(self.shard in ("no", "fsdp"), "loop.shard must be no or fsdp")
        again = self.activation_checkpointing and self.precision == "bf16-pure"  # with the weights before their cast
        require(not again, "loop.activation_checkpointing does not go with bf16-pure: take loop.precision=bf16")
        require(self.shard == "no" or not self.ema, "loop.shard fsdp keeps no averaged weights: set loop.ema=0.0")


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
    measure: str = ""
    """Which of the metric's measures is the figure; empty means its first."""
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
