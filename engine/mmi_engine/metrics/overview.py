"""The page of a suite: its table, each part linked to its gallery and its worst items.

Place in the flow: `mmi eval --suite` writes ``OUT/index.html`` beside ``suite.json`` once the table is there. The page
stands alone, and links to files of the same folder only.
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Sequence
from html import escape
from pathlib import Path

from mmi_engine.gallery import STYLE
from mmi_engine.metrics.score import write_text

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} · mmi</title><style>{style}</style></head><body>
<header><h1>{title}</h1><p>{remark}</p></header><main>
{links}
<section class="item"><table>
<tr>{header}</tr>
{rows}
</table></section>
</main></body></html>
"""
PAGES = {"index.html": "gallery", "worst.html": "worst items"}


def write(
    path: Path, title: str, remark: str, header: Sequence[str], rows: Sequence[Sequence[str]], parts: Sequence[str]
) -> Path:
    """Write the page.

    Args:
        path: of the page, in the suite's output folder.
        title, remark: what stands above the table.
        header, rows: the table, as it is printed.
        parts: folders of the parts below the page's; those of their pages that are there are linked.

    Raises:
        OutputError: the disk refuses.
    """
    links = [_links(path.parent, part) for part in dict.fromkeys(parts)]
    return write_text(
        path,
        PAGE.format(
            title=escape(title),
            remark=escape(remark),
            style=STYLE,
            links=f"<nav>{''.join(links)}</nav>" if any(links) else "",
            header="".join(f"<th>{escape(cell)}</th>" for cell in header),
            rows="\n".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows),
        ),
    )


def _links(folder: Path, part: str) -> str:
    """To the pages of a part that are there."""
    there = [(name, words) for name, words in PAGES.items() if (folder / part / name).is_file()]
    quoted = urllib.parse.quote(part)
    return "".join(f'<a href="{quoted}/{name}">{escape(part)}: {words}</a>' for name, words in there)
