"""Launches that silently go wrong: one process where several were meant, several that do not know of each other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmi_cli import launch
from mmi_engine.errors import UsageError

REPOSITORY = Path(__file__).resolve().parent.parent


# what sbatch --ntasks 4 exports to its script, and what srun adds
BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_NPROCS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
STEP = {"SLURM_STEP_ID": "0", "SLURM_STEPID": "0"}


@pytest.mark.parametrize(
    ("parent", "environment", "said"),
    [
        (["accelerate", "launch", "--cpu", "--num_processes", "2", "x"], {"ACCELERATE_USE_CPU": "1"}, "asked for 2"),
        (["accelerate", "launch", "--num-processes=3"], {"ACCELERATE_USE_CPU": "1"}, "asked for 3"),
        (["accelerate", "launch", "--num_processes", "1"], {"ACCELERATE_USE_CPU": "1"}, None),
        (["accelerate", "launch", "x"], {"ACCELERATE_USE_CPU": "1"}, None),
        (["bash"], {"ACCELERATE_USE_CPU": "1"}, None),
        (["srun"], {**BATCH, **STEP, "SLURM_STEP_NUM_TASKS": "4"}, "--shard $((SLURM_PROCID+1))/4"),
        (["srun"], {**BATCH, **STEP, "SLURM_STEP_NUM_TASKS": "1"}, None),  # srun -n 1 in a job of four tasks
        (["slurm_script"], BATCH, None),  # the batch script itself, not a task of it
        (["mpirun"], {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, "$((OMPI_COMM_WORLD_RANK+1))/2"),
        ([], {}, None),
        (["x"], {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, None),
    ],
)
def test_launches_that_start_one_process_or_strangers_are_called_out(monkeypatch, tmp_path, parent, environment, said):
    monkeypatch.setattr(launch, "parent_command", lambda process: parent)
    warnings: list[str] = []
    launch.check(warnings.append, streaming=False, environment={"HOME": str(tmp_path), **environment})
    assert (said is None and not warnings) or (len(warnings) == 1 and said in warnings[0])


def test_the_number_of_processes_may_stand_in_accelerates_configuration(monkeypatch, tmp_path):
    (tmp_path / "two.yaml").write_text("use_cpu: true\nnum_processes: 2\n")
    words = ["accelerate", "launch", "--config_file", str(tmp_path / "two.yaml"), "x"]
    monkeypatch.setattr(launch, "parent_command", lambda process: words)
    warnings: list[str] = []
    launch.check(warnings.append, streaming=False, environment={"ACCELERATE_USE_CPU": "1"})
    assert len(warnings) == 1


def test_a_real_accelerate_launch_of_one_process_is_noticed(tmp_path):
    """environment.md: --cpu --num_processes 2 starts one process; its command line says what was meant."""
    script = tmp_path / "script.py"
    script.write_text("from mmi_cli import launch\nlaunch.check(print, streaming=False)\nprint(launch.ranks())\n")
    path = os.pathsep.join(str(REPOSITORY / name) for name in (".", "engine", "kernels"))
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2"]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([*command, str(script)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    if "(0, 1)" in done.stdout:
        assert "asked for 2 processes but started one" in done.stdout
    else:
        assert "(0, 2)" in done.stdout and "(1, 2)" in done.stdout


def test_one_stdout_is_not_shared_and_nonsense_is_refused():
    two = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    with pytest.raises(UsageError):
        launch.check(lambda text: None, streaming=True, environment=two)
    for rank, world in (("2", "2"), ("x", "2"), ("-1", "1"), ("0", "0")):
        with pytest.raises(UsageError):
            launch.ranks({"RANK": rank, "LOCAL_RANK": "0", "WORLD_SIZE": world})
