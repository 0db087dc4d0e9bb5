"""Dense attention in MMFS's place: against a loop in float64, and in the whole model, cached and not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_generate_reuse import made as made_stories
from tiny import tiny_config, tiny_model

from mmi_engine.errors import ModelError
from mmi_engine.generate.reuse import LITERAL, Reuse
from mmi_engine.generate.settings import Settings
from mmi_engine.model.checkpoint import load_model, save_model
from mmi_engine.model.config import RESAMPLED_TOKENS, MMFSConfig, ModelConfig
from mmi_engine.model.dense import DenseAttention, synchronizer
from mmi_engine.model.interleaved import MMInterleaved
from mmi_engine.model.mmfs import MMFS
from mmi_engine.model.positions import sincos_2d

KINDS = ("dense", "resampled")
SIDES = (4, 2)
CELLS = sum(side * side for side in SIDES)


def made(kind: str) -> DenseAttention:
    torch.manual_seed(0)
    config = MMFSConfig(heads=2, points=3, width=8, levels=SIDES, max_images=5, attention=kind)
    module = synchronizer(config, d_query=12, d_value=16, d_out=6, base=4).double().eval()
    assert isinstance(module, DenseAttention)
    torch.nn.init.normal_(module.image_index.weight)
    torch.nn.init.normal_(module.ignore_token)
    return module


def drawn(images: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(3, 5, 12, generator=generator, dtype=torch.float64)
    return query, torch.randn(3, images, CELLS, 16, generator=generator, dtype=torch.float64)


def test_dense_attention_equals_a_loop() -> None:
    module, (query, features) = made("dense"), drawn(3)
    visible = torch.tensor([[1, 0, 1], [1, 1, 1], [0, 0, 0]])
    with torch.no_grad():
        found = module(query, query.new_empty(0), module.project_values(features), [], visible)
        asked = module.query_proj(query)
        weight, shift = module.value_proj.weight, module.value_proj.bias
        for b in range(3):
            for q in range(5):
                mixed = []
                for h in range(2):
                    part = slice(4 * h, 4 * h + 4)
                    logits, contents = [torch.zeros(())], [module.ignore_token.flatten()[part]]
                    for m in range(3):
                        if not visible[b, m]:
                            continue
                        nearness = int(visible[b, m:].sum())
                        for cell in range(CELLS):
                            level = 0 if cell < 16 else 1
                            place = module.cell_positions[cell] + module.level_index.weight[level]
                            told = weight @ (features[b, m, cell] + place) + shift
                            key, content = told.view(2, 8)[h].chunk(2)
                            bias = module.image_index.weight[nearness, h]
                            logits.append(asked[b, q, part] @ key / 2 + bias)
                            contents.append(content)
                    share = torch.stack([logit.double() for logit in logits]).softmax(0)
                    mixed.append(share @ torch.stack(contents))
                torch.testing.assert_close(found[b, q], module.output_proj(torch.cat(mixed)))
    torch.testing.assert_close(found[2], module.blind().expand(5, -1))


def test_cells_stand_where_their_pixels_are() -> None:
    module = made("dense")
    torch.testing.assert_close(module.cell_positions[:16].float(), sincos_2d(4, 4, 16))
    middle = module.cell_positions[16:].view(2, 2, 16)  # cells (0 … 1)² of the finest map have their centre at 0.5
    angles = 0.5 * 10000.0 ** (-torch.arange(4) / 4)
    expected = torch.cat([angles.sin(), angles.cos()])
    torch.testing.assert_close(middle[0, 0].float(), expected.repeat(2))


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_images_do_not_count_and_rows_choose_values(kind: str) -> None:
    module, (query, features) = made(kind), drawn(2)
    values = module.project_values(features)
    tokens = CELLS if kind == "dense" else RESAMPLED_TOKENS
    assert values.shape == (3, 2 * tokens, 2, 8)
    seen = torch.tensor([[0, 1]] * 3)
    alone = module.project_values(features[:, 1:])
    both = module(query, query.new_empty(0), values, [], seen)
    torch.testing.assert_close(both, module(query, query.new_empty(0), alone, [], seen[:, 1:]))
    rows = torch.tensor([2, 0, 0])
    torch.testing.assert_close(
        module(query, query.new_empty(0), values, [], seen, rows=rows),
        module(query, query.new_empty(0), values[rows], [], seen),
    )
    each = torch.ones(3, 5, 2)
    each[:, :2, 0] = 0  # the first two queries see one image, the others both
    mixed = module(query, query.new_empty(0), values, [], each)
    torch.testing.assert_close(mixed[:, :2], both[:, :2])
    torch.testing.assert_close(mixed[:, 2:], module(query[:, 2:], query.new_empty(0), values, [], each[:, -1]))
    mixed.sum().backward()
    lacking = [
        n for n, p in module.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().any())
    ]
    assert lacking == []


def model_of(kind: str) -> MMInterleaved:
    table = json.loads(tiny_config().to_json())
    for part in ("language", "image_decoder"):
        table[part]["mmfs"]["attention"] = kind
    return tiny_model(seed=4, config=ModelConfig.from_json(json.dumps(table)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_this_kind_keeps_and_stores_what_it_computes(kind: str, tmp_path: Path) -> None:
    model = model_of(kind)
    save_model(model, tmp_path / "m", dtype=torch.float32)
    loaded = load_model(tmp_path / "m")
    assert loaded.config == model.config
    settings = Settings(steps=2, guidance=2.0, max_new_tokens=5, min_new_tokens=5)
    once = [p.value for pieces in made_stories(model, Reuse(), settings) for p in pieces]
    for other, reuse in ((model, LITERAL), (loaded, Reuse())):
        for kept, again in zip(once, [p.value for ps in made_stories(other, reuse, settings) for p in ps], strict=True):
            if isinstance(kept, str):
                assert kept == again
            else:
                assert np.abs(np.asarray(kept, int) - np.asarray(again, int)).max() <= 1


def test_other_maps_and_unknown_kinds_are_refused() -> None:
    module = made("dense")
    with pytest.raises(ModelError, match="maps of 20 cells, these have 21"):
        module.project_values(torch.zeros(1, 1, 21, 16, dtype=torch.float64))
    with pytest.raises(ModelError, match=r"mmfs\.attention must be one of"):
        dataclasses.replace(module.config, attention="sparse")
    assert isinstance(synchronizer(MMFSConfig(), d_query=8, d_value=8, d_out=8, base=4), MMFS)
