"""The assembled model: what a fresh assembly must leave unchanged, what a token may see, losses, saving and loading."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from mmi_engine.errors import ModelError
from mmi_engine.model.checkpoint import WEIGHTS, load_model, save_model
from mmi_engine.model.config import ModelConfig
from mmi_engine.model.image_decoder import Draws
from mmi_engine.model.interleaved import MMInterleaved, per_row, previous_images
from mmi_engine.model.presets import released_config
from mmi_engine.sequence import InterleavedBatch, image_block, pad_rows, text_targets
from tests.tiny import tiny_config, tiny_model


def batch_of(model: MMInterleaved, rows: list[list[int | str]]) -> InterleavedBatch:
    """Rows of ids; ``"image"`` stands for an image block."""
    tokens, ids, counts = model.config.tokens, [], []
    for row in rows:
        flat: list[int] = []
        for entry in row:
            flat += image_block(tokens, model.config.tokens_per_image) if entry == "image" else [int(entry)]
        ids.append(flat)
        counts.append(sum(entry == "image" for entry in row))
    text_ids, mask = pad_rows(ids, tokens.pad)
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(sum(counts), 3, 32, 32, generator=generator)
    targets = text_targets(text_ids, tokens)
    return InterleavedBatch(text_ids, mask, images, torch.tensor(counts), targets, images_dec=images)


def draws_for(batch: InterleavedBatch, keep: float = 0.9) -> Draws:
    generator = torch.Generator().manual_seed(4)
    count = int(batch.image_counts.sum())
    shape = (count, 4, 8, 8)
    noise = torch.randn(shape, generator=generator)
    return Draws(
        torch.full((count, 1, 1), keep), torch.randn(shape, generator=generator), noise, torch.full((count,), 400)
    )


def test_closed_gates_leave_the_language_model_and_unet_unchanged() -> None:
    torch.manual_seed(0)
    model = MMInterleaved(tiny_config()).eval()
    embeds, mask = torch.randn(1, 6, 24), torch.ones(1, 6, dtype=torch.long)
    features = [torch.randn(1, 2, 16, s, s) for s in (16, 8, 4, 2)]
    with torch.no_grad():
        seen = model.language.visual_context(features, torch.ones(1, 6, 2, dtype=torch.long))
        torch.testing.assert_close(
            model.language(embeds, mask, seen), model.language(embeds, mask, None), rtol=0, atol=0
        )
        latents, context = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)
        unet = model.image_decoder.unet
        vision = unet.look([m[:, :1] for m in features], torch.ones(1, 1, dtype=torch.long))
        expected = unet.unet(latents, 7, context).sample
        torch.testing.assert_close(unet(latents, torch.tensor([7]), context, vision), expected)
        torch.testing.assert_close(unet(latents, torch.tensor([7]), context), expected)


def test_a_token_sees_only_earlier_images_of_its_document() -> None:
    model = tiny_model()
    batch = batch_of(model, [[1, 5, "image", 6, 7, "image", 8, 2, 1, 9, "image", 10]])
    per_image = model.config.tokens_per_image
    first, second = 2, 2 + 1 + per_image + 2
    with torch.no_grad():
        visual = model.visual_tokenizer(batch.images)
        before = model.language.visual_context  # features alone are changed: visual tokens stay in place
        hidden = model.hidden_states(batch, visual)
        changed = dataclasses.replace(visual, features=tuple(m.clone() for m in visual.features))
        for m in changed.features:
            m[1] += 1.0
        after = model.hidden_states(batch, changed)
    assert before is not None
    moved = (hidden - after).abs().amax(-1)[0] > 1e-6
    assert not moved[: second + 1].any(), "tokens up to the second image's <BoI> must not see it"
    assert moved[second + 1], "the image's own tokens see it"
    assert first < second


def test_neighbours_do_not_matter_in_training_losses() -> None:
    model = tiny_model()
    together = batch_of(model, [[1, 5, "image", 6, 2], [1, 7, 8, 9, "image", 3, "image", 2]])
    with torch.no_grad():
        logits = model(together, draws=draws_for(together)).logits
        alone = batch_of(model, [[1, 5, "image", 6, 2]])
        alone.images = together.images[:1]
        single = model(alone, draws=draws_for(alone)).logits
    torch.testing.assert_close(logits[:1, : single.shape[1]], single, rtol=1e-4, atol=1e-5)


def test_loss_is_weighted_sum_and_images_without_context_do_not_count() -> None:
    model = tiny_model()
    batch = batch_of(model, [[1, "image", 5, "image", 2]])
    draws = draws_for(batch)
    with torch.no_grad():
        output = model(batch, draws=draws)
        assert output.loss_image is not None and output.diffusion is not None
        torch.testing.assert_close(output.loss, output.loss_text + 10.0 * output.loss_image)
        snr = 1.0  # min-SNR is off
        torch.testing.assert_close(output.loss_image, output.diffusion.per_image[1] * snr / 2)
        model.config = dataclasses.replace(model.config, image_loss_mean="counted")
        counted = model(batch, draws=draws)
    torch.testing.assert_close(counted.loss_image, output.diffusion.per_image[1])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weight(prediction: str) -> None:
    decoder = tiny_config().image_decoder
    scheduler = {**decoder.scheduler, "prediction_type": prediction}
    config = tiny_config(image_decoder=dataclasses.replace(decoder, min_snr_gamma=5.0, scheduler=scheduler))
    image_decoder = MMInterleaved(config).image_decoder
    steps = torch.tensor([10, 400, 900])
    alphas = image_decoder.scheduler.alphas_cumprod[steps]
    snr = alphas / (1 - alphas)
    # Hang et al.: min(SNR, γ) on the error of the clean image; an error of ε is that times 1/SNR, of v 1/(SNR + 1).
    expected = [min(float(s), 5.0) / (float(s) + (prediction == "v_prediction")) for s in snr]
    torch.testing.assert_close(image_decoder._snr_weight(steps), torch.tensor(expected))


def test_unconditional_embedding_replaces_the_context() -> None:
    model = tiny_model()
    batch = batch_of(model, [[1, 5, "image", 2]])
    other = batch_of(model, [[1, 9, "image", 2]])
    with torch.no_grad():
        dropped = [model(b, draws=draws_for(b, keep=0.05)).loss_image for b in (batch, other)]
        kept = [model(b, draws=draws_for(b, keep=0.95)).loss_image for b in (batch, other)]
    torch.testing.assert_close(dropped[0], dropped[1])
    assert abs(float(kept[0]) - float(kept[1])) > 1e-7


def test_all_trainable_weights_get_gradients() -> None:
    model = tiny_model().train()
    batch = batch_of(model, [[1, 5, "image", 6, "image", 2], [1, 7, "image", 2]])
    for parameter in model.codec.parameters():
        parameter.requires_grad_(False)
    draws = draws_for(batch)
    draws.uncond_uniform = torch.tensor([0.5, 0.01, 0.5]).view(3, 1, 1)
    model(batch, draws=draws).loss.backward()
    silent = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert silent == []


def test_save_and_load_round_trip(tmp_path) -> None:
    model = tiny_model()
    save_model(model, tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    assert loaded.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, dict(loaded.named_buffers())[name]), name
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("Pip is on the beach.")) == "Pip is on the beach."


def test_damaged_model_directories_are_refused(tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    model = tiny_model()
    directory = save_model(model, tmp_path / "m")
    tensors = load_file(directory / WEIGHTS)
    for label, change in (
        ("missing", lambda t: t.pop("boi_embedding")),
        ("unexpected", lambda t: t.update(extra=torch.zeros(1))),
        ("of another shape", lambda t: t.update(boi_embedding=torch.zeros(1, 5))),
    ):
        damaged = dict(tensors)
        change(damaged)
        save_file(damaged, directory / WEIGHTS)
        with pytest.raises(ModelError, match=label):
            load_model(directory)
    (directory / WEIGHTS).write_bytes(b"no safetensors")
    with pytest.raises(ModelError, match="cannot be read"):
        load_model(directory)
    with pytest.raises(ModelError, match="not found"):
        load_model(tmp_path / "absent")


def test_configuration_round_trip_and_errors() -> None:
    config = released_config()
    assert ModelConfig.from_json(config.to_json()) == config
    data = json.loads(config.to_json())
    data["vision"]["patchsize"] = 3
    with pytest.raises(ModelError, match="patchsize"):
        ModelConfig.from_json(json.dumps(data))
    with pytest.raises(ModelError, match="sample_size"):
        ModelConfig.from_json(config.to_json().replace('"sample_size": 64', '"sample_size": 32'))


def test_gathering_of_features() -> None:
    maps = torch.arange(5.0).view(5, 1, 1, 1)
    assert per_row(maps, torch.tensor([2, 0, 3])).squeeze().tolist() == [[0, 1, 0], [0, 0, 0], [2, 3, 4]]
    assert previous_images(maps, 2).squeeze().tolist() == [[0, 0], [0, 0], [0, 1], [1, 2], [2, 3]]
