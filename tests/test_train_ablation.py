"""The ablations' report: figures against hand-made ones, what is missing or failed; recipes that change one thing."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmi_engine.train.recipe import resolve, shipped

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from ablation_report import MEASURES, Run, difference, kinds, spread, table, write_report
from ablation_toon import PARTS, kind_of

KEY = ("stories", "hat")
NAMES = ["ablation_toon_mmfs", "ablation_toon_no_mmfs"]


def run(recipe: str, seed: int, hat: float, **more: Any) -> Run:
    parts = {"stories": {"hat": {"value": hat, "low": 0.0, "high": 100.0, "unit": "%", "baselines": {"chance": 10.0}}}}
    measured = {"machine": {"name": "a CPU"}, "steps": 20, "items": {"stories": 40}}
    return Run(recipe, seed, kind="pictures", seconds=10.0, parts=parts, measured=measured, **more)


RUNS = [run(NAMES[0], s, v) for s, v in ((1, 50.0), (2, 60.0), (3, 40.0))]
RUNS += [run(NAMES[1], s, v) for s, v in ((1, 44.0), (2, 50.0), (4, 1.0))]


def test_differences_are_paired_by_seed_with_students_interval() -> None:
    stats = pytest.importorskip("scipy.stats")
    mean, half, seeds = difference(RUNS, NAMES[1], NAMES[0], KEY)
    apart = np.array([-6.0, -10.0])  # seeds 1 and 2; the others lack a partner
    low, high = stats.t.interval(0.95, len(apart) - 1, loc=apart.mean(), scale=stats.sem(apart))
    assert (mean, seeds) == (-8.0, 2) and half == pytest.approx((high - low) / 2, rel=1e-4)
    assert spread([50.0, 60.0, 40.0, math.nan]) == (50.0, 10.0)
    assert math.isnan(difference(RUNS, NAMES[1], "other", KEY)[0]) and math.isnan(spread([3.0])[1])


def test_the_table_says_what_is_known_and_what_failed() -> None:
    failed = Run("ablation_toon_multi_image", 1, failed="RuntimeError: too large")
    text = table([*RUNS, failed], [*NAMES, failed.recipe])
    assert "| `ablation_toon_mmfs` | 3 | 50.0 ± 10.0 | 10 |" in text
    assert "| `ablation_toon_no_mmfs` | 2 | -8.0 ± 25.4 | |" in text
    assert text.startswith("a CPU; 20 steps of sampling; 40 stories.")
    assert "failed: `ablation_toon_multi_image`, seed 1: RuntimeError: too large" in text
    assert kinds([*RUNS, failed], [*NAMES, failed.recipe]) == {"pictures": NAMES}
    assert MEASURES[KEY] in text and "questions" not in text


def test_the_report_shows_truth_and_what_was_drawn(tmp_path: Path) -> None:
    (tmp_path / "maps").mkdir()
    for name, color in (("map", "red"), ("true", "green")):
        Image.new("RGB", (128, 128), color).save(tmp_path / "maps" / f"{name}.png")
    row = {"segmentation": "maps/map.png", "meta": {"image": "maps/true.png"}}
    manifest = tmp_path / "seg2img.jsonl"
    manifest.write_text(json.dumps(row) + "\n", encoding="utf-8")
    drawn = tmp_path / "pictures" / f"{NAMES[0]}-1"
    drawn.mkdir(parents=True)
    Image.new("RGB", (128, 128), "blue").save(drawn / "seg2img-0-0.png")
    write_report(tmp_path, RUNS, NAMES, {"seg2img": manifest})
    with Image.open(tmp_path / "sheet.png") as sheet:
        shown = sheet.convert("RGB")  # stored with 256 colours
    middle = [shown.getpixel((150 + 64, 4 + 64 + 132 * line)) for line in range(4)]
    assert middle == [(255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 255)]  # the second recipe drew nothing
    assert len(json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["runs"]) == len(RUNS)
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.width > 300
    empty = tmp_path / "empty"
    empty.mkdir()
    write_report(empty, [], NAMES, {})
    assert sorted(path.name for path in empty.iterdir()) == ["report.json", "table.md"]


@pytest.mark.parametrize("first", ["ablation_toon_mmfs", "ablation_toon_text_mmfs"])
def test_variants_have_the_data_steps_and_rates_of_the_first(first: str) -> None:
    base = resolve(first).recipe
    mine = [name for name in shipped() if f'extends = "{first}"' in shipped()[name].read_text(encoding="utf-8")]
    assert len(mine) >= 3
    for name in mine:
        other = resolve(name).recipe
        assert (other.task, other.seed, other.loss, other.optim) == (base.task, base.seed, base.loss, base.optim)
        assert other.loop == base.loop and other.data.mixture == base.data.mixture and other.model != base.model


def test_recipes_of_lambda_differ_in_it_alone() -> None:
    first, *others = (resolve(f"ablation_toon_lambda_{weight}").recipe for weight in (10, 1, 100))
    assert [first.loss.image, *(other.loss.image for other in others)] == [10, 1, 100]
    for other in others:
        assert replace(other, name=first.name, loss=replace(other.loss, image=10.0)) == first


def test_a_recipe_is_evaluated_on_what_it_learns() -> None:
    names = ("ablation_toon_mmfs", "ablation_toon_text_mmfs", "ablation_toon_lambda_1")
    assert [PARTS[kind_of(resolve(name).recipe)] for name in names] == [
        ("seg2img", "stories"),
        ("vqa", "captions"),
        ("vqa", "captions", "seg2img", "stories"),
    ]
