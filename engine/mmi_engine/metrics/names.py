"""The table of metrics: name → where it is, what it reads, what it says. Imports nothing heavy: the help shows it.

Place in the flow: the command line lists these names, `registry.py` makes a metric from one. A new metric is one entry.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One metric: module and class, reference fields, result field, a line of help.

    `result`: fields of the result row, one of which must be there. `auto`: chosen when none is named and the references
    have the fields; `needs`: an option it cannot do without.
    """

    module: str
    attribute: str
    reference: tuple[str, ...]
    result: tuple[str, ...]
    help: str
    auto: bool = False
    needs: str | None = None


METRICS: dict[str, Entry] = {
    "cider": Entry("captions", "Cider", ("captions", "caption"), ("caption",), "CIDEr-D, 0 to 10", auto=True),
    "bleu": Entry("captions", "Bleu", ("captions", "caption"), ("caption",), "BLEU-1 to BLEU-4", auto=True),
    "rouge": Entry("captions", "RougeL", ("captions", "caption"), ("caption",), "ROUGE-L", auto=True),
    "vqa": Entry("vqa", "Vqa", ("answers",), ("answer",), "VQA accuracy over several human answers"),
    "vizwiz": Entry("vqa", "VizWiz", ("answers",), ("answer",), "VQA accuracy and answerability AP"),
    "exact": Entry("vqa", "Exact", ("answers", "answer"), ("answer",), "exact match after VQA normalisation"),
    "rec": Entry("rec", "Rec", ("box",), ("box",), "REC accuracy: IoU over 0.5", auto=True),
    "ranking": Entry(
        "ranking", "Ranking", ("options",), ("ranks", "ranking", "scores"), "NDCG, MRR, R@k, mean rank", auto=True
    ),
    "fid": Entry(
        "frechet", "Fid", ("image", "frames"), ("image",), "FID: Inception features at 299 px", needs="inception"
    ),
    "fid64": Entry("frechet", "Fid64", ("image", "frames"), ("image",), "FID of pictures at 64 px", needs="inception"),
    "kid": Entry("kid", "Kid", ("image", "frames"), ("image",), "KID × 1000: Inception features", needs="inception"),
    "fd-encoder": Entry(
        "frechet", "EncoderFd", ("image", "frames"), ("image",), "Fréchet distance, own encoder (no FID)"
    ),
    "kd-encoder": Entry("kid", "EncoderKd", ("image", "frames"), ("image",), "kernel distance, own encoder (no KID)"),
    "clip-i": Entry(
        "clip", "ClipImage", ("image", "frames"), ("image",), "CLIP similarity to the true picture", needs="clip"
    ),
    "clip-t": Entry("clip", "ClipText", ("prompt", "frames"), ("image",), "CLIP similarity to the text", needs="clip"),
    "miou": Entry("miou", "MIoU", ("labels", "segmentation"), ("image",), "mIoU of label maps or re-read pictures"),
    "toon": Entry(
        "toonworld", "Toon", ("meta",), ("caption", "answer", "box", "image", "frames"), "the embedded world's oracle"
    ),
    "psnr": Entry("pixels", "Psnr", ("image", "frames"), ("image",), "PSNR to the true picture, dB"),
    "ssim": Entry("pixels", "Ssim", ("image", "frames"), ("image",), "SSIM to the true picture"),
}

# What people also call them.
ALIASES: dict[str, str] = {
    "rouge-l": "rouge", "rougel": "rouge", **{f"bleu-{k}": "bleu" for k in range(1, 5)}, "vqa-accuracy": "vqa",
    "ndcg": "ranking", "mrr": "ranking", "recall": "ranking", "clip": "clip-i", "clip-sim": "clip-i", "iou": "rec",
}  # fmt: skip

HELP: dict[str, str] = {name: entry.help for name, entry in METRICS.items()}
