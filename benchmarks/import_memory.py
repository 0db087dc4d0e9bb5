"""Peak memory of an import: a fake released checkpoint is made, imported, killed half-way and gone on with.

    python benchmarks/import_memory.py --gigabytes 6 --shard 1 --folder /tmp

Prints one JSON line: sizes, the peak of resident memory above what the program needs before it begins, of both
processes, and the bound, the largest shard + 2 GB. Everything it makes is removed at the end. Its numbers are
random; the layout is the released one with a language model of as many layers as fill the size.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / name) for name in ("tests", ".", "engine", "kernels")]


def big_config(gigabytes: float):
    """A small model with a language model of about this many bytes in float32."""
    from dataclasses import replace

    from released_layout import small_config

    config = small_config()
    width = 2048 if gigabytes >= 2 else 256
    layer = 4 * (4 * width**2 + 3 * width * 4 * width)
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": 16, "num_key_value_heads": 16}
    layers = max(1, int(gigabytes * 1e9 / layer))
    language = replace(
        config.language, transformers={**config.language.transformers, **sizes, "num_hidden_layers": layers}
    )
    decoder = config.image_decoder
    resampler = replace(decoder.context_resampler, encoder_hidden_size=width)
    return replace(config, language=language, image_decoder=replace(decoder, context_resampler=resampler))


def make(folder: Path, gigabytes: float, shard: float) -> int:
    """Write the checkpoint in shards of about ``shard`` GB; returns the largest shard's bytes."""
    import torch

    from mmi_engine.model.checkpoint import skeleton
    from mmi_engine.model.names import NameTable

    config = big_config(gigabytes)
    table, model = NameTable(config), skeleton(config)
    folder.mkdir()
    (folder / "config.json").write_text(config.to_json())
    part: dict = {}
    number = size = 0

    def flush() -> None:
        nonlocal part, number, size
        number += 1
        torch.save(part, folder / f"pytorch_model-{number:05}.bin")
        part, size = {}, 0

    for name, value in model.state_dict().items():
        part[table.to_released(name)] = torch.rand(value.shape)
        size += value.numel() * 4
        if size > shard * 1e9:
            flush()
    flush()
    return max(path.stat().st_size for path in folder.glob("*.bin"))


CHILD = """
import sys, json
sys.path[:0] = {paths!r}
from pathlib import Path
import torch
from mmi_engine.weights.importing import import_released
from mmi_engine.model.checkpoint import skeleton
from mmi_engine.toon.tokenizer import PATH
from mmi_engine.model.config import ModelConfig
skeleton(ModelConfig.load(Path(sys.argv[1])))  # what the program needs anyway
def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
def progress(done, total):
    if sys.argv[3] == "stop" and done > total / 2:
        print(json.dumps(dict(peak=status("VmHWM") - before)), flush=True)
        import time; time.sleep(600)
done = import_released(Path(sys.argv[1]), Path(sys.argv[2]), dtype=torch.bfloat16, tokenizer=str(PATH),
                       shard_bytes=int(sys.argv[4]), progress=progress)
print(json.dumps(dict(peak=status("VmHWM") - before, resumed=done.resumed, files=done.files, bytes=done.bytes)))
"""


def run(source: Path, out: Path, how: str, shard_bytes: int) -> dict:
    """One import in a process of its own; with ``stop`` it is killed when half is written."""
    paths = [str(ROOT / name) for name in ("tests", ".", "engine", "kernels")]
    command = [sys.executable, "-c", CHILD.format(paths=paths), str(source), str(out), how, str(shard_bytes)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    if how == "stop":
        process.send_signal(signal.SIGKILL)
    process.wait()
    assert line, "the import failed"
    return json.loads(line)


def measure(gigabytes: float, shard: float, folder: Path | None) -> dict:
    """Make, import with a kill in the middle, remove."""
    work = Path(tempfile.mkdtemp(prefix="mmi-import-", dir=folder))
    try:
        needed = gigabytes * 1e9 * 1.8
        assert shutil.disk_usage(work).free > needed, f"{needed / 1e9:.0f} GB of disk are needed"
        largest = make(work / "src", gigabytes, shard)
        start = time.monotonic()
        limit = int(shard * 1e9 / 4)
        stopped = run(work / "src", work / "out", "stop", limit)
        rest = run(work / "src", work / "out", "go", limit)
        assert (work / "out" / "config.json").is_file() and not (work / "out.partial").exists()
        return {
            "source_bytes": sum(path.stat().st_size for path in (work / "src").glob("*.bin")),
            "largest_shard": largest,
            "peak_until_killed": stopped["peak"],
            "peak_resumed": rest["peak"],
            "bound": largest + 2 * 10**9,
            "files": rest["files"],
            "resumed": rest["resumed"],
            "seconds": round(time.monotonic() - start, 1),
        }
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=6.0)
    parser.add_argument("--shard", type=float, default=1.0)
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    sys.stdout.write(json.dumps(measure(arguments.gigabytes, arguments.shard, arguments.folder)) + "\n")
