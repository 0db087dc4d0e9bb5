"""Ablations of the embedded model: recipes × seeds trained and evaluated in one process, one table.

    python benchmarks/ablation_toon.py ablation_toon_mmfs ablation_toon_no_mmfs --seeds 1 2 3 --out ablation

For every seed, for every recipe: training as `mmi train` does it, then the exported model through the toon suite's
own parts (test split, first items) and measures. Recipes of the image decoder draw maps and stories, those of reading
answer questions and write captions, those that train the whole model do both. The first named recipe of each kind is
what the others of that kind are compared with.

    OUT/RECIPE-SEED.json  figures of one run, or why it failed    OUT/report.json  all of them, device, versions
    OUT/table.md  plot.png  sheet.png  pictures/                  RUNS/RECIPE-SEED  run directories, results of `eval`

A run with its JSON file is not done again, one that was interrupted goes on from its checkpoint. Scoring (the oracle
takes about 40 ms a picture) goes on in other processes while the next run trains.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import multiprocessing
import os
import platform
import shutil
import sys
import time
import traceback
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / name) for name in (".", "engine", "kernels", "benchmarks")]

from ablation_report import SHOWN_ITEMS, SHOWN_STORIES, Run, write_report  # noqa: E402

from mmi_engine.errors import Interrupted  # noqa: E402
from mmi_engine.versions import versions  # noqa: E402

PARTS = {"pictures": ("seg2img", "stories"), "text": ("vqa", "captions")}
PARTS["both"] = PARTS["text"] + PARTS["pictures"]
TASKS = {"seg2img": "seg2img", "stories": "story", "vqa": "vqa", "captions": "caption"}
logger = logging.getLogger("ablation")


def kind_of(recipe: Any) -> str:
    """``pictures``, ``text`` or ``both``: what a recipe learns, and is evaluated on."""
    if recipe.task == "image_decoder":
        return "pictures"
    return "both" if recipe.loss.image > 0 else "text"


def draw(folder: Path, part: str, count: int) -> Path:
    """The manifest of a part's test items, drawn once."""
    from mmi_engine.toon import measure

    place = folder / f"{part}-{count}"
    done = place / "done"
    if not done.is_file():
        done.parent.mkdir(parents=True, exist_ok=True)
        done.write_text(str(measure.draw(place, TASKS[part], count).resolve()), encoding="utf-8")
    return Path(done.read_text(encoding="utf-8"))


def train(name: str, seed: int, changes: list[str], folder: Path) -> dict[str, Any]:
    """One run as `mmi train` does it, resumed where it was interrupted; its checkpoints are removed at the end.

    Returns:
        seconds, the last held-out losses, the kind of recipe.
    """
    from mmi_engine.train.recipe import resolve
    from mmi_engine.train.start import train as run

    started = time.monotonic()
    resolved = resolve(name, [*changes, f"seed={seed}"])
    losses = run(resolved, folder, resume=folder.exists(), report=_said())
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    kind = kind_of(resolved.recipe)
    return {"seconds": round(time.monotonic() - started, 1), "held_out": losses, "kind": kind}


def _said() -> Any:
    """A line for what takes long: drawing and encoding, and every few steps."""
    last = [time.monotonic()]

    def report(line: dict[str, Any]) -> None:
        if time.monotonic() - last[0] > 15:
            last[0] = time.monotonic()
            logger.info("  %s", json.dumps(line))

    return report


def generate(model: Path, parts: dict[str, Path], counts: dict[str, int], out: Path, given: argparse.Namespace) -> None:
    """The model's results for every part, below ``out``; the weights are read once."""
    from mmi_engine.metrics import produce, suite

    shared: dict[str, Any] = {}
    for part in suite.load("toon").parts:
        if part.data not in parts:
            continue
        task, _ = produce.task_of(part, "toon")
        choices: dict[str, Any] = {"model": str(model), "batch_size": given.batch_size}
        if given.steps and part.data in PARTS["pictures"]:
            choices["settings"] = {"steps": given.steps}
        if given.threads:
            choices["threads"] = given.threads
        count = counts[part.data]
        produce.produce(part, task, parts[part.data], out / part.data, choices, limit=count, shared=shared)


def score(part: str, manifest: Path, count: int, results: Path, pictures: Path) -> dict[str, dict[str, Any]]:
    """Measures of one part's results, as `mmi eval` has them, and the first pictures kept for the sheet.

    Returns:
        measure → ``{"value", "low", "high", "unit", "baselines"}``.
    """
    from mmi_engine.metrics import pairs
    from mmi_engine.metrics.base import Options
    from mmi_engine.metrics.pictures import made_pictures
    from mmi_engine.metrics.score import evaluate

    references = pairs.read_references(manifest)
    references = references.only(row.id for row in references.rows[:count])
    made = pairs.read_results(results)
    if part in PARTS["pictures"]:
        pictures.mkdir(parents=True, exist_ok=True)
        shown = SHOWN_ITEMS if part == "seg2img" else SHOWN_STORIES
        for number, item in enumerate(pairs.pair(references, made)[0][:shown]):
            for frame, source in enumerate([] if item.problem else made_pictures(item)):
                source.load().save(pictures / f"{part}-{number}-{frame}.png")
    (card,) = evaluate(["toon"], references, made, Options())
    return {
        m.name: {"value": m.value, "low": m.low, "high": m.high, "unit": m.unit, "baselines": m.baselines}
        for m in card.measures
    }


def machine() -> dict[str, Any]:
    """Device, its name, and versions."""
    import torch

    cuda = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if cuda else _cpu()
    return {"device": "cuda" if cuda else "cpu", "name": name, "cores": os.cpu_count(), "versions": versions()}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


class Ablation:
    """All runs of one call; see module.

    Args:
        given: the command line.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.out, self.runs = given, given.out.resolve(), (given.runs or given.out / "runs").resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.counts = {"seg2img": given.scenes, "captions": given.scenes, "vqa": given.questions}
        self.counts["stories"] = given.stories
        self.started = time.monotonic()
        self.waiting: dict[tuple[str, int], tuple[dict[str, Any], dict[str, Future[Any]]]] = {}
        self.drawn: dict[str, Future[Path]] = {}
        self.manifests: dict[str, Path] = {}
        self.machine = {} if given.only_report else machine()
        if not given.only_report:
            self._check()

    def all(self) -> list[Run]:
        """Train and evaluate what is missing; returns every run."""
        workers = min(8, os.cpu_count() or 1)
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            self._draw(pool)
            for seed in self.given.seeds:
                for name in self.given.recipes:
                    if self._file(name, seed).exists():
                        continue
                    if self.given.seconds and time.monotonic() - self.started > self.given.seconds:
                        logger.info("%s seconds are over: %s, seed %d is left out", self.given.seconds, name, seed)
                        continue
                    self._one(name, seed, pool)
                    self._collect()
            self._collect(wait=True)
        return self.report()

    def _check(self) -> None:
        """End the call where something that is there was made with other settings, or two recipes share a name."""
        names = [Path(name).stem for name in self.given.recipes]
        if len(set(names)) < len(names):
            raise SystemExit(f"two recipes of one name: {', '.join(sorted(names))}")
        for name in self.given.recipes:
            for seed in self.given.seeds:
                wanted = {"changes": self.given.set}
                for path in (self._file(name, seed), self._folder(name, seed) / "ablation.json"):
                    facts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else wanted
                    measured = facts.get("measured", {"steps": self.given.steps, "items": {}})
                    items = {part: self.counts[part] for part in measured["items"]}
                    if (facts["changes"], measured["steps"], measured["items"]) != (
                        self.given.set,
                        self.given.steps,
                        items,
                    ):
                        raise SystemExit(f"{path} was made with other settings: take another --out, or remove it")

    def _draw(self, pool: ProcessPoolExecutor) -> None:
        """Begin to draw the test items; an unknown recipe or key ends the call here."""
        from mmi_engine.train.recipe import resolve

        kinds = {kind_of(resolve(name, self.given.set).recipe) for name in self.given.recipes}
        wanted = {part: self.counts[part] for kind in sorted(kinds) for part in PARTS[kind] if self.counts[part] > 0}
        self.drawn = {k: pool.submit(draw, self.runs / "items", k, count) for k, count in wanted.items()}

    def _one(self, name: str, seed: int, pool: ProcessPoolExecutor) -> None:
        """One run, whose scoring is left to the pool; what goes wrong is recorded."""
        logger.info("%s, seed %d, %.0f s after the start", name, seed, time.monotonic() - self.started)
        folder = self._folder(name, seed)
        facts: dict[str, Any] = {"recipe": Path(name).stem, "seed": seed, "changes": self.given.set}
        futures: dict[str, Future[Any]] = {}
        try:
            if not (folder / "model" / "config.json").is_file() or not (folder / "ablation.json").is_file():
                trained = {**train(name, seed, self.given.set, folder), "changes": self.given.set}
                (folder / "ablation.json").write_text(json.dumps(trained), encoding="utf-8")
            facts |= json.loads((folder / "ablation.json").read_text(encoding="utf-8"))
            self._free()
            manifests = {part: self.drawn[part].result() for part in PARTS[facts["kind"]] if part in self.drawn}
            self.manifests |= manifests
            items = {part: self.counts[part] for part in manifests}
            facts["measured"] = {"machine": self.machine, "steps": self.given.steps, "items": items}
            started = time.monotonic()
            generate(folder / "model", manifests, self.counts, folder / "eval", self.given)
            facts["generation_seconds"] = round(time.monotonic() - started, 1)
            for part, manifest in manifests.items():
                place, pictures = folder / "eval" / part, self.out / "pictures" / f"{Path(name).stem}-{seed}"
                futures[part] = pool.submit(score, part, manifest, self.counts[part], place, pictures)
        except Interrupted:
            raise
        except Exception as error:  # the other runs go on, and the report says what this one died of
            traceback.print_exc()
            facts["failed"] = f"{type(error).__name__}: {error}"
        self._free()
        self.waiting[name, seed] = facts, futures

    @staticmethod
    def _free() -> None:
        """Give memory of the run before back to the device."""
        import torch

        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _collect(self, wait: bool = False) -> None:
        """Write the figures of runs whose scoring is done, and the report."""
        for key, (facts, futures) in list(self.waiting.items()):
            if not wait and not all(future.done() for future in futures.values()):
                continue
            try:
                facts["parts"] = {part: future.result() for part, future in futures.items()}
            except Exception as error:
                traceback.print_exc()
                facts["failed"] = f"{type(error).__name__}: {error}"
            _write(self._file(*key) if "failed" not in facts else self._failure(*key), facts)
            del self.waiting[key]
            self.report()

    def report(self) -> list[Run]:
        """Everything that is known so far, written into the output folder."""
        runs = []
        for name in self.given.recipes:
            for seed in self.given.seeds:
                for path in (self._file(name, seed), self._failure(name, seed)):
                    if path.is_file():
                        runs.append(Run(**json.loads(path.read_text(encoding="utf-8"))))
                        break
        write_report(self.out, runs, [Path(name).stem for name in self.given.recipes], self.manifests)
        return runs

    def _folder(self, name: str, seed: int) -> Path:
        return self.runs / f"{Path(name).stem}-{seed}"

    def _file(self, name: str, seed: int) -> Path:
        return self.out / f"{Path(name).stem}-{seed}.json"

    def _failure(self, name: str, seed: int) -> Path:
        return self.out / f"{Path(name).stem}-{seed}.failed.json"


def _write(path: Path, content: dict[str, Any]) -> None:
    """Under a temporary name, then renamed."""
    draft = path.with_name(path.name + ".partial")
    draft.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(draft, path)


def arguments(line: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", metavar="RECIPE", help="shipped names or files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=None, help="folder of the run directories (OUT/runs)")
    parser.add_argument("--scenes", type=int, default=200, help="maps to draw, pictures to caption")
    parser.add_argument("--stories", type=int, default=40, help="stories to draw, four pictures each")
    parser.add_argument("--questions", type=int, default=700, help="questions to answer")
    parser.add_argument("--steps", type=int, default=None, help="of sampling (the model's own)")
    parser.add_argument("--batch-size", type=int, default=100, help="items generated at a time")
    parser.add_argument("--threads", type=int, default=None, help="of the CPU while generating")
    parser.add_argument("--set", nargs="*", action="extend", default=[], metavar="KEY=VALUE", help="for every recipe")
    parser.add_argument("--seconds", type=float, default=0.0, help="no run begins after so many (0: no limit)")
    parser.add_argument("--only-report", action="store_true", help="from the figures that are there")
    return parser.parse_args(line)


def main() -> int:
    """Run; 1 where a run failed."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    ablation = Ablation(arguments())
    if ablation.given.only_report:
        items = ablation.runs / "items"
        there = {part: count for part, count in ablation.counts.items() if (items / f"{part}-{count}").is_dir()}
        ablation.manifests = {part: draw(items, part, count) for part, count in there.items()}
    runs = ablation.report() if ablation.given.only_report else ablation.all()
    sys.stdout.write((ablation.out / "table.md").read_text(encoding="utf-8"))
    return int(any(run.failed for run in runs))


if __name__ == "__main__":
    sys.exit(main())
