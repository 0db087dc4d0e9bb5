"""Memory estimates of `mmi model info` beside measured peaks, for random models of a few sizes on the CPU.

    python benchmarks/model_memory.py [--sizes small,medium] [--runs 5] [--kernel torch]

For every size fresh processes load the model, read pictures and text up to the context given, and draw one picture;
resident memory is read after loading and at its peak. Prints one JSON line per size, bytes: what was measured above the
level before loading, and what the estimate says for the same context. The peak of equal runs varies by a tenth with the
timing of their threads (tiny: 418 to 458 MB); what an estimate has to cover is the largest, so that is what counts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATHS = [str(ROOT / name) for name in ("tests", ".", "engine", "kernels")]
sys.path[:0] = PATHS

# width of the language model, its layers, width of the U-Net's first stage, side of the pictures drawn, images read
SIZES = {
    "tiny": (128, 4, 32, 64, 2),
    "small": (256, 6, 32, 128, 8),
    "medium": (768, 12, 96, 256, 8),
}


def make(size: str, folder: Path) -> None:
    """A random model of the released shape with smaller numbers."""
    import torch

    from mmi_engine.model.checkpoint import save_model
    from mmi_engine.model.interleaved import MMInterleaved
    from mmi_engine.model.presets import released_config
    from mmi_engine.model.tokenizer import DirectoryTokenizer
    from mmi_engine.toon.tokenizer import PATH

    width, layers, channels, side, _ = SIZES[size]
    full = released_config(image_size=side)
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 64}
    decoder = full.image_decoder
    mmfs = {"width": 256, "heads": 4}
    unet = {**decoder.unet, "block_out_channels": [channels, 2 * channels], "attention_head_dim": 8}
    unet |= {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "sample_size": side // 8}
    unet |= {"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "cross_attention_dim": 256}
    former = {"hidden_size": 256, "intermediate_size": 768, "num_heads": 4, "encoder_hidden_size": width}
    base = min(128, channels)
    vae = replace(
        decoder.vae, diffusers={**decoder.vae.diffusers, "block_out_channels": [base, 2 * base, 4 * base, 4 * base]}
    )
    language = full.language
    config = replace(
        full,
        name=size,
        vision=replace(full.vision, hidden_size=256, intermediate_size=768, num_layers=8, num_heads=4),
        visual_resampler=replace(full.visual_resampler, encoder_hidden_size=256, num_layers=4),
        language=replace(
            language,
            transformers={**language.transformers, **sizes, **heads},
            mmfs=replace(language.mmfs, **mmfs),
        ),
        image_decoder=replace(
            decoder,
            unet=unet,
            vae=vae,
            context_resampler=replace(decoder.context_resampler, **former),
            mmfs=replace(decoder.mmfs, **mmfs),
        ),
    )
    torch.manual_seed(0)
    model = MMInterleaved(config)
    model.tokenizer = DirectoryTokenizer(PATH.parent)
    save_model(model, folder, dtype=torch.float16)  # loaded in fp32: memory of the process, not pages of the file


CHILD = """
import json, sys
sys.path[:0] = {paths!r}
from pathlib import Path
import torch
from PIL import Image
from mmi_engine.generate.interleave import fill
from mmi_engine.generate.settings import Settings
from mmi_engine.model.checkpoint import load_model, skeleton
from mmi_engine.model.config import ModelConfig
from mmi_engine.sequence import Piece
from mmi_engine.weights.estimate import need
from mmi_kernels import deform_sample
torch.set_num_threads(1)
folder, images = Path(sys.argv[1]), int(sys.argv[2])
config = ModelConfig.load(folder)
skeleton(config)  # what the program needs anyway, and the compiler of the CPU kernel, where there is one
deform_sample(torch.zeros(1, 4, 1, 8), [(2, 2)], torch.zeros(1, 1, 1, 1, 1, 2), torch.ones(1, 1, 1, 1, 1))
def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
before = status("VmRSS")
model = load_model(folder)
model.set_backend(sys.argv[3])
weights = status("VmRSS") - before
open("/proc/self/clear_refs", "w").write("5")
picture = Image.linear_gradient("L").resize((config.vision.image_size,) * 2).convert("RGB")
pieces = [Piece("text", "Pip is on the beach near a ball."), Piece("image", picture)] * images
fill(model, [[*pieces, Piece("image", None)]], [0], Settings(steps=2, guidance=2.0), 1)
peak = status("VmHWM") - before
count = sum(value.numel() for value in model.state_dict().values())
needed = need(config, count, "fp32", tokens=images * (config.tokens_per_image + 11),
              copied=sys.argv[3] == "torch")
context = needed.tokens * needed.cache_per_token + images * needed.per_image + needed.per_picture
print(json.dumps(dict(parameters=count, weights=weights, weights_estimate=needed.weights, peak=peak,
                      peak_estimate=needed.weights + context + needed.working)))
"""


def measure(size: str, runs: int, kernel: str) -> dict:
    """Make a model, measure it in processes of its own, remove it; the run with the largest peak."""
    found = []
    with tempfile.TemporaryDirectory(prefix="mmi-memory-") as folder:
        make(size, Path(folder))
        command = [sys.executable, "-c", CHILD.format(paths=PATHS), folder, str(SIZES[size][4]), kernel]
        for _ in range(runs):
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            assert run.returncode == 0, run.stderr
            found.append(json.loads(run.stdout))
    return {"size": size, **max(found, key=lambda one: one["peak"])}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="tiny,small,medium")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--kernel", choices=["auto", "torch"], default="auto")
    wanted = parser.parse_args()
    for name in wanted.sizes.split(","):
        sys.stdout.write(json.dumps(measure(name, wanted.runs, wanted.kernel)) + "\n")
