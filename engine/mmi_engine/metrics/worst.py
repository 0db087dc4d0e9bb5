"""The worst items of a run, to look at: truth, answer and score side by side.

Place in the flow: `mmi eval … --out DIR` writes ``DIR/worst.html``. The page stands alone: small copies of the pictures
are inside it. Items without a usable result are listed by their reason, not shown.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmi_engine.data.images import ImageLoader
from mmi_engine.data.manifest import shorten
from mmi_engine.errors import ItemError
from mmi_engine.gallery import STYLE
from mmi_engine.metrics.base import Measure
from mmi_engine.metrics.fields import meta
from mmi_engine.metrics.pairs import Pair
from mmi_engine.metrics.score import Card

if TYPE_CHECKING:
    from PIL import Image

SIDE = 224  # px of a picture on the page
SAID = ("caption", "answer", "text", "box", "ranking", "scores")
TRUE = ("question", "expression", "prompt", "captions", "caption", "answers", "answer", "box", "options", "relevance")
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Worst items · mmi</title><style>{style}</style></head><body>
<header><h1>Worst items</h1><p>{run}</p></header><main>
{body}
</main></body></html>
"""


def write(cards: Sequence[Card], path: Path, count: int = 20) -> Path:
    """Write the page.

    Args:
        cards: of one run; those whose measures are no means over items have nothing to show.
        path: of the page; count: items per metric.
    """
    body = "\n".join(_section(card, count) for card in cards)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        PAGE.format(style=STYLE, run=escape(cards[0].run) if cards else "", body=body), encoding="utf-8"
    )  # fmt: skip
    return path


def worst(card: Card, count: int) -> tuple[Measure | None, list[int]]:
    """The first measure that items have a value in, and the indices of those with a usable result that is not
    perfect, worst first."""
    measure = next((m for m in card.measures if m.parts is not None and len(m.parts) == len(card.pairs)), None)
    if measure is None or measure.parts is None:
        return None, []
    usable = [
        k
        for k, item in enumerate(card.pairs)
        if item.result is not None
        and item.id not in card.unusable
        and not np.isnan(measure.parts[k])
        and not (measure.unit == "%" and measure.higher and measure.parts[k] == 100)
    ]
    keys = measure.parts if measure.higher else -measure.parts
    return measure, sorted(usable, key=lambda k: float(keys[k]))[:count]


def _section(card: Card, count: int) -> str:
    measure, indices = worst(card, count)
    lost = {**card.missing, **card.failed, **card.unusable}
    rows = "".join(f"<tr><td>{escape(key)}</td><td>{escape(why)}</td></tr>" for key, why in list(lost.items())[:200])
    table = f'<section class="item"><h2>Without a usable result: {len(lost)}</h2><table>{rows}</table></section>'
    title = f"<h2>{escape(card.metric)} ({escape(card.variant)}): {card.headline.name} {card.headline.value:.4g}</h2>"
    if measure is None or measure.parts is None:
        items = '<p class="item">a distance between sets has no worst item</p>'
    else:
        shown = [_shown(card.pairs[k], measure.name, float(measure.parts[k])) for k in indices]
        items = "\n".join(shown) or '<p class="item">no item with a fault</p>'
    return f"{title}\n{items}\n{table if lost else ''}"


def _shown(item: Pair, name: str, value: float) -> str:
    """One item, or why it cannot be shown: the metric read its own fields, and any other may hold anything."""
    heading = f"<h2>{escape(item.id)}<small>{escape(name)} {value:.3f}</small></h2>"
    try:
        return f'<section class="item">{heading}{_strip(item)}</section>'
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        return f'<section class="item">{heading}<p class="tag">cannot be shown: {escape(str(error))}</p></section>'


def _strip(item: Pair) -> str:
    result = item.result or {}
    said = {key: result[key] for key in SAID if result.get(key) is not None}
    true = {key: item.reference[key] for key in TRUE if item.reference.get(key) is not None}
    boxes = [(item.reference.get("box"), "#2e7d6b"), (result.get("box"), "#b4531f")]
    pictures = [_picture(item.truth, reference, "given or true", boxes) for reference in _true(item.reference)]
    pictures += [_picture(item.made, reference, "made by the model", []) for reference in _made(result)]
    texts = "".join(f"<figcaption>{escape(_line(key, v))}</figcaption>" for key, v in true.items())
    texts += "".join(f'<figcaption class="made">{escape(_line(key, v))}</figcaption>' for key, v in said.items())
    return f'<div class="strip">{"".join(pictures)}<figure>{texts}</figure></div>'


def _line(key: str, value: Any) -> str:
    return shorten(f"{key}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}", 400)


def _true(row: dict[str, Any]) -> list[str]:
    """Pictures that a reference names, at most six: the whole true story where there is one."""
    story = meta(row, "images")
    found = story if isinstance(story, list) else [meta(row, "image"), row.get("segmentation")]
    found = [*found, *(frame.get("image") for frame in _frames(row))]
    return list(dict.fromkeys(name for name in found if isinstance(name, str)))[:6]


def _made(row: dict[str, Any]) -> list[str]:
    """Pictures that the model made, at most six."""
    found = [row.get("image"), *(f.get("image") for f in _frames(row) if "image" in f.get("generated", ["image"]))]
    return [name for name in found if isinstance(name, str)][:6]


def _frames(row: dict[str, Any]) -> list[dict[str, Any]]:
    frames = row.get("frames")
    return [frame for frame in frames if isinstance(frame, dict)] if isinstance(frames, list) else []


def _picture(loader: ImageLoader, reference: str, tag: str, boxes: list[tuple[Any, str]]) -> str:
    try:
        image = loader.load(reference)
    except ItemError as error:
        return f'<figure><p class="tag">{escape(str(error))}</p></figure>'
    _draw(image, boxes)
    image.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    image.save(stream, format="JPEG", quality=85)
    source = f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
    return f'<figure><div class="picture"><img src="{source}" alt=""></div><p class="tag">{tag}</p></figure>'


def _draw(image: Image.Image, boxes: list[tuple[Any, str]]) -> None:
    from PIL import ImageDraw

    pen = ImageDraw.Draw(image)
    for box, color in boxes:
        if isinstance(box, list) and len(box) == 4 and box[0] < box[2] and box[1] < box[3]:
            pen.rectangle([float(v) for v in box], outline=color, width=max(1, max(image.size) // 80))
