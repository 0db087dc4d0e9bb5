"""The shipped recipes: the paper's numbers as the docs list them, layers, profiles, data sets from the command line."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from mmi_engine.errors import ConfigError
from mmi_engine.train.layers import has_profile
from mmi_engine.train.recipe import find, resolve, shipped

PAGE = Path(__file__).resolve().parent.parent / "docs" / "recipes.md"
LINE = re.compile(r"^\| `(\w+)` \| `([\w.]+)` \| `(.+)` \| (.+) \|$", re.MULTILINE)
LISTED = LINE.findall(PAGE.read_text(encoding="utf-8"))
PAPER = sorted(name for name in shipped() if not name.startswith(("toon_", "ablation_toon_")))

# Tables 11 to 15 once more, written down apart from the page: (input, output, rate, warm-up, steps, β2, ε, batch)
TABLES = {
    "pretrain": (224, 512, 1e-4, 1000, 15000, 0.995, 1e-6, 0),
    "sft_vqa": (448, 0, 1e-5, 500, 10000, 0.999, 1e-8, 256),
    "sft_caption": (448, 0, 1e-5, 500, 10000, 0.999, 1e-8, 256),
    "sft_rec": (224, 0, 2e-5, 500, 10000, 0.999, 1e-8, 256),
    "sft_seg2img": (224, 512, 1e-4, 100, 4000, 0.98, 1e-5, 512),
    "sft_story_vist": (224, 512, 1e-5, 200, 4000, 0.98, 1e-8, 128),
    "sft_story_pororo": (224, 512, 1e-5, 200, 4000, 0.98, 1e-8, 128),
    "sft_story_flintstones": (224, 512, 1e-5, 200, 4000, 0.98, 1e-8, 128),
}


def value(name: str, key: str) -> Any:
    current: Any = dataclasses.asdict(resolve(name).recipe)
    for part in key.split("."):
        current = current[part]
    return current


@pytest.mark.parametrize(("name", "key", "shown", "_table"), LISTED)
def test_the_page_says_what_the_recipe_holds(name: str, key: str, shown: str, _table: str) -> None:
    found = value(name, key)
    if key == "optim.groups":
        pattern, rate = shown.split(" ")
        chosen = next(group for group in found if group["pattern"].startswith(pattern))
        assert chosen["lr"] == float(rate)
        return
    expected = tomllib.loads(f"v = {shown}")["v"]
    assert (list(found) if isinstance(found, tuple) else found) == expected


@pytest.mark.parametrize("name", TABLES)
def test_recipes_hold_the_tables_of_the_paper(name: str) -> None:
    recipe = resolve(name).recipe
    data, optim, loop = recipe.data, recipe.optim, recipe.loop
    row = (data.encoder_px, data.decoder_px, optim.lr, optim.warmup, loop.steps, optim.betas[1], optim.eps)
    assert (*row, loop.global_batch) == TABLES[name]
    assert optim.betas[0] == 0.9 and optim.weight_decay == 0.05 and recipe.model.get("base") is None


def test_every_paper_recipe_is_on_the_page_and_names_its_data() -> None:
    assert {name for name, *_ in LISTED} == set(PAPER)
    for name in PAPER:
        sets = resolve(name).recipe.data.sets
        assert sets and all(entry.origin and entry.importer and not entry.toon for entry in sets)


def test_mmc4_has_twice_the_probability_of_each_pair_set() -> None:
    weights = {entry.name: entry.weight for entry in resolve("pretrain").recipe.data.sets}
    assert weights.pop("mmc4") == 2 * max(weights.values()) and len(set(weights.values())) == 1
    only = [entry.name for entry in resolve("pretrain").recipe.data.sets if entry.skip_imageless]
    assert only == ["laion2b", "laion_coco"]


@pytest.mark.parametrize("name", PAPER)
def test_profiles_run_on_the_embedded_model(name: str) -> None:
    recipe = resolve(name, profile="toon").recipe
    assert recipe.model["base"] == "toon" and recipe.data.sets and all(entry.toon for entry in recipe.data.sets)
    assert recipe.loop.steps < resolve(name).recipe.loop.steps and not recipe.loop.activation_checkpointing


def test_origins_tell_the_file_the_profile_and_the_line() -> None:
    origins = resolve("sft_story_pororo", ["loop.steps=3"], profile="toon").origins
    assert origins["optim.eps"] == "recipe sft_story_vist.toml"
    assert origins["data.sets"] == "recipe sft_story_pororo.toml [toon]"
    assert origins["optim.warmup"] == "recipe sft_story_vist.toml [toon]"
    assert origins["loop.steps"] == "command line" and origins["loop.log_every"].endswith("[toon]")


def test_a_typing_error_in_the_profile_is_found_without_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('extends = "sft_rec"\n[toon.loop]\nstep = 3\n', encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        resolve(str(path))
    assert "loop.step" in caught.value.message and "loop.steps" in str(caught.value.remedy)


def test_extends_in_a_circle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f'extends = "{path}"\n', encoding="utf-8")
    for call in (lambda: resolve(str(path)), lambda: has_profile(path, find)):
        with pytest.raises(ConfigError, match="extends itself"):
            call()


def test_a_recipe_without_a_profile_says_so() -> None:
    with pytest.raises(ConfigError, match=r"has no \[toon\] profile"):
        resolve("toon_vae", profile="toon")


def test_data_from_the_command_line(tmp_path: Path) -> None:
    own = tmp_path / "birds" / "manifest.jsonl"
    own.parent.mkdir()
    own.write_text("", encoding="utf-8")
    resolved = resolve("sft_rec", data=[f"refcocog={own}", str(own)])
    first, second = resolved.recipe.data.sets
    assert (first.name, first.kind, first.manifest) == ("refcocog", "ground", str(own)) and first.prompt
    assert (second.name, second.kind, second.weight) == ("birds", "auto", 1.0)
    assert resolved.origins["data.sets"] == "command line"
    with pytest.raises(ConfigError, match="no set 'refcocc'"):
        resolve("sft_rec", data=["refcocc=x.jsonl"])


FROZEN = ("sft_vqa", "pretrain", "ablation_no_mmfs", "sft_story_pororo", "sft_caption", "sft_seg2img")


@pytest.mark.parametrize("name", [*FROZEN, "ablation_text_only", "ablation_mmfs_256"])
def test_the_papers_freezing_and_groups_find_their_parameters(name: str) -> None:
    """The recipe as the paper has it, on the embedded model's modules: same names, smaller numbers."""
    from mmi_engine.train import foundation
    from mmi_engine.train.interleaved import InterleavedObjective
    from mmi_engine.train.optim import freeze, parameter_groups

    recipe = resolve(name, ["model.base=toon"]).recipe
    base = foundation.load(recipe)
    objective = InterleavedObjective(base.model, 1)
    freeze(objective, recipe.optim.freeze)
    rates = {n: group["lr"] for group in parameter_groups(objective, recipe.optim) for n in group["names"]}
    assert not any("trunk" in n or "codec" in n for n in rates)
    body = [n for n in rates if "language.body" in n and ".cross." not in n]
    assert bool(body) == (name == "sft_vqa") and all(rates[n] == 1e-6 for n in body)
    assert any("text_head.head_new" in n for n in rates) and any("resampler" in n for n in rates)
    decoder = {n: rate for n, rate in rates.items() if "image_decoder" in n and ".offsets." not in n}
    assert bool(decoder) == bool(recipe.loss.image)
    story = name.startswith("sft_story")
    assert set(decoder.values()) <= {1e-4 if story else 1e-5}
    mmfs = [n for n in rates if ".mmfs" in n or ".cross." in n]
    assert bool(mmfs) == ("language.mmfs" not in recipe.model.get("without", ()))
    if "resampler" in " ".join(base.fresh):  # only what the ablation changes begins fresh
        assert all("resampler" in n for n in base.fresh)
