"""What `--model` names: paths before the hub's cache before the network; released checkpoints converted once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from released_layout import released_state, small_model, write_shards
from tiny import tiny_model

from mmi_cli.main import main
from mmi_engine import model_info
from mmi_engine.choices import Choices
from mmi_engine.engine import ModelEngine
from mmi_engine.errors import ModelError
from mmi_engine.model.checkpoint import load_model, save_model
from mmi_engine.model_info import describe, family, fingerprint, locate
from mmi_engine.toon.tokenizer import PATH as TOKENIZER
from mmi_engine.weights import find, store
from mmi_engine.weights.parts import BASE, locate_part

COMMIT = "0" * 39 + "1"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMI_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Path:
    return save_model(tiny_model(), tmp_path_factory.mktemp("ours") / "m")


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    model = small_model()
    folder = write_shards(released_state(model), tmp_path_factory.mktemp("released") / "src")
    (folder / "config.json").write_text(model.config.to_json())
    shutil.copyfile(TOKENIZER, folder / "tokenizer.json")
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Puts a folder into the hub's cache as the library lays it out; returns a function."""
    root = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root))
    plain = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **options: plain(name, cache_dir=root, **options)
    )

    def put(name: str, source: Path, folder: str = "") -> Path:
        repository = root / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / COMMIT
        shutil.copytree(source, snapshot / folder, dirs_exist_ok=True)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs/main").write_text(COMMIT)
        return snapshot

    return put


def test_a_hub_id_of_ours_comes_from_the_cache_without_a_network(hub, ours) -> None:
    snapshot = hub("someone/story", ours)
    assert locate("someone/story").samefile(snapshot)
    assert main(["model", "info", "someone/story"]) == 0
    assert load_model("someone/story").config.name == "tiny"
    engine = ModelEngine(Choices(model="someone/story", device="cpu", kernel="torch"))
    assert engine.identity(1, {})["model"] == fingerprint(ours)
    engine.load()


def test_a_folder_of_that_name_comes_before_the_hub(hub, ours, tmp_path) -> None:
    hub("someone/story", ours)
    other = save_model(tiny_model(seed=1), tmp_path / "someone/story")
    assert locate("someone/story").samefile(other)
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(ModelError, match="not found"):  # the folder is there, the model in it is not: a typing error
        locate("someone/other")


def test_a_cached_repository_that_lacks_files_is_completed_from_the_network(hub, ours, monkeypatch, tmp_path) -> None:
    whole = save_model(tiny_model(), tmp_path / "whole", shard_bytes=40_000)
    snapshot = hub("someone/big", whole)
    lost = sorted(snapshot.glob("model-*.safetensors"))[-1]
    lost.unlink()
    with pytest.raises(ModelError, match="lacks|hub does not give it|missing"):  # offline
        load_model("someone/big")
    cached, calls = huggingface_hub.snapshot_download, []

    def network(name: str, **options):
        if options.get("local_files_only"):
            return cached(name, **options)
        calls.append(name)
        shutil.copyfile(whole / lost.name, lost)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", network)
    assert load_model("someone/big").config.name == "tiny"
    assert calls == ["someone/big"]
    load_model("someone/big")
    assert calls == ["someone/big"]  # complete now: no second look at the network


def test_a_repository_that_nobody_has_is_refused_with_the_reason(hub) -> None:
    with pytest.raises(ModelError, match="the hub does not give it: .*"):
        locate("nobody/nothing")


def test_a_released_directory_is_converted_once_into_the_cache(released, tmp_path, monkeypatch, caplog) -> None:
    before = describe(str(released))
    assert before.tensors == 815 and not (tmp_path / "cache").exists()
    assert family(str(released)) == "released" and not (tmp_path / "cache").exists()
    first = locate(str(released))
    assert first.parent == tmp_path / "cache/models" and "converting it once" in caplog.text
    caplog.clear()
    monkeypatch.setattr("mmi_engine.weights.importing.import_released", None)
    assert locate(str(released)) == first and not caplog.text
    state = load_model(str(released)).state_dict()
    assert all((state[name] == value).all() for name, value in small_model().state_dict().items())


def test_a_released_repository_keeps_its_shards_in_a_subfolder_and_its_tokenizer_elsewhere(
    hub, released, tmp_path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(released, bare)
    (bare / "tokenizer.json").unlink()
    hub("lab/released", bare, "mm_interleaved_pretrain")
    with pytest.raises(ModelError, match=find.RELEASED_TOKENIZER):
        locate("lab/released")
    assert not any((tmp_path / "cache/models").glob("*"))
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    shutil.copyfile(TOKENIZER, tokens / "tokenizer.json")
    hub(find.RELEASED_TOKENIZER, tokens)
    assert locate("lab/released").name.startswith("lab-released-")


def test_a_damaged_released_directory_is_refused_and_leaves_nothing(released, tmp_path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(released, damaged)
    path = sorted(damaged.glob("*.bin"))[0]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match="truncated"):
        load_model(damaged)
    assert not any((tmp_path / "cache/models").iterdir())


def test_a_language_model_alone_is_no_model_of_ours(tmp_path) -> None:
    llama = tmp_path / "llama"
    llama.mkdir()
    (llama / "config.json").write_text('{"model_type": "llama"}')
    (llama / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(ModelError, match="mmi model new"):
        locate(str(llama))
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(ModelError, match="holds no"):
        locate(str(llama))


def test_missing_weights_are_never_replaced(ours, tmp_path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(ours, broken)
    (broken / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no"):
        load_model(broken)
    sharded = save_model(tiny_model(), tmp_path / "sharded", shard_bytes=40_000)
    files = sorted(sharded.glob("model-*.safetensors"))
    files[0].unlink()
    with pytest.raises(ModelError, match=f"lacks 1 of {len(files)} weight files, first {files[0].name}"):
        load_model(sharded)
    (sharded / store.INDEX).unlink()
    with pytest.raises(ModelError, match=f"has no {store.INDEX}"):
        load_model(sharded)


def test_base_models_come_from_the_cache_without_a_network(hub, tmp_path) -> None:
    names = ("sd/unet/diffusion_pytorch_model", "sd/vae/diffusion_pytorch_model", "llama/model")
    for name in names:
        file = tmp_path / f"{name}.safetensors"
        file.parent.mkdir(parents=True)
        file.write_bytes((2).to_bytes(8, "little") + b"{}")
    for name in ("sd", "llama"):
        snapshot, folder = hub(f"lab/{name}", tmp_path / name), tmp_path / name
        assert locate_part(f"lab/{name}", BASE).samefile(snapshot) and locate_part(str(folder), BASE) == folder
    with pytest.raises(ModelError, match='base model "lab/none" is no directory'):
        locate_part("lab/none", BASE)


INTERRUPTED = "unet/config.json"
SMALL = [INTERRUPTED, "model_index.json", "text_encoder/config.json", "vae/config.json"]
UNUSED = ["safety_checker/model", "unet/diffusion_pytorch_model.fp16", "unet/diffusion_pytorch_model.non_ema", "v2"]


@pytest.mark.parametrize(("kept", "other"), [("safetensors", "bin"), ("bin", "ckpt")])
def test_an_interrupted_download_of_a_base_is_completed_by_what_is_read(hub, tmp_path, monkeypatch, kept, other):
    source, text = tmp_path / "repository", "model" if kept == "safetensors" else "pytorch_model"
    wanted = [f"{part}/diffusion_pytorch_model.{kept}" for part in ("unet", "vae")] + [f"text_encoder/{text}.{kept}"]
    unused = [f"{name}.{kept}" for name in UNUSED] + [f"unet/diffusion_pytorch_model.{other}"]
    for name in (*SMALL, *wanted, *unused):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("{}")
    (source / "model_index.json").write_text('{"text_encoder": ["transformers", "CLIPTextModel"]}')
    (source / "text_encoder/config.json").write_text('{"model_type": "clip_text_model"}')
    (tmp_path / "first/unet").mkdir(parents=True)
    shutil.copyfile(source / INTERRUPTED, tmp_path / "first" / INTERRUPTED)
    snapshot = hub("lab/sd", tmp_path / "first")
    cached, calls = huggingface_hub.snapshot_download, []

    def network(name: str, *, allow_patterns: list[str], local_files_only: bool = False):
        if local_files_only:
            return cached(name, allow_patterns=allow_patterns, local_files_only=True)
        calls.append(allow_patterns)
        files = [str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()]
        for file in huggingface_hub.utils.filter_repo_objects(files, allow_patterns=allow_patterns):
            (snapshot / file).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / file, snapshot / file)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", network)
    assert locate_part("lab/sd", BASE).samefile(snapshot) and calls
    assert sorted(str(p.relative_to(snapshot)) for p in snapshot.rglob("*.*")) == sorted(SMALL + wanted)
    calls.clear()
    for what in (BASE, "U-Net", "VAE", "diffusion model"):
        locate_part("lab/sd", what)
    assert not calls  # whole now: no second look at the network
    for what, lost in ((BASE, wanted[1]), ("VAE", wanted[1]), ("U-Net", wanted[0]), ("diffusion model", wanted[2])):
        (snapshot / lost).unlink()
        assert (locate_part("lab/sd", what) / lost).is_file()


def test_the_command_imports_a_hub_id(hub, released, tmp_path, capsys) -> None:
    hub("lab/released", released)
    assert main(["model", "import", "lab/released", "--out", str(tmp_path / "out")]) == 0
    assert "810 tensors" in capsys.readouterr().err
    assert (tmp_path / "out/model.safetensors").is_file() and not (tmp_path / "out" / store.INDEX).exists()
    assert main(["model", "import", "lab/absent", "--out", str(tmp_path / "out2")]) == 1
    assert main(["model", "import", str(tmp_path / "absent"), "--out", str(tmp_path / "out2")]) == 1
    assert "not found" in capsys.readouterr().err


CONVERT = """
import sys
from pathlib import Path
from mmi_engine.weights.importing import import_released
sys.stdout.write("ready\\n")
sys.stdout.flush()
sys.stdin.readline()
done = import_released(Path(sys.argv[1]), Path(sys.argv[2]), wait=True)
sys.stdout.write(f"{done.tensors}\\n")
"""


def test_two_processes_convert_once(released, tmp_path) -> None:
    """Both begin at the same moment: one converts, the other waits and takes what it made."""
    root = Path(__file__).resolve().parent.parent
    paths = os.pathsep.join(str(root / name) for name in (".", "engine", "kernels"))
    command = [sys.executable, "-c", CONVERT, str(released), str(tmp_path / "t")]
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths}, **pipe) for _ in range(2)]
    try:
        assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
        for process in both:
            process.stdin.write("go\n")
            process.stdin.flush()
        told = [process.communicate(timeout=120) for process in both]
    finally:
        for process in both:
            process.kill()
            process.wait()
    assert sorted(out for out, _ in told) == ["0\n", "810\n"], told
    assert load_model(tmp_path / "t").config.name == "small"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t"]


@pytest.fixture
def kept(monkeypatch, tmp_path) -> Path:
    """Fingerprints are kept of every size, and files are settled at once."""
    monkeypatch.setattr(model_info, "KEPT_BYTES", 0)
    monkeypatch.setattr(model_info, "CLOCK_TICK_S", -1.0)
    return tmp_path / "cache/fingerprints"


def test_a_fingerprint_is_kept_and_a_changed_weight_is_noticed(ours, tmp_path, kept, monkeypatch) -> None:
    model = Path(shutil.copytree(ours, tmp_path / "m"))
    weights = model / "model.safetensors"
    first = fingerprint(model)
    monkeypatch.setattr(model_info, "KEPT_BYTES", 10**12)
    assert fingerprint(model) == fingerprint(ours) == first  # kept, computed anew, and of another copy
    monkeypatch.setattr(model_info, "KEPT_BYTES", 0)
    (entry,) = kept.iterdir()
    entry.write_text("0" * 64)
    assert fingerprint(model) == "0" * 64  # so it is the kept one that is told
    before = weights.stat()
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a copy that preserves times would
    changed = fingerprint(model)
    assert changed not in (first, "0" * 64) and len(list(kept.iterdir())) == 2
    data[-1] ^= 1
    weights.write_bytes(data)
    assert fingerprint(model) == first
    max(kept.iterdir(), key=lambda path: path.stat().st_mtime_ns).write_text("nonsense")
    assert fingerprint(model) == first


def test_a_kept_fingerprint_knows_what_the_files_are_called(ours, tmp_path, kept) -> None:
    blob, seen = tmp_path / "blob", []
    shutil.copyfile(ours / "model.safetensors", blob)
    for name in ("a", "b"):  # as the hub's cache links a repository's files, under two names
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.safetensors").symlink_to(blob)
        seen.append(fingerprint(tmp_path / name))
    assert seen[0] != seen[1] and len(list(kept.iterdir())) == 2


@pytest.mark.parametrize("large", [False, True])
def test_a_user_without_a_home_has_fingerprints(ours, monkeypatch, large) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    expected = fingerprint(ours)
    monkeypatch.delenv("MMI_CACHE")
    monkeypatch.setattr(Path, "home", home)
    monkeypatch.setattr(model_info, "KEPT_BYTES", 0 if large else 2**60)
    assert fingerprint(ours) == expected
    with pytest.raises(ModelError, match="MMI_CACHE"):
        find.cache_root()


def test_a_fingerprint_of_files_just_written_is_not_kept(ours, tmp_path, kept, monkeypatch) -> None:
    monkeypatch.setattr(model_info, "CLOCK_TICK_S", 60.0)
    model = Path(shutil.copytree(ours, tmp_path / "m"))
    fingerprint(model)
    assert not kept.exists()


@pytest.mark.parametrize("damage", ["5", '{"weight_map": 5}', '{"weight_map": {"a": 5}}', "[1]"])
def test_a_damaged_index_or_header_is_told_without_a_traceback(tmp_path, damage) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(damage)
    assert find.kind(folder) is None and not find.complete(folder)
    with pytest.raises(ModelError, match="holds no"):
        locate(str(folder))
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors").write_bytes(len(damage).to_bytes(8, "little") + damage.encode())
    (folder / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="no MM-Interleaved model"):
        locate(str(folder))
