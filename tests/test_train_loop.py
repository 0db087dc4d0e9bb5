"""The loop: a run that was interrupted, even by kill -9, ends with the same bits as one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from train_tiny import TinyTask, recipe

from mmi_engine.errors import Interrupted, OutputError
from mmi_engine.train import checkpoints
from mmi_engine.train.curves import MetricsFile, read
from mmi_engine.train.loop import Loop, NotFiniteError

SCRIPT = Path(__file__).with_name("train_tiny.py")
STEPS = 20
DEADLINE = 120.0


def train(directory: Path, *, resume: bool = False, task: TinyTask | None = None, **loop: object) -> TinyTask:
    directory.mkdir(parents=True, exist_ok=True)
    task = task or TinyTask()
    Loop(recipe(STEPS, **loop), task, directory).run(resume=resume)
    return task


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed")
    train(directory)
    return directory


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def start(directory: Path, sleep: float) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, str(SCRIPT), str(directory), str(STEPS), str(sleep)], env=environment())


def wait_for_step(directory: Path, step: int) -> None:
    """Until the run has logged ``step``."""
    path, limit = directory / "metrics.jsonl", time.monotonic() + DEADLINE
    while not (path.exists() and any(line["step"] >= step for line in read(path))):
        assert time.monotonic() < limit, "the run did not get so far"
        time.sleep(0.02)


def assert_same_end(directory: Path, reference: Path) -> None:
    """Exported (averaged) weights, raw weights, optimizer moments and the log are the same, to the last bit."""
    ours, theirs = (torch.load(d / "model" / "weights.pt") for d in (directory, reference))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    last = f"checkpoints/step-{STEPS:08d}"
    raw = [(d / last / "model.safetensors").read_bytes() for d in (directory, reference)]
    assert raw[0] == raw[1]
    moments = [torch.load(d / last / "optimizer.bin")["state"] for d in (directory, reference)]
    for key, state in moments[0].items():
        assert torch.equal(state["exp_avg_sq"], moments[1][key]["exp_avg_sq"])
    assert losses(directory) == losses(reference)


def losses(directory: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read(directory / "metrics.jsonl") if "loss" in line]


def test_killed_run_resumes_to_the_same_bits(tmp_path: Path, undisturbed: Path) -> None:
    process = start(tmp_path, 0.05)
    wait_for_step(tmp_path, 8)  # behind checkpoint 5, before checkpoint 10 or little after
    process.kill()
    process.wait()
    done = [path.name for path in checkpoints.complete(tmp_path / "checkpoints")]
    assert done and done[-1] != f"step-{STEPS:08d}"
    task = train(tmp_path, resume=True)
    assert min(task.asked) == int(done[-1].removeprefix("step-"))  # the data go on where the checkpoint stands
    assert_same_end(tmp_path, undisturbed)


def test_sigterm_writes_a_checkpoint_and_says_130(tmp_path: Path, undisturbed: Path) -> None:
    process = start(tmp_path, 0.05)
    wait_for_step(tmp_path, 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(DEADLINE) != 0
    stopped_at = read(tmp_path / "metrics.jsonl")[-1]["step"]
    newest = checkpoints.complete(tmp_path / "checkpoints")[-1].name
    assert newest == f"step-{stopped_at:08d}"
    train(tmp_path, resume=True)
    assert_same_end(tmp_path, undisturbed)


def test_signal_in_process_raises_interrupted(tmp_path: Path) -> None:
    class Impatient(TinyTask):
        def batch(self, index: int) -> torch.Tensor:
            if index == 6:
                os.kill(os.getpid(), signal.SIGINT)
            return super().batch(index)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted) as caught:
        train(tmp_path, task=Impatient())
    assert caught.value.exit_code == 130 and "--resume" in str(caught.value)
    assert signal.getsignal(signal.SIGINT) is before


def test_non_finite_loss_names_the_batch(tmp_path: Path) -> None:
    task = TinyTask(poisoned=7)
    with pytest.raises(NotFiniteError) as caught:
        train(tmp_path, task=task)
    message = caught.value.message
    assert "nan" in message and "step 7" in message
    assert all(name in message for name in task.ids(task.batch(7)))
    assert checkpoints.complete(tmp_path / "checkpoints")[-1].name == "step-00000005"  # nothing poisoned was saved


def test_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    """Two micro-batches of a model without dropout move the weights as their union does."""
    moved = []
    for accumulate in (1, 2):
        task = TinyTask(dropout=0.0)
        if accumulate == 1:
            single = task.batch
            task.batch = lambda i, single=single: torch.cat([single(2 * i), single(2 * i + 1)])  # type: ignore[method-assign]
        folder = tmp_path / str(accumulate)
        train(folder, task=task, accumulate=accumulate)
        moved.append(torch.cat([p.detach().flatten() for p in task.module.parameters()]))
    assert torch.allclose(moved[0], moved[1], atol=1e-5)


def test_two_processes_equal_one_that_accumulates(tmp_path: Path) -> None:
    """The mean of two processes' gradients is the mean over two micro-batches: the same stream, the same weights."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(SCRIPT)]
    settings = {**environment(), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path / "two"), str(STEPS), "0", "exact"], env=settings, check=True, timeout=300)
    assert [(tmp_path / "two" / f"world-{rank}").read_text() for rank in (0, 1)] == ["2", "2"]
    train(tmp_path / "one", task=TinyTask(dropout=0.0), accumulate=2)
    ours, theirs = (torch.load(tmp_path / name / "model" / "weights.pt") for name in ("two", "one"))
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], atol=1e-5), name


def test_existing_run_is_not_overwritten(undisturbed: Path) -> None:
    with pytest.raises(OutputError, match="already holds"):
        train(undisturbed)


def test_what_a_run_leaves_behind(undisturbed: Path) -> None:
    assert [p.name for p in checkpoints.complete(undisturbed / "checkpoints")] == ["step-00000015", "step-00000020"]
    assert (undisturbed / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert (undisturbed / "preview.png").exists()
    lines = read(undisturbed / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "val_norm" in line] == [10, 20]
    assert "body.0.weight" in (undisturbed / "parameters.txt").read_text(encoding="utf-8")
    assert not list((undisturbed / "checkpoints").glob(".partial*"))


def test_learning_rate_in_the_log_follows_the_schedule(undisturbed: Path) -> None:
    rates = [line["lr"] for line in read(undisturbed / "metrics.jsonl") if "lr" in line]
    assert rates[:4] == pytest.approx([0.0125, 0.025, 0.0375, 0.05])
    assert rates[12] == pytest.approx(0.025)  # half-way down the cosine: step 12 of 4 … 20
    assert rates == sorted(rates[:5]) + sorted(rates[5:], reverse=True)


def test_metrics_file_drops_what_a_kill_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2}\n{"step": 2, "loss": 1}\n{"step": 3, "lo', encoding="utf-8")
    file = MetricsFile(tmp_path)
    file.cut(1)
    file.write({"step": 2, "loss": 0.5})
    file.close()
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == [
        {"step": 1, "loss": 2},
        {"step": 2, "loss": 0.5},
    ]
