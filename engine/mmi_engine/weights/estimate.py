"""How much memory a model needs, from its configuration and the shapes of its weights; nothing is loaded.

Place in the flow: `mmi model info` and dry runs show it, `placement.py` decides with it. Weights, KV cache and image
features are exact products of shapes. The working memory of the largest step (the VAE's last stage, or the logits of a
prompt) is an estimate that errs to the high side; docs/model.md has it beside measured peaks.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmi_engine.model.config import LAID_OUT_TWICE, RESAMPLED_TOKENS, MMFSConfig, ModelConfig, VAEConfig

DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
LLM_BITS_BYTES = {8: 1.0, 4: 0.5 + 4 / 64}
"""Bytes per weight of a quantised linear layer; 4-bit adds one float32 scale per block of 64."""
STAGE_COPIES = 6
"""Feature maps of the VAE's widest stage that are alive at once (a residual block with float32 norms)."""
UNET_COPIES = 12
"""Maps of the U-Net's finest stage that are alive at once, feed-forward of its transformer included."""
LIBRARIES = 104 * 2**20
"""What a first step costs beside its tensors: code and tables of the libraries, workspaces of convolutions, what the
allocator keeps, and the visual encoder's own activations. Measured, see ``benchmarks/model_memory.py``."""

GATHERED = 20 * 2**20
"""What comes on top of :data:`LIBRARIES` where torch copies MMFS's values. Measured likewise: 438 to 502 MB of the tiny
model, the most on a machine whose cores were taken."""


@dataclass(frozen=True)
class Need:
    """Bytes in one dtype.

    Attributes:
        weights: all parameters and buffers.
        cache_per_token: keys and values of one token of one sequence.
        per_image: feature maps F1..F4 of an image and what the language model's MMFS keeps of it.
        per_picture: what the U-Net's MMFS keeps of the images that a drawn picture looks at; without a kernel that
            looks its values up by row, also a copy for each half of guidance.
        working: the largest step at batch size 1, with what the libraries need for it; of a small model in fp32 also
            the second layouts that a CPU makes of its weights.
        tokens, images: of the context that is meant.
    """

    weights: int
    cache_per_token: int
    per_image: int
    per_picture: int
    working: int
    tokens: int
    images: int

    @property
    def context(self) -> int:
        """KV cache and image features of one sequence."""
        return self.tokens * self.cache_per_token + self.images * self.per_image + self.per_picture

    @property
    def total(self) -> int:
        """One sequence, weights included."""
        return self.weights + self.context + self.working


def layer_linear_weights(config: ModelConfig) -> int:
    """Weights in the linear maps of all decoder layers of the language model: what 8 and 4 bits apply to."""
    sizes = config.language.transformers
    width, heads = int(sizes["hidden_size"]), int(sizes["num_attention_heads"])
    head = int(sizes.get("head_dim") or width // heads)
    key_heads = int(sizes.get("num_key_value_heads") or heads)
    attention = 2 * width * heads * head + 2 * width * key_heads * head
    return int(sizes["num_hidden_layers"]) * (attention + 3 * width * int(sizes["intermediate_size"]))


def gathers() -> bool:
    """Whether no kernel is installed that looks values up by row (numba, CuPy), so that torch copies them."""
    return not any(importlib.util.find_spec(name) for name in ("numba", "cupy"))


def need(
    config: ModelConfig,
    parameters: int,
    dtype: str,
    llm_bits: int | None = None,
    *,
    tokens: int | None = None,
    copied: bool | None = None,
) -> Need:
    """What a model needs.

    Args:
        config: of the model.
        parameters: weights in all.
        dtype: ``fp32``, ``bf16`` or ``fp16``, of weights and computation.
        llm_bits: 8 or 4 for a quantised language model.
        tokens: length of the sequence; ``None`` is a full context, of 2048 at most.
        copied: whether MMFS runs in torch, which copies values; ``None`` as :func:`gathers` says.
    """
    size, language, decoder = DTYPE_BYTES[dtype], config.language, config.image_decoder
    sizes = language.transformers
    heads = int(sizes["num_attention_heads"])
    head = int(sizes.get("head_dim") or int(sizes["hidden_size"]) // heads)
    layers, key_heads = int(sizes["num_hidden_layers"]), int(sizes.get("num_key_value_heads") or heads)
    tokens = tokens or min(int(sizes.get("max_position_embeddings", 2048)), 2048)
    per_image_tokens = config.tokens_per_image + 1
    weights = float(parameters * size)
    if llm_bits is not None:
        weights -= layer_linear_weights(config) * (size - LLM_BITS_BYTES[llm_bits])
    cells = [side * side for side in config.vision.feature_sizes]
    maps = config.vision.hidden_size * sum(cells) * 4  # they are kept in float32 until they are projected
    values = picture = 0
    if language.mmfs is not None:
        blocks = -(-layers // language.mmfs_every)
        values = blocks * _values(language.mmfs, sum(cells[language.finest_map :]))
    if decoder.mmfs is not None:
        blocks = _unet_blocks(decoder.unet)
        picture = blocks * _values(decoder.mmfs, sum(cells[m] for m in decoder.maps)) * decoder.context_images
    copied = gathers() if copied is None else copied
    logits = tokens * config.tokens.vocab_size * 4
    second = parameters * size if dtype == "fp32" and parameters * size <= LAID_OUT_TWICE else 0
    return Need(
        weights=int(weights),
        cache_per_token=2 * layers * key_heads * head * size,
        per_image=maps + values * size,
        per_picture=picture * size * (3 if copied else 1),
        working=(LIBRARIES + GATHERED if copied and picture else LIBRARIES)
        + second
        + max(_vae_step(decoder.vae) * size, _unet_step(decoder.unet) * size, logits),
        tokens=tokens,
        images=min(config.language.mmfs.max_images - 1 if language.mmfs else tokens, tokens // per_image_tokens),
    )


def _values(mmfs: MMFSConfig, cells: int) -> int:
    """Numbers that one block keeps of one image; dense attention keeps keys beside values, `model/dense.py`."""
    if mmfs.attention == "deformable":
        return mmfs.width * cells
    return 2 * mmfs.width * (RESAMPLED_TOKENS if mmfs.attention == "resampled" else cells)


def _vae_step(vae: VAEConfig) -> int:
    """Numbers alive in the VAE's widest stage, which works at the picture's full size."""
    stages = vae.diffusers["block_out_channels"]
    widest = max(int(stages[0]), int(stages[min(1, len(stages) - 1)]))
    return STAGE_COPIES * (vae.image_size // vae.patch) ** 2 * widest


def _unet_step(unet: dict[str, Any]) -> int:
    """Numbers alive in a denoising step: both halves of guidance, all skips, and the finest stage's own maps."""
    channels, side = list(unet["block_out_channels"]), int(unet["sample_size"])
    per_stage = unet.get("layers_per_block", 2)
    counts = [per_stage] * len(channels) if isinstance(per_stage, int) else list(per_stage)
    skips = sum((n + 1) * c * (side >> level) ** 2 for level, (n, c) in enumerate(zip(counts, channels, strict=True)))
    return 2 * (skips + UNET_COPIES * side * side * channels[0])


def _unet_blocks(unet: dict[str, Any]) -> int:
    """MMFS blocks of a U-Net: one per skip and one for the middle."""
    channels = unet["block_out_channels"]
    per_stage = unet.get("layers_per_block", 2)
    counts = [per_stage] * len(channels) if isinstance(per_stage, int) else list(per_stage)
    return 1 + sum(counts) + len(channels) - 1 + 1


@dataclass(frozen=True)
class Device:
    """A place for weights and its free memory in bytes."""

    name: str
    free: int


def devices() -> list[Device]:
    """The CUDA devices of this machine and, last, main memory."""
    from mmi_engine.versions import free_memory_bytes

    found = []
    if Path("/dev/dxg").exists() or any(Path("/dev").glob("nvidia[0-9]*")):  # torch is slow to import for nothing
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        found = [Device(f"cuda:{index}", int(torch.cuda.mem_get_info(index)[0])) for index in range(count)]
    return [*found, Device("cpu", free_memory_bytes() or 0)]


def fits(config: ModelConfig, parameters: int, places: list[Device]) -> list[tuple[str, str]]:
    """What fits where: (device, one phrase) for every device, in words for the reader."""
    told = []
    for place in places:
        dtypes = ("fp32", "bf16") if place.name == "cpu" else ("fp32", "bf16", "fp16")
        good = [dtype for dtype in dtypes if need(config, parameters, dtype).total <= place.free]
        bits = [f"{b} bits" for b in (8, 4) if need(config, parameters, "bf16", b).total <= place.free]
        if not good and bits and place.name != "cpu":
            good = [f"bf16 with the language model in {' or '.join(bits)}: --llm-bits"]
        if good:
            told.append((place.name, f"fits in {', '.join(good)}"))
        elif place.name != "cpu" and _core(config, parameters) <= place.free:
            told.append((place.name, "fits with layers on other devices or in main memory: --device-map auto"))
        else:
            lacking = need(config, parameters, "bf16").total - place.free
            told.append((place.name, f"does not fit; bf16 lacks {lacking / 2**30:.1f} GiB"))
    return told


def _core(config: ModelConfig, parameters: int) -> int:
    """Bytes in bf16 of everything but the decoder layers, with a full context."""
    whole = need(config, parameters, "bf16")
    return whole.total - 2 * layer_linear_weights(config)
