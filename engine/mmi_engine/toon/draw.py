"""From a Scene to pixels: the picture and its semantic map.

Place in the flow: the painter's entry. render → PIL RGB 128 × 128; semantic_map → uint8 [128, 128] of class ids, drawn
from the same geometry without smoothing. Order: place, shadow, props, character.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from mmi_engine.toon.canvas import Canvas, Color
from mmi_engine.toon.characters import paint_character, paint_shadow
from mmi_engine.toon.palette import CLASSES, ID, PALETTE
from mmi_engine.toon.places import PAINTERS
from mmi_engine.toon.props import paint_prop
from mmi_engine.toon.world import Scene

__all__ = ["CLASSES", "PALETTE", "SHADOW", "map_image", "render", "semantic_map"]

SHADOW: dict[str, Color] = {
    "beach": (218, 190, 132), "forest": (44, 88, 44), "snow": (198, 210, 234), "town": (66, 66, 90),
    "room": (120, 156, 150), "desert": (192, 122, 66), "meadow": (126, 186, 78), "lake": (120, 118, 72),
}  # fmt: skip


def _paint(cv: Canvas, scene: Scene) -> Canvas:
    PAINTERS[scene.place](cv, scene.sun, scene.pan)
    paint_shadow(cv, scene, ID["ground"], SHADOW[scene.place])
    for prop in scene.props:
        paint_prop(cv, prop)
    paint_character(cv, scene)
    return cv


def render(scene: Scene) -> Image.Image:
    """The picture of a scene, RGB, 128 × 128 px."""
    return _paint(Canvas(), scene).rgb()


def semantic_map(scene: Scene) -> np.ndarray:
    """Class ids, uint8 [128, 128], indices into CLASSES; the same geometry as the picture."""
    return _paint(Canvas(semantic=True), scene).labels()


def map_image(labels: np.ndarray) -> Image.Image:
    """A class map uint8 [h, w] in the fixed PALETTE colours, RGB."""
    return Image.fromarray(np.asarray(PALETTE, dtype=np.uint8)[labels])
