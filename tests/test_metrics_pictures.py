"""Features and their cache, maps, pixels, CLIP, segmenters: known answers, closed forms; tiny random networks."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hostile import bomb
from PIL import Image

from mmi_engine.data.images import ImageLoader
from mmi_engine.errors import ImageError, ModelError
from mmi_engine.metrics import features, miou, pixels
from mmi_engine.metrics.base import Options
from mmi_engine.metrics.pictures import Source


class Means:
    """Mean colour: features with a closed form."""

    name, fingerprint, width = "means", "0" * 16, 3

    def __init__(self):
        self.seen = 0

    def prepare(self, image):
        return np.asarray(image, np.float64).mean((0, 1)) / 255

    def features(self, prepared):
        self.seen += len(prepared)
        return np.stack(prepared).astype(np.float32)


def test_features_are_computed_once_per_file_and_kept(tmp_path):
    for k, grey in enumerate((0, 255, 0)):
        Image.new("RGB", (8, 6), (grey,) * 3).save(tmp_path / f"{k}.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no")
    loader = ImageLoader(tmp_path)
    sources = [Source(loader, name, "r:1") for name in ("0.png", "1.png", "2.png", "broken.png")] + [None]
    options, network = Options(cache=tmp_path / "cache", batch_size=2), Means()
    values, problems = features.extract(network, sources, options, "pictures")
    assert np.allclose(values[:, 0], [0, 1, 0, 128 / 255, 128 / 255], atol=1e-6) and list(problems) == [3]
    first = network.seen
    again, _ = features.extract(network, sources[:3], options, "pictures")
    assert network.seen == first and np.array_equal(again, values[:3])
    assert features.blame({3: "x", 4: "y"}, [1, 2, 2]) == {2: "x"}


def test_a_network_that_gives_nan_is_named(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    network = Means()
    network.features = lambda prepared: np.full((len(prepared), 3), np.nan)
    with pytest.raises(ModelError, match=r"gives NaN for r:1: a.png"):
        features.extract(network, [Source(ImageLoader(tmp_path), "a.png", "r:1")], Options(), "x")


def test_the_models_own_encoder_reads_its_part_of_the_weights():
    from mmi_engine.metrics.encoder import EncoderFeatures
    from mmi_engine.model.checkpoint import load_model

    extractor = EncoderFeatures("toon")
    for module in extractor.network.modules():
        if hasattr(module, "backend"):
            module.backend = "torch"  # nothing to compile
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8))
    prepared = extractor.prepare(image)
    whole = load_model("toon")
    whole.set_backend("torch")
    with torch.inference_mode():
        hidden = whole.visual_tokenizer(prepared[None]).last_hidden[:, whole.visual_tokenizer.trunk.prefix :]
    plain = hidden[0] - hidden[0].mean(1, keepdim=True)
    plain = plain / (plain.square().mean(1, keepdim=True) + 1e-5).sqrt()
    assert np.allclose(extractor.features([prepared])[0], plain.mean(0).numpy(), atol=1e-4)


def test_miou_known_answer():
    true, said = np.array([[1, 1, 2, 2], [0, 0, 3, 3]]), np.array([[1, 2, 2, 2], [1, 1, 3, 1]])
    default, released = miou.MIoU(Options()), miou.MIoU(Options(variant="released"))
    assert default.score([true], [said]).measures[0].value == pytest.approx(0.5)
    assert released.score([true], [said]).measures[0].value == pytest.approx(0.01)
    both = default.score([true, true], [said, None]).measures[0]
    table = np.stack([miou.counts(true, s, 3) for s in (said, said, None)]).sum(0)
    assert both.resample(np.array([[2.0, 1.0]]))[0] == pytest.approx(float(miou.miou(table)))
    assert both.value < 0.5 and both.parts.tolist() == [0.5, 0.0]


def test_label_maps_are_ids_or_refused(tmp_path):
    labels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    Image.fromarray(labels).save(tmp_path / "l.png")
    Image.fromarray(labels.astype(np.uint16) * 1000).save(tmp_path / "i.png")
    Image.new("RGB", (4, 3)).save(tmp_path / "c.png")
    loader = ImageLoader(tmp_path)
    assert np.array_equal(miou.load_labels(loader, "l.png"), labels)
    assert miou.load_labels(loader, "i.png").max() == 11000
    (tmp_path / "bomb.png").write_bytes(bomb(30_000, 30_000))
    (tmp_path / "folder").mkdir()
    for name, words in (
        ("c.png", "colour picture"),
        ("gone.png", "not found"),
        ("bomb.png", "million pixels"),
        ("a\0b.png", "not found"),
        ("folder", "not a file"),
    ):
        with pytest.raises(ImageError, match=words) as raised:
            miou.load_labels(loader, name)
        assert str(tmp_path) not in str(raised.value)


def test_psnr_and_ssim():
    pytest.importorskip("torchmetrics", reason="SSIM comes with the extra eval")
    grey = [Image.new("RGB", (20, 14), (value,) * 3) for value in (100, 110)]
    assert pixels.psnr(*grey) == pytest.approx(20 * np.log10(255 / 10)) and pixels.psnr(grey[0], grey[0]) == 100.0
    noisy = Image.fromarray(np.random.default_rng(0).integers(0, 255, (14, 20, 3), dtype=np.uint8))
    assert pixels.ssim(grey[0], grey[0]) == pytest.approx(1.0) and abs(pixels.ssim(grey[0], noisy)) < 0.2
    c1, (a, b) = 0.01**2, (100 / 255, 110 / 255)  # of constant pictures the closed form is the luminance term
    assert pixels.ssim(*grey) == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), abs=1e-5)


def tiny_tokenizer(folder):
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: k for k, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt")).save_pretrained(folder)
    return {word: k for k, word in enumerate(words)}


def tiny_clip(folder):
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    torch.manual_seed(0)
    folder.mkdir()
    words = tiny_tokenizer(folder)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={
            **size,
            "vocab_size": len(words),
            "max_position_embeddings": 12,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
        vision_config={**size, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return words


def test_clip_similarity_of_a_tiny_model(tmp_path):
    from transformers import CLIPModel

    from mmi_engine.metrics.clip import ClipFeatures, ClipImage, ClipText

    words = tiny_clip(tmp_path / "clip")
    rng = np.random.default_rng(0)
    for name in "ab":
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    options, loader = Options(clip=tmp_path / "clip"), ImageLoader(tmp_path)
    a, b = (Source(loader, f"{name}.png", "r:1") for name in "ab")
    measure = ClipImage(options).score([[a], [a], [b]], [[a], [b], None]).measures[0]
    assert measure.parts[0] == pytest.approx(1.0) and measure.parts[1] < 1.0 and measure.parts[2] == 0.0
    extractor = ClipFeatures(tmp_path / "clip")
    model = CLIPModel.from_pretrained(tmp_path / "clip").eval()
    pixels_ = extractor.prepare(a.load())[None]
    ids = torch.tensor([[0, words["a</w>"], words["b</w>"], 1]])
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels_)
    cosine = float((out.image_embeds * out.text_embeds).sum())
    text = ClipText(options).score([["a b"]], [[a]]).measures[0]
    assert text.value == pytest.approx(cosine, abs=1e-5)
    with pytest.raises(ModelError, match="no config.json"):
        ClipFeatures(tmp_path)


def test_a_tiny_segmenter_reads_pictures(tmp_path):
    from transformers import SegformerConfig, SegformerForSemanticSegmentation
    from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil

    from mmi_engine.metrics.segmenter import make

    torch.manual_seed(0)
    config = SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 8], patch_sizes=[7, 3], strides=[4, 2],
        num_attention_heads=[1, 2], mlp_ratios=[1, 1], decoder_hidden_size=8, num_labels=5,
    )  # fmt: skip
    SegformerForSemanticSegmentation(config).save_pretrained(tmp_path / "seg")
    SegformerImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "seg")
    labels = make(str(tmp_path / "seg")).read(Image.new("RGB", (40, 30), (200, 10, 10)), (17, 23))
    assert labels.shape == (17, 23) and labels.min() >= 1 and labels.max() <= 5
    with pytest.raises(ModelError, match="no config.json"):
        make(str(tmp_path))


def test_a_tiny_oneformer_reads_pictures(tmp_path):
    from transformers import OneFormerConfig, OneFormerForUniversalSegmentation, SwinConfig
    from transformers.models.oneformer.image_processing_pil_oneformer import OneFormerImageProcessorPil

    from mmi_engine.metrics.segmenter import make

    torch.manual_seed(0)
    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = {"image_size": 64, "embed_dim": 8, "depths": [1] * 4, "num_heads": [1, 1, 2, 2], "window_size": 2}
    config = OneFormerConfig(
        backbone_config=SwinConfig(**swin, out_features=stages), num_queries=6, hidden_dim=32, mask_dim=32, conv_dim=32,
        encoder_feedforward_dim=16, dim_feedforward=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2,
        task_seq_len=8, max_seq_len=8, text_encoder_width=16, text_encoder_context_length=8, text_encoder_num_layers=1,
        text_encoder_vocab_size=64, text_encoder_proj_layers=1, text_encoder_n_ctx=2, use_auxiliary_loss=False,
        is_training=False, num_labels=5,
    )  # fmt: skip
    folder = tmp_path / "oneformer"
    OneFormerForUniversalSegmentation(config).save_pretrained(folder)
    (folder / "classes.json").write_text(json.dumps({str(k): {"isthing": 0, "name": f"c{k}"} for k in range(5)}))
    size = {"height": 64, "width": 64}
    processor = OneFormerImageProcessorPil(size=size, class_info_file="classes.json", repo_path=str(folder), num_text=2)
    processor.save_pretrained(folder)
    tiny_tokenizer(folder)
    labels = make(str(folder)).read(Image.new("RGB", (80, 60), (200, 10, 10)), (30, 40))
    assert labels.shape == (30, 40) and labels.min() >= 1 and labels.max() <= 5


class FakeInception(Means):
    """Stands in for Inception where only what surrounds it is looked at."""

    official = False

    def __init__(self, path, side=0, device="cpu"):
        super().__init__()
        self.name = f"inception{side or 299}"


def test_fid_and_kid_by_name_with_weights_that_are_not_theirs(tmp_path, monkeypatch, capsys):
    from mmi_cli.main import main
    from mmi_engine.metrics import inception

    monkeypatch.setattr(inception, "InceptionFeatures", FakeInception)
    rng = np.random.default_rng(0)
    rows = []
    for k in range(6):
        Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)).save(tmp_path / f"{k}.png")
        rows.append({"id": str(k), "image": f"{k}.png"})
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["eval", str(tmp_path / "results.jsonl"), str(tmp_path / "r.jsonl"), "--inception", "x", "--no-cache"]
    assert main([*arguments, "--metric", "fid,fid64,kid"]) == 0
    out, err = capsys.readouterr()
    scores = json.loads((tmp_path / "metrics.json").read_text())["scores"]
    assert scores["fid"]["measures"]["FID"]["value"] == pytest.approx(0.0, abs=1e-9)
    assert scores["kid"]["measures"]["KID × 1000"]["value"] < 0.0  # unbiased: below zero for equal sets
    assert "FID at 64 px" in out and err.count("not those of 2015-12-05") == 3
    assert main([*arguments, "--metric", "fid", "--parity", "released"]) == 0
    out, err = capsys.readouterr()
    assert "FID at 64 px" in out and "inception64" in out and "the same as fid64" in err
