"""Images: every mode and rotation comes out upright RGB; what cannot be loaded is a coded error, quickly."""

from __future__ import annotations

import base64
import http.server
import io
import os
import struct
import threading
import zlib

import numpy as np
import pytest
from PIL import Image

from mmi_engine.data.images import ImageLoader, decode, prepare, to_rgb
from mmi_engine.errors import ImageError


def encoded(image: Image.Image, fmt: str = "PNG", **kwargs) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=fmt, **kwargs)
    return stream.getvalue()


def code_of(call) -> str:
    with pytest.raises(ImageError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return caught.value.code


def colours() -> Image.Image:
    """4 × 2: left half red, right half blue, so that rotations show."""
    array = np.zeros((2, 4, 3), np.uint8)
    array[:, :2, 0] = 255
    array[:, 2:, 2] = 255
    return Image.fromarray(array)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_comes_out_upright(orientation):
    rng = np.random.default_rng(0)
    upright = rng.integers(0, 256, (6, 4, 3), dtype=np.uint8)
    # how a camera stores the pixels for each orientation (EXIF 2.3, tag 0x0112): inverse of the viewer's operation
    store = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(np.ascontiguousarray(store[orientation](upright))), exif=exif)
    assert np.array_equal(np.asarray(decode(content, "x")), upright)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16", "PA", "La"]
)
def test_every_mode_becomes_rgb_of_the_same_size(mode):
    base = Image.new("L", (5, 3), 255)
    image = Image.new(mode, (5, 3)) if mode in ("LAB", "HSV", "PA", "La", "I;16") else base.convert(mode)
    result = to_rgb(image)
    assert (result.mode, result.size) == ("RGB", (5, 3))
    if mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "F"):
        assert np.asarray(result).min() >= 254  # white stays white


def test_sixteen_bits_are_scaled_not_clipped():
    array = np.array([[0, 257 * 100, 65535]], np.uint16)
    content = encoded(Image.fromarray(array))
    assert np.asarray(decode(content, "x"))[0, :, 0].tolist() == [0, 100, 255]


def test_alpha_lies_over_white():
    half = Image.new("RGBA", (1, 1), (255, 0, 0, 128))
    expected = [255, round(255 * (1 - 128 / 255)), round(255 * (1 - 128 / 255))]
    assert np.abs(np.asarray(decode(encoded(half), "x"))[0, 0].astype(int) - expected).max() <= 1
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.putdata([0, 1])
    assert np.asarray(decode(encoded(palette, transparency=0), "x"))[0].tolist() == [[255, 255, 255], [10, 20, 30]]


def test_animations_give_their_first_frame():
    frames = [Image.new("RGB", (3, 3), colour) for colour in ((200, 0, 0), (0, 200, 0))]
    for fmt in ("GIF", "WEBP", "PNG"):
        lossless = {"lossless": True} if fmt == "WEBP" else {}
        content = encoded(frames[0], fmt, save_all=True, append_images=frames[1:], **lossless)
        assert np.asarray(decode(content, "x"))[1, 1].tolist() == [200, 0, 0]


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_every_truncation_is_a_coded_error_or_a_picture(fmt):
    rng = np.random.default_rng(1)
    content = encoded(Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)), fmt)
    for length in (0, 1, 8, 20, len(content) // 2, len(content) - 12):
        try:
            assert decode(content[:length], "x").size == (40, 40)
        except ImageError as error:
            assert error.code == "image_unreadable"
    assert code_of(lambda: decode(content[: len(content) // 2], "x")) == "image_unreadable"


def test_a_decompression_bomb_is_refused_before_it_is_decoded():
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )
    assert code_of(lambda: decode(bomb, "x")) == "image_too_large"
    assert code_of(lambda: decode(encoded(Image.new("RGB", (20, 20))), "x", max_pixels=399)) == "image_too_large"


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    loader = ImageLoader(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "big.png").write_bytes(encoded(Image.new("RGB", (9, 9))))
    assert code_of(lambda: loader.load("nope.png")) == "image_not_found"
    assert code_of(lambda: loader.load("nul\0.png")) == "image_not_found"
    assert code_of(lambda: loader.load("x" * 5000)) == "image_not_found"
    assert code_of(lambda: loader.load("pipe")) == "image_unreadable"
    assert code_of(lambda: loader.load("folder")) == "image_unreadable"
    assert code_of(lambda: loader.load("text.png")) == "image_unreadable"
    assert code_of(lambda: ImageLoader(tmp_path, max_bytes=20).load("big.png")) == "image_too_large"
    for reference in (None, 3, "", "  ", [], {}, True):
        assert code_of(lambda reference=reference: loader.load(reference)) == "bad_image"


def test_messages_name_the_folder_but_no_absolute_path(tmp_path):
    with pytest.raises(ImageError) as caught:
        ImageLoader(tmp_path).load("a.png")
    assert f"looked in {tmp_path.name}/" in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_data_uris(tmp_path):
    loader = ImageLoader(tmp_path)
    body = base64.b64encode(encoded(colours())).decode()
    urlsafe = body.replace("+", "-").replace("/", "_").rstrip("=")
    for uri in (f"data:image/png;base64,{body}", f"data:;base64,{urlsafe}", f"DATA:image/png;charset=x;BASE64,{body}"):
        assert loader.load(uri).size == (4, 2)
    for broken in (
        "data:",
        "data:image/png;base64",
        "data:image/png;base64,@@@",
        "data:image/png;base64,",
        "data:,hello",
    ):
        assert code_of(lambda broken=broken: loader.load(broken)) == "image_unreadable"


@pytest.fixture
def server():
    content = encoded(colours())

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/redirect":
                self.send_response(302)
                self.send_header("Location", "file:///etc/passwd")
                self.end_headers()
                return
            self.send_response(200 if self.path == "/ok.png" else 404)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def test_urls_only_when_allowed_and_never_to_other_schemes(tmp_path, server):
    closed, open_ = ImageLoader(tmp_path), ImageLoader(tmp_path, allow_urls=True, timeout=5)
    assert code_of(lambda: closed.load(f"{server}/ok.png")) == "url_refused"
    assert open_.load(f"{server}/ok.png").size == (4, 2)
    assert code_of(lambda: open_.load(f"{server}/missing.png")) == "url_failed"
    assert code_of(lambda: open_.load(f"{server}/redirect")) == "url_failed"
    assert code_of(lambda: open_.load("file:///etc/passwd")) == "url_refused"
    assert code_of(lambda: open_.load("http://[broken/x.png")) == "url_failed"
    assert code_of(lambda: ImageLoader(tmp_path, True, max_url_bytes=10).load(f"{server}/ok.png")) == "image_too_large"


@pytest.mark.parametrize("size", [(1, 1), (1, 50_000), (50_000, 1), (64, 64), (333, 127), (64, 63), (128, 900)])
def test_prepare_gives_the_asked_size_for_every_shape(size):
    assert prepare(Image.new("RGB", size, (9, 90, 200)), 64).size == (64, 64)


def test_prepare_averages_and_crops_around_the_centre():
    # a one-pixel checkerboard is uniform grey after averaging; nearest or bare bicubic would alias
    board = (np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8)
    small = np.asarray(prepare(Image.fromarray(board).convert("RGB"), 64)).astype(int)
    assert np.abs(small - 127).max() <= 2
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = 255  # the centre third
    assert np.asarray(prepare(Image.fromarray(wide), 32)).min() == 255
    same = Image.fromarray(np.random.default_rng(2).integers(0, 256, (48, 48, 3), dtype=np.uint8))
    assert np.array_equal(np.asarray(prepare(same, 48)), np.asarray(same))
