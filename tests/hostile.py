"""The hostile corpus: bad manifests and bad pictures, each with the code it must come to. Run as a script it prints the
table of docs/bad-input.md.

A case stands between two good rows, ``first`` and ``last``. Its code is None where the input is odd but sound, and the
item must then be done.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import io
import json
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

NOBODY = 65534


@dataclass(frozen=True)
class Case:
    """What goes in, and what must come out.

    Attributes:
        name: what it is, as the table says it.
        row: the hostile row; bytes stand for the raw line.
        code: of errors.jsonl; None for an item that is done.
        command: which command reads it.
        make: writes the files that the row names into the manifest's folder.
        kind: section of the table; the row of a ``table`` is one cell of a CSV.
    """

    name: str
    row: Any
    code: str | None = None
    command: str = "caption"
    make: Callable[[Path], None] | None = None
    kind: str = "row"

    @property
    def manifest(self) -> str:
        """The manifest's file name."""
        return "m.csv" if self.kind == "table" else "m.jsonl"


GOOD: dict[str, dict[str, Any]] = {
    "caption": {"image": "good.png"},
    "vqa": {"image": "good.png", "question": "what?"},
    "ground": {"image": "good.png", "expression": "it"},
    "t2i": {"prompt": "a bus"},
    "seg2img": {"segmentation": "map.png", "prompt": "a bus"},
    "story": {"frames": [{"text": "A.", "image": "good.png"}, {"text": "B."}]},
}


def noise(width: int = 24, height: int = 16, channels: int = 3) -> Image.Image:
    shape = (height, width) if channels == 1 else (height, width, channels)
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, shape, np.uint8))


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=form, **options)
    return stream.getvalue()


def put(content: bytes | Callable[[], bytes], name: str = "bad.png") -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content() if callable(content) else content) and None


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few kilobytes that unpacks to width × height one-bit pixels."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * min(width // 8 + 2, 2**16) * 100, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def animated(form: str, **options: Any) -> bytes:
    frames = [Image.new("RGB", (20, 20), (index * 80, 0, 0)) for index in range(3)]
    return encoded(frames[0], form, save_all=True, append_images=frames[1:], duration=50, **options)


def with_exif(content: bytes, exif: bytes) -> bytes:
    """A JPEG with an EXIF segment put in behind its start."""
    body = b"Exif\0\0" + exif
    return content[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + content[2:]


def rotated() -> bytes:
    exif = Image.Exif()
    exif[274] = 6
    return encoded(noise(), "JPEG", exif=exif)


def flipped_byte(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]


PICTURE = {"image": "bad.png"}
PNG, JPEG = encoded(noise(), "PNG"), encoded(noise(64, 64), "JPEG")


def picture(name: str, content: bytes | Callable[[], bytes], code: str | None = None) -> Case:
    return Case(name, PICTURE, code, make=put(content), kind="picture")


def reference(name: str, value: Any, code: str | None, make: Callable[[Path], None] | None = None) -> Case:
    return Case(name, {"image": value}, code, make=make, kind="reference")


def secret(folder: Path) -> None:
    (folder / "secret.png").write_bytes(PNG)
    (folder / "secret.png").chmod(0)


def secret_folder(folder: Path) -> None:
    (folder / "secret").mkdir()
    (folder / "secret/x.png").write_bytes(PNG)
    (folder / "secret").chmod(0)


def chat(*contents: Any) -> dict[str, Any]:
    """Turns of user and assistant in turn."""
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]}


PICTURES = [
    picture("empty file", b"", "image_unreadable"),
    picture("text named .png", b"no picture at all\n" * 9, "image_unreadable"),
    picture("PNG cut in half", PNG[: len(PNG) // 2], "image_unreadable"),
    picture("PNG with its header alone", PNG[:33], "image_unreadable"),
    picture("PNG with a flipped byte", flipped_byte(PNG), "image_unreadable"),
    picture("JPEG cut in half", JPEG[: len(JPEG) // 2], "image_unreadable"),
    picture("decompression bomb, 900 million pixels", bomb(30_000, 30_000), "image_too_large"),
    picture("PNG that claims 2 billion × 2 billion", bomb(2**31 - 1, 2**31 - 1), "image_too_large"),
    picture("SVG", b'<svg xmlns="http://www.w3.org/2000/svg"/>', "image_unreadable"),
    picture("EPS (would run Ghostscript)", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "image_unreadable"),
    picture("PDF", b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n", "image_unreadable"),
    picture("one pixel", lambda: encoded(noise(1, 1), "PNG")),
    picture("strip of 1 × 4000", lambda: encoded(noise(1, 4000), "PNG")),
    picture("strip of 4000 × 2", lambda: encoded(noise(4000, 2), "PNG")),
    picture("large, 4000 × 3000", lambda: encoded(Image.new("RGB", (4000, 3000)), "PNG")),
    picture("animated GIF", lambda: animated("GIF")),
    picture("animated WebP", lambda: animated("WEBP")),
    picture("animated PNG", lambda: animated("PNG")),
    picture("animated GIF cut after its first frame", lambda: animated("GIF")[:-60]),
    picture(
        "16-bit grey PNG", lambda: encoded(Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30)), "PNG")
    ),
    picture("32-bit float TIFF", lambda: encoded(Image.fromarray(np.eye(9, dtype=np.float32)), "TIFF")),
    picture("CMYK JPEG", lambda: encoded(noise().convert("CMYK"), "JPEG")),
    picture("palette PNG with transparency", lambda: encoded(noise().quantize(8), "PNG", transparency=0)),
    picture("RGBA", lambda: encoded(noise(channels=4), "PNG")),
    picture("grey with alpha", lambda: encoded(noise(channels=1).convert("LA"), "PNG")),
    picture("one bit a pixel", lambda: encoded(noise(channels=1).convert("1"), "PNG")),
    picture("Lab TIFF", lambda: encoded(Image.new("LAB", (9, 9), (128, 128, 128)), "TIFF")),
    picture("EXIF rotation", rotated),
    picture("damaged EXIF", with_exif(JPEG, b"MM\0*\xff\xff\xff\xff")),
    picture("wrong suffix (JPEG named .png)", JPEG),
]

REFERENCES = [
    reference("missing file", "nowhere.png", "image_not_found"),
    reference("a folder", ".", "image_unreadable"),
    reference("outside the folder, missing", "../../../nowhere.png", "image_not_found"),
    reference("a link to a picture", "link.png", None, lambda folder: (folder / "link.png").symlink_to("good.png")),
    reference("a link to nothing", "link.png", "image_not_found", lambda f: (f / "link.png").symlink_to("nothing")),
    reference("a link to itself", "loop.png", "image_not_found", lambda f: (f / "loop.png").symlink_to("loop.png")),
    reference("a link to a folder", "link.png", "image_unreadable", lambda f: (f / "link.png").symlink_to("/tmp")),
    reference("a pipe (would wait for ever)", "pipe.png", "image_unreadable", lambda f: os.mkfifo(f / "pipe.png")),
    reference("a device", "/dev/zero", "image_unreadable"),
    reference("a file of the kernel (would wait for ever)", "/proc/kmsg", "image_unreadable"),
    reference("a file without permission to read", "secret.png", "image_unreadable", secret),
    reference("a folder without permission to enter", "secret/x.png", "image_unreadable", secret_folder),
    reference("a path with NUL", "a\0b.png", "image_not_found"),
    reference("a path of 5000 characters", "x" * 5000, "image_not_found"),
    reference("a number", 3, "bad_image"),
    reference("an empty string", "", "bad_image"),
    reference("a list", ["good.png"], "bad_image"),
    reference("an object", {"path": "good.png"}, "bad_image"),
    reference("a data: URI", "data:image/png;base64," + base64.b64encode(PNG).decode(), None),
    reference("a data: URI without a comma", "data:image/png;base64", "image_unreadable"),
    reference("a data: URI of broken base64", "data:image/png;base64,@@@@", "image_unreadable"),
    reference("an empty data: URI", "data:,", "image_unreadable"),
    reference("http without --allow-urls", "http://localhost:9/x.png", "url_refused"),
    reference("ftp", "ftp://localhost/x.png", "url_refused"),
    reference("file://", "file:///etc/passwd", "url_refused"),
    Case("5000 images in one row", {"images": ["good.png"] * 5000}, "bad_row", kind="reference"),
    Case("images that is no list", {"images": "good.png"}, "bad_row", kind="reference"),
    Case("null among the images", {"images": ["good.png", None]}, "bad_image", kind="reference"),
]

LINES = [
    Case("broken JSON", b"{not json", "bad_json"),
    Case("JSON cut off", b'{"image": "good.png"', "bad_json"),
    Case("two objects on a line", b'{"image": "good.png"} {"image": "good.png"}', "bad_json"),
    Case("carriage returns alone as line ends", b'{"image": "good.png"}\r{"image": "good.png"}', "bad_json"),
    Case("a JSON list", b"[1, 2]", "bad_row"),
    Case("a JSON string", b'"good.png"', "bad_row"),
    Case("null", b"null", "bad_row"),
    Case("NaN", b'{"image": "good.png", "meta": NaN}', "bad_json"),
    Case("a number beyond floats", b'{"image": "good.png", "meta": 1e999}', "bad_json"),
    Case("an integer of 5000 digits", b'{"image": "good.png", "seed": ' + b"9" * 5000 + b"}", "bad_json"),
    Case("100 000 brackets", b"[" * 100_000, "bad_json"),
    Case("a NUL byte", b'{"image": "good\0.png"}', "bad_json"),
    Case("Latin-1", '{"image": "good.png", "meta": "café"}'.encode("latin-1"), "bad_encoding"),
    Case("half a surrogate pair", b'{"image": "good.png", "meta": "\\ud800"}', "bad_encoding"),
    Case("an empty object", {}, "no_image"),
    Case("spaces and tabs around the object", b' \t{"id": "bad", "image": "good.png"} \t', None),
    Case("CRLF", b'{"id": "bad", "image": "good.png"}\r', None),
    Case("blank lines", b'\n  \n{"id": "bad", "image": "good.png"}\n', None),
    Case("keys twice (the last one counts)", b'{"id": "x", "id": "bad", "image": "good.png"}', None),
    Case("unknown fields", {"image": "good.png", "colour": "blue", "meta": {"deep": [[[{}]]]}}, None),
    Case("an id that occurs before", {"id": "first", "image": "good.png"}, "duplicate_id"),
    Case("an id that is a number", {"id": 7, "image": "good.png"}, "bad_id"),
    Case("an empty id", {"id": "", "image": "good.png"}, "bad_id"),
    Case("a negative seed", {"image": "good.png", "seed": -1}, "bad_seed"),
    Case("a seed that is a fraction", {"image": "good.png", "seed": 1.5}, "bad_seed"),
    Case("a seed that is true", {"image": "good.png", "seed": True}, "bad_seed"),
    Case("a seed beyond 63 bits", {"image": "good.png", "seed": 2**63}, "bad_seed"),
]

CELLS = [
    Case(name, {column: text}, code, kind="table")
    for name, column, text, code in (
        ("a cell of 100 000 brackets", "meta", "[" * 100_000, "bad_json"),
        ("a cell with NaN", "meta", "[NaN, 1]", "bad_json"),
        ("a cell with a number beyond floats", "meta", "[1e999]", "bad_json"),
        ("a cell with half a surrogate pair", "meta", '{"a": "\\ud800"}', "bad_encoding"),
        ("a cell that begins like JSON and is text", "meta", "[sic] {a}", None),
        ("a seed of 5000 digits in a table", "seed", "9" * 5000, "bad_seed"),
        ("a seed that is ²", "seed", "²", "bad_seed"),
    )
]

IDS = [
    Case(f"id {name}", {"id": value, "prompt": "x"}, command="t2i", kind="id")
    for name, value in {
        "../../x": "../../x",
        "/etc/passwd": "/etc/passwd",
        "a/b": "a/b",
        "a\\b": "a\\b",
        ". and ..": "..",
        "with NUL": "nul\0l",
        "with a line break": "a\nb",
        "of 300 characters": "x" * 300,
        "😀": "😀",
        "case twin of another": "First",
        "another normal form of é": "e\u0301",
        "CON (Windows)": "CON",
        "results.jsonl": "results.jsonl",
        ".mmi": ".mmi",
        "-rf": "-rf",
    }.items()
]

TASKS = [
    Case("empty prompt", {"prompt": ""}, "no_prompt", "t2i"),
    Case("prompt of blanks", {"prompt": " \n\t"}, "no_prompt", "t2i"),
    Case("prompt that is a list", {"prompt": ["a bus"]}, "bad_row", "t2i"),
    Case("prompt with control characters and right-to-left marks", {"prompt": "a\u0007\u202eb\u2028c"}, None, "t2i"),
    Case("no question", {"image": "good.png"}, "no_question", "vqa"),
    Case("question that is null", {"image": "good.png", "question": None}, "no_question", "vqa"),
    Case("options that are empty", {**GOOD["vqa"], "options": []}, "bad_options", "vqa"),
    Case("options of another type", {**GOOD["vqa"], "options": [1, 2]}, "bad_options", "vqa"),
    Case("history without an answer", {**GOOD["vqa"], "history": [{"question": "x"}]}, "bad_history", "vqa"),
    Case("shots that are no list", {**GOOD["vqa"], "shots": {"image": "good.png"}}, "bad_shots", "vqa"),
    Case("messages that are null beside a question", {**GOOD["vqa"], "messages": None}, None, "vqa"),
    Case("messages that are null beside a picture", {"image": "good.png", "messages": None}),
    Case("no expression", {"image": "good.png"}, "no_expression", "ground"),
    Case("a map with values that are no class", {"segmentation": "bad.png", "prompt": "x"}, "bad_map", "seg2img",
         put(lambda: encoded(Image.new("L", (9, 9), 200), "PNG"))),
    Case("no map", {"prompt": "x"}, "no_segmentation", "seg2img"),
    Case("no frames", {"frames": []}, "no_frames", "story"),
    Case("frames of another type", {"frames": {"0": {}}}, "bad_frames", "story"),
    Case("a frame that is a string", {"frames": ["x"]}, "bad_frames", "story"),
    Case("5000 frames", {"frames": [{}] * 5000}, "bad_row", "story"),
    Case("a chat that is answered already", chat("x", "y"), "bad_messages", "story"),
    Case("a chat with sound", chat([{"type": "audio"}]), "bad_messages", "story"),
    Case("a chat without roles", {"messages": [{"content": "x"}]}, "bad_messages", "story"),
]  # fmt: skip

CASES = [*PICTURES, *REFERENCES, *LINES, *TASKS, *CELLS, *IDS]
SECTIONS = {
    "picture": "Pictures",
    "reference": "References to pictures",
    "row": "Lines and rows",
    "table": "Cells of a CSV",
    "id": "Ids",
}


@contextlib.contextmanager
def ordinary_user() -> Iterator[Path]:
    """A fresh folder, and not the rights of root: root reads everything, whatever the permissions say."""
    with tempfile.TemporaryDirectory() as name:
        root = os.geteuid() == 0
        if root:
            os.chown(name, NOBODY, -1)
            os.seteuid(NOBODY)
        try:
            yield Path(name)
        finally:
            if root:
                os.seteuid(0)
            for folder in Path(name).rglob("secret"):
                folder.chmod(0o700)


def lines_of(case: Case) -> bytes:
    """A manifest with the case between two good rows."""
    good = GOOD[case.command]
    if case.kind == "table":
        rows = [{"id": "first", **good}, {"id": "bad", **good, **case.row}, {"id": "last", **good}]
        stream = io.StringIO()
        writer = csv.DictWriter(stream, ["id", *good, *case.row])
        writer.writeheader()
        writer.writerows(rows)
        return stream.getvalue().encode()
    row = case.row if isinstance(case.row, bytes) else json.dumps({"id": "bad", **case.row}).encode()
    return b"\n".join([json.dumps({"id": "first", **good}).encode(), row, json.dumps({"id": "last", **good}).encode()])


def table() -> str:
    """The tables of the docs, as Markdown."""
    parts = []
    for kind, title in SECTIONS.items():
        parts.append(f"## {title}\n\n| input | command | code | exit | others |\n|---|---|---|---|---|")
        for case in CASES:
            if case.kind == kind:
                outcome = f"`{case.code}` | 3" if case.code else "done | 0"
                name = case.name.replace("\\", "\\\\")
                parts.append(f"| {name} | {case.command} | {outcome} | unharmed |")
        parts.append("")
    return "\n".join(parts)


if __name__ == "__main__":
    import sys

    sys.stdout.write(table())
