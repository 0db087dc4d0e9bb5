"""One token a row through the language model on a CPU, without what the library's layers cost around their arithmetic.

Place in the flow: `text.Decoder` asks `token_step` for it once per batch and calls it for every token. On a small model
four fifths of a token's time go into calls: here maps that read the same input are one matrix, the weights of the norms
are drawn into the matrices that follow, tanh(gate) into MMFS's output, rotations come from a table. The arithmetic is
Llama's, the KV cache is the one that reading the prompt left. Other families, devices, types, adapters, quantised or
sharded layers take the library's own forward pass, and so do models too large for a second copy of their weights.
Source: docs/model.md; rotary positions Su et al. 2021, in the order of transformers' Llama.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaModel
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from mmi_engine.model.interleaved import MMInterleaved
from mmi_engine.model.language import GatedMMFS, MMFSDecoderLayer, RoomyLayer, VisualContext
from mmi_engine.model.mmfs import MMFS
from mmi_engine.model.packed import MOST_BYTES, PackedLinear
from mmi_kernels import mmfs_attention


@dataclass(frozen=True)
class _Look:
    """MMFS of one layer: the query side and the output as one matrix each; ``blind``: what a row gets that sees
    nothing."""

    cross: GatedMMFS
    order: int
    query: Tensor
    query_bias: Tensor
    split: tuple[int, int]
    tables: tuple[Tensor, Tensor]
    token: Tensor
    out: Tensor
    out_bias: Tensor
    blind: Tensor


@dataclass(frozen=True)
class _Layer:
    """Matrices of one decoder layer, those that are added to the hidden state transposed."""

    attention: Tensor
    attention_out: Tensor
    gate_up: Tensor
    down: Tensor
    look: _Look | None


class TokenStep:
    """The language model's body and head for one new token in every row.

    Args:
        model: one that `token_step` has looked at.
    """

    def __init__(self, model: MMInterleaved) -> None:
        body, head = model.language.body, model.text_head
        config = body.config
        self.embedding = body.embed_tokens.weight.detach()
        self.eps = float(config.rms_norm_eps)
        first = body.layers[0].layer if isinstance(body.layers[0], MMFSDecoderLayer) else body.layers[0]
        self.width, self.scaling = int(first.self_attn.head_dim), float(first.self_attn.scaling)
        self.heads, self.kv_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
        self.layers = [_layer(layer) for layer in body.layers]
        weight, bias = head.head.weight.detach().clone(), head.head.bias.detach().clone()
        weight[head.first_new :] += head.head_new.weight.detach()
        bias[head.first_new :] += head.head_new.bias.detach()
        self.head, self.head_bias = (weight * body.norm.weight.detach()).t(), bias
        self.frequencies = body.rotary_emb.inv_freq.float()
        self.rotations = self._turns(int(config.max_position_embeddings))

    def __call__(
        self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache, visual: VisualContext | None
    ) -> Tensor:
        """Logits ``[B, vocabulary]``.

        Args:
            ids: ``[B]``, the new tokens.
            mask: ``[B, past + 1]``, 1 = attend.
            positions: ``[B, 1]``.
            cache: read and extended.
            visual: the images, or ``None``.
        """
        hidden = F.embedding(ids, self.embedding)
        seen = mask[:, None, None].bool()
        if mask.shape[1] > len(self.rotations):  # beyond what the model was made for, as the library computes it
            self.rotations = self._turns(2 * mask.shape[1])
        turn = F.embedding(positions, self.rotations).chunk(2, dim=-1)
        for index, layer in enumerate(self.layers):
            hidden = torch.addmm(hidden, self._attend(hidden, layer, index, seen, turn, cache), layer.attention_out)
            if layer.look is not None and visual is not None:
                hidden = self._look(hidden, layer.look, visual)
            gate, up = (F.linear(hidden, layer.gate_up) * self._scale(hidden)).chunk(2, dim=-1)
            hidden = torch.addmm(hidden, F.silu(gate) * up, layer.down)
        return torch.addmm(self.head_bias, hidden * self._scale(hidden), self.head)

    def _turns(self, count: int) -> Tensor:
        """Cosines and sines ``[count, 2·D]`` of the first positions, with the sign of rotate_half."""
        angles = torch.arange(count).float()[:, None] * self.frequencies
        return torch.cat([angles.cos(), angles.cos(), -angles.sin(), angles.sin()], dim=1)

    def _scale(self, hidden: Tensor) -> Tensor:
        """What RMSNorm multiplies a row by, ``[B, 1]``."""
        return torch.rsqrt((hidden * hidden).sum(-1, keepdim=True).mul_(1 / hidden.shape[1]).add_(self.eps))

    def _attend(
        self, hidden: Tensor, layer: _Layer, index: int, seen: Tensor, turn: tuple[Tensor, ...], cache: Cache
    ) -> Tensor:
        """Self-attention of the new tokens before its output projection, ``[B, H·D]``."""
        turned = self.heads + self.kv_heads
        each = (F.linear(hidden, layer.attention) * self._scale(hidden)).view(len(hidden), -1, self.width)
        query_key = each[:, :turned]
        query_key = torch.addcmul(query_key * turn[0], query_key.roll(self.width // 2, -1), turn[1])
        keys, values = cache.update(query_key[:, self.heads :, None], each[:, turned:, None], index)
        gathered = F.scaled_dot_product_attention(
            query_key[:, : self.heads, None],
            keys,
            values,
            attn_mask=seen,
            scale=self.scaling,
            enable_gqa=self.heads != self.kv_heads,
        )
        return gathered.flatten(1)

    def _look(self, hidden: Tensor, look: _Look, visual: VisualContext) -> Tensor:
        """The hidden state with MMFS's term."""
        if visual.visible.shape[-1] == 0:
            return hidden + look.blind
        mmfs = look.cross.mmfs
        query = torch.addmm(look.query_bias, hidden * self._scale(hidden), look.query)
        offsets, logits = query[:, None].split(look.split, dim=2)
        sampled = mmfs_attention(
            visual.values[look.order],
            visual.shapes,
            offsets,
            logits,
            look.tables,
            hidden.new_full((1, 1, 2), 0.5),
            mmfs.scales(visual.shapes),
            visual.visible[:, -1:],
            look.token,
            backend=mmfs.backend,
        )
        return torch.addmm(hidden + look.out_bias, sampled[:, 0], look.out)


def token_step(model: MMInterleaved, cache: Cache | None) -> TokenStep | None:
    """The step for this model and KV cache; ``None`` where the library's own forward pass is to be taken."""
    language = model.language
    weights = (*language.parameters(), *model.text_head.parameters())
    if not (language.lean and language.kept.may(language.training, weights) and _serves(model, weights, cache)):
        return None
    step: TokenStep = language.kept.get(weights, lambda: TokenStep(model))
    return step


def _serves(model: MMInterleaved, weights: Sequence[Tensor], cache: Cache | None) -> bool:
    """Whether body, head and cache are what `TokenStep` computes: plain Llama in float32 on a CPU, and small."""
    body, head = model.language.body, model.text_head
    if type(body) is not LlamaModel or cache is None or any(type(layer) is not RoomyLayer for layer in cache.layers):
        return False
    layers = [layer.layer if isinstance(layer, MMFSDecoderLayer) else layer for layer in body.layers]
    if not all(type(layer) is LlamaDecoderLayer for layer in layers):
        return False
    linears = [getattr(layer.self_attn, f"{name}_proj") for layer in layers for name in "qkvo"]
    linears += [getattr(layer.mlp, f"{name}_proj") for layer in layers for name in ("gate", "up", "down")]
    own = len(linears)  # without a bias in Llama
    looking = [layer.cross for layer in body.layers if isinstance(layer, MMFSDecoderLayer)]
    if not all(type(cross.mmfs) is MMFS for cross in looking):
        return False
    linears += [getattr(cross.mmfs, name) for cross in looking for name in ("query_proj", "offsets", "logits")]
    linears += [*(cross.mmfs.output_proj for cross in looking), head.head, head.head_new]
    norms = [norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    changed = any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) or hasattr(module, "_hf_hook")
        for part in (model.language, head)
        for module in part.modules()
    )
    return (
        not changed
        and all(type(w) is nn.Parameter and w.device.type == "cpu" and w.dtype == torch.float32 for w in weights)
        and sum(4 * weight.numel() for weight in weights) <= MOST_BYTES
        and all(type(norm) is LlamaRMSNorm for norm in (*norms, body.norm))
        and all(type(cross.query_norm) is nn.RMSNorm for cross in looking)
        and all(type(linear) in (nn.Linear, PackedLinear) for linear in linears)
        and all(linear.bias is None for linear in linears[:own])
        and body.config.hidden_act == "silu"
        and body.rotary_emb.rope_type == "default"
    )


def _layer(wrapped: nn.Module) -> _Layer:
    layer = wrapped.layer if isinstance(wrapped, MMFSDecoderLayer) else wrapped
    attention, mlp = layer.self_attn, layer.mlp
    maps = [attention.q_proj, attention.k_proj, attention.v_proj]
    return _Layer(
        torch.cat([linear.weight for linear in maps]).detach() * layer.input_layernorm.weight.detach(),
        attention.o_proj.weight.detach().t(),
        torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).detach() * layer.post_attention_layernorm.weight.detach(),
        mlp.down_proj.weight.detach().t(),
        _looking(wrapped) if isinstance(wrapped, MMFSDecoderLayer) else None,
    )


def _looking(wrapped: MMFSDecoderLayer) -> _Look:
    cross = wrapped.cross
    mmfs, strength = cross.mmfs, cross.gate.detach().tanh()
    derived, output = mmfs.derived(), mmfs.output_proj
    offsets, logits = derived.offsets, derived.logits
    query = torch.cat([offsets.weight, logits.weight]) * cross.query_norm.weight.detach()
    return _Look(
        cross,
        wrapped.order,
        query.t(),
        torch.cat([offsets.bias, logits.bias]),
        (len(offsets.bias), len(logits.bias)),
        derived.tables,
        derived.token,
        (strength * output.weight.detach()).t(),
        strength * output.bias.detach(),
        strength * mmfs.blind(),
    )
