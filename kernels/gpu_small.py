"""A few calls of every kind of kernel, small enough for compute-sanitizer: `gpu_check.sh` runs it under its tools.

Prints nothing; ends with an error if a result is not finite.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests")]

from kernel_cases import CASES, draw, evaluate, run  # noqa: E402

CALLS = {
    "mmfs, odd sizes": torch.bfloat16,
    "mmfs, one query": torch.float32,
    "mmfs, ragged channels": torch.float32,
    "attention, narrow": torch.float32,
    "sample, many levels": torch.float16,
}


def main() -> int:
    for name, dtype in CALLS.items():
        given = {key: tensor.cuda() for key, tensor in draw(CASES[name], dtype).items()}
        for deterministic in (False, True) if name == "mmfs, odd sizes" else (False,):
            torch.use_deterministic_algorithms(deterministic)
            found = evaluate(lambda inputs, name=name: run(CASES[name], inputs, "cuda"), given)
            torch.cuda.synchronize()
            if not all(tensor.isfinite().all() for tensor in found.values()):
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
