"""Seconds from the command line to the model's first step, beside importing transformers and diffusers whole.

    python benchmarks/startup.py [--root CHECKOUT] [--repeats 5] [--json]

Starts `mmi story` on the shipped example again and again, each time in a fresh process that ends at the first call of
any module of the model; wall clock and processor time, the median of the repeats after one that fills the caches of
files. `--root` measures another checkout with this Python. A number of modules is a measure that no other load changes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STORY = """
import json, os, resource, runpy, sys, time
from torch.nn.modules import module

def first(*_):
    used = resource.getrusage(resource.RUSAGE_SELF)
    took = time.time() - float(os.environ["STARTED"])
    found = {"wall_s": took, "processor_s": used.ru_utime + used.ru_stime, "modules": len(sys.modules)}
    os.write(1, (json.dumps(found) + "\\n").encode())
    os._exit(0)

module.register_module_forward_pre_hook(first)
sys.argv = ["mmi", "story", *sys.argv[1:]]
runpy.run_module("mmi_cli", run_name="__main__")
"""
WHOLE = """
import json, os, resource, sys, time
import diffusers, transformers

for library in (diffusers, transformers):
    for name in dir(library):
        try:
            getattr(library, name)
        except Exception:
            pass
used = resource.getrusage(resource.RUSAGE_SELF)
took = time.time() - float(os.environ["STARTED"])
print(json.dumps({"wall_s": took, "processor_s": used.ru_utime + used.ru_stime, "modules": len(sys.modules)}))
"""


def once(root: Path, code: str, *arguments: str) -> dict[str, float]:
    """One fresh process; what it printed last."""
    paths = os.pathsep.join(str(root / name) for name in (".", "engine", "kernels"))
    environment = {**os.environ, "PYTHONPATH": paths, "STARTED": repr(time.time()), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, cwd=root, capture_output=True, text=True, check=False
    )
    if done.returncode or not done.stdout:
        raise SystemExit(f"the measured process failed:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(root: Path, repeats: int) -> dict[str, Any]:
    """Medians of both."""
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, code in (("story", STORY), ("whole", WHOLE)):
            runs = []
            for number in range(repeats + 1):
                out = ["examples/story.jsonl", "--out", f"{folder}/{number}"] if name == "story" else []
                runs.append(once(root, code, *out))
            result[name] = {key: statistics.median(run[key] for run in runs[1:]) for key in runs[0]}
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    result = measure(given.root.resolve(), given.repeats)
    if given.json:
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
        return 0
    for name, title in (("story", "mmi story, to the first step"), ("whole", "transformers and diffusers whole")):
        row = result[name]
        times = f"{row['wall_s']:6.2f} s  {row['processor_s']:6.2f} s of a processor"
        sys.stdout.write(f"{title:34} {times}  {row['modules']:5.0f} modules\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
