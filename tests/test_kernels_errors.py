"""Errors of the CPU kernel against float64, forward and backward, in every dtype and shape of `kernel_cases.py`.

The measure and the bound are those of the CUDA kernel's tests. The errors are printed at the end of a run and kept in
docs/kernel.md, next to those of the CUDA kernel.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_cases import CASES, assert_as_good_as_torch, draw, evaluate, run, told


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_errors(name: str, dtype: torch.dtype, record_property: Callable[[str, object], None]) -> None:
    case, given = CASES[name], draw(CASES[name], dtype)
    found = assert_as_good_as_torch(case, given, evaluate(lambda inputs: run(case, inputs, "numba"), given))
    record_property("errors", told("numba", name, dtype, found))
