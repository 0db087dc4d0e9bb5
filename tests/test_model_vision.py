"""Visual tokenizer: each part against a loop, a closed form or another library, and the whole by its properties."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from mmi_engine.errors import ModelError
from mmi_engine.model.adapter import (
    ChannelLayerNorm,
    ConvFFN,
    DeformableAttention,
    SpatialPrior,
    Upsampling,
    cell_centres,
    to_map,
    to_tokens,
)
from mmi_engine.model.config import QFormerConfig, VisionConfig
from mmi_engine.model.names_vision import CONTEXT_RESAMPLER, VISUAL_TOKENIZER, is_dropped, to_official, to_ours
from mmi_engine.model.positions import interpolate_position_embedding, resize_grid, sincos_1d, sincos_2d
from mmi_engine.model.resampler import QFormer
from mmi_engine.model.trunk import take_apart
from mmi_engine.model.vision import VisualTokenizer

VISION = VisionConfig(
    image_size=32, patch_size=8, hidden_size=16, intermediate_size=32, num_layers=4, num_heads=2, stem_channels=4
)
QUERIES = QFormerConfig(
    num_queries=3, hidden_size=12, encoder_hidden_size=16, num_layers=2, num_heads=2, intermediate_size=20, dropout=0.0
)


def tokenizer(*, random: bool = True) -> VisualTokenizer:
    """A tiny tokenizer; ``random`` also fills what starts at zero, so that every part takes effect."""
    torch.manual_seed(0)
    model = VisualTokenizer(VISION, QFormer(QUERIES), d_llm=10).eval()
    if random:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


# positions


def test_1d_table_is_the_closed_form() -> None:
    table = sincos_1d(torch.tensor([0, 3, 2047]), 6)
    for row, position in enumerate((0, 3, 2047)):
        for i in range(3):
            angle = position / 10000 ** (2 * i / 6)
            assert table[row, i] == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[row, 3 + i] == pytest.approx(math.cos(angle), abs=1e-6)


def test_2d_table_has_rows_in_the_first_half() -> None:
    table = sincos_2d(3, 5, 8).view(3, 5, 8)
    for row in range(3):
        for column in range(5):
            expected = [f(p * w) for p in (row, column) for f in (math.sin, math.cos) for w in (1.0, 0.01)]
            assert table[row, column].tolist() == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_2d(2, 2, 6)


def test_resized_tables_keep_prefix_corners_and_constants() -> None:
    torch.manual_seed(0)
    table = torch.randn(1 + 16, 3)
    assert torch.equal(interpolate_position_embedding(table, (4, 4)), table)
    grown = interpolate_position_embedding(table, (7, 9), align_corners=True)
    assert grown.shape == (1 + 63, 3)
    assert torch.equal(grown[0], table[0])
    cells, before = grown[1:].view(7, 9, 3), table[1:].view(4, 4, 3)
    for new, old in ((cells[0, 0], before[0, 0]), (cells[0, -1], before[0, -1]), (cells[-1, 0], before[-1, 0])):
        torch.testing.assert_close(new, old)
    assert not torch.allclose(interpolate_position_embedding(table, (7, 9))[1], table[1])
    torch.testing.assert_close(resize_grid(torch.full((9, 2), 0.7), (5, 2)), torch.full((10, 2), 0.7))
    with pytest.raises(ValueError, match="square"):
        resize_grid(torch.zeros(12, 2), (4, 4))


# parts of the adapter


def sample_loop(attention: DeformableAttention, query: Tensor, reference: Tensor, features: Tensor, shapes) -> Tensor:
    """Deformable DETR, Eq. 2, one number at a time."""
    batch, n_query, channels = query.shape
    heads, points = attention.heads, attention.points
    value = attention.value(features).view(batch, features.shape[1], heads, -1)
    offsets = attention.offsets(query).view(batch, n_query, heads, len(shapes), points, 2)
    weights = attention.weights(query).view(batch, n_query, heads, -1).softmax(-1)
    out = torch.zeros(batch, n_query, heads, value.shape[-1])
    for n in range(batch):
        for q in range(n_query):
            for h in range(heads):
                start = 0
                for level, (height, width) in enumerate(shapes):
                    grid = value[n, start : start + height * width, h].view(height, width, -1)
                    start += height * width
                    for p in range(points):
                        x = float(reference[q, 0]) * width + float(offsets[n, q, h, level, p, 0]) - 0.5
                        y = float(reference[q, 1]) * height + float(offsets[n, q, h, level, p, 1]) - 0.5
                        for row in (math.floor(y), math.floor(y) + 1):
                            for column in (math.floor(x), math.floor(x) + 1):
                                if 0 <= row < height and 0 <= column < width:
                                    share = (1 - abs(y - row)) * (1 - abs(x - column))
                                    out[n, q, h] += weights[n, q, h, level * points + p] * share * grid[row, column]
    return attention.output(out.flatten(2))


@pytest.mark.parametrize("shapes", [[(5, 3), (2, 4)], [(3, 4)]])
def test_deformable_attention_equals_the_loop(shapes: list[tuple[int, int]]) -> None:
    torch.manual_seed(3)
    attention = DeformableAttention(8, heads=2, levels=len(shapes), points=3, value_ratio=0.5)
    nn.init.normal_(attention.offsets.weight, std=0.7)
    nn.init.normal_(attention.weights.weight)
    query, reference = torch.randn(2, 4, 8), torch.rand(4, 2)
    features = torch.randn(2, sum(h * w for h, w in shapes), 8)
    with torch.no_grad():
        expected = sample_loop(attention, query, reference, features, shapes)
        for backend in ("auto", "torch"):
            attention.backend = backend
            torch.testing.assert_close(attention(query, reference, features, shapes), expected, rtol=1e-4, atol=1e-5)


def test_fresh_offsets_lie_on_rays() -> None:
    attention = DeformableAttention(8, heads=4, levels=2, points=3, value_ratio=0.5)
    bias = attention.offsets.bias.detach().view(4, 2, 3, 2)
    for head, ray in enumerate(((1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0))):
        for level in range(2):
            for point in range(3):
                expected = torch.tensor(ray) * (point + 1)
                torch.testing.assert_close(bias[head, level, point], expected, rtol=0, atol=1e-5)
    assert attention.offsets.weight.abs().max() == 0


def test_cell_centres_are_x_then_y() -> None:
    expected = torch.tensor([[0.25, 0.5], [0.75, 0.5], [0.5, 0.25], [0.5, 0.75]])
    torch.testing.assert_close(cell_centres([(1, 2), (2, 1)]), expected)


def test_channel_norm_is_over_channels_and_in_single_precision() -> None:
    torch.manual_seed(0)
    norm = ChannelLayerNorm(5, eps=1e-6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 5, 3, 4) * 4 + 2
    centred = x - x.mean(1, keepdim=True)
    expected = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    expected = expected * norm.weight.view(1, 5, 1, 1) + norm.bias.view(1, 5, 1, 1)
    torch.testing.assert_close(norm(x), expected, rtol=1e-5, atol=1e-5)
    half = norm(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, norm(x.bfloat16().float()).bfloat16())


def test_upsampling_is_the_transposed_convolution() -> None:
    torch.manual_seed(0)
    up = Upsampling(6)
    x = torch.randn(2, 6, 3, 5)
    expected = F.conv_transpose2d(x, up.weight, up.bias, stride=2)
    torch.testing.assert_close(up(x), expected, rtol=1e-5, atol=1e-5)


def test_conv_ffn_keeps_the_maps_apart() -> None:
    torch.manual_seed(0)
    ffn, shapes = ConvFFN(8, 4), [(4, 3), (2, 2)]
    pyramid = torch.randn(1, 16, 8)
    with torch.no_grad():
        whole = ffn(pyramid, shapes)
        for part, own, shape in zip(pyramid.split([12, 4], 1), whole.split([12, 4], 1), shapes, strict=True):
            depthwise = ffn.depthwise
            inner = F.conv2d(to_map(ffn.expand(part), shape), depthwise.weight, depthwise.bias, padding=1, groups=4)
            torch.testing.assert_close(own, ffn.project(F.gelu(to_tokens(inner))), rtol=1e-5, atol=1e-6)


def test_spatial_prior_strides() -> None:
    maps = SpatialPrior(8, 4)(torch.rand(1, 3, 64, 96))
    assert [tuple(m.shape[1:]) for m in maps] == [(8, 16, 24), (8, 8, 12), (8, 4, 6), (8, 2, 3)]


# the whole


SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
SIZES |= {"image_size": 32, "patch_size": 8}
LIBRARY = {
    "clip": (CLIPVisionModel, CLIPVisionConfig(**SIZES, hidden_act="quick_gelu")),
    "siglip": (SiglipVisionModel, SiglipVisionConfig(**SIZES, vision_use_head=False)),
    "vit": (ViTModel, ViTConfig(**SIZES)),
    "dinov2": (Dinov2Model, Dinov2Config(**{**SIZES, "mlp_ratio": 2})),
}


@pytest.mark.parametrize("family", LIBRARY)
def test_fresh_adapter_leaves_the_trunk_alone(family: str) -> None:
    """With gamma 0 the last hidden states are what the library's own forward computes."""
    torch.manual_seed(0)
    make, config = LIBRARY[family]
    library = make(config).eval()
    for name in ("layernorm", "post_layernorm"):  # the final norm, which the trunk leaves out
        if hasattr(library, name):
            setattr(library, name, nn.Identity())
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
    trunk = take_apart(library)
    config = replace(VISION, mean=mean, std=std)
    model = VisualTokenizer(config, QFormer(QUERIES), d_llm=10, trunk=trunk).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = library((images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))
        out = model(images)
    assert trunk.prefix == (0 if family == "siglip" else 1)
    torch.testing.assert_close(out.last_hidden, expected.last_hidden_state, rtol=1e-5, atol=1e-5)
    assert out.image_embeds.shape == (2, 16, 16)


def test_only_plain_vision_transformers_are_taken_apart() -> None:
    with pytest.raises(ModelError, match="QFormer is not a plain vision transformer"):
        take_apart(QFormer(QUERIES))
    registers = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**{**SIZES, "mlp_ratio": 2}))
    with pytest.raises(ModelError, match="Dinov2WithRegistersModel is not a plain"):
        take_apart(registers)


def test_normalisation_is_clips_own() -> None:
    processor = CLIPImageProcessorPil()
    model = tokenizer(random=False)
    assert model.clip_mean.flatten().tolist() == pytest.approx(list(processor.image_mean), abs=1e-7)
    assert model.clip_std.flatten().tolist() == pytest.approx(list(processor.image_std), abs=1e-7)


def test_outputs_carry_the_positions() -> None:
    model = tokenizer()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        out = model(images)
        hidden, maps = model.adapter(model.trunk, (images - model.clip_mean) / model.clip_std)
    assert out.tokens.shape == (2, 3, 10)
    assert [tuple(f.shape) for f in out.features] == [(2, 16, n, n) for n in VISION.feature_sizes]
    table = sincos_2d(4, 4, 16)
    torch.testing.assert_close(out.image_embeds, hidden[:, 1:] + table)
    for feature, raw in zip(out.features, maps, strict=True):
        side = raw.shape[-1]
        grid = F.interpolate(table.T.view(1, 16, 4, 4), size=(side, side), mode="bicubic")
        torch.testing.assert_close(feature - raw, grid.expand_as(raw), rtol=1e-4, atol=1e-5)


def test_other_sizes_and_shapes_of_images() -> None:
    model = tokenizer()
    with torch.no_grad():
        out = model(torch.rand(1, 3, 48, 24))  # an odd number of patch columns
    assert [tuple(f.shape[2:]) for f in out.features] == [(24, 12), (12, 6), (6, 3), (3, 2)]
    assert out.last_hidden.shape == (1, 1 + 18, 16)
    with pytest.raises(ValueError, match="patches of 8"):
        model(torch.rand(1, 3, 36, 32))


def test_images_of_a_batch_do_not_mix() -> None:
    model = tokenizer()
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        together, alone = model(images), model(images[1:2])
    torch.testing.assert_close(together.tokens[1:2], alone.tokens, rtol=1e-4, atol=1e-5)
    for many, one in zip(together.features, alone.features, strict=True):
        torch.testing.assert_close(many[1:2], one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_stays_near_single_precision(autocast: bool) -> None:
    model = tokenizer()
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        exact = model(images)
        if not autocast:
            model.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            rough = model(images)
    for got, expected in zip((rough.tokens, *rough.features), (exact.tokens, *exact.features), strict=True):
        error = (got.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert error < 0.05


def test_every_parameter_learns() -> None:
    model = tokenizer().train()
    out = model(torch.rand(2, 3, 32, 32))
    (out.tokens.square().sum() + sum(f.square().sum() for f in out.features)).backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert idle == []


def test_start_values() -> None:
    model = tokenizer(random=False)
    assert model.project_out.weight.std() < 2e-3
    assert all(block.injector.gamma.abs().max() == 0 for block in model.adapter.interactions)
    assert model.positions[0].abs().max() == 0
    assert [len(block.extra_extractors) for block in model.adapter.interactions] == [0, 0, 0, 2]


def test_resampler_must_read_the_trunk() -> None:
    narrow = QFormer(QFormerConfig(num_queries=2, hidden_size=8, encoder_hidden_size=8, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match="reads 8 channels"):
        VisualTokenizer(VISION, narrow, d_llm=4)


# released names

RELEASED = {
    "visual_tokenizer.pos_embed": (257, 1024),
    "visual_tokenizer.encoder.vision_model.adapter_level_embed": (3, 1024),
    "visual_tokenizer.encoder.vision_model.embeddings.position_embedding.weight": (257, 1024),
    "visual_tokenizer.encoder.vision_model.pre_layrnorm.bias": (1024,),
    "visual_tokenizer.encoder.vision_model.encoder.layers.23.mlp.fc1.weight": (4096, 1024),
    "visual_tokenizer.encoder.vision_model.adapter_spm.stem.6.weight": (64, 64, 3, 3),
    "visual_tokenizer.encoder.vision_model.adapter_spm.conv4.1.bias": (256,),
    "visual_tokenizer.encoder.vision_model.adapter_spm.fc2.weight": (1024, 128, 1, 1),
    "visual_tokenizer.encoder.vision_model.adapter_interactions.2.injector.attn.sampling_offsets.weight": (384, 1024),
    "visual_tokenizer.encoder.vision_model.adapter_interactions.3.extra_extractors.1.ffn.dwconv.dwconv.weight": (
        256,
        1,
        3,
        3,
    ),
    "visual_tokenizer.encoder.vision_model.adapter_up.weight": (1024, 1024, 2, 2),
    "visual_tokenizer.perceiver_resampler.queries": (1, 64, 768),
    "visual_tokenizer.perceiver_resampler.blip2qformer.encoder.layer.4.crossattention.attention.k_norm.weight": (64,),
    "visual_tokenizer.perceiver_resampler.blip2qformer.encoder.layer.4.crossattention.attention.key.weight": (
        768,
        1024,
    ),
    "visual_tokenizer.proj.weight": (5120, 768),
    "image_decoder.perceiver_resampler.blip2qformer.encoder.layer.0.attention.attention.query.weight": (1024, 1024),
    "image_decoder.perceiver_resampler.blip2qformer.encoder.layer.0.output_query.LayerNorm.bias": (1024,),
}


def released_layout() -> dict[str, torch.Size]:
    """Names and shapes of our modules at the released size, without memory."""
    context = QFormerConfig(
        num_queries=77,
        hidden_size=1024,
        encoder_hidden_size=5120,
        cross_attention_frequency=1,
        num_layers=1,
        num_heads=16,
        qk_norm=False,
    )
    with torch.device("meta"):
        vision = VisualTokenizer(VisionConfig(), QFormer(QFormerConfig()), 5120)
        resampler = QFormer(context)
    shapes = {VISUAL_TOKENIZER + name: tensor.shape for name, tensor in vision.state_dict().items()}
    return shapes | {CONTEXT_RESAMPLER + name: tensor.shape for name, tensor in resampler.state_dict().items()}


def test_released_names_are_a_bijection() -> None:
    shapes = released_layout()
    assert len(shapes) == 957  # tensors of these modules in the released state dictionary, position_ids left out
    released = {name: to_official(name) for name in shapes}
    assert len(set(released.values())) == len(shapes)
    assert all(there is not None and to_ours(there) == name for name, there in released.items())
    for name, shape in RELEASED.items():
        ours = to_ours(name)
        assert ours is not None and tuple(shapes[ours]) == shape, name


def test_unknown_and_dropped_names() -> None:
    assert to_ours("mm_decoder.layers.0.mlp.up_proj.weight") is None
    assert to_ours("visual_tokenizer.proj.weights") is None
    assert is_dropped("visual_tokenizer.encoder.vision_model.embeddings.position_ids")
    assert not is_dropped("visual_tokenizer.pos_embed")
