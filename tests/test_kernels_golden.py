"""deform_sample against recorded outputs and gradients of the released implementation (case 1 of the shipped bundle).

How the values were made: the released sampling function, run unmodified on the CPU in float32 with random inputs, two
thirds of the locations outside the maps. Against a float64 run they are exact to 7e-7 of the largest magnitude, which
is what the tolerance leaves for two float32 computations.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmi_kernels import deform_sample

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = load_file(ROOT / "engine/mmi_engine/verify/golden/case1_mmfs_op.safetensors")
CALLS = sorted({name.partition(".")[0] for name in GOLDEN})
TOLERANCE = 1e-6


def test_there_is_something_to_compare() -> None:
    assert len(CALLS) >= 3


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("call", CALLS)
def test_output_and_gradients_are_the_recorded_ones(call: str, backend: str) -> None:
    shapes = [(int(height), int(width)) for height, width in GOLDEN[f"{call}.spatial_shapes"]]
    names = ("value", "sampling_locations", "attention_weights")
    leaves = [GOLDEN[f"{call}.{name}"].clone().requires_grad_() for name in names]
    out = deform_sample(leaves[0], shapes, leaves[1], leaves[2], backend=backend)
    gradients = torch.autograd.grad(out, leaves, GOLDEN[f"{call}.grad_output"])
    found = {
        "output": out.detach(),
        **{f"grad_{name}": gradient for name, gradient in zip(names, gradients, strict=True)},
    }
    for name, tensor in found.items():
        recorded = GOLDEN[f"{call}.{name}"]
        assert tensor.shape == recorded.shape
        worst = (tensor - recorded).abs().max() / recorded.abs().max()
        assert worst <= TOLERANCE, f"{name} off by {worst:.1e}"
