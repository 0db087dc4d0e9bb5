"""The gallery: complete, escaped, paged, deterministic, and dependent on nothing outside its directory."""

from __future__ import annotations

import html.parser
import json
import urllib.parse
from pathlib import Path

from mmi_engine import gallery
from mmi_engine.data.manifest import Row
from mmi_engine.tasks import CaptionTask, GroundTask, StoryTask, T2iTask, VqaTask


class Page(html.parser.HTMLParser):
    """Tags with attributes and all text of a page; raises on unclosed or crossed tags."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.words += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def story(name: str, text: str = "A.") -> dict:
    frames = [
        {"text": text, "image": f"{name}/00.png", "generated": []},
        {"text": "made <b>up</b>", "image": f"{name}/01.png", "generated": ["text", "image"]},
    ]
    return {"id": name, "frames": frames, "seed": 1, "status": "ok"}


def build(tmp_path: Path, results: list[dict], errors: list[dict] | None = None) -> dict[str, Page]:
    for name, rows in (("results.jsonl", results), ("errors.jsonl", errors or [])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = dict(gallery.pages(StoryTask(), tmp_path / "results.jsonl", tmp_path / "errors.jsonl"))
    assert made == dict(gallery.pages(StoryTask(), tmp_path / "results.jsonl", tmp_path / "errors.jsonl"))
    return {name: Page(text) for name, text in made.items()}


def test_given_and_generated_are_told_apart(tmp_path):
    (page,) = build(tmp_path, [story("s")]).values()
    assert [figure.get("class") for figure in page.all("figure")] == [None, "made"]
    assert [caption.get("class") for caption in page.all("figcaption")] == [None, "made"]
    assert [image["src"] for image in page.all("img")] == ["s/00.png", "s/01.png"]
    assert all(image["loading"] == "lazy" and image["alt"] for image in page.all("img"))


def test_hostile_text_stays_text(tmp_path):
    evil = "<script>alert(1)</script>\"' onerror=x & </style>"
    rows = [{**story("a b#?%", evil), "id": evil}]
    (page,) = build(tmp_path, rows, [{"id": evil, "line": 3, "error": "bad_json", "message": evil}]).values()
    assert not page.all("script")
    assert page.words.count(evil) == 4  # title of the item, caption, and twice in the table of errors
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert urllib.parse.unquote(page.all("img")[0]["src"] or "") == "a b#?%/00.png"


def test_pages_hold_a_bounded_number_of_items_and_link_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "ITEMS_PER_PAGE", 3)
    pages = build(tmp_path, [story(f"s{n}") for n in range(7)])
    assert list(pages) == ["index.html", "index-2.html", "index-3.html"]
    assert [len(page.all("figure")) // 2 for page in pages.values()] == [3, 3, 1]
    links = {link["href"] for page in pages.values() for link in page.all("a")}
    assert set(pages) <= links


def test_nothing_is_loaded_from_elsewhere_and_no_script_is_needed(tmp_path):
    (page,) = build(tmp_path, [story("s")]).values()
    targets = [
        value or "" for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")
    ]
    assert targets and not any(urllib.parse.urlsplit(target).scheme or target.startswith("/") for target in targets)
    assert not page.all("script") and not page.all("link")
    assert "prefers-color-scheme: dark" in gallery.STYLE


def test_an_empty_run_still_has_a_page(tmp_path):
    pages = build(tmp_path, [], [{"id": "x", "line": 1, "error": "bad_json", "message": "broken"}])
    assert "bad_json" in pages["index.html"].words


def test_every_task_shows_what_was_asked_beside_what_came_out(tmp_path):
    """Inputs, questions, boxes in percent of the picture; items of several pictures get wider cards."""
    rows = {
        "ground": (GroundTask(), {"expression": "the <ball>"}, {"box": [10, 5, 30, 15], "size": [40, 20]}),
        "vqa": (VqaTask(), {"question": "what?"}, {"answer": "a bus"}),
        "caption": (CaptionTask(), {}, {"caption": "a bus"}),
        "t2i": (T2iTask(), {"prompt": "a bus"}, {"image": "t2i.png"}),
    }
    for name, (task, asked, made) in rows.items():
        result = {"id": name, **made, "seed": 1, "status": "ok"}
        (tmp_path / "results.jsonl").write_text(json.dumps(result) + "\n")
        (tmp_path / "errors.jsonl").write_text("")
        files = (tmp_path / "results.jsonl", tmp_path / "errors.jsonl")
        manifest = [Row(1, "other", {}), Row(2, name, asked)]
        copies = {name: [f"index_files/0-{name}.jpg"] if task.keeps_inputs else []}
        ((_, text),) = gallery.pages(task, *files, rows=manifest, copies=copies.__getitem__)
        page = Page(text)
        assert all(value in page.words for value in asked.values())
        assert [image["src"] for image in page.all("img")] == (copies[name] or ["t2i.png"])
        boxes = [span["style"] for span in page.all("span") if span.get("class") == "box"]
        assert boxes == (["left:25.00%;top:25.00%;width:50.00%;height:50.00%"] if name == "ground" else [])


def test_an_item_that_cannot_be_shown_costs_no_other_its_place(tmp_path):
    class Choosy(StoryTask):
        def panels(self, result, data, inputs):
            return super().panels(result, data, inputs) if result["id"] != "s1" else 1 / 0

    build(tmp_path, [story(f"s{n}") for n in range(3)])
    ((_, text),) = gallery.pages(Choosy(), tmp_path / "results.jsonl", tmp_path / "errors.jsonl")
    page = Page(text)
    assert [image["src"].split("/")[0] for image in page.all("img")] == ["s0", "s0", "s2", "s2"]
    assert "cannot be shown" in page.words and [item["id"] for item in page.all("section")] == ["s0", "s1", "s2"]


def test_thousands_of_items_stay_in_pages_a_browser_can_hold(tmp_path):
    results = "".join(json.dumps(story(f"s{n}")) + "\n" for n in range(5000))
    (tmp_path / "results.jsonl").write_text(results)
    (tmp_path / "errors.jsonl").write_text("")
    sizes = [
        len(page.encode())
        for _, page in gallery.pages(StoryTask(), tmp_path / "results.jsonl", tmp_path / "errors.jsonl")
    ]
    assert len(sizes) == 25 and max(sizes) < 2**20
