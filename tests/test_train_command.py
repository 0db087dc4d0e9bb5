"""`mmi train`: what it prints and refuses before anything heavy is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mmi_cli.commands.train import train
from mmi_engine.errors import ConfigError


def call(*arguments: str) -> Result:
    return CliRunner().invoke(train, arguments)


def test_dry_run_prints_the_recipe_and_writes_nothing(tmp_path: Path) -> None:
    result = call("--recipe", "toon_vae", "--dry-run", "--out", str(tmp_path / "run"), "optim.lr=0.25")
    assert result.exit_code == 0
    shown = json.loads(result.stdout)
    assert shown["recipe"]["optim"]["lr"] == 0.25 and shown["origins"]["optim.lr"] == "command line"
    assert not (tmp_path / "run").exists()


def test_model_option_sets_the_base() -> None:
    shown = json.loads(call("--recipe", "toon_pretrain", "--model", "some/model", "--dry-run").stdout)
    assert shown["recipe"]["model"]["base"] == "some/model"


def test_refusals() -> None:
    assert call().exit_code == 2
    assert "mmi recipe ls" in call().stderr
    with pytest.raises(ConfigError, match=r"optim\.lrr"):
        raise call("--recipe", "toon_vae", "optim.lrr=1").exception or AssertionError
    with pytest.raises(ConfigError, match="holds no training run"):
        raise call("--resume", "--out", "nowhere").exception or AssertionError


def test_what_is_not_measured_is_said_and_nothing_stands_in_empty_brackets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n", encoding="utf-8")
    monkeypatch.setattr("mmi_engine.train.start.train", lambda *_, **__: {})
    words = ["--recipe", "sft_vqa", "--out", str(tmp_path / "run")]
    own = ["--data", f"vqav2={tmp_path / 'rows.jsonl'}"]
    notice = "measured before and after: name held-out rows with measure.manifest=FILE"
    said = {}
    for name, more in {"own": own, "drawn": [], "named": [*own, "measure.manifest=held.jsonl"]}.items():
        result = call(*words, *more)
        assert result.exit_code == 0
        said[name] = result.stderr
    assert [notice in said[name] for name in ("own", "drawn", "named")] == [True, False, False]
    assert said["own"].rstrip().endswith(f"done: {tmp_path / 'run' / 'model'}")


def test_help_and_dry_run_load_no_torch() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from mmi_cli.commands.train import train;"
        "assert CliRunner().invoke(train, ['--help']).exit_code == 0;"
        "assert CliRunner().invoke(train, ['--recipe', 'toon_vae', '--dry-run']).exit_code == 0;"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    environment = {"PYTHONPATH": ":".join(p for p in sys.path if p), "PATH": ""}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
