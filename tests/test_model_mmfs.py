"""MMFS against its definition (Eq. 4 with the ignore slot), written out image by image without any algebra."""

from __future__ import annotations

import pytest
import torch

from mmi_engine.model.config import MMFSConfig
from mmi_engine.model.mmfs import MMFS, project_all, relative_index
from tests.tiny import tiny_model


def literal(module: MMFS, query: torch.Tensor, reference: torch.Tensor, features: torch.Tensor, shapes, visible):
    """One query at a time, one image at a time; every logit and location as the definition has it."""
    config = module.config
    heads, points, levels = config.heads, config.points, len(config.levels)
    batch, n_query, _ = query.shape
    images = features.shape[1]
    values = module.value_proj(features).view(batch, images, -1, heads, config.width // heads)
    rows = []
    for b in range(batch):
        for q in range(n_query):
            logits, samples = [], []
            for m in range(images):
                r = int(visible[b, q, m:].sum()) if visible[b, q, m] else 0
                latent = module.query_proj(query[b, q]) + module.image_index.weight[r]
                offset = module.offsets(latent).view(heads, points, 2)
                logit = module.logits(latent).view(heads, levels, points + 1).clone()
                if not visible[b, q, m]:
                    logit = logit - 10000.0
                logit[:, :, -1] = -torch.log(torch.tensor(float(images * levels), dtype=logit.dtype))
                logits.append(logit)
                start, per_level = 0, []
                for level, (height, width) in enumerate(shapes):
                    cells = values[b, m, start : start + height * width].view(height, width, heads, -1)
                    start += height * width
                    scale = config.levels[level] / module.base
                    xy = reference[0, q] + offset * scale / torch.tensor([width, height], dtype=query.dtype)
                    per_level.append(bilinear(cells, xy))
                samples.append(torch.stack(per_level, 1))  # (H, L, P, D)
            weight = torch.stack(logits, 1).flatten(1).softmax(-1).view(heads, images, levels, points + 1)
            token = module.ignore_token.view(heads, 1, 1, 1, -1).expand(heads, images, levels, 1, -1)
            stacked = torch.cat([torch.stack(samples, 1), token], dim=3)
            rows.append((weight[..., None] * stacked).sum(dim=(1, 2, 3)).flatten())
    return module.output_proj(torch.stack(rows).view(batch, n_query, -1))


def bilinear(cells: torch.Tensor, xy: torch.Tensor) -> torch.Tensor:
    """``cells`` ``[h, w, H, D]`` at ``xy`` ``[H, P, 2]`` in [0, 1]; zeros outside."""
    height, width, heads, depth = cells.shape
    cells, xy = cells.detach(), xy.detach()
    out = torch.zeros(heads, xy.shape[1], depth, dtype=cells.dtype)
    for h in range(heads):
        for p in range(xy.shape[1]):
            x, y = float(xy[h, p, 0]) * width - 0.5, float(xy[h, p, 1]) * height - 0.5
            for j in (int(y // 1), int(y // 1) + 1):
                for i in (int(x // 1), int(x // 1) + 1):
                    if 0 <= i < width and 0 <= j < height:
                        out[h, p] += cells[j, i, h] * (1 - abs(x - i)) * (1 - abs(y - j))
    return out


def make(levels: tuple[int, ...], **changes: bool) -> MMFS:
    torch.manual_seed(1)
    config = MMFSConfig(heads=2, points=3, width=8, levels=levels, max_images=6, offset_init=2.0, **changes)
    module = MMFS(config, d_query=6, d_value=5, d_out=7, base=4).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module


@pytest.mark.parametrize(
    ("shapes", "images"), [(((4, 4), (2, 2)), 1), (((4, 4), (2, 2)), 3), (((3, 5), (2, 1)), 2)], ids=str
)
def test_equals_the_definition(shapes, images) -> None:
    module = make((4, 2))
    cells = sum(h * w for h, w in shapes)
    query, features = torch.randn(2, 3, 6).double(), torch.randn(2, images, cells, 5).double()
    reference = torch.rand(1, 3, 2).double()
    visible = torch.randint(0, 2, (2, 3, images))
    visible[0, 0] = 0  # a query that sees nothing
    got = module(query, reference, module.project_values(features), shapes, visible)
    torch.testing.assert_close(
        got, literal(module, query, reference, features, shapes, visible), rtol=1e-12, atol=1e-12
    )


def test_blind_query_is_a_constant() -> None:
    module = make((4, 2))
    query = torch.randn(1, 2, 6).double()
    values = module.project_values(torch.randn(1, 2, 20, 5).double())
    got = module(query, torch.full((1, 2, 2), 0.5).double(), values, ((4, 4), (2, 2)), torch.zeros(1, 2))
    torch.testing.assert_close(got, module.blind().expand(1, 2, -1))
    none = module(query, torch.full((1, 2, 2), 0.5).double(), values, ((4, 4), (2, 2)), torch.zeros(1, 2, 0))
    torch.testing.assert_close(none, got)


def test_hidden_images_do_not_matter() -> None:
    module = make((4, 2))
    query, features = torch.randn(1, 2, 6).double(), torch.randn(1, 3, 20, 5).double()
    reference, shapes = torch.rand(1, 2, 2).double(), ((4, 4), (2, 2))
    visible = torch.tensor([[1, 0, 1]])
    before = module(query, reference, module.project_values(features), shapes, visible)
    features[:, 1] = 1e3
    after = module(query, reference, module.project_values(features), shapes, visible)
    torch.testing.assert_close(before, after)


def test_relative_distance_key_changes_larger_maps_only() -> None:
    query, reference = torch.randn(1, 2, 6).double(), torch.rand(1, 2, 2).double()
    for shapes, equal in ((((4, 4), (2, 2)), True), (((8, 8), (4, 4)), False)):
        cells = sum(h * w for h, w in shapes)
        features = torch.randn(1, 1, cells, 5).double()
        outputs = []
        for keep in (False, True):
            module = make((4, 2), keep_relative_distance=keep)
            outputs.append(module(query, reference, module.project_values(features), shapes, torch.ones(1, 1)))
        assert torch.allclose(*outputs) == equal


def test_relative_index() -> None:
    assert relative_index(torch.tensor([1, 0, 1, 1])).tolist() == [3, 0, 2, 1]
    assert relative_index(torch.tensor([0, 0])).tolist() == [0, 0]


def call_of() -> tuple:
    """Query, reference, values, shapes and visibility of one call of ``make((4, 2))``."""
    query, reference, values = torch.randn(1, 3, 6), torch.rand(1, 3, 2), torch.randn(1, 20, 2, 4)
    return query.double(), reference.double(), values.double(), [(4, 4), (2, 2)], torch.ones(1, 1)


def test_what_is_kept_of_weights_follows_every_change_of_them() -> None:
    """Each way to change a weight in evaluation, against a fresh module with the same weights."""
    module = make((4, 2)).eval()
    inputs = call_of()

    def check() -> None:
        fresh = make((4, 2))
        fresh.load_state_dict(module.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(module(*inputs), fresh.train()(*inputs), rtol=1e-12, atol=1e-12)

    check()
    kept = module.kept.entry
    check()
    assert kept is not None and module.kept.entry is kept
    with torch.no_grad():
        module.logits.weight.mul_(3)
    check()
    module.image_index.weight.data = module.image_index.weight.data + 1
    check()
    module.load_state_dict({name: tensor + 0.5 for name, tensor in module.state_dict().items()})
    check()
    module.load_state_dict({name: tensor * 2 for name, tensor in module.state_dict().items()}, assign=True)
    check()
    module.offsets.weight.data.add_(1)
    module.eval()  # a change past the version counter shows after the next train() or eval()
    check()


def test_nothing_is_kept_where_gradients_or_other_dtypes_may_be_wanted() -> None:
    module = make((4, 2)).float()
    inputs = tuple(i.float() if isinstance(i, torch.Tensor) else i for i in call_of())
    with torch.no_grad():
        module.train()(*inputs)
        assert module.kept.entry is None
        with torch.autocast("cpu", torch.bfloat16):
            module.eval()(*inputs)
        assert module.kept.entry is None
    module(*inputs).sum().backward()
    assert module.kept.entry is None and module.image_index.weight.grad is not None


@torch.no_grad()
def test_features_normalised_once_are_what_every_block_projects(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(seed=3)
    for blocks in (model.language.mmfs_layers, list(model.image_decoder.unet.mmfs_blocks)):
        for block in blocks:
            for parameter in block.feature_norm.parameters():
                parameter.uniform_(-1.0, 2.0)
        features = torch.randn(2, 3, 40, blocks[0].mmfs.value_proj.in_features)
        with monkeypatch.context() as patch:
            for block in blocks:
                patch.setattr(block.feature_norm, "forward", None)  # in evaluation no block normalises for itself
            together = project_all(blocks, features)
        for block, values in zip(blocks, together, strict=True):
            torch.testing.assert_close(values, block.project_values(features), rtol=1e-5, atol=1e-5)
            block.mmfs.value_proj.weight.mul_(2)
        for block, values in zip(blocks, project_all(blocks, features), strict=True):
            torch.testing.assert_close(values, block.project_values(features), rtol=1e-5, atol=1e-5)
