"""The diffusion U-Net with MMFS: noisy latents ``[N, C, h, w]`` → predicted noise or velocity of the same shape.

MMFS runs on all skip features and on the middle block's output, after the middle block and before the up path, where
ControlNet adds its residuals:  x += zero_conv(MMFS(LayerNorm(x) + positions, LayerNorm(F))).
The U-Net itself is diffusers' ``UNet2DConditionModel`` (SD 1.5, SD 2.1, miniSD … shapes); its blocks are called one by
one because the skips must be read and changed between its down and its up path.
Source: docs/model.md (the paper puts MMFS after each up block; the released model does this).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from mmi_engine.errors import ModelError
from mmi_engine.model.config import MMFSConfig
from mmi_engine.model.dense import synchronizer
from mmi_engine.model.kept import Keeps, joined
from mmi_engine.model.mmfs import Projecting, Shapes, project_all
from mmi_engine.model.packed import PackedMap
from mmi_engine.model.positions import resize_grid, sincos_2d
from mmi_kernels import resolve


class MMFSBlock(Projecting):
    """zero_conv(MMFS(LayerNorm(x) + positions, LayerNorm(F))) for one U-Net feature map ``[N, channels, side, side]``.

    The zero convolution starts at zero, so a fresh assembly computes what the unmodified U-Net computes.
    """

    positions: Tensor
    query_positions: Tensor
    reference: Tensor

    def __init__(self, config: MMFSConfig, channels: int, side: int, latent_side: int, d_value: int) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(channels, eps=1e-6)
        self.feature_norm = nn.LayerNorm(d_value, eps=1e-6)
        self.mmfs = synchronizer(config, d_query=channels, d_value=d_value, d_out=channels, base=side)
        self.zero_conv = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.zero_conv.weight)
        nn.init.zeros_(self.zero_conv.bias)
        self.side = side
        # The table is made for the latent's grid and resized to the query's, as the released model does.
        self.register_buffer("positions", sincos_2d(latent_side, latent_side, channels), persistent=False)
        self.register_buffer("query_positions", resize_grid(self.positions, (side, side)), persistent=False)
        self.register_buffer("reference", cell_centres(side, side), persistent=False)  # (side², 2)

    def forward(
        self, x: Tensor, values: Tensor, shapes: Shapes, visible: Tensor, sources: Tensor | None = None
    ) -> Tensor:
        """``x`` ``[N, channels, h, w]`` → the term that is added to it."""
        height, width = x.shape[2:]
        positions, reference = self.query_positions, self.reference
        if (height, width) != (self.side, self.side):
            positions = resize_grid(self.positions, (height, width))
            reference = cell_centres(height, width).to(x)
        query = self.query_norm(x.flatten(2).transpose(1, 2)) + positions.to(x.dtype)
        out = self.out_map()
        synced = self.mmfs(query, reference[None].float(), values, shapes, visible, sources, out)
        synced = synced.transpose(1, 2).unflatten(2, (height, width))
        return self.zero_conv(synced) if out is None else synced

    def out_map(self) -> PackedMap | None:
        """MMFS's output projection and the zero convolution as one linear map; ``None`` in training."""
        last = self.mmfs.output_proj
        weights = (last.weight, last.bias, self.zero_conv.weight, self.zero_conv.bias)
        if not self.kept.may(self.training, weights):
            return None
        zero, bias = self.zero_conv.weight.flatten(1), self.zero_conv.bias
        return self.kept.get(weights, lambda: PackedMap(*joined(zero, last.weight, last.bias, bias)))

    def term(self, x: Tensor, vision: ImageVision, order: int) -> Tensor:
        """What is added to ``x`` ``[N, channels, h, w]``, rows that see nothing included."""
        rows, seen = vision.rows, (vision.values[order], vision.shapes, vision.visible, vision.sources)
        if len(rows) == len(x):
            return self(x, *seen)
        blind = self.zero_conv(self.mmfs.blind().view(1, -1, 1, 1)).expand_as(x)
        if len(rows) == 0:
            return blind
        return blind.index_copy(0, rows, self(x[rows], *seen))


@dataclass
class ImageVision:
    """What the U-Net's MMFS looks at; made once per picture and used by every denoising step.

    ``values``: one ``[V, M·S, H, D]`` per MMFS block; ``shapes``: (height, width) of the maps; ``visible``: ``[R, M]``;
    ``rows``: ``[R]`` the batch rows that see anything at all, for all others MMFS is a constant; ``sources``: ``[R]``
    which row of ``values`` each of them looks at, ``None`` for its own (V = R); ``once``: what this is copies of.
    """

    values: Sequence[Tensor]
    shapes: Shapes
    visible: Tensor
    rows: Tensor
    sources: Tensor | None = None
    once: ImageVision | None = None

    def repeat(self, times: int, batch: int) -> ImageVision:
        """The same for ``times`` copies of a batch of ``batch`` rows, one copy after the other."""
        rows = torch.cat([self.rows + batch * k for k in range(times)])
        own = torch.arange(len(self.rows), device=self.rows.device) if self.sources is None else self.sources
        return ImageVision(self.values, self.shapes, self.visible.repeat(times, 1), rows, own.repeat(times), self)

    def part(self, rows: slice) -> ImageVision:
        """The same for some rows of the batch."""
        at = ((self.rows >= rows.start) & (self.rows < rows.stop)).nonzero().squeeze(1)
        own = at if self.sources is None else self.sources[at]
        return ImageVision(self.values, self.shapes, self.visible[at], self.rows[at] - rows.start, own)

    def side_by_side(self) -> ImageVision:
        """The same with the values of every row in place, for kernels that would gather them in every step."""
        if self.sources is None:
            return self
        return replace(self, values=[v[self.sources] for v in self.values], sources=None)


class Paths(Protocol):
    """What stands before and behind MMFS; see :class:`MMFSUNet`."""

    def down(self, latents: Tensor, timesteps: Tensor, context: Tensor) -> Sequence[Tensor]:
        """See :meth:`MMFSUNet.down`."""
        ...

    def up(self, emb: Tensor, context: Tensor, *features: Tensor) -> Tensor:
        """See :meth:`MMFSUNet.up`."""
        ...


class MMFSUNet(Keeps):
    """``UNet2DConditionModel`` with one :class:`MMFSBlock` per skip feature and one for the middle."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        config: MMFSConfig | None,
        d_value: int,
        maps: Sequence[int] = (0, 1, 2, 3),
    ) -> None:
        super().__init__()
        self.unet, self.maps = unet, maps
        _remember_signatures(unet)
        self.compiled = False  # its blocks by `generate/compiled.py`
        blocks = []
        if config is not None:
            skips = skip_shapes(unet)
            latent_side = skips[0][1]
            blocks = [MMFSBlock(config, width, side, latent_side, d_value) for width, side in [*skips, skips[-1]]]
        self.mmfs_blocks = nn.ModuleList(blocks)

    def look(self, features: list[Tensor], visible: Tensor, seeing: int | None = None) -> ImageVision | None:
        """Project those of ``maps`` among F1..F4 ``[N, M, C, h_l, w_l]`` of the context images; ``visible`` ``[N, M]``.

        ``seeing``: how many of the N see anything, where they are known to come first; else the device is asked.
        """
        if not self.mmfs_blocks:
            return None
        features = [features[number] for number in self.maps]
        if seeing is None:
            rows = visible.any(dim=1).nonzero().squeeze(1)
        else:
            rows = torch.arange(seeing, device=visible.device)
        flat = torch.cat([m[rows].flatten(3).transpose(2, 3) for m in features], dim=2)  # (R, M, S, C)
        shapes = [(m.shape[3], m.shape[4]) for m in features]
        return ImageVision(project_all(list(self.mmfs_blocks), flat), shapes, visible[rows], rows)

    def indexes(self, dtype: torch.dtype) -> bool:
        """Whether the kernel looks rows of values up by index; the others gather them in every call."""
        block = self.mmfs_blocks[0]
        return resolve(block.mmfs.backend, block.positions.device, dtype) != "torch"

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        context: Tensor,
        vision: ImageVision | None = None,
        paths: Paths | None = None,
    ) -> Tensor:
        """One prediction.

        Args:
            latents: ``[N, C, h, w]``, scaled and noisy.
            timesteps: ``[N]`` or scalar, 0 … 999.
            context: text condition ``[k·N, 77, cross_attention_dim]``, k conditions for the same latents, one after the
                other (both halves of guidance); what does not depend on them is computed once.
            vision: of :meth:`look`, repeated k times; ``None`` leaves MMFS out altogether.
            paths: what computes the two halves around MMFS, by default the model's own.

        Returns:
            ``[k·N, C, h, w]``.
        """
        paths = paths or self
        emb, *features = paths.down(latents, timesteps, context)
        if vision is not None:
            features = self._synchronized(features, vision, len(context) // len(latents))
        return paths.up(emb, context, *features)

    def down(self, latents: Tensor, timesteps: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        """Time embedding, all skip features and the middle block's output; arguments as of :meth:`forward`."""
        unet, copies = self.unet, len(context) // len(latents)
        if timesteps.dim():
            emb = unet.time_embedding(unet.get_time_embed(sample=latents, timestep=timesteps)).repeat(copies, 1)
        else:  # one step for all rows: one row, whatever their number, and the blocks broadcast it
            emb = unet.time_embedding(unet.get_time_embed(sample=latents[:1], timestep=timesteps))
        sample = _copies(unet.conv_in(latents), copies)
        skips = (sample,)
        for block in unet.down_blocks:
            sample, more = block(hidden_states=sample, temb=emb, **_attends(block, context))
            skips += more
        return emb, *skips, unet.mid_block(sample, emb, **_attends(unet.mid_block, context))

    def _synchronized(self, features: list[Tensor], vision: ImageVision, copies: int) -> list[Tensor]:
        """Skip features and the middle block's output, each with its MMFS block's term."""
        terms = []
        for order, (block, x) in enumerate(zip(self.mmfs_blocks, features, strict=True)):
            if order == 0 and copies > 1 and vision.once is not None:  # nothing has read the text yet
                terms.append(_copies(block.term(x[: len(x) // copies], vision.once, 0), copies))
            else:
                terms.append(block.term(x, vision, order))
        return [x + term for x, term in zip(features, terms, strict=True)]

    def up(self, emb: Tensor, context: Tensor, *features: Tensor) -> Tensor:
        """The prediction from what :meth:`down` gives."""
        unet, (*skips, sample) = self.unet, features
        for block in unet.up_blocks:
            count = len(block.resnets)
            residuals, skips = skips[-count:], skips[:-count]
            target = skips[-1].shape[2:] if skips else None  # odd sizes do not double exactly
            sample = block(
                hidden_states=sample,
                temb=emb,
                res_hidden_states_tuple=tuple(residuals),
                upsample_size=target,
                **_attends(block, context),
            )
        if unet.conv_norm_out is not None:
            sample = unet.conv_act(unet.conv_norm_out(sample))
        return unet.conv_out(sample)


class _Signed:
    """Stands for the ``__call__`` of one attention processor where diffusers asks which arguments it takes."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call, self.__signature__ = call, inspect.signature(call)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the processor."""
        return self.call(*args, **kwargs)


def _remember_signatures(unet: UNet2DConditionModel) -> None:
    """diffusers asks in every call of every attention, 4 % of a small U-Net's time; each instance remembers."""
    for processor in unet.attn_processors.values():
        processor.__call__ = _Signed(processor.__call__)


TextKeys = list[tuple[nn.Module, Tensor]]
"""Every linear map of the text in cross-attention, and what it gives."""


def text_keys(unet: MMFSUNet, context: Tensor) -> TextKeys:
    """Keys and values of ``context`` in every cross-attention."""
    crossing = [m.attn2 for m in unet.unet.modules() if getattr(m, "attn2", None) is not None]
    return [(linear, linear(context)) for attention in crossing for linear in (attention.to_k, attention.to_v)]


@contextmanager
def text_once(unet: MMFSUNet, contexts: Sequence[Tensor], keys: Sequence[TextKeys] | None = None) -> Iterator[None]:
    """While it lasts, the keys and values in cross-attention of each of ``contexts`` are those of ``keys``, by default
    computed now.

    Only these very tensors are recognised; any other is projected as ever.
    """

    def kept(known: Sequence[Tensor], project: Callable[[Tensor], Tensor]) -> Any:
        def find(given: Tensor) -> Tensor:
            for context, one in zip(contexts, known, strict=True):
                if given is context:
                    return one
            return project(given)

        return find

    keys = [text_keys(unet, context) for context in contexts] if keys is None else keys
    found = [(same[0][0], [known for _, known in same]) for same in zip(*keys, strict=True)]
    before = [vars(linear).get("forward") for linear, _ in found]
    for linear, known in found:
        linear.forward = kept(known, linear.forward)
    try:
        yield
    finally:
        for (linear, _), old in zip(found, before, strict=True):
            vars(linear).pop("forward")
            if old is not None:
                linear.forward = old


def _copies(x: Tensor, count: int) -> Tensor:
    """``count`` copies of a batch, one after the other."""
    return x if count == 1 else torch.cat([x] * count)


def _attends(block: nn.Module, context: Tensor) -> dict[str, Tensor]:
    """The text condition for blocks that have cross-attention."""
    return {"encoder_hidden_states": context} if getattr(block, "has_cross_attention", False) else {}


def skip_shapes(unet: UNet2DConditionModel) -> list[tuple[int, int]]:
    """(channels, side) of every skip feature in the order of the down path, for the U-Net's own ``sample_size``."""
    config = unet.config
    if config.sample_size is None:
        raise ModelError("the U-Net's configuration lacks sample_size", remedy="state it: the side of the latent")
    side = int(config.sample_size)
    shapes = [(int(config.block_out_channels[0]), side)]
    for channels, block in zip(config.block_out_channels, unet.down_blocks, strict=True):
        shapes += [(int(channels), side)] * len(block.resnets)
        if block.downsamplers is not None:
            side = (side + 1) // 2
            shapes.append((int(channels), side))
    return shapes


def cell_centres(height: int, width: int) -> Tensor:
    """Centres of a grid's cells as (x, y) in [0, 1], row by row: ``[height·width, 2]``."""
    y = (torch.arange(height) + 0.5) / height
    x = (torch.arange(width) + 0.5) / width
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([grid_x, grid_y], dim=-1).flatten(0, 1)
