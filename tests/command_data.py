"""Manifests and a tiny model for tests that run whole commands: a row or more of every kind, one of them broken."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image
from tiny import tiny_model

from mmi_cli.main import main
from mmi_engine.model.checkpoint import save_model

FIXED = ["--device", "cpu", "--kernel", "torch", "--threads", "1"]
# every text of the tiny model may be nonsense: short ones keep the tests short
OPTIONS = {
    "caption": ["--beams", "2", "--max-new-tokens", "5"],
    "vqa": ["--max-new-tokens", "4"],
    "ground": ["--max-new-tokens", "4"],
    "t2i": ["--candidates", "2", "--rerank", "self", "--keep-all"],
    "seg2img": [],
    "story": ["--max-new-tokens", "4", "--temperature", "0.9", "--free", "1"],
}


def make_data(folder: Path) -> Path:
    """The model, pictures and a manifest per command, each with a broken row."""
    save_model(tiny_model(), folder / "model")
    noise = np.random.default_rng(0)
    for name, size in (("a.png", (40, 30)), ("b.png", (32, 32)), ("c.png", (20, 64))):
        Image.fromarray(noise.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(folder / name)
    Image.fromarray(noise.integers(0, 28, (32, 32), np.uint8)).save(folder / "map.png")
    shots = [{"image": "b.png", "question": "who?", "answer": "Pip"}]
    rows = {
        "caption": [{"image": "a.png"}, {"images": ["b.png", "c.png"]}, {"image": "c.png"}, {"image": "b.png"}],
        "vqa": [
            {"image": "a.png", "question": "What colour is the ball?"},
            {"image": "b.png", "question": "x", "options": ["red", "blue", "Pip is here"], "caption": "a thing"},
            {"image": "c.png", "question": "which?", "shots": shots},
            {"image": "c.png", "question": "What colour is the boat?"},
        ],
        "ground": [{"image": name, "expression": "the ball"} for name in ("a.png", "b.png", "c.png")],
        "t2i": [{"prompt": "Pip is on the beach."}, {"prompt": "Boo waves."}, {"prompt": "a red ball " * 12}],
        "seg2img": [{"segmentation": "map.png", "prompt": word} for word in ("Pip.", "Boo is here.", "Momo runs.")],
        "story": [
            {"frames": [{"text": "Pip is here.", "image": "a.png"}, {"text": "Pip runs."}, {"text": None}]},
            {"frames": [{"text": "Boo waves."}]},
            {"messages": [{"role": "user", "content": "Draw Pip."}]},
        ],
    }
    for command, listed in rows.items():
        named = [{"id": f"{command}-{number}", **row} for number, row in enumerate(listed)]
        lines = [json.dumps(row) for row in [*named[:2], {"id": "bad", "image": "gone.png"}, *named[2:]]]
        (folder / f"{command}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def go(data: Path, command: str, out: Path, *arguments: str, manifest: Path | None = None) -> dict[str, dict]:
    """Run a command; its rows by id."""
    source = manifest or data / f"{command}.jsonl"
    model = ["--model", str(data / "model")]
    code = main([command, str(source), "--out", str(out), *model, *FIXED, *OPTIONS[command], "-q", *arguments])
    assert code == 3, "one row is broken"
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return {row["id"]: row for row in rows}
