"""Parameters, gradients and optimizer state spread over the processes (FSDP2), and checkpoints that any number reads.

Place in the flow: the loop calls :func:`shard` before it makes the optimizer (``loop.shard = "fsdp"``). Attention and
FFN of every language layer and every layer of the trunk are units of their own; the rest is one. Works on CUDA (NCCL)
and on CPUs (gloo). A checkpoint holds whole tensors under the names of an unsharded run: one process resumes what eight
have begun, and the reverse.
Source: torch.distributed.fsdp.fully_shard (Zhao et al. 2023).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmi_engine.train.interleaved import InterleavedObjective
from mmi_engine.train.sections import LoopConfig

MODEL, OPTIMIZER = "model.safetensors", "optimizer.bin"


class WholeObjective(InterleavedObjective):
    """The objective, with every trainable parameter of the outermost unit in the graph.

    Processes reduce the gradients of a unit together; a batch without a picture to draw would leave the image decoder
    without gradients in one process while the others wait.
    """

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """As :class:`InterleavedObjective`."""
        loss, parts = super().forward(batch)
        inner = {id(p) for layer in units(self.model) for p in layer.parameters()}
        rest = [p for p in self.model.parameters() if p.requires_grad and id(p) not in inner]
        if rest and torch.is_grad_enabled():
            loss = loss + sum(p.flatten()[:1].sum() for p in rest).to(loss) * 0.0  # type: ignore[union-attr]
        return loss, parts


def units(model: Any) -> list[nn.Module]:
    """The modules that are sharded one by one: those whose weights are read in their own forward pass alone (MMFS
    projects the values of all layers beforehand, so it belongs to the rest)."""
    inner = [getattr(layer, "layer", layer) for layer in model.language.body.layers]
    blocks = [module for layer in inner for module in (layer.self_attn, layer.mlp)]
    return [*blocks, *model.visual_tokenizer.trunk.layers]


def shard(module: Any, device: torch.device, processes: int, loop: LoopConfig) -> None:
    """Shard an objective in place over all processes, as ``loop.reshard`` and ``loop.offload`` say."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    mesh = init_device_mesh(device.type, (processes,))
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if loop.offload else OffloadPolicy()
    how: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": loop.reshard, "offload_policy": offload}
    if device.type == "cuda" and not loop.offload:
        module.to(device)
    for parameter in module.parameters():  # channels-last weights cannot be cut into shards
        parameter.data = parameter.data.contiguous()
    for layer in units(module.model):
        fully_shard(layer, **how)
    fully_shard(module, **how)


def full_state(module: nn.Module) -> dict[str, Tensor]:
    """The whole weights on the CPU of the first process (empty in the others); all processes must call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def save(module: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, *, main: bool) -> None:
    """Write weights and optimizer state as accelerate writes those of one process; all processes must call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    state = full_state(module)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    named = get_optimizer_state_dict(module, optimizer, options=options)
    if not main:
        return
    save_file({k: v.contiguous() for k, v in state.items()}, folder / MODEL, metadata={"format": "pt"})
    order = [name for group in named["param_groups"] for name in group["params"]]
    number = {name: place for place, name in enumerate(order)}
    groups = [{**group, "params": [number[name] for name in group["params"]]} for group in named["param_groups"]]
    moments = {number[name]: value for name, value in named["state"].items()}
    torch.save({"state": moments, "param_groups": groups}, folder / OPTIMIZER)


def load(module: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, names: list[str]) -> None:
    """Read what :func:`save`, or a run of one process, has written.

    Args:
        module, optimizer: sharded, of this run.
        folder: the checkpoint.
        names: of the trainable parameters, in the optimizer's order.
    """
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(module, load_file(folder / MODEL), options=options)
    stored = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
    groups = [{**group, "params": [names[number] for number in group["params"]]} for group in stored["param_groups"]]
    state = {names[number]: value for number, value in stored["state"].items()}
    set_optimizer_state_dict(module, optimizer, {"state": state, "param_groups": groups}, options=options)


def align(optimizer: torch.optim.Optimizer) -> None:
    """Lay moments out in memory as their parameters are: the fused AdamW walks both in the same order, and a checkpoint
    of several processes has lost that the U-Net's weights are channels-last."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for name, value in optimizer.state.get(parameter, {}).items():
                if value.shape == parameter.shape and value.stride() != parameter.stride():
                    optimizer.state[parameter][name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def whole(value: Any) -> Any:
    """A sharded scalar (the gradient norm) as a plain tensor."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value
