"""The formats by name, with a line of help each; readers are found here.

Place in the flow: `mmi_cli/commands/data.py` lists the names without importing a reader.
"""

from __future__ import annotations

import importlib
from typing import Any

# name → (module, function, what it reads)
FORMATS: dict[str, tuple[str, str, str]] = {
    "messages": ("chats", "read_messages", "chat rows of OpenAI or Hugging Face (JSON, JSON lines)"),
    "llava": ("chats", "read_llava", "LLaVA conversations (JSON)"),
    "coco": ("captions", "read_coco", "COCO captions or a Karpathy split; NoCaps, Flickr30k (JSON)"),
    "vqa": ("questions", "read_vqa", "VQAv2, OK-VQA (with --annotations), TextVQA, VizWiz (JSON)"),
    "refcoco": ("boxes", "read_refcoco", "RefCOCO/+/g: a folder with instances.json and refs, or JSON lines"),
    "folder": ("containers", "read_plain", "a folder of pictures"),
    "csv": ("containers", "read_plain", "a CSV or TSV whose header names the fields"),
    "text": ("containers", "read_plain", "a text file, one prompt a line"),
    "vist": ("stories", "read_vist", "VIST stories in sequence, nested or flattened (JSON)"),
    "story-h5": ("stories", "read_story_h5", "PororoSV, FlintstonesSV, VIST as AR-LDM stores them (HDF5)"),
    "pororo": ("pickles", "read_pororo", "PororoSV as published (npy files, with --trust-pickle)"),
    "flintstones": ("pickles", "read_flintstones", "FlintstonesSV as published (pickle, with --trust-pickle)"),
    "ade20k": ("pages", "read_ade20k", "ADE20K: maps and pictures; captions with --annotations"),
    "mmc4": ("pages", "read_mmc4", "MMC4 documents (JSON lines, also in a zip)"),
    "webdataset": ("containers", "read_webdataset", "tars of samples"),
    "parquet": ("containers", "read_parquet", "tables with pictures inside, OBELICS"),
    "visdial": ("benchmarks", "read_visdial", "VisDial 1.0; relevance with --annotations (JSON)"),
    "paragraph": ("benchmarks", "read_paragraph", "Image2Paragraph; a split with --annotations (JSON)"),
    "narratives": ("benchmarks", "read_narratives", "LN-COCO: narratives as prompts (JSON lines)"),
    "gqa": ("benchmarks", "read_gqa", "GQA questions (JSON)"),
    "released": ("benchmarks", "read_released", "annt.json and pair lists of the released project"),
}


def reader(name: str) -> Any:
    """The reader of a format."""
    module, function, _ = FORMATS[name]
    return getattr(importlib.import_module(f"mmi_engine.data.importers.{module}"), function)
