"""The single step on a CPU against the library's forward pass: the same logits; what it leaves to the library."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mmi_engine.generate.literal import literal
from mmi_engine.generate.reading import Prompt
from mmi_engine.generate.step import token_step
from mmi_engine.generate.text import Decoder
from mmi_engine.model.interleaved import MMInterleaved
from tests.test_generate_text import prompt_of
from tests.tiny import tiny_config, tiny_model

ROWS = {
    "alone": ([[7, 8, 9]], [1]),
    "no image": ([[7, 8, 9]], [0]),
    "padded": ([[7, 8, 9, 10, 11, 12], [5], [6, 7]], [1, 2, 0]),
}


def grouped() -> MMInterleaved:
    """Fewer heads for keys than for queries, and norms that are not all ones."""
    config = tiny_config()
    body = {**config.language.transformers, "num_key_value_heads": 1}
    model = tiny_model(4, replace(config, language=replace(config.language, transformers=body)))
    with torch.no_grad():
        for name, parameter in model.language.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 2.0)
    return model


@torch.no_grad()
def continued(model: MMInterleaved, prompt: Prompt, lean: bool, copies: int = 1) -> list[Tensor]:
    """Logits of six steps with fixed tokens; half way the rows change places."""
    model.language.lean = lean
    decoder = Decoder(model, prompt, copies=copies)
    model.language.lean = True
    assert (decoder.lean is not None) == lean
    found = []
    for step in range(6):
        rows = len(decoder.mask)
        if step == 3 and copies > 1:
            decoder.reorder(torch.arange(rows).view(-1, copies).flip(1).flatten())
        found.append(decoder.step(torch.arange(rows) + 5 + step))
    return found


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("make", [lambda: tiny_model(seed=2), grouped], ids=["plain", "grouped heads"])
def test_the_same_logits(make, rows: str, copies: int) -> None:
    model = make()
    prompt = prompt_of(model, *ROWS[rows])
    for ours, library in zip(*(continued(model, prompt, lean, copies) for lean in (True, False)), strict=True):
        torch.testing.assert_close(ours, library, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_new_weights_count_at_once() -> None:
    model = tiny_model(seed=2)
    prompt = prompt_of(model, *ROWS["alone"])
    before = continued(model, prompt, True)
    model.language.body.layers[0].layer.mlp.down_proj.weight.mul_(3)
    after, library = continued(model, prompt, True), continued(model, prompt, False)
    assert not torch.allclose(after[0], before[0])
    torch.testing.assert_close(after[-1], library[-1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_positions_beyond_the_models_own_are_the_librarys() -> None:
    model = tiny_model(seed=2)
    prompt = prompt_of(model, *ROWS["alone"])
    model.language.body.config.max_position_embeddings = prompt.ids.shape[1] + 2
    for ours, library in zip(*(continued(model, prompt, lean) for lean in (True, False)), strict=True):
        torch.testing.assert_close(ours, library, rtol=1e-4, atol=1e-4)


class Doubled(nn.Linear):
    """A layer that an adapter has put in a linear map's place."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def change(model: MMInterleaved, how: str) -> None:
    attention = model.language.body.layers[1].self_attn
    if how == "adapter":
        attention.q_proj.__class__ = Doubled
    elif how == "hook":
        attention.register_forward_hook(lambda module, inputs, output: None)
    elif how == "double":
        model.double()
    elif how == "training":
        model.train()
    elif how == "activation":
        model.language.body.config.hidden_act = "gelu"
    elif how == "norm":
        model.language.body.layers[1].input_layernorm.__class__ = type("Other", (LlamaRMSNorm,), {})
    elif how == "own forward":
        attention.q_proj.forward = attention.q_proj.forward
    elif how == "output of MMFS":
        model.language.mmfs_layers[0].mmfs.output_proj.__class__ = Doubled
    elif how == "rotations":
        model.language.body.rotary_emb.rope_type = "dynamic"


@pytest.mark.parametrize(
    "how",
    ["adapter", "hook", "double", "training", "activation", "norm", "own forward", "output of MMFS", "rotations"],
)
@torch.no_grad()
def test_anything_else_takes_the_library(how: str) -> None:
    model = tiny_model(seed=2)
    assert token_step(model, model.language.new_cache()) is not None
    change(model, how)
    assert token_step(model, model.language.new_cache()) is None


@torch.no_grad()
def test_large_models_gradients_and_the_literal_form_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(seed=2)
    cache = model.language.new_cache()
    with torch.enable_grad():
        assert token_step(model, cache) is None
    with literal(model):
        assert token_step(model, cache) is None
    assert token_step(model, None) is None
    assert token_step(model, cache) is token_step(model, cache)
    monkeypatch.setattr("mmi_engine.generate.step.MOST_BYTES", 1000)
    assert token_step(model, cache) is None
