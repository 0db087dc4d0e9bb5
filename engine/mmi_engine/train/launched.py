"""What `accelerate launch --config_file` asks for beyond plain data parallelism: FSDP2 and DeepSpeed.

Place in the flow: ``start.train`` calls :func:`adapted` before anything is loaded, the loop asks :func:`deepspeed`.
accelerate hands its configuration on in the environment; its own plugins read it here. FSDP2 is then done by
``sharding.py``, on CUDA and on CPUs alike (accelerate by itself would train unsharded on CPUs without a word),
DeepSpeed by accelerate, on CUDA alone. Examples: examples/accelerate/.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from typing import Any

from mmi_engine.errors import ConfigError, UsageError
from mmi_engine.train.recipe import Recipe, Resolved

FSDP, DEEPSPEED = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"
WORDS = "accelerate's configuration"


def _asked(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1", "yes")


def adapted(resolved: Resolved) -> Resolved:
    """The recipe with what accelerate's configuration says about sharding; ``recipe.json`` names it as the origin.

    Raises:
        ConfigError: FSDP of version 1, or what does not go together with sharding.
        UsageError: DeepSpeed cannot run here.
    """
    if _asked(DEEPSPEED):
        deepspeed(resolved.recipe)
    if not _asked(FSDP):
        return resolved
    from accelerate import FullyShardedDataParallelPlugin

    from mmi_engine.train.processes import process_state

    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError("FSDP of version 1 is not used", remedy="fsdp_version: 2 in accelerate's configuration")
    plugin = FullyShardedDataParallelPlugin()
    process_state()  # its choice of backend reads the same variables
    os.environ[FSDP] = "false"  # the loop shards by itself
    changes: dict[str, Any] = {"shard": "fsdp", "reshard": bool(plugin.reshard_after_forward)}
    changes["offload"] = type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy"
    if plugin.activation_checkpointing:
        changes["activation_checkpointing"] = True
    loop = dataclasses.replace(resolved.recipe.loop, **changes)
    recipe = dataclasses.replace(resolved.recipe, loop=loop)
    return Resolved(recipe, {**resolved.origins, **{f"loop.{name}": WORDS for name in changes}})


def deepspeed(recipe: Recipe) -> Any:
    """accelerate's DeepSpeed plugin with the recipe's batch, accumulation and clipping; None where nobody asks for it.

    Raises:
        UsageError: no CUDA device, or DeepSpeed is not installed.
        ConfigError: ZeRO stage 3, which leaves no process with whole weights to average and to write.
    """
    if not _asked(DEEPSPEED):
        return None
    import torch

    if not torch.cuda.is_available():
        raise UsageError("DeepSpeed needs CUDA devices", remedy="FSDP runs on CPUs: examples/accelerate/fsdp.yaml")
    if importlib.util.find_spec("deepspeed") is None:
        raise UsageError("DeepSpeed is asked for and not installed", remedy="pip install deepspeed")
    from accelerate import DeepSpeedPlugin

    plugin = DeepSpeedPlugin()  # reads a configuration file, or accelerate's
    if plugin.zero_stage == 3:
        raise ConfigError("ZeRO stage 3 is not used", remedy="stage 2, or examples/accelerate/fsdp.yaml")
    held, loop = plugin.deepspeed_config, recipe.loop
    held["train_micro_batch_size_per_gpu"], held["gradient_accumulation_steps"] = loop.batch_size, loop.accumulate
    held["gradient_clipping"] = recipe.optim.clip
    held.pop("train_batch_size", None)  # follows from those and the number of processes
    return plugin
