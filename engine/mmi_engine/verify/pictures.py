"""Golden case 6: denoising with given seed, every stage from the initial latents to the picture.

The released ``generate_images`` takes the context from column 0 and lets MMFS see the row's previous image, whatever
``<s>`` stands between; that rule is followed here. Pictures of long runs are stored with every n-th row and column.
"""

from __future__ import annotations

import torch

from mmi_engine.generate.image import Denoising, ImageRequest, denoise, to_images
from mmi_engine.model.interleaved import MMInterleaved, previous_images
from mmi_engine.sequence import InterleavedBatch, context_columns
from mmi_engine.verify.bundle import Bundle
from mmi_engine.verify.compare import CaseReport, Recorder

GREY = 0.5
"""Value of the picture that stands for the one to be drawn."""


def check_generate_images(
    model: MMInterleaved, bundle: Bundle, name: str, report: CaseReport, tensors: Recorder
) -> None:
    """Case 6."""
    described = bundle.description(name)
    for run, options in described["runs"].items():
        target, count = options["target_image_idxs"][0], options["num_image_per_seq"][0]
        request = _request(model, bundle, run, target, count, tensors)
        request.generators = [torch.Generator().manual_seed(described["base_seed"])]
        plan = Denoising(options["num_inference_steps"], options["guidance_scale"], "ddpm")
        seen: dict[str, torch.Tensor] = {}
        latents = denoise(model, request, plan, seen.__setitem__)
        _check_noise(options["num_inference_steps"], described["base_seed"], run, report, tensors)
        for stage, value in seen.items():
            report.check(f"{run}.{stage}", value, tensors.golden(f"{run}.{stage}"))
        with torch.no_grad():
            image = to_images(model, latents)
        golden = tensors.golden(f"{run}.image")
        step = max(1, image.shape[-1] // golden.shape[-1])
        report.check(f"{run}.image", image[..., ::step, ::step], golden)


def _request(
    model: MMInterleaved, bundle: Bundle, run: str, target: int, count: int, tensors: Recorder
) -> ImageRequest:
    """Context and image features of picture ``target`` of a row of ``count`` pictures, the last one grey."""
    size = bundle.config.vision.image_size
    kind = run.split(".")[0]
    ids = tensors[f"{kind}.text_ids"]
    given = [tensors["image_tensors_u8"].float() / 255][: count - 1]
    images = torch.cat([*given, torch.full((1, 3, size, size), GREY)])
    with torch.no_grad():
        visual = model.visual_tokenizer(images)
        batch = InterleavedBatch(ids, torch.ones_like(ids), images, torch.tensor([count]))
        hidden = model.hidden_states(batch, visual)
        _, sites = model.image_sites(ids)
        end = sites[target : target + 1]
        columns, mask = context_columns(torch.zeros_like(end), end)
        tokens = model.image_decoder.context_tokens(hidden[:1, columns[0]], mask)
        features = [previous_images(m, 1)[target : target + 1] for m in visual.features]
    return ImageRequest(tokens, features, torch.tensor([[int(target > 0)]]), [])


def _check_noise(steps: int, seed: int, run: str, report: CaseReport, tensors: Recorder) -> None:
    """The generator's later draws are the scheduler's noise."""
    golden = tensors.golden(f"{run}.scheduler_noise")
    generator = torch.Generator().manual_seed(seed)
    torch.randn(golden.shape[1:], generator=generator)  # the initial latents
    drawn = torch.stack([torch.randn(golden.shape[1:], generator=generator) for _ in range(steps)])
    report.check(f"{run}.scheduler_noise", drawn, golden)
