"""The static gallery of an output directory: inputs beside outputs, what was given and what the model made.

Place in the flow: `run.py` calls `pages` over the merged rows and writes what comes out as ``index.html``,
``index-2.html``, …. Pages need no script, no network and no file outside the directory; they follow the reader's light
or dark setting, and they are a pure function of the rows (no time, host or path), so two equal runs have equal pages.
"""

from __future__ import annotations

import json
import logging
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any

from mmi_engine.data.manifest import Row
from mmi_engine.tasks import Panel, Task

ITEMS_PER_PAGE = 200
ERRORS_PER_PAGE = 500  # shown on the first page; all are in errors.jsonl

STYLE = """
:root { color-scheme: light dark;
  --paper: #faf7f2; --card: #fffdf9; --ink: #2b2620; --soft: #857a6c; --line: #e6dfd3;
  --made: #b4531f; --made-soft: #fbeee4; --bad: #a3262a; --box: #d81f2a;
  --shade: 0 1px 2px #3a2d1a14, 0 6px 20px #3a2d1a0d; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #171513; --card: #211e1b; --ink: #ece5da; --soft: #9a8f80; --line: #37322c;
  --made: #f0a06c; --made-soft: #33261c; --bad: #f08a86; --shade: 0 1px 2px #0006; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main, header, footer { max-width: 1280px; margin: 0 auto; padding: 0 clamp(14px, 3vw, 36px); }
header { padding-top: 44px; padding-bottom: 10px; }
h1 { margin: 0 0 6px; font: 600 34px/1.15 "Iowan Old Style", "Palatino Linotype", Palatino, Georgia, serif; }
header p { margin: 0; color: var(--soft); }
.key { display: inline-block; padding: 0 9px; border-radius: 99px; border: 1px solid var(--line); font-size: 13px; }
.key.made { border-color: var(--made); color: var(--made); background: var(--made-soft); }
.items { display: grid; grid-template-columns: repeat(auto-fill, minmax(236px, 1fr)); gap: 22px; margin: 26px 0; }
.item { padding: 18px clamp(14px, 2vw, 24px) 22px; background: var(--card); border-radius: 14px;
  border: 1px solid var(--line); box-shadow: var(--shade); }
.item h2 { display: flex; flex-wrap: wrap; gap: 4px 14px; align-items: baseline; margin: 0 0 14px; font-size: 16px;
  font-weight: 600; overflow-wrap: anywhere; }
.item h2 a { color: inherit; text-decoration: none; }
.item h2 a:hover { text-decoration: underline; }
.item h2 small { color: var(--soft); font-weight: 400; font-size: 13px; }
.two { grid-column: span 2; }
.wide { grid-column: 1 / -1; }
.strip { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 178px), 1fr)); gap: 18px; }
figure { margin: 0; min-width: 0; }
figure .picture { position: relative; display: block; border-radius: 10px; overflow: hidden; background: var(--line); }
figure img { display: block; width: 100%; height: auto; aspect-ratio: 1; object-fit: contain; }
figure .whole img { aspect-ratio: auto; }
figure .box { position: absolute; border: 2px solid var(--box); border-radius: 2px;
  box-shadow: 0 0 0 1.5px #fff, inset 0 0 0 1.5px #fff; }
figure.made .picture { box-shadow: 0 0 0 3px var(--card), 0 0 0 5px var(--made); }
figure .tag { margin: 9px 0 0; font-size: 12px; letter-spacing: .02em; color: var(--soft); }
figure.made .tag { color: var(--made); }
figcaption { margin-top: 4px; font: 17px/1.4 "Iowan Old Style", "Palatino Linotype", Palatino, Georgia, serif;
  overflow-wrap: anywhere; white-space: pre-line; }
figcaption.made { color: var(--made); }
figcaption.made::before { content: "✎ "; font-family: system-ui, sans-serif; }
nav { display: flex; flex-wrap: wrap; gap: 6px; margin: 22px 0; }
nav a, nav b { padding: 3px 11px; border-radius: 8px; border: 1px solid var(--line); color: inherit;
  text-decoration: none; }
nav b { background: var(--made-soft); border-color: var(--made); color: var(--made); }
table { width: 100%; border-collapse: collapse; font-size: 14px; }
td, th { padding: 6px 14px 6px 0; text-align: left; vertical-align: top; border-top: 1px solid var(--line);
  overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: 500; border-top: 0; }
td code { color: var(--bad); white-space: nowrap; }
td:first-child { white-space: nowrap; color: var(--soft); font-variant-numeric: tabular-nums; }
footer { padding-top: 8px; padding-bottom: 44px; color: var(--soft); font-size: 13px; }
footer a { color: inherit; }
@media (max-width: 560px) { .two { grid-column: 1 / -1; }
  .strip { grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)); gap: 14px; } }
@media print { .item { break-inside: avoid; box-shadow: none; } }
"""

log = logging.getLogger(__name__)

MADE = ' class="made"'

TITLES = {
    "caption": ("Captions", "picture", "pictures"),
    "vqa": ("Questions and answers", "question", "questions"),
    "ground": ("Expressions and boxes", "expression", "expressions"),
    "t2i": ("Pictures from text", "prompt", "prompts"),
    "seg2img": ("Pictures from maps", "map", "maps"),
    "story": ("Stories", "story", "stories"),
}


def pages(
    task: Task,
    results: Path,
    errors: Path,
    *,
    rows: Iterable[Row] = (),
    copies: Callable[[str], Sequence[str]] = lambda item_id: (),
) -> Iterator[tuple[str, str]]:
    """The gallery's pages, one in memory at a time.

    Args:
        task: turns a result row into panels.
        results, errors: the merged files of a finished run.
        rows: the sound rows of the manifest, in order: what the items were asked.
        copies: item id → small copies of its given pictures, paths relative to the pages.

    Yields:
        (file name, HTML): ``index.html``, then ``index-2.html`` and so on; at least one.
    """
    total, failed = _count(results), _count(errors)
    count = max(1, -(-total // ITEMS_PER_PAGE))
    asked = iter(rows)
    with results.open("rb") as stream:
        for number in range(1, count + 1):
            made = [json.loads(raw) for raw in islice(stream, ITEMS_PER_PAGE)]
            items = "\n".join(
                _item(result, _panels(task, result, _data_of(result["id"], asked), copies(result["id"])))
                for result in made
            )
            listed = f'<div class="items">\n{items}\n</div>' if items else ""
            table = _error_table(errors, failed) if number == 1 and failed else ""
            nav = _nav(number, count)
            yield _page_name(number), _page(task.name, total, failed, f"{nav}\n{listed}\n{table}\n{nav}")


def _panels(task: Task, result: dict[str, Any], data: dict[str, Any], inputs: Sequence[str]) -> list[Panel]:
    """The item's panels; where they cannot be made, a note in their place: the other items are shown all the same."""
    try:
        return task.panels(result, data, inputs)
    except Exception:
        log.debug("no panels for %s", result["id"], exc_info=True)
        return [Panel(texts=(("This item cannot be shown; it is in results.jsonl.", False),))]


def _data_of(item_id: str, rows: Iterator[Row]) -> dict[str, Any]:
    """The manifest row of an item; `rows` moves on, as results are in manifest order."""
    return next((row.data for row in rows if row.id == item_id), {})


def _count(path: Path) -> int:
    with path.open("rb") as stream:
        return sum(1 for _ in stream)


def _page_name(number: int) -> str:
    return "index.html" if number == 1 else f"index-{number}.html"


def _page(task: str, total: int, failed: int, body: str) -> str:
    title, one, many = TITLES.get(task, (task, "item", "items"))
    counts = f"{total} {one if total == 1 else many}"
    if failed:
        counts += f", {failed} failed"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)} · mmi</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<p>{counts} &nbsp; <span class="key">given</span> <span class="key made">made by the model</span></p>
</header>
<main>
{body.strip()}
</main>
<footer><a href="results.jsonl">results.jsonl</a> · <a href="errors.jsonl">errors.jsonl</a> ·
<a href="run.json">run.json</a></footer>
</body>
</html>
"""


def _nav(number: int, count: int) -> str:
    if count == 1:
        return ""
    links = (f"<b>{n}</b>" if n == number else f'<a href="{_page_name(n)}">{n}</a>' for n in range(1, count + 1))
    return f'<nav aria-label="Pages">{"".join(links)}</nav>'


def _item(row: dict[str, Any], panels: list[Panel]) -> str:
    anchor = urllib.parse.quote(row["id"], safe="")
    figures = "\n".join(_figure(panel) for panel in panels)
    size = {0: "", 1: "", 2: " two"}.get(len(panels), " wide")
    return f"""<section class="item{size}" id="{anchor}">
<h2><a href="#{urllib.parse.quote(anchor)}">{escape(row["id"])}</a><small>seed {row["seed"]}</small></h2>
<div class="strip">
{figures}
</div>
</section>"""


def _figure(panel: Panel) -> str:
    parts = []
    if panel.image is not None:
        source = escape(urllib.parse.quote(panel.image))
        alt = escape(" ".join(text for text, _ in panel.texts) or "picture")
        kind, box = ("picture whole", _box(panel.box)) if panel.box else ("picture", "")
        parts.append(f'<a class="{kind}" href="{source}"><img src="{source}" alt="{alt}" loading="lazy">{box}</a>')
        tag = panel.tag or ("made by the model" if panel.image_generated else "given")
        parts.append(f'<p class="tag">{escape(tag)}</p>')
    for text, made in panel.texts:
        parts.append(f"<figcaption{MADE if made else ''}>{escape(text)}</figcaption>")
    return f"<figure{MADE if panel.image_generated else ''}>{''.join(parts)}</figure>"


def _box(box: tuple[float, float, float, float]) -> str:
    """A frame over the picture, in percent of it."""
    left, top, right, bottom = (min(max(value, 0.0), 1.0) * 100 for value in box)
    place = f"left:{left:.2f}%;top:{top:.2f}%;width:{right - left:.2f}%;height:{bottom - top:.2f}%"
    return f'<span class="box" style="{place}"></span>'


def _error_table(errors: Path, failed: int) -> str:
    with errors.open("rb") as stream:
        rows = [json.loads(raw) for raw in islice(stream, ERRORS_PER_PAGE)]
    lines = "\n".join(
        f"<tr><td>line {row['line']}</td><td>{escape(row['id'])}</td><td><code>{escape(row['error'])}</code></td>"
        f"<td>{escape(row['message'])}</td></tr>"
        for row in rows
    )
    more = f"<p>and {failed - len(rows)} more in errors.jsonl</p>" if failed > len(rows) else ""
    return f"""<section class="item">
<h2>Failed</h2>
<table>
<tr><th>place</th><th>id</th><th>code</th><th>cause and remedy</th></tr>
{lines}
</table>{more}
</section>"""
