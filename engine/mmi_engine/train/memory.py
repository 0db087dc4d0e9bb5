"""How much memory a training step will need, told before it is run.

Place in the flow: `mmi train --dry-run` on manifests. Weights, gradients, moments and averaged weights follow from the
configuration alone (no weight is read). Activations are tried: one forward pass of the recipe's own micro-batch on the
CPU, counting what autograd keeps; of a base larger than ``TRIAL_BYTES`` the trial is left out, and said so.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmi_engine.train.recipe import Recipe

TRIAL_BYTES = 4 * 2**30
GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """Bytes of one process: ``activations`` None where they were not tried."""

    weights: int
    gradients: int
    moments: int
    average: int
    activations: int | None = None
    batch: int = 0
    working: int = 0
    """What the text loss holds for a moment beside what is kept: the logits once more in float32."""

    @property
    def peak(self) -> int:
        """The most at one time: while gradients come, activations go, so the larger of the two stands for both."""
        steady = self.weights + self.moments + self.average + self.batch
        return steady + max(self.gradients, (self.activations or 0) + self.working)

    def to_json(self) -> dict[str, Any]:
        """GiB by part, for the command line."""
        parts = {name: getattr(self, name) for name in ("weights", "gradients", "moments", "average", "activations")}
        shown = {name: None if value is None else round(value / GIB, 4) for name, value in parts.items()}
        return {**shown, "batch": round(self.batch / GIB, 4), "peak": round(self.peak / GIB, 4)}

    def sentence(self) -> str:
        """``2.1 GiB a process: weights 0.5, …``; says where activations were not tried."""
        shown = {name: value for name, value in self.to_json().items() if value and name != "peak"}
        parts = ", ".join(f"{name} {value:.3g}" for name, value in shown.items())
        least = "at least " if self.activations is None else ""
        more = "; activations were not tried, the base is too large for it" if self.activations is None else ""
        return f"memory {least}{self.peak / GIB:.3g} GiB a process ({parts}){more}"


def static(module: nn.Module, recipe: Recipe, processes: int = 1) -> Estimate:
    """Everything but activations, of a module with its frozen parts marked; also of one on the meta device."""
    shared = processes if recipe.loop.shard == "fsdp" else 1
    weights = sum(p.numel() * p.element_size() for p in [*module.parameters(), *module.buffers()])
    trained = sum(4 * p.numel() for p in module.parameters() if p.requires_grad)
    average = trained if recipe.loop.ema else 0
    return Estimate(weights // shared, trained // shared, 2 * trained // shared, average // shared)


def tried(task: Any, recipe: Recipe, processes: int = 1) -> Estimate:
    """The estimate with activations, from a forward pass of the task's first micro-batch.

    Args:
        task: a :class:`mmi_engine.train.finetune.ManifestTask` on the CPU.
    """
    fixed = static(task.module, recipe, processes)
    batch = task.train.encoded(task.train.batch(0, recipe.loop.batch_size)).to("cpu")
    known = {p.untyped_storage().data_ptr() for p in [*task.module.parameters(), *task.module.buffers()]}
    inputs = [value for value in vars(batch.inputs).values() if isinstance(value, Tensor)]
    known |= {value.untyped_storage().data_ptr() for value in inputs}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # a storage that were freed could be taken for the next one

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    state = torch.get_rng_state()
    task.module.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), task.precision():
        loss, _ = task.module(batch)
    del loss
    torch.set_rng_state(state)
    held = sum(value.untyped_storage().nbytes() for value in inputs)
    logits = 4 * batch.inputs.text_ids.numel() * task.model.config.tokens.vocab_size
    parts = (fixed.weights, fixed.gradients, fixed.moments, fixed.average)
    return Estimate(*parts, sum(kept.values()), held, logits)


def before_loading(recipe: Recipe) -> Estimate:
    """Everything but activations from the configuration: modules on the meta device, no weight read."""
    from mmi_engine.model.interleaved import MMInterleaved
    from mmi_engine.train.foundation import configuration
    from mmi_engine.weights.quantize import LINEAR

    config, _ = configuration(recipe)
    with torch.device("meta"):
        model = MMInterleaved(config)
    if not recipe.loss.image:
        model.image_decoder = nn.Identity()  # type: ignore[assignment]
    kept = recipe.optim.frozen_dtype
    adapted = _adapted(model, recipe)
    weights = gradients = 0
    for name, parameter in model.named_parameters():
        frozen = any(re.search(p, f"model.{name}") for p in recipe.optim.freeze) or name.endswith("ignore_token")
        frozen = frozen or name.rpartition(".")[0] in adapted
        eight = kept == "int8" and LINEAR.match(name.removesuffix(".weight")) is not None
        small = frozen and kept != "fp32" and parameter.ndim > 1
        weights += parameter.numel() * ((1 if eight else 2) if small else 4)
        weights += 4 * len(parameter) if small and eight else 0  # a scale per row
        gradients += 0 if frozen else 4 * parameter.numel()
    extra = sum(4 * recipe.lora.rank * (layer.in_features + layer.out_features) for layer in adapted.values())
    weights, gradients = weights + extra, gradients + extra
    weights += sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    return Estimate(weights, gradients, 2 * gradients, gradients if recipe.loop.ema else 0)


def _adapted(model: nn.Module, recipe: Recipe) -> dict[str, nn.Linear]:
    """Layers that get adapters, by name."""
    from mmi_engine.train.adapters import targets

    if not recipe.lora.rank:
        return {}
    names = set(targets(model, recipe.lora))
    return {name: module for name, module in model.named_modules() if name in names and isinstance(module, nn.Linear)}
