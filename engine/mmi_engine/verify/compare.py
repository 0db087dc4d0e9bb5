"""Golden value against computed value: tolerances, the table of results, and the rule that nothing stays uncompared.

A tensor passes when  max|a − b| ≤ tolerance · max|b| + floor  with b the golden value; integers must be equal. Outputs
are held to 2e-5 with floor 1e-7, gradients and gradient norms to 1e-3 with floor 1e-6 (a float64 run of the released
code differs from its float32 run by up to 7e-7 … 3e-6 and 2.5e-4).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

OUTPUT = (2e-5, 1e-7)
GRADIENT = (1e-3, 1e-6)
EXACT = (0.0, 0.0)


@dataclass(frozen=True)
class Comparison:
    """One compared tensor. ``relative`` is the absolute error over the largest golden magnitude."""

    case: str
    tensor: str
    absolute: float
    relative: float
    passed: bool
    note: str = ""


@dataclass
class CaseReport:
    """All comparisons of one case; golden tensors that were neither input nor compared make it fail."""

    case: str
    rows: list[Comparison] = field(default_factory=list)

    def check(self, name: str, computed: Tensor, golden: Tensor, tolerance: tuple[float, float] = OUTPUT) -> None:
        """Compare one tensor; ``name`` is the golden tensor's name."""
        if computed.shape != golden.shape:
            note = f"shape {list(computed.shape)} instead of {list(golden.shape)}"
            self.rows.append(Comparison(self.case, name, float("inf"), float("inf"), False, note))
            return
        if not golden.is_floating_point():
            tolerance = EXACT
        a, b = computed.detach().double().cpu(), golden.double()
        absolute = float((a - b).abs().max()) if b.numel() else 0.0
        scale = float(b.abs().max()) if b.numel() else 0.0
        passed = bool(torch.isfinite(a).all()) and absolute <= tolerance[0] * scale + tolerance[1]
        self.rows.append(Comparison(self.case, name, absolute, absolute / scale if scale else absolute, passed))

    def fail(self, name: str, note: str) -> None:
        """Record something that cannot be compared at all."""
        self.rows.append(Comparison(self.case, name, float("inf"), float("inf"), False, note))

    def finish(self, tensors: dict[str, Tensor], inputs: set[str]) -> CaseReport:
        """Fail for every golden tensor that was neither read as input nor compared, and for an empty case."""
        compared = {row.tensor for row in self.rows}
        for name in sorted(set(tensors) - inputs - compared):
            self.fail(name, "not compared: this version does not know the tensor")
        if not self.rows:
            self.fail("(none)", "the case holds nothing to compare")
        return self

    @property
    def passed(self) -> bool:
        """Whether all comparisons passed."""
        return all(row.passed for row in self.rows)


class Recorder(dict[str, Tensor]):
    """Tensors of a case that remembers which were read, so that inputs need no list of their own."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__(tensors)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return super().__getitem__(name)

    def golden(self, name: str) -> Tensor:
        """A tensor to compare with: not counted as an input."""
        return super().__getitem__(name)
