"""The seven kinds of golden case, each: inputs from the bundle → our code → compared tensors.

    1 mmfs_op             the sampling operation, forward and backward
    2 mmfs_module         MMFS with 2-D, 3-D and decoding masks, forward and backward
    3 visual_tokenizer    tokens and feature maps, at the native and at another image size
    4 forward             losses, logits, intermediates and gradients of a packed batch (``verify.forward``)
    5 generate_texts      ids of greedy, penalised and beam search, and greedy logits
    6 generate_images     denoising of text-only and image + text prompts (``verify.pictures``)
    7 unet_mmfs           one U-Net prediction with and without MMFS

Source: the format is described with the bundles; every case follows the released implementation's rules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmi_engine.errors import VerifyError
from mmi_engine.generate.settings import Settings
from mmi_engine.generate.text import Prompt, generate_text
from mmi_engine.model.config import MMFSConfig
from mmi_engine.model.mmfs import MMFS
from mmi_engine.model.names import mmfs_rules
from mmi_engine.model.names_vision import template_pattern
from mmi_engine.model.positions import interpolate_position_embedding
from mmi_engine.verify.bundle import Bundle
from mmi_engine.verify.compare import GRADIENT, CaseReport, Recorder
from mmi_engine.verify.forward import check_forward
from mmi_engine.verify.pictures import check_generate_images
from mmi_kernels import deform_sample

SHIPPED = Path(__file__).parent / "golden"
"""The bundle that ships: cases 1, 2, 3 and 5."""


def verify(
    directory: Path, *, backend: str = "auto", started: Callable[[str], None] | None = None
) -> Iterator[CaseReport]:
    """Run all cases of a bundle.

    Args:
        directory: the bundle.
        backend: deformable-sampling kernel.
        started: told the name of every case before it runs.

    Raises:
        VerifyError: the directory is no bundle, a file cannot be read, or a case is of an unknown kind.
    """
    bundle = Bundle(directory)
    for name in bundle.cases:
        check = next((c for kind, c in CASES if re.fullmatch(kind, name)), None)
        if check is None:
            raise VerifyError(f"{name}: unknown kind of case", remedy="the bundle is newer than this version of mmi")
        if started is not None:
            started(name)
        torch.manual_seed(0)
        report, tensors = CaseReport(name), Recorder(bundle.tensors(name))
        check(bundle, name, report, tensors, backend)
        yield report.finish(dict(tensors), tensors.read)


def _model(bundle: Bundle, report: CaseReport, backend: str, parts: tuple[str, ...]) -> Any:
    """The bundle's model, with every weight of ``parts`` (released prefixes) found; others may be absent."""
    model = bundle.model
    model.set_backend(backend)
    problems = [*bundle.report.unexpected, *bundle.report.mismatched]
    problems += [name for name in bundle.report.missing if name.startswith(parts)]
    for problem in problems:
        report.fail(problem, "weight missing, unexpected or of another shape")
    return model


def check_mmfs_op(bundle: Bundle, name: str, report: CaseReport, tensors: Recorder, backend: str) -> None:
    """Case 1."""
    for index in sorted({key.split(".")[0] for key in tensors}, key=int):
        value, locations, weights = (
            tensors[f"{index}.{k}"].clone().requires_grad_()
            for k in ("value", "sampling_locations", "attention_weights")
        )
        shapes = [(h, w) for h, w in tensors[f"{index}.spatial_shapes"].tolist()]
        areas = torch.tensor([0, *[h * w for h, w in shapes]]).cumsum(0)[:-1]
        report.check(f"{index}.level_start_index", areas, tensors.golden(f"{index}.level_start_index"))
        output = deform_sample(value, shapes, locations, weights, backend=backend)
        report.check(f"{index}.output", output, tensors.golden(f"{index}.output"))
        output.backward(tensors[f"{index}.grad_output"])
        for leaf, key in ((value, "value"), (locations, "sampling_locations"), (weights, "attention_weights")):
            assert leaf.grad is not None
            report.check(f"{index}.grad_{key}", leaf.grad, tensors.golden(f"{index}.grad_{key}"), GRADIENT)


_MODULE_NAMES = [(template_pattern(released), ours) for released, ours in mmfs_rules("", "")]


def _module_name(released: str) -> str | None:
    """Our name of a parameter of one MMFS module."""
    for pattern, template in _MODULE_NAMES:
        if match := pattern.fullmatch(released):
            return template.format(**match.groupdict())
    return None


def _module(described: dict[str, Any], weights: dict[str, Tensor], report: CaseReport, prefix: str) -> MMFS:
    """An MMFS module with the constructor arguments of the bundle."""
    arguments = described["module_kwargs"]
    levels = tuple(arguments["spatial_shapes"])
    config = MMFSConfig(
        heads=arguments["n_heads"],
        points=arguments["n_points"],
        width=int(arguments["d_model"] * arguments["ratio"]),
        levels=levels,
        max_images=arguments["max_num_image_per_seq"],
        offset_init=float(arguments["offset_init_magnitude"]),
    )
    base = arguments.get("base_spatial_shape", RELEASED_BASE)
    d_query, d_value, d_out = (arguments[key] for key in ("d_query", "d_value", "d_out"))
    module = MMFS(config, d_query=d_query, d_value=d_value, d_out=d_out, base=base)
    own = module.state_dict()
    with torch.no_grad():
        for released, tensor in weights.items():
            ours = _module_name(released)
            if ours is None or own[ours].shape != tensor.shape:
                report.fail(f"{prefix}{released}", "unknown weight or another shape")
            else:
                own[ours].copy_(tensor)
    return module


RELEASED_BASE = 16
"""Base grid of a released MMFS module whose constructor names none."""


def check_mmfs_module(bundle: Bundle, name: str, report: CaseReport, tensors: Recorder, backend: str) -> None:
    """Case 2."""
    for described in bundle.description(name):
        prefix, index = f"weights{described['weights']}.", described["index"]
        ratios = f"{prefix}scale_ratios(non-persistent buffer)"
        keys = [k for k in tensors if k.startswith(prefix) and k != ratios]
        module = _module(described, {k.removeprefix(prefix): tensors[k] for k in keys}, report, prefix)
        module.backend = backend
        if ratios in tensors:
            scale = torch.tensor([side / module.base for side in module.config.levels])
            report.check(ratios, scale, tensors.golden(ratios))
        _check_module_run(module, f"{index}.", report, tensors)


def _check_module_run(module: MMFS, at: str, report: CaseReport, tensors: Recorder) -> None:
    """One forward and backward run of case 2."""
    query = tensors[f"{at}query"].clone().requires_grad_()
    features = tensors[f"{at}input_flatten"].clone().requires_grad_()
    per_image = len(module.config.levels)
    shapes = [(h, w) for h, w in tensors[f"{at}input_spatial_shapes"].tolist()][:per_image]
    if f"{at}input_level_start_index" in tensors:
        every = shapes * features.shape[1]
        starts = torch.tensor([0, *[h * w for h, w in every]]).cumsum(0)[:-1]
        report.check(f"{at}input_level_start_index", starts, tensors.golden(f"{at}input_level_start_index"))
    visible = tensors[f"{at}attention_mask"].long()
    output = module(query, tensors[f"{at}reference_points"][:, :, 0], module.project_values(features), shapes, visible)
    report.check(f"{at}output", output, tensors.golden(f"{at}output"))
    output.backward(tensors[f"{at}grad_output"])
    assert query.grad is not None and features.grad is not None
    report.check(f"{at}grad_query", query.grad, tensors.golden(f"{at}grad_query"), GRADIENT)
    report.check(f"{at}grad_input_flatten", features.grad, tensors.golden(f"{at}grad_input_flatten"), GRADIENT)
    parameters = dict(module.named_parameters())
    start = f"{at}grad_param."
    for key in [k for k in tensors if k.startswith(start)]:
        ours = _module_name(key.removeprefix(start))
        gradient = parameters[ours].grad if ours else None
        if gradient is None:
            report.fail(key, "no gradient")
        else:
            report.check(key, gradient, tensors.golden(key), GRADIENT)
    for parameter in module.parameters():
        parameter.grad = None


def check_visual_tokenizer(bundle: Bundle, name: str, report: CaseReport, tensors: Recorder, backend: str) -> None:
    """Case 3. Tensors named ``…_strideN`` are stored with every N-th row and column."""
    tokenizer = _model(bundle, report, backend, ("visual_tokenizer.",)).visual_tokenizer
    pixels = tensors["pixels_u8"].float() / 255
    native = tokenizer.trunk.position_embedding.data
    resized = next((k for k in tensors if k.startswith("position_embedding_")), None)
    if resized is not None:  # the released code is resized by hand here, with corners aligned
        grid = (pixels.shape[2] // bundle.config.vision.patch_size, pixels.shape[3] // bundle.config.vision.patch_size)
        tokenizer.trunk.position_embedding.data = interpolate_position_embedding(native, grid, align_corners=True)
        report.check(resized, tokenizer.trunk.position_embedding.data, tensors.golden(resized))
    try:
        with torch.no_grad():
            out = tokenizer(pixels)
    finally:
        tokenizer.trunk.position_embedding.data = native
    computed = {"encoder_last_hidden_state": out.last_hidden, "image_embeds": out.image_embeds, "vis_embed": out.tokens}
    computed |= {f"multiscale_features.{level}": m for level, m in enumerate(out.features)}
    for key in tensors:
        match = re.fullmatch(r"(.+?)(?:_stride(\d+))?", key)
        assert match is not None
        if match[1] in computed:
            step = int(match[2] or 1)
            value = computed[match[1]]
            report.check(key, value[..., ::step, ::step] if step > 1 else value, tensors.golden(key))


def check_generate_texts(bundle: Bundle, name: str, report: CaseReport, tensors: Recorder, backend: str) -> None:
    """Case 5. Beam search in the released code writes ``</s>`` for either stop id; rows are filled up with pad."""
    model = _model(bundle, report, backend, ("visual_tokenizer.", "mm_decoder.", "text_decoder.", "soi_token"))
    runs, tokens = bundle.description(name), bundle.config.tokens
    with torch.no_grad():
        visual = model.visual_tokenizer(tensors["image_tensors_u8"].float() / 255)
    prompt = Prompt(tensors["text_ids"], tensors["attention_mask"], visual, tensors["num_image_per_seq"])
    for run in sorted({k.removesuffix(".text_ids") for k in tensors if k.endswith(".text_ids")}):
        options = runs[run]["kwargs"]
        settings = Settings(
            beams=options["num_beams"],
            max_new_tokens=options["max_length"],
            min_new_tokens=max(0, options["min_length"] - 1),  # the released length counts <s>
            repetition_penalty=options.get("repetition_penalty", 1.0),
            length_penalty=options.get("length_penalty", 1.0),
        )
        logits = f"{run}.step_logits"
        made = generate_text(
            model, prompt, settings, returned=options.get("num_captions", 1), record_logits=logits in tensors
        )
        golden = tensors.golden(f"{run}.text_ids")
        rows = made.ids
        if settings.beams > 1:
            rows = [[*ids[:-1], tokens.eos] if ids[-1] == tokens.boi else ids for ids in rows]
        width = max(golden.shape[1], *map(len, rows))
        filled = [ids + [tokens.pad] * (width - len(ids)) for ids in rows]
        report.check(f"{run}.text_ids", torch.tensor(filled), golden)
        if logits in tensors:
            report.check(logits, torch.stack(made.step_logits, dim=1), tensors.golden(logits))


def check_unet_mmfs(bundle: Bundle, name: str, report: CaseReport, tensors: Recorder, backend: str) -> None:
    """Case 7."""
    unet = _model(bundle, report, backend, ("image_decoder.",)).image_decoder.unet
    levels = sorted(k for k in tensors if k.startswith("mmfs_features."))
    inputs = (tensors["latents"], tensors["timesteps"], tensors["encoder_hidden_states"])
    with torch.no_grad():
        vision = unet.look([tensors[k] for k in levels], tensors["mmfs_mask"])
        report.check("eps", unet(*inputs, vision), tensors.golden("eps"))
        report.check("eps_without_mmfs_module", unet(*inputs), tensors.golden("eps_without_mmfs_module"))


def _with_model(
    check: Callable[[Any, Bundle, str, CaseReport, Recorder], None],
) -> Callable[[Bundle, str, CaseReport, Recorder, str], None]:
    """A check that needs the whole model."""

    def run(bundle: Bundle, name: str, report: CaseReport, tensors: Recorder, backend: str) -> None:
        check(_model(bundle, report, backend, ("",)), bundle, name, report, tensors)

    return run


CASES = (
    (r"case1_mmfs_op", check_mmfs_op),
    (r"case2_mmfs_module", check_mmfs_module),
    (r"case3_visual_tokenizer_\d+", check_visual_tokenizer),
    (r"case4_forward", _with_model(check_forward)),
    (r"case5_generate_texts", check_generate_texts),
    (r"case6_generate_images", _with_model(check_generate_images)),
    (r"case7_unet_mmfs", check_unet_mmfs),
)
