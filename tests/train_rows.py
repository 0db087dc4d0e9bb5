"""Small manifests and a recipe over the tiny model, for tests of training on manifests.

python tests/train_rows.py DIRECTORY BASE MANIFEST [key=value …]     trains a text recipe there, in a process of its own
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from mmi_engine.train.recipe import Recipe, Resolved, resolve

TEXT = """
task = "interleaved"
seed = 3
[data]
source = "manifests"
row_tokens = 120
held_out = 0.2
palette = "toon"
[[data.sets]]
name = "rows"
manifest = "{manifest}"
[model]
base = "{base}"
[loss]
image = {image}
[optim]
lr = 1e-3
warmup = 1
freeze = ['visual_tokenizer\\.trunk\\.']
[loop]
steps = 4
batch_size = 2
ema = 0.0
log_every = 1
eval_every = 100
eval_samples = 2
checkpoint_steps = 2
checkpoint_minutes = 1e9
[measure.settings]
steps = 2
"""


def manifest(folder: Path, kind: str = "vqa", count: int = 20) -> Path:
    """``count`` rows with pictures of one colour each: of questions, or of pairs."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        name = f"{number:02d}.png"
        Image.fromarray(np.full((32, 40, 3), rng.integers(0, 255, 3), np.uint8)).save(folder / name)
        row = {"id": f"r{number}", "image": name}
        if kind == "vqa":
            row |= {"question": "What color is the shirt?", "answers": ["red" if number % 2 else "blue"]}
        else:
            row |= {"prompt": f"Pip is on the beach, picture {number}."}
        rows.append(row)
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe_of(folder: Path, base: Path, rows: Path, *overrides: str, image: float = 0.0) -> Resolved:
    """A resolved recipe over ``rows`` for the model directory ``base``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "rows.toml"
    path.write_text(TEXT.format(manifest=rows, base=base, image=image), encoding="utf-8")
    return resolve(str(path), overrides)


def numbers(resolved: Resolved) -> Recipe:
    """The recipe alone."""
    return resolved.recipe


def main() -> None:
    """Train as the command line says."""
    from mmi_engine.train.start import train

    directory, base, rows = (Path(word) for word in sys.argv[1:4])
    import os

    folder = directory.parent / f"recipe-{os.environ.get('RANK', '0')}"
    words = [word for word in sys.argv[4:] if word != "resume"]
    train(recipe_of(folder, base, rows, *words), directory, resume="resume" in sys.argv[4:])


if __name__ == "__main__":
    main()
