"""Golden case 4: one packed training batch, losses, intermediates and gradients.

All random draws are fed from the bundle. The variant run uses other loss masks and weights on the same batch.
Outputs are compared in float32 with the kernel under test. Gradients are compared in float64 with the reference kernel:
through a bilinear sample the gradient with respect to its location jumps where the sample crosses a cell's centre, so
that a rounding difference of 1e-7 in one of a million locations (another thread count or memory layout is enough)
changes small gradient norms by up to a percent. The golden values lie within 7e-4 of a float64 run.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, TypeVar

import torch
from torch import Tensor

from mmi_engine.model.image_decoder import Draws
from mmi_engine.model.interleaved import MMInterleaved, Output
from mmi_engine.model.names import NameTable
from mmi_engine.model.positions import sincos_1d
from mmi_engine.sequence import (
    InterleavedBatch,
    decoder_visibility,
    image_contexts,
    language_visibility,
    last_bos,
    text_targets,
)
from mmi_engine.verify.bundle import Bundle
from mmi_engine.verify.compare import GRADIENT, CaseReport, Recorder

T = TypeVar("T", InterleavedBatch, Draws)


def check_forward(model: MMInterleaved, bundle: Bundle, name: str, report: CaseReport, tensors: Recorder) -> None:
    """Case 4."""
    tokens, ids = bundle.config.tokens, tensors["text_ids"]
    batch = InterleavedBatch(
        ids,
        tensors["attention_mask"],
        tensors["image_tensors_u8"].float() / 255,
        tensors["num_image_per_seq"],
        target_ids=text_targets(ids, tokens, skip_imageless=_skips_imageless(bundle.description(name))),
        images_dec=tensors["image_tensors_dec_u8"].float() / 255,
    )
    draws = Draws(*(tensors[k] for k in ("uncond_uniform", "vae_sample_noise", "diffusion_noise", "timesteps")))
    _check_layout(bundle, batch, report, tensors)
    _check_stages(model, batch, report, tensors)
    with torch.no_grad():
        _check_output(model(batch, draws=draws), report, tensors)
    _check_gradients(model, bundle, name, batch, draws, report, tensors)
    _check_variant(model, bundle, name, batch, draws, report, tensors)


def _skips_imageless(described: dict[str, Any]) -> bool:
    """Whether the main run's data set is one whose text before any image carries no loss."""
    datasets = described.get("variant", {}).get("dataset_to_ignore_noimage_cond_loss", [])
    return described.get("meta_dataset_name") in datasets


def _check_layout(bundle: Bundle, batch: InterleavedBatch, report: CaseReport, tensors: Recorder) -> None:
    """Index maps and masks."""
    tokens, ids = bundle.config.tokens, batch.text_ids
    assert batch.target_ids is not None
    report.check("gt_text_ids_shifted", batch.target_ids[:, 1:], tensors.golden("gt_text_ids_shifted"))
    rows, columns, mask = image_contexts(ids, tokens)
    report.check("context_attention_mask", mask, tensors.golden("context_attention_mask"))
    starts = last_bos(ids, tokens)[rows, columns[:, 0]]
    report.check("nearest_bos_idxs", starts, tensors.golden("nearest_bos_idxs"))
    images = int(batch.image_counts.max())
    seen = language_visibility(ids, tokens, images)
    golden = tensors.golden("cross_attention_mask")
    report.check("cross_attention_mask", seen.to(golden.dtype), golden)
    report.check("image_decoder_mmfs_mask", decoder_visibility(ids, tokens), tensors.golden("image_decoder_mmfs_mask"))


@torch.no_grad()
def _check_stages(model: MMInterleaved, batch: InterleavedBatch, report: CaseReport, tensors: Recorder) -> None:
    """Intermediates that the forward pass does not return."""
    visual = model.visual_tokenizer(batch.images)
    report.check("mm_embeds", model.embed(batch.text_ids, visual.tokens), tensors.golden("mm_embeds"))
    hidden = model.hidden_states(batch, visual)
    report.check("mm_hidden_state", hidden, tensors.golden("mm_hidden_state"))
    rows, columns, mask = image_contexts(batch.text_ids, model.config.tokens)
    decoder = model.image_decoder
    contexts = hidden[rows[:, None], columns] * mask[..., None]
    features = decoder.context_proj(contexts)
    features = features + sincos_1d(torch.arange(features.shape[1]), decoder.d_context)
    report.check("context_features", features, tensors.golden("context_features"))
    report.check("context_tokens", decoder.context_tokens(contexts, mask), tensors.golden("context_tokens"))


def _check_output(output: Output, report: CaseReport, tensors: Recorder) -> None:
    """Losses, logits and what the diffusion loss was made of."""
    assert output.loss_image is not None and output.diffusion is not None
    computed: dict[str, Tensor] = {
        "loss": output.loss,
        "loss_txt": output.loss_text,
        "loss_img": output.loss_image,
        "text_logits": output.logits,
        "latents": output.diffusion.latents,
        "noisy_latents": output.diffusion.noisy,
        "model_pred": output.diffusion.prediction,
    }
    for key, value in computed.items():
        report.check(key, value, tensors.golden(key))


def _check_gradients(
    model: MMInterleaved,
    bundle: Bundle,
    name: str,
    batch: InterleavedBatch,
    draws: Draws,
    report: CaseReport,
    tensors: Recorder,
) -> None:
    """Stored gradients, and the norm of every parameter's and every part's gradient, in float64."""
    model = copy.deepcopy(model).double()
    model.set_backend("torch")
    for parameter in model.parameters():  # the bundle also holds gradients of tensors that are frozen in practice
        parameter.requires_grad_(True)
    model(_in_double(batch), draws=_in_double(draws)).loss.backward()
    table, parameters = NameTable(bundle.config), dict(model.named_parameters())
    described = bundle.description(name)

    def gradient(released: str) -> Tensor | None:
        ours = table.to_ours(released)
        return parameters[ours].grad if ours in parameters else None

    for key in [k for k in tensors if k.startswith("grad.")]:
        found = gradient(key.removeprefix("grad."))
        if found is None:
            report.fail(key, "no gradient")
        else:
            report.check(key, found, tensors.golden(key), GRADIENT)
    parts: dict[str, float] = {}
    for released, norm in described["grad_norm_per_param"].items():
        found = gradient(released)
        if found is None:
            report.fail(f"grad_norm.{released}", "no gradient")
            continue
        report.check(f"grad_norm.{released}", found.norm(), torch.tensor(norm), GRADIENT)
        part = released.split(".")[0]
        parts[part] = parts.get(part, 0.0) + float(found.double().norm()) ** 2
    for part, norm in described["grad_norm_top"].items():
        report.check(f"grad_norm_top.{part}", torch.tensor(parts.get(part, 0.0) ** 0.5), torch.tensor(norm), GRADIENT)


def _in_double(fields: T) -> T:
    """A dataclass of tensors with its floating tensors in float64."""
    changed = {k: v.double() for k, v in vars(fields).items() if isinstance(v, Tensor) and v.is_floating_point()}
    return dataclasses.replace(fields, **changed)  # type: ignore[type-var]


@torch.no_grad()
def _check_variant(
    model: MMInterleaved,
    bundle: Bundle,
    name: str,
    batch: InterleavedBatch,
    draws: Draws,
    report: CaseReport,
    tensors: Recorder,
) -> None:
    """The same batch as image-text pairs with prompts, an image loss mask and other weights."""
    described = bundle.description(name).get("variant")
    if described is None:
        return
    skip = described["dataset_name"] in described["dataset_to_ignore_noimage_cond_loss"]
    targets = text_targets(
        batch.text_ids,
        bundle.config.tokens,
        skip_imageless=skip,
        prompt_lengths=described["ignore_prompt_token_offset"],
    )
    report.check("variant.gt_text_ids_shifted", targets[:, 1:], tensors.golden("variant.gt_text_ids_shifted"))
    changed = dataclasses.replace(batch, target_ids=targets, image_loss_mask=tensors["variant.image_loss_mask"])
    config = model.config
    model.config = dataclasses.replace(
        config, loss_text_weight=described["loss_txt_weight"], loss_image_weight=described["loss_img_weight"]
    )
    try:
        output = model(changed, draws=draws)
    finally:
        model.config = config
    assert output.loss_image is not None
    for key, value in (("loss", output.loss), ("loss_txt", output.loss_text), ("loss_img", output.loss_image)):
        report.check(f"variant.{key}", value, tensors.golden(f"variant.{key}"))
