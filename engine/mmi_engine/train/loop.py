"""The training loop: the only one, for every recipe.

    batch(index) → module(batch) → loss → backward → clip → AdamW → EMA → log / evaluate / checkpoint

Runs over accelerate, hence unchanged on one process, under ``accelerate launch`` or ``torchrun``. Every random draw of
micro-batch ``i`` comes from a generator seeded with (recipe seed, ``i``), and the learning rate is a function of the
step; a resumed run therefore repeats an undisturbed one bit for bit. Source: paper Tables 11 to 15, docs/model.md.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor

from mmi_engine.errors import GenerationError, Interrupted, OutputError
from mmi_engine.train import checkpoints, launched, sharding
from mmi_engine.train.curves import MetricsFile
from mmi_engine.train.loader import stream
from mmi_engine.train.optim import Average, cosine_with_warmup, freeze, parameter_groups
from mmi_engine.train.recipe import Recipe
from mmi_engine.train.task import Task
from mmi_engine.train.watching import Watch

logger = logging.getLogger(__name__)
Report = Callable[[dict[str, Any]], None]
SEED_STRIDE = 1_000_003


class NotFiniteError(GenerationError):
    """The loss is NaN or infinite; the message holds the ids of the batch. Never replaced by another batch."""

    code = "not_finite"
    exit_code = 1


class Loop:
    """One training run in ``directory``.

    Args:
        recipe: all numbers.
        task: module, data and losses.
        directory: run directory; checkpoints, metrics and previews go there.
        report: called on the main process with each line of ``metrics.jsonl`` as it is written.
    """

    def __init__(self, recipe: Recipe, task: Task, directory: Path, report: Report | None = None) -> None:
        self.recipe, self.task, self.directory = recipe, task, directory
        self.report = report or (lambda _: None)
        loop = recipe.loop
        if loop.threads:
            torch.set_num_threads(loop.threads)
        torch.set_flush_denormal(True)  # vanishing moments and activations cost CPUs a hundred times the cycles
        self.accelerator = Accelerator(
            gradient_accumulation_steps=loop.accumulate,
            mixed_precision="bf16" if loop.precision == "bf16" else "no",
            log_with=list(loop.trackers) or None,
            project_dir=str(directory / "trackers") if loop.trackers else None,
            # a batch without a picture to draw leaves the image decoder without gradients
            deepspeed_plugin=launched.deepspeed(recipe),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        freeze(task.module, recipe.optim.freeze)
        self.sharded = loop.shard == "fsdp" and self.accelerator.num_processes > 1
        if self.sharded:
            sharding.shard(task.module, self.accelerator.device, self.accelerator.num_processes, loop)
        else:  # before the average is copied from it; a task may have moved but a part
            task.module.to(self.accelerator.device)
        groups = parameter_groups(task.module, recipe.optim)
        self.names = [name for group in groups for name in group["names"]]
        self.peaks = [group["lr"] for group in groups]
        optimizer = torch.optim.AdamW(
            [{k: v for k, v in g.items() if k not in ("names", "label")} for g in groups],
            betas=recipe.optim.betas,
            eps=recipe.optim.eps,
            fused=not self.sharded,
        )
        self.average = Average(task.module, loop.ema) if loop.ema else None
        self.position = checkpoints.Position()
        self.module: Any = task.module
        self.optimizer: Any = optimizer
        if not self.sharded:
            self.module, self.optimizer = self.accelerator.prepare(task.module, optimizer)
        self.accelerator.register_for_checkpointing(self.position, *([self.average] if self.average else []))
        self.metrics = MetricsFile(directory, enabled=self.accelerator.is_main_process)
        self.watch = Watch(recipe, self.accelerator, directory)
        self.stop_signal = 0
        self.waited = 0.0
        if self.accelerator.is_main_process:
            _write_parameters(directory / "parameters.txt", groups, task.module)

    # ------------------------------------------------------------------ the run

    def run(self, *, resume: bool = False) -> dict[str, float]:
        """Train to the recipe's last step; returns the last evaluation.

        Raises:
            Interrupted: SIGINT or SIGTERM; a checkpoint was written first.
            NotFiniteError: a loss was NaN or infinite.
            OutputError: the directory holds a run and ``resume`` is False, or nothing to resume.
        """
        self._restore(resume)
        loop = self.recipe.loop
        handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        last_saved, figures = time.monotonic(), {}
        clock = _Clock(self.position.seconds)
        try:
            self.task.module.train()
            for batches in self._batches():
                line = self._step(batches, clock)
                step = self.position.step
                self.position.seconds = clock.total()
                done = step == loop.steps
                if step % loop.log_every == 0 or done:
                    values = {k: round(float(v), 6) if isinstance(v, Tensor) else v for k, v in line.items()}
                    rates = clock.rates(self.position, self.waited)
                    self._log({**values, **rates, **self.watch.figures(step)})
                if step % loop.eval_every == 0 or done:
                    figures = self._evaluate()
                    clock.skip()
                if self.watch.sheet_due(step) and not self.sharded:
                    self._sheet()
                    clock.skip()
                due = time.monotonic() - last_saved > 60 * loop.checkpoint_minutes
                due |= bool(loop.checkpoint_steps) and step % loop.checkpoint_steps == 0
                if self._stopping() or due or done:
                    self._save()
                    last_saved = time.monotonic()
                    clock.skip()
                if self._stopping() and not done:
                    raise Interrupted(
                        f"stopped at step {step} of {loop.steps}", remedy="the same command with --resume"
                    )
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            self.metrics.close()
            self.watch.end()
        self._export("model")
        return figures

    def _step(self, batches: list[tuple[int, Any]], clock: _Clock) -> dict[str, Any]:
        """One optimizer step over ``accumulate`` micro-batches; returns what is logged, still on the device."""
        recipe = self.recipe
        factor = cosine_with_warmup(
            self.position.step,
            total=recipe.loop.steps,
            warmup=recipe.optim.warmup,
            min_ratio=recipe.optim.min_lr_ratio,
        )
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        sums: dict[str, Tensor] = {}
        norm = torch.zeros(())
        for index, batch in batches:
            with self.accelerator.accumulate(self.module):
                torch.manual_seed(recipe.seed * SEED_STRIDE + index)
                with self.accelerator.autocast() if self.sharded else nullcontext():
                    loss, parts = self.module(self.task.to_device(batch, self.accelerator.device))
                value = _Arriving(loss)
                self.accelerator.backward(loss)
                if not math.isfinite(value.get()):
                    self._not_finite(value.get(), batch)
                if self.accelerator.sync_gradients and recipe.optim.clip:
                    norm = self.accelerator.clip_grad_norm_(self.module.parameters(), recipe.optim.clip)
                if self.accelerator.sync_gradients:
                    self.optimizer.step()
                    self.optimizer.zero_grad()
            for name, value in {"loss": loss.detach(), **parts}.items():
                sums[name] = sums.get(name, 0) + value / len(batches)
            self.position.samples += self.task.size(batch)
        if self.average:
            self.average.update(self.task.module)
        self.position.step += 1
        clock.tick()
        count = getattr(self.task, "tokens", None)
        self.watch.step(self.position.step, sum(count(batch) for _, batch in batches) if count else 0)
        norm = sharding.whole(norm)
        return {"step": self.position.step, **sums, "lr": self.peaks[0] * factor, "grad_norm": norm}

    # ------------------------------------------------------------------ data

    def _batches(self) -> Iterator[list[tuple[int, Any]]]:
        """The micro-batches of each remaining optimizer step, made ahead of time."""
        loop, world, rank = self.recipe.loop, self.accelerator.num_processes, self.accelerator.process_index
        micro = range(self.position.step * loop.accumulate, loop.steps * loop.accumulate)
        indices = [i * world + rank for i in micro]
        cuda = self.accelerator.device.type == "cuda"
        batches = stream(self.task.batch, indices, workers=self.recipe.data.loaders, pin=cuda)
        ready: list[tuple[int, Any]] = []
        for _ in indices:
            started = time.monotonic()
            ready.append(next(batches))
            self.waited += time.monotonic() - started
            if len(ready) == loop.accumulate:
                yield ready
                ready = []

    # ------------------------------------------------------------------ what is written

    def _averaged(self) -> AbstractContextManager[None]:
        return self.average.applied(self.task.module) if self.average else nullcontext()

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """Figures on held-out data with the averaged weights, plus preview and curves."""
        figures: dict[str, float] = {}
        if self.accelerator.is_main_process or self.sharded:  # sharded weights compute together or not at all
            self.task.module.eval()
            with self._averaged():
                figures = {k: round(float(v), 5) for k, v in self.task.evaluate(self.recipe.loop.eval_samples).items()}
                if not self.sharded:
                    self.task.preview(self.directory / "preview.png")
            self.task.module.train()
        if self.watch.best(figures):
            self._export("model-best")
        if self.accelerator.is_main_process:
            self._log({"step": self.position.step, **{f"val_{k}": v for k, v in figures.items()}})
            self.metrics.plot()
        self.accelerator.wait_for_everyone()
        return figures

    @torch.no_grad()
    def _sheet(self) -> None:
        """``samples/step-N.png``, from the averaged weights."""
        if self.accelerator.is_main_process:
            folder = self.directory / "samples"
            folder.mkdir(exist_ok=True)
            state = torch.get_rng_state()
            self.task.module.eval()
            with self._averaged():
                self.task.preview(folder / f"step-{self.position.step:08d}.png")
            self.task.module.train()
            torch.set_rng_state(state)
        self.accelerator.wait_for_everyone()

    def _export(self, name: str) -> None:
        """Write the averaged weights as model directory ``name``."""
        state = sharding.full_state(self.task.module) if self.sharded else None
        with self._averaged():
            if self.accelerator.is_main_process and state is not None:
                self.task.export_state(self.directory / name, state)  # type: ignore[attr-defined]
            elif self.accelerator.is_main_process:
                self.task.export(self.directory / name)
        self.accelerator.wait_for_everyone()

    def _log(self, line: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.metrics.write(line)
            self.watch.track(line)
            self.report({**line, "steps": self.recipe.loop.steps})

    def _save(self) -> None:
        folder = self.directory / "checkpoints"
        extra = None
        if self.sharded:
            main = self.accelerator.is_main_process
            extra = lambda place: sharding.save(self.task.module, self.optimizer, place, main=main)  # noqa: E731
        checkpoints.save(self.accelerator, folder, self.position.step, self.recipe.loop.keep_checkpoints, extra)

    def _restore(self, resume: bool) -> None:
        found = checkpoints.complete(self.directory / "checkpoints")
        if resume and found:
            if self.sharded:
                sharding.load(self.task.module, self.optimizer, found[-1], self.names)
            self.accelerator.load_state(str(found[-1]))
            self.accelerator.step = 0  # counted in micro-batches of another number of processes, perhaps
            if not self.sharded:
                sharding.align(getattr(self.optimizer, "optimizer", self.optimizer))
            self.metrics.cut(self.position.step)
            logger.info("resumed at step %d of %d", self.position.step, self.recipe.loop.steps)
        elif found:
            raise OutputError(
                f"{self.directory} already holds a training run", remedy="add --resume or choose another --out"
            )

    # ------------------------------------------------------------------ stopping

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.stop_signal:  # the second one does not wait for the step to finish
            raise Interrupted("stopped without a checkpoint", remedy="--resume continues from the last one")
        self.stop_signal = number

    def _stopping(self) -> bool:
        """Whether any process was told to stop (all must leave at the same step)."""
        if self.accelerator.num_processes == 1:
            return bool(self.stop_signal)
        flag = torch.tensor([float(bool(self.stop_signal))], device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def _not_finite(self, loss: float, batch: Any) -> None:
        ids = ", ".join(self.task.ids(batch))
        raise NotFiniteError(
            f"loss is {loss} at step {self.position.step}; batch: {ids}",
            remedy="lower the learning rate or look at these samples; --resume continues from the last checkpoint",
        )


class _Arriving:
    """A scalar on its way to the host: reading it waits for what was queued before it, not for what came after."""

    def __init__(self, scalar: Tensor) -> None:
        self.event = torch.cuda.Event() if scalar.is_cuda else None
        self.value = scalar.detach().to("cpu", non_blocking=True)
        if self.event is not None:
            self.event.record()

    def get(self) -> float:
        if self.event is not None:
            self.event.synchronize()
        return float(self.value)


class _Clock:
    """Training time without evaluations and checkpoints, and images per second since the last log line."""

    def __init__(self, before: float) -> None:
        self.before, self.spent, self.mark = before, 0.0, time.monotonic()
        self.last_samples, self.last_total, self.last_waited = -1, before, 0.0

    def tick(self) -> None:
        now = time.monotonic()
        self.spent += now - self.mark
        self.mark = now

    def skip(self) -> None:
        self.mark = time.monotonic()

    def total(self) -> float:
        return self.before + self.spent

    def rates(self, position: checkpoints.Position, waited: float) -> dict[str, float]:
        """Images per second and the share of time spent waiting for data, since the last call."""
        known, total = self.last_samples >= 0, self.total()
        elapsed = max(1e-9, total - self.last_total)
        rate = (position.samples - self.last_samples) / elapsed if known else 0.0
        share = (waited - self.last_waited) / elapsed
        self.last_samples, self.last_total, self.last_waited = position.samples, total, waited
        return {"images_per_s": round(rate, 2), "data_share": round(share, 4), "seconds": round(total, 1)}


def _write_parameters(path: Path, groups: list[dict[str, Any]], module: torch.nn.Module) -> None:
    """Every parameter with its shape, peak learning rate and weight decay, so that nobody has to guess."""
    lines = []
    for group in groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            lines.append(f"{group['lr']:.3g}\t{group['weight_decay']:.3g}\t{tuple(parameter.shape)}\t{name}")
    lines += [f"frozen\t-\t{tuple(p.shape)}\t{n}" for n, p in module.named_parameters() if not p.requires_grad]
    path.write_text("\n".join(["peak lr\tdecay\tshape\tname", *lines]) + "\n", encoding="utf-8")
