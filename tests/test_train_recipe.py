"""Recipes: errors name the key and its neighbour, overrides win, origins are recorded, shipped files resolve."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmi_engine.errors import ConfigError
from mmi_engine.train.recipe import find, parse_override, resolve, resumed, shipped

MINIMAL = 'task = "vae"\n[optim]\nlr = 0.5\n[loop]\nsteps = 7\n'


def write(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_precedence_and_origins(tmp_path: Path) -> None:
    resolved = resolve(write(tmp_path, MINIMAL), ["loop.steps=9", "optim.betas=[0.5, 0.6]", "data.codec=some/place"])
    recipe = resolved.recipe
    assert (recipe.loop.steps, recipe.optim.lr, recipe.optim.eps) == (9, 0.5, 1e-6)
    assert recipe.optim.betas == (0.5, 0.6) and recipe.data.codec == "some/place"
    assert resolved.origins["loop.steps"] == "command line"
    assert resolved.origins["optim.lr"] == "recipe mine.toml"
    assert resolved.origins["optim.eps"] == "default"


def test_every_leaf_has_an_origin_and_json_round_trips(tmp_path: Path) -> None:
    resolved = resolve(write(tmp_path, MINIMAL), ["model.diffusers.latent_channels=5"])
    data = json.loads(resolved.to_json())
    assert data["origins"]["model.diffusers.latent_channels"] == "command line"
    (tmp_path / "recipe.json").write_text(resolved.to_json(), encoding="utf-8")
    again = resumed(tmp_path, ["loop.steps=3"])
    assert again.recipe.loop.steps == 3 and again.recipe.model == {"diffusers": {"latent_channels": 5}}
    assert again.origins["optim.lr"] == "recipe mine.toml" and again.origins["loop.steps"] == "command line"


@pytest.mark.parametrize(
    ("text", "named", "hint"),
    [
        ('task = "vae"\n[optim]\nlearning_rate = 1\n', "optim.learning_rate", "valid keys"),
        ('task = "vae"\n[optim]\nwarmups = 1\n', "optim.warmups", "optim.warmup"),
        ('task = "vae"\n[loops]\nsteps = 1\n', "loops", "loop"),
        ('task = "vae"\n[[optim.groups]]\npatern = "x"\n', "optim.groups[0].patern", "optim.groups[0].pattern"),
    ],
)
def test_unknown_keys_name_the_nearest(tmp_path: Path, text: str, named: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(write(tmp_path, text))
    assert repr(named) in caught.value.message and hint in str(caught.value.remedy)


@pytest.mark.parametrize(
    "override",
    ["loop.steps=many", "loop.steps=1.5", "loop.steps=true", "optim.lr=fast", "optim.betas=0.9", "loop.steps=0"],
)
def test_wrong_types_and_ranges_name_the_key(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(write(tmp_path, MINIMAL), [override])
    assert override.split("=")[0] in caught.value.message


@pytest.mark.parametrize(
    ("override", "key"),
    [("loop.stps=3", "loop.stps"), ("loop.steps=abc", "loop.steps"), ("optim.groups=[{patern='x'}]", "patern")],
)
def test_errors_say_whether_the_file_or_the_command_line_is_wrong(tmp_path: Path, override: str, key: str) -> None:
    path = write(tmp_path, MINIMAL)
    with pytest.raises(ConfigError, match="^command line: ") as caught:
        resolve(path, [override])
    assert key in caught.value.message and path not in caught.value.message
    assert "did you mean" in str(caught.value.remedy) or key == "loop.steps"
    with pytest.raises(ConfigError, match=r"mine\.toml: unknown key 'optim\.lrr'"):
        resolve(write(tmp_path, 'task = "vae"\n[optim]\nlrr = 1\n'), ["loop.steps=3"])


def test_recomputed_activations_do_not_go_with_cast_weights(tmp_path: Path) -> None:
    both = ["loop.activation_checkpointing=true", "loop.precision=bf16-pure"]
    with pytest.raises(ConfigError, match="does not go with bf16-pure"):
        resolve(write(tmp_path, MINIMAL), both)
    for one in both:
        resolve(write(tmp_path, MINIMAL), [one])


def test_task_is_required_and_limited(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'task' is missing"):
        resolve(write(tmp_path, "seed = 1\n"))
    with pytest.raises(ConfigError, match="task must be"):
        resolve(write(tmp_path, 'task = "gan"\n'))


def test_broken_toml_and_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a TOML file"):
        resolve(write(tmp_path, "task = \n"))
    with pytest.raises(ConfigError) as caught:
        find("toon_vea")
    assert "toon_vae" in str(caught.value.remedy)


def test_overrides_are_toml_values_or_bare_words() -> None:
    assert parse_override("a.b=1e-3") == ("a.b", 0.001)
    assert parse_override("a=[1, 2]") == ("a", [1, 2])
    assert parse_override("path=runs/x") == ("path", "runs/x")
    assert parse_override("x=a=b") == ("x", "a=b")
    for broken in ("novalue", "=3"):
        with pytest.raises(ConfigError, match="key=value"):
            parse_override(broken)


def test_an_override_cannot_turn_a_value_into_a_table(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a value, not a table"):
        resolve(write(tmp_path, MINIMAL), ["loop.steps.x=1"])


@pytest.mark.parametrize("name", sorted(shipped()))
def test_shipped_recipes_resolve_and_state_their_command(name: str) -> None:
    assert resolve(name).recipe.name == name
    header = shipped()[name].read_text(encoding="utf-8").split("\n\n")[0:2]
    assert f"mmi train --recipe {name}" in "\n".join(header)
    assert "Hardware:" in "\n".join(header) and "Expected:" in "\n".join(header)
