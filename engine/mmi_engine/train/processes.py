"""The processes of a run as accelerate knows them, asked for in the one way that connects them on a CPU as well.

Place in the flow: first call of ``start`` and ``finetune``. Without being told, accelerate starts unconnected processes
where there is no accelerator: each would train alone and overwrite the others.
"""

from __future__ import annotations

import os

import torch
from accelerate import PartialState


def process_state() -> PartialState:
    """Rank, world size and device of this process; joins the others (gloo) where several were launched on CPUs."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and not torch.cuda.is_available():
        return PartialState(cpu=True)
    return PartialState()
