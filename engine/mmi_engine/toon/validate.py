"""How well the oracle reads: the figures of docs/toon-world.md, made again.

Place in the flow: beside `score`; nothing else uses it. Truth is what `world` sampled; pictures are drawn, then
damaged as a codec or a diffusion model might: softened, noisy, compressed.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable

import numpy as np
from PIL import Image, ImageFilter

from mmi_engine.toon import score
from mmi_engine.toon.canvas import SIZE
from mmi_engine.toon.draw import render
from mmi_engine.toon.world import sample_scene

Damage = Callable[[Image.Image, int], Image.Image]


def blur(sigma: float) -> Damage:
    """Gaussian blur, sigma in px."""
    return lambda image, _: image.filter(ImageFilter.GaussianBlur(sigma))


def noise(sigma: float) -> Damage:
    """Gaussian noise, sigma in grey levels of 255, seeded by the picture's index."""

    def damage(image: Image.Image, index: int) -> Image.Image:
        noisy = np.asarray(image) + np.random.default_rng(index).normal(0.0, sigma, (SIZE, SIZE, 3))
        return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))

    return damage


def jpeg(quality: int) -> Damage:
    """JPEG with the usual halved colour resolution."""

    def damage(image: Image.Image, _: int) -> Image.Image:
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=quality)
        return Image.open(stream).convert("RGB")

    return damage


def halve(image: Image.Image, _: int) -> Image.Image:
    """Halved (box) and enlarged again (bicubic)."""
    small = image.resize((SIZE // 2, SIZE // 2), Image.Resampling.BOX)
    return small.resize((SIZE, SIZE), Image.Resampling.BICUBIC)


DAMAGES: dict[str, Damage] = {
    "clean": lambda image, _: image, "blur 0.7": blur(0.7), "blur 1.0": blur(1.0), "blur 1.5": blur(1.5),
    "halved": halve, "noise 15": noise(15.0), "noise 25": noise(25.0), "jpeg 75": jpeg(75), "jpeg 40": jpeg(40),
}  # fmt: skip


def validate(
    count: int, start: int = 0, split: str = "test", damages: Iterable[str] = tuple(DAMAGES)
) -> dict[str, dict[str, score.Figure]]:
    """Figures by damage and attribute over scenes start .. start + count - 1 of a split; about 50 ms a picture.

    Raises:
        KeyError: a damage that is not in DAMAGES.
    """
    scenes = [(index, sample_scene(index, split)) for index in range(start, start + count)]
    asked = tuple(score.CHOICES)
    return {
        name: score.score_pictures((DAMAGES[name](render(scene), index), scene, asked) for index, scene in scenes)
        for name in damages
    }
