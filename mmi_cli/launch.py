"""How this process was started: alone, by `torchrun` / `accelerate launch`, or by a launch that went wrong silently.

Place in the flow: `generating.py` asks for rank and world size, and has launches called out that will not do what was
asked: `accelerate launch --cpu --num_processes 2` and some configuration files start a single process, `srun` and
`mpirun` start several that do not know of each other.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from mmi_engine.errors import UsageError

# launcher, how many it started, number of this one. A Slurm batch script has SLURM_NTASKS and SLURM_PROCID too, and is
# one process all the same; the tasks of a step are set by srun alone.
STRANGERS = (
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
)
TORCHRUN = "ACCELERATE_USE_CPU=true torchrun --nproc_per_node N -m mmi_cli …"


def ranks(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(rank, processes) as `torchrun` and `accelerate launch` export them; (0, 1) without a launcher.

    Raises:
        UsageError: the variables are there but are no sound numbers.
    """
    if not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= environment.keys():
        return 0, 1
    try:
        rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    except ValueError:
        rank, world = -1, 0
    if not 0 <= rank < world:
        raise UsageError(
            f"RANK={environment['RANK']} of WORLD_SIZE={environment['WORLD_SIZE']} is no process of a launch",
            remedy="unset both to run alone",
        )
    return rank, world


def check(warn: Callable[[str], None], *, streaming: bool, environment: Mapping[str, str] = os.environ) -> None:
    """Say what is odd about the launch.

    Args:
        warn: told in a sentence.
        streaming: whether result rows go to stdout.
        environment: of this process.

    Raises:
        UsageError: several processes would write to one stdout.
    """
    _, world = ranks(environment)
    if world > 1:
        if streaming:
            remedy = "name a folder: --out DIR, or run one process"
            raise UsageError(f"{world} processes cannot share stdout in order", remedy=remedy)
        return
    wanted = _accelerate_wants(environment)
    if wanted is not None and wanted > 1:
        warn(f"accelerate launch was asked for {wanted} processes but started one; on a CPU use: {TORCHRUN}")
    for name, size, rank in STRANGERS:
        count = environment.get(size, "1")
        if count.isdigit() and int(count) > 1 and rank in environment:
            part = f"--shard $(({rank}+1))/{count}"
            warn(f"{name} started {count} processes that do not know of each other; give each its part with {part}")


def _accelerate_wants(environment: Mapping[str, str]) -> int | None:
    """How many processes the `accelerate launch` above this process was asked for; None without one."""
    if not any(name.startswith("ACCELERATE_") for name in environment):
        return None
    words = parent_command(os.getppid())
    if "launch" not in words:
        return None
    for index, word in enumerate(words):
        match = re.fullmatch(r"--num[_-]processes(?:=(\d+))?", word)
        if match:
            value = match[1] or (words[index + 1] if index + 1 < len(words) else "")
            return int(value) if value.isdigit() else None
    return _configured(words, environment)


def _configured(words: list[str], environment: Mapping[str, str]) -> int | None:
    """``num_processes`` of the configuration file that accelerate reads."""
    named = next(
        (words[i + 1] for i, word in enumerate(words[:-1]) if word in ("--config_file", "--config-file")), None
    )
    home = environment.get("HF_HOME") or str(Path(environment.get("HOME", "")) / ".cache/huggingface")
    path = Path(named) if named else Path(home) / "accelerate/default_config.yaml"
    try:
        match = re.search(r"^num_processes:\s*(\d+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    except (OSError, UnicodeDecodeError):
        return None
    return int(match[1]) if match else None


def parent_command(process: int) -> list[str]:
    """The command line of a process, as words; [] where the system does not tell."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
    except OSError:
        return []
