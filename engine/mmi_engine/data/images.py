"""Image references to RGB pictures, safely, and the one resize that every part of the model uses.

Place in the flow: `tasks.py` asks for the images a row names; what comes out is an upright 8-bit RGB `PIL.Image` of the
file's own size. `prepare` makes it square for the model. Anything that cannot be loaded is an `ImageError` with a
code: `bad_image`, `image_not_found`, `image_unreadable`, `image_too_large`, `url_refused`, `url_failed`.

Sources: EXIF 2.3 orientation (through Pillow); the halve-then-bicubic resize is the usual centre crop of
image-diffusion training, which averages instead of skipping pixels on large reductions.
"""

from __future__ import annotations

import base64
import binascii
import functools
import io
import os
import stat
import urllib.parse
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmi_engine.data.manifest import json_type, shorten
from mmi_engine.errors import ImageError

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 178_000_000  # a 13-thousand-pixel square; more is a decompression bomb or a map sheet
MAX_BYTES = 512 * 2**20
MAX_URL_BYTES = 64 * 2**20
URL_TIMEOUT_S = 30.0
MAX_ASPECT = 4  # beyond it the long side is cut before the resize: the centre crop drops the rest anyway

# Raster formats that Pillow decodes by itself: no PostScript (runs Ghostscript), no container of programs.
FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "ICO", "AVIF", "JPEG2000", "TGA", "QOI"]


@dataclass(frozen=True)
class ImageLoader:
    """Loads the images that manifest rows name.

    Attributes:
        root: folder that relative paths start from.
        allow_urls: whether http(s) references are fetched.
        max_pixels, max_bytes, max_url_bytes: limits checked before anything is decoded.
        timeout: seconds for one network operation.
    """

    root: Path
    allow_urls: bool = False
    max_pixels: int = MAX_PIXELS
    max_bytes: int = MAX_BYTES
    max_url_bytes: int = MAX_URL_BYTES
    timeout: float = URL_TIMEOUT_S

    def load(self, reference: Any) -> Image.Image:
        """The referenced image: upright, 8-bit RGB, alpha over white, first frame of an animation.

        Args:
            reference: path (relative to `root`, or absolute), ``data:`` URI, or http(s) URL.

        Raises:
            ImageError: whatever is wrong with it.
        """
        content, name = self._content(reference)
        return decode(content, name, self.max_pixels)

    def load_raw(self, reference: Any) -> Image.Image:
        """As `load`, but in the mode of the file (class maps are numbers, not colours)."""
        content, name = self._content(reference)
        return decode(content, name, self.max_pixels, raw=True)

    def _content(self, reference: Any) -> tuple[bytes, str]:
        """The bytes of a reference, and how messages call it."""
        if not isinstance(reference, str) or not reference.strip():
            found = "an empty string" if isinstance(reference, str) else json_type(reference)
            raise ImageError(f"an image must be a path or a URI, found {found}", code="bad_image")
        scheme = reference.split(":", 1)[0].lower() if ":" in reference else ""
        if scheme == "data":
            return _data_uri(reference), "the data: URI"
        if scheme in ("http", "https"):
            return self._fetch(reference), f'"{shorten(reference)}"'
        if "://" in reference:
            raise ImageError(
                f'image "{shorten(reference)}": {shorten(scheme, 12)} addresses are not read',
                remedy="use a path, a data: URI, or http(s) with --allow-urls",
                code="url_refused",
            )
        return self._read(reference), f'"{shorten(reference)}"'

    def _read(self, reference: str) -> bytes:
        name = f'image "{shorten(reference)}"'
        try:
            path = self.root / reference
            info = os.stat(path)
        except PermissionError as error:
            raise ImageError(f"{name} cannot be read: {error.strerror}", code="image_unreadable") from None
        except (OSError, ValueError):
            folder = self.root.absolute().name + "/"
            raise ImageError(
                f"{name} not found (looked in {folder})",
                remedy="paths are relative to the manifest, or pass --root",
                code="image_not_found",
            ) from None
        if not stat.S_ISREG(info.st_mode):  # reading a pipe would wait for ever
            raise ImageError(f"{name} is not a file", code="image_unreadable")
        if info.st_size == 0:  # or one of /proc, some of which never end
            raise ImageError(f"{name} is empty", code="image_unreadable")
        if info.st_size > self.max_bytes:
            raise ImageError(f"{name} is larger than {self.max_bytes >> 20} MiB", code="image_too_large")
        try:
            return path.read_bytes()
        except OSError as error:
            raise ImageError(f"{name} cannot be read: {error.strerror}", code="image_unreadable") from None

    def _fetch(self, url: str) -> bytes:
        name = f'image "{shorten(url)}"'
        if not self.allow_urls:
            raise ImageError(
                f"{name} is on the network",
                remedy="pass --allow-urls to fetch it, or download it first",
                code="url_refused",
            )
        import http.client
        import urllib.error
        import urllib.request

        try:
            request = urllib.request.Request(url, headers={"User-Agent": "mmi"})
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                content = response.read(self.max_url_bytes + 1)
        except (OSError, ValueError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()
            reason = shorten(str(getattr(error, "reason", error)) or type(error).__name__)
            raise ImageError(f"{name} could not be fetched: {reason}", code="url_failed") from None
        if len(content) > self.max_url_bytes:
            raise ImageError(f"{name} is larger than {self.max_url_bytes >> 20} MiB", code="image_too_large")
        return content


@functools.cache
def _known_formats() -> list[str]:
    from PIL import Image

    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]  # AVIF and others depend on how Pillow was built


def _data_uri(reference: str) -> bytes:
    """The bytes of ``data:[type][;base64],…`` (RFC 2397)."""
    header, comma, body = reference.partition(",")
    try:
        if not comma:
            raise ValueError("no comma")
        if header.lower().rstrip().endswith(";base64"):
            body = "".join(urllib.parse.unquote(body).split()).replace("-", "+").replace("_", "/")
            return base64.b64decode(body + "=" * (-len(body) % 4), validate=True)
        return urllib.parse.unquote_to_bytes(body)
    except (ValueError, binascii.Error) as error:
        raise ImageError(f"the data: URI is broken: {error}", code="image_unreadable") from None


def decode(content: bytes, name: str, max_pixels: int = MAX_PIXELS, *, raw: bool = False) -> Image.Image:
    """An encoded picture as an upright RGB image, or with `raw` in its own mode.

    Args:
        content: the file's bytes.
        name: how messages call the picture.
        max_pixels: refused beyond, before decoding.

    Raises:
        ImageError: `image_unreadable` (unknown format, truncated, damaged) or `image_too_large`.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not content:
        raise ImageError(f"image {name} is empty", code="image_unreadable")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on bombs and odd metadata; both are judged here
            with Image.open(io.BytesIO(content), formats=_known_formats()) as image:
                if image.width * image.height > max_pixels:
                    raise Image.DecompressionBombError
                image.seek(0)
                image.load()
                try:
                    upright = ImageOps.exif_transpose(image)
                except Exception:  # damaged EXIF: the pixels are fine as they are
                    upright = image
                return upright.copy() if raw else to_rgb(upright)
    except Image.DecompressionBombError:
        raise ImageError(
            f"image {name} has more than {max_pixels // 10**6} million pixels",
            remedy="scale it down",
            code="image_too_large",
        ) from None
    except UnidentifiedImageError:
        raise ImageError(
            f"image {name} is in no known format", remedy="PNG, JPEG and WebP are safe choices", code="image_unreadable"
        ) from None
    except MemoryError:
        raise ImageError(f"image {name} does not fit into memory", code="image_too_large") from None
    except ImageError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, … on damaged files
        reason = shorten(str(error) or type(error).__name__)
        raise ImageError(f"image {name} is truncated or damaged: {reason}", code="image_unreadable") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode as 8-bit RGB: alpha over white, 16-bit and float scaled to 8 bits, Lab by its profile."""
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        image = _scale_to_8_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        if image.mode in ("La", "RGBa"):  # premultiplied: undo before compositing
            image = image.convert("LA" if image.mode == "La" else "RGBA")
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    if image.mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
        assert converted is not None
        return converted
    return image.convert("RGB") if image.mode != "RGB" else image.copy()


def _scale_to_8_bits(image: Image.Image) -> Image.Image:
    """Modes I;16*, I and F as L. Integers above 255 are read as 16-bit, floats within [0, 1] as fractions."""
    import numpy as np
    from PIL import Image

    values = np.nan_to_num(np.asarray(image).astype(np.float64), nan=0.0, posinf=65535.0, neginf=0.0)
    top = float(values.max())
    if image.mode.startswith("I;16") or top > 255:
        values = values / 257.0
    elif image.mode == "F" and top <= 1.0:
        values = values * 255.0
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


def prepare(image: Image.Image, size: int) -> Image.Image:
    """Centre crop to `size` × `size` RGB: halve by averaging while twice too large, then bicubic on the short side.

    Args:
        image: any RGB picture of at least one pixel.
        size: side of the result in pixels.
    """
    from PIL import Image

    image = image if image.mode == "RGB" else to_rgb(image)
    image = _cut_long_side(image)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    target = (max(size, round(image.width * scale)), max(size, round(image.height * scale)))
    if target != image.size:
        image = image.resize(target, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def shrink(image: Image.Image, side: int) -> Image.Image:
    """The first steps of `prepare` for every size up to `side`: what waits for the model need not be larger.

    Args:
        image: an RGB picture; side: the largest size in pixels that it will be prepared for.
    """
    from PIL import Image

    image = _cut_long_side(image)
    while min(image.size) >= 2 * side > 0:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return image


def bytes_of(image: Image.Image) -> int:
    """Memory of a decoded RGB picture."""
    return 3 * image.width * image.height


def _cut_long_side(image: Image.Image) -> Image.Image:
    """A 1 × 50 000 strip would become gigapixels when its short side grows; cut it around the centre first."""
    width, height = image.size
    limit = MAX_ASPECT * min(width, height)
    new_width, new_height = min(width, limit), min(height, limit)
    if (new_width, new_height) == (width, height):
        return image
    left, top = (width - new_width) // 2, (height - new_height) // 2
    return image.crop((left, top, left + new_width, top + new_height))
