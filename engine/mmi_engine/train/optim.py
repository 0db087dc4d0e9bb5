"""Optimizer pieces that the loop is made of: parameter groups, learning-rate schedule, averaged weights.

Between the recipe's ``[optim]`` table and :mod:`mmi_engine.train.loop`. Source: paper appendix (AdamW, cosine schedule
with linear warm-up, weight decay 0.05, none on biases and norms); the released parameter groups (first match wins).
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from mmi_engine.errors import ConfigError
from mmi_engine.train.sections import OptimConfig

NORM_LAYERS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def cosine_with_warmup(step: int, *, total: int, warmup: int, min_ratio: float) -> float:
    """Factor on the peak learning rate for optimizer step ``step`` (0-based).

    Linear from 1 / ``warmup`` to 1 over the first ``warmup`` steps, then half a cosine down to ``min_ratio`` at
    ``total``. Closed form of the step alone, so that nothing has to be restored on resume.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def freeze(module: nn.Module, patterns: tuple[str, ...]) -> list[str]:
    """Switch gradients off for parameters whose name a pattern is found in; returns their names.

    Raises:
        ConfigError: a pattern matches no parameter (a typing error would otherwise train what should be frozen).
    """
    frozen: list[str] = []
    for pattern in patterns:
        hits = [name for name, _ in module.named_parameters() if re.search(pattern, name)]
        if not hits:
            raise ConfigError(
                f"optim.freeze: {pattern!r} matches no parameter", remedy="see the names in parameters.txt"
            )
        frozen += hits
    for name, parameter in module.named_parameters():
        if name in set(frozen):
            parameter.requires_grad_(False)
    return frozen


def parameter_groups(module: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """AdamW groups of the trainable parameters: ``params``, ``names``, ``lr`` (peak), ``weight_decay``, ``label``.

    A parameter joins the first ``config.groups`` entry whose pattern is found in its name, else the default. Within
    a group, biases, norm weights and every other vector (one dimension or fewer) get no weight decay.
    """
    undecayed = _norm_parameters(module)
    buckets: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        rule = next((g for g in config.groups if re.search(g.pattern, name)), None)
        peak = config.lr if rule is None else rule.lr if rule.lr is not None else rule.lr_scale * config.lr
        decays = (rule is None or rule.decay) and parameter.ndim > 1 and name not in undecayed
        label = "default" if rule is None else rule.pattern
        bucket = buckets.setdefault(
            (label, decays),
            {
                "params": [],
                "names": [],
                "lr": peak,
                "weight_decay": config.weight_decay if decays else 0.0,
                "label": label,
            },
        )
        bucket["params"].append(parameter)
        bucket["names"].append(name)
    return list(buckets.values())


def _norm_parameters(module: nn.Module) -> set[str]:
    """Names of parameters that belong to normalisation layers, whatever their shape."""
    names: set[str] = set()
    for prefix, child in module.named_modules():
        if isinstance(child, NORM_LAYERS) or type(child).__name__.endswith("RMSNorm"):
            names |= {f"{prefix}.{n}" if prefix else n for n, _ in child.named_parameters(recurse=False)}
    return names


class Average:
    """Exponential moving average of a module's trainable parameters, kept in fp32.

    After update ``t`` (from 0) ``shadow = d·shadow + (1 − d)·weights`` with ``d = min(decay, (1 + t) / (10 + t))``, so
    that the average follows quickly at first. Frozen parameters are not copied.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.shadow = {n: p.detach().float().clone() for n, p in module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards the current weights."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = dict(module.named_parameters())
        names = list(self.shadow)
        weights = [current[n].detach().float() for n in names]
        torch._foreach_lerp_([self.shadow[n] for n in names], weights, 1 - decay)
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        """Shadow weights and the number of updates."""
        return {"updates": self.updates, "shadow": self.shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`; the names must be the same.

        Raises:
            ConfigError: the checkpoint averages other parameters than this run trains.
        """
        if state["shadow"].keys() != self.shadow.keys():
            raise ConfigError(
                "the checkpoint's averaged weights belong to other parameters", remedy="start without --resume"
            )
        self.updates = int(state["updates"])
        for name, value in state["shadow"].items():
            self.shadow[name].copy_(value)

    def applied(self, module: nn.Module) -> _Swapped:
        """Context in which ``module`` carries the averaged weights."""
        return _Swapped(module, self.shadow)


class _Swapped:
    def __init__(self, module: nn.Module, shadow: dict[str, Tensor]) -> None:
        self.parameters = {n: p for n, p in module.named_parameters() if n in shadow}
        self.shadow = shadow

    def __enter__(self) -> None:
        self.saved = {n: p.data for n, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            parameter.data = self.shadow[name].to(parameter.dtype)

    def __exit__(self, *_: object) -> None:
        for name, parameter in self.parameters.items():
            parameter.data = self.saved[name]
