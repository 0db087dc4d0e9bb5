"""The eight characters: heads with fixed looks, hats, numbered shirts, and the six poses.

Place in the flow: painted last by `draw`. Local frame: origin between the feet, x right, y down, one unit = scene.scale
px; a standing figure is about 92 units high. The shirt's front with its white number field is always upright, 38 × 32
units, so that the number keeps one size and orientation in every pose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mmi_engine.toon.canvas import INK, Canvas, Color, mix
from mmi_engine.toon.palette import BODY, DIGIT, ID, PLATE, SHIRT, THING, WHITE
from mmi_engine.toon.props import digit
from mmi_engine.toon.world import SPECIES, Scene

LINE = 1.6  # outline width in units
HEAD, TOP, NUMBER, LIMB, HAT, BOOK = ID["head"], ID["shirt"], ID["number"], ID["limb"], ID["hat"], ID["book"]
PLATE_HALF = (15.5, 11.5)  # half width and height of the number field
TORSO_HALF = (19.0, 16.0)

Path = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Pose:
    """Where the parts of a figure are, in units: torso and head centres, arms (upper end first), legs, lift off the
    ground; `asleep` closes the eyes."""

    torso: tuple[float, float]
    head: tuple[float, float]
    arms: tuple[Path, ...]
    legs: tuple[Path, ...]
    feet: Path
    lift: float = 0.0
    asleep: bool = False
    book: bool = False


POSES: dict[str, Pose] = {
    "waving": Pose(
        (0, -27), (0, -59),
        (((-18, -37), (-25, -21)), ((18, -37), (33, -47), (40, -63))),
        (((-9, -12), (-9, -3)), ((9, -12), (9, -3))), ((-11, -2), (11, -2)),
    ),
    "running": Pose(
        (0, -31), (6, -62),
        (((-18, -40), (-29, -36), (-31, -26)), ((18, -38), (27, -30), (34, -40))),
        (((-9, -16), (-20, -9), (-30, -13)), ((9, -16), (22, -14), (25, -3))), ((-32, -15), (28, -3)),
    ),
    "jumping": Pose(
        (0, -31), (0, -63),
        (((-18, -42), (-33, -50), (-40, -64)), ((18, -42), (33, -50), (40, -64))),
        (((-9, -16), (-17, -7)), ((9, -16), (17, -7))), ((-20, -5), (20, -5)), lift=13.0,
    ),
    "sitting": Pose(
        (0, -19), (0, -51),
        (((-18, -28), (-26, -14)), ((18, -28), (26, -14))),
        (((-10, -6), (-18, -4)), ((10, -6), (18, -4))), ((-21, -6), (21, -6)),
    ),
    "sleeping": Pose(
        (18, -17), (-20, -19),
        (), (((34, -8), (44, -7)), ((34, -19), (44, -19))), ((47, -7), (47, -19)), asleep=True,
    ),
    "reading": Pose(
        (0, -27), (0, -59),
        (((-18, -37), (-25, -21)), ((18, -37), (29, -30))),
        (((-9, -12), (-9, -3)), ((9, -12), (9, -3))), ((-11, -2), (11, -2)), book=True,
    ),
}  # fmt: skip


def _eyes(cv: Canvas, asleep: bool, dx: float = 8.0, y: float = -2.0, r: float = 2.9) -> None:
    for side in (-1, 1):
        if asleep:
            cv.arc(side * dx, y - 1, 4, 3.4, 15, 165, 1.5, INK, HEAD)
        else:
            cv.ellipse(side * dx, y, r, r * 1.15, INK, HEAD)
            cv.ellipse(side * dx + 0.9, y - 1.1, 1.0, 1.0, WHITE, HEAD)


def _cheeks(cv: Canvas, fill: Color = (250, 140, 140), dx: float = 14.5, y: float = 5.0) -> None:
    for side in (-1, 1):
        cv.ellipse(side * dx, y, 3.2, 2.2, fill, HEAD)


def _smile(cv: Canvas, y: float = 5.0, rx: float = 4.0) -> None:
    cv.arc(0, y, rx, 3.4, 10, 170, 1.4, INK, HEAD)


def _rabbit(cv: Canvas, skin: Color, asleep: bool) -> None:
    for side in (-1, 1):
        cv.ellipse(side * 15, -23, 6, 15, skin, HEAD, LINE, turn=side * 22)
        cv.ellipse(side * 15.5, -23, 2.8, 10.5, (255, 214, 226), HEAD, turn=side * 22)
    cv.ellipse(0, 0, 21, 17.5, skin, HEAD, LINE)
    _eyes(cv, asleep)
    _cheeks(cv, (232, 106, 140))
    cv.ellipse(0, 3.2, 2.2, 1.6, (206, 70, 110), HEAD)
    cv.rrect(-2.4, 7.5, 2.4, 11.5, 0.8, WHITE, HEAD, 0.8)
    _smile(cv, 5.2, 4.4)


def _bear(cv: Canvas, skin: Color, asleep: bool) -> None:
    for side in (-1, 1):
        cv.ellipse(side * 17.5, -12.5, 8, 8, skin, HEAD, LINE)
        cv.ellipse(side * 17.5, -12.5, 4, 4, (214, 160, 112), HEAD)
    cv.ellipse(0, 0, 22, 18, skin, HEAD, LINE)
    cv.ellipse(0, 7, 10, 7.6, (232, 194, 150), HEAD)
    _eyes(cv, asleep, 9.5, -3.5)
    cv.ellipse(0, 3.6, 3.6, 2.5, INK, HEAD)
    _smile(cv, 7.6, 3.6)


def _fox(cv: Canvas, skin: Color, asleep: bool) -> None:
    for side in (-1, 1):
        cv.poly([(side * 9, -13), (side * 22, -30), (side * 23, -5)], skin, HEAD, LINE)
        cv.poly([(side * 14, -14), (side * 20, -23), (side * 20.5, -9)], (70, 44, 50), HEAD)
    face = [(-23, 0), (-18, -12), (0, -17), (18, -12), (23, 0), (13, 13), (0, 18), (-13, 13)]
    cv.poly(face, skin, HEAD, LINE)
    for side in (-1, 1):
        cv.poly([(side * 21, 2), (side * 7, 4), (0, 10), (0, 16.5), (side * 12, 12)], (255, 244, 230), HEAD)
    _eyes(cv, asleep, 8.5, -2.5)
    cv.ellipse(0, 10.5, 3.2, 2.5, INK, HEAD)


def _frog(cv: Canvas, skin: Color, asleep: bool) -> None:
    cv.ellipse(0, 1, 24, 16.5, skin, HEAD, LINE)
    for side in (-1, 1):
        cv.ellipse(side * 17, -14, 8.4, 8.4, skin, HEAD, LINE)
        if asleep:
            cv.arc(side * 17, -15, 5, 4.4, 10, 170, 1.6, INK, HEAD)
        else:
            cv.ellipse(side * 17, -14.5, 5.6, 5.6, WHITE, HEAD)
            cv.ellipse(side * 16.4, -14, 3, 3.2, INK, HEAD)
    cv.arc(0, 1, 15, 9, 12, 168, 1.7, INK, HEAD)
    _cheeks(cv, (250, 150, 110), 16.5, 3.5)
    cv.ellipse(-2.5, -2, 0.9, 0.9, INK, HEAD)
    cv.ellipse(2.5, -2, 0.9, 0.9, INK, HEAD)


def _cat(cv: Canvas, skin: Color, asleep: bool) -> None:
    for side in (-1, 1):
        cv.poly([(side * 8, -14), (side * 20, -27), (side * 22, -4)], skin, HEAD, LINE)
        cv.poly([(side * 13, -14), (side * 18.5, -21), (side * 19.5, -8)], (246, 170, 214), HEAD)
    cv.ellipse(0, 0, 22.5, 17, skin, HEAD, LINE)
    for y in (3, 7):
        for side in (-1, 1):
            cv.stroke([(side * 15, y), (side * 27, y - 3 + (y - 3))], 1.1, INK, HEAD)
    _eyes(cv, asleep, 9, -2, 3.2)
    cv.ellipse(0, 3.4, 2.4, 1.7, (250, 150, 190), HEAD)
    _smile(cv, 5.6, 3.4)


def _chick(cv: Canvas, skin: Color, asleep: bool) -> None:
    for x, turn in ((-18, -50), (18, 50)):
        cv.ellipse(x, -15, 3.2, 8, skin, HEAD, LINE, turn=turn)
    for x, turn in ((-5, -24), (5, 24), (0, 0)):
        cv.ellipse(x, -20, 2.8, 7, skin, HEAD, LINE, turn=turn)
    cv.ellipse(0, 0, 20.5, 18.5, skin, HEAD, LINE)
    _eyes(cv, asleep, 9.5, -3)
    _cheeks(cv, (255, 160, 100), 14.5, 4.5)
    cv.poly([(-6.5, 4), (0, 0.5), (6.5, 4), (0, 10)], (240, 116, 36), HEAD, 1.2)


def _elephant(cv: Canvas, skin: Color, asleep: bool) -> None:
    for side in (-1, 1):
        cv.ellipse(side * 23.5, -3, 11, 14.5, skin, HEAD, LINE)
        cv.ellipse(side * 24.5, -3, 6.5, 9.5, (188, 214, 250), HEAD)
    cv.ellipse(0, 0, 19.5, 18, skin, HEAD, LINE)
    cv.stroke([(0, 4), (0, 13), (4, 17.5)], 8, skin, HEAD, LINE)
    cv.ellipse(0, 3, 6.5, 5, skin, HEAD)
    _eyes(cv, asleep, 9.5, -3.5)
    _cheeks(cv, (236, 150, 190), 13, 5)


def _robot(cv: Canvas, skin: Color, asleep: bool) -> None:
    for side in (-1, 1):
        cv.stroke([(side * 15, -14), (side * 21, -26)], 2.0, INK, HEAD)
        cv.ellipse(side * 21.5, -27, 3.6, 3.6, (232, 70, 70), HEAD, LINE)
        cv.rrect(side * 23.5 - 3.5, -6, side * 23.5 + 3.5, 6, 2, (112, 118, 130), HEAD, LINE)
    cv.rrect(-22, -16.5, 22, 17, 4.5, skin, HEAD, LINE)
    cv.rrect(-17, -10.5, 17, 5, 3, (40, 46, 62), HEAD)
    for side in (-1, 1):
        if asleep:
            cv.rrect(side * 8.5 - 4, -3, side * 8.5 + 4, -1, 0.8, (112, 240, 240), HEAD)
        else:
            cv.ellipse(side * 8.5, -2.8, 4, 4.6, (112, 240, 240), HEAD)
    cv.rrect(-8, 9, 8, 13, 1.4, (232, 236, 242), HEAD)
    for x in (-4, 0, 4):
        cv.stroke([(x, 9), (x, 13)], 0.9, INK, HEAD)


HEADS: dict[str, Callable[[Canvas, Color, bool], None]] = {
    "rabbit": _rabbit, "bear": _bear, "fox": _fox, "frog": _frog,
    "cat": _cat, "chick": _chick, "elephant": _elephant, "robot": _robot,
}  # fmt: skip


def paint_hat(cv: Canvas, hat: str) -> None:
    """The hat on a head centred at the origin of the current local frame ("none" draws nothing)."""
    if hat == "none":
        return
    color, kind = hat.split(" ")
    fill = THING[color]
    if kind == "cap":
        cv.poly([(-15, -10), (-14, -17), (-8, -22), (0, -23.5), (8, -22), (14, -17), (15, -10)], fill, HAT, LINE)
        cv.rrect(2, -13.5, 27, -9, 2.2, mix(fill, INK, 0.25), HAT, LINE)
        cv.ellipse(0, -23.5, 2, 1.6, WHITE, HAT)
    elif kind == "cone":
        cv.poly([(-12, -11), (0, -34), (12, -11)], fill, HAT, LINE)
        cv.poly([(-8.9, -17), (-6.3, -22), (6.3, -22), (8.9, -17)], WHITE, HAT)
        cv.ellipse(0, -34.5, 3.6, 3.6, WHITE, HAT, LINE)
    else:
        cv.rrect(-11, -31, 11, -11, 1.5, fill, HAT, LINE)
        cv.poly([(-10.4, -19), (10.4, -19), (10.4, -14.5), (-10.4, -14.5)], WHITE, HAT)
        cv.rrect(-19, -14, 19, -9.5, 2, fill, HAT, LINE)


def _book(cv: Canvas) -> None:
    cv.poly([(25, -42), (36, -38), (47, -42), (47, -24), (36, -20), (25, -24)], (126, 70, 44), BOOK, LINE)
    cv.poly([(26.5, -40.5), (35.4, -37), (35.4, -22), (26.5, -25.5)], WHITE, BOOK)
    cv.poly([(45.5, -40.5), (36.6, -37), (36.6, -22), (45.5, -25.5)], WHITE, BOOK)
    for y in (-35, -31):
        cv.stroke([(28.5, y), (33.5, y + 2)], 1.0, (150, 150, 160), BOOK)
        cv.stroke([(43.5, y), (38.5, y + 2)], 1.0, (150, 150, 160), BOOK)


def paint_character(cv: Canvas, scene: Scene) -> None:
    """Draw the scene's character in its pose, with shirt, number and hat; a soft shadow lies on the ground."""
    pose, skin = POSES[scene.action], BODY[scene.character]
    s = scene.scale
    base = scene.y - pose.lift * s
    cv.at(scene.x, base, s)
    for path in pose.legs:
        cv.stroke(path, 9.0, skin, LIMB, LINE)
    for x, y in pose.feet:
        cv.ellipse(x, y, 6.6, 4.6, mix(skin, INK, 0.3), LIMB, LINE)
    parts = (_torso, _head) if not pose.asleep else (_head, _torso)  # a sleeper's shirt lies over its ears
    for part in parts:
        part(cv, scene, pose, base)
    cv.at(scene.x + pose.head[0] * s, base + pose.head[1] * s, s)
    paint_hat(cv, scene.hat)
    cv.at(scene.x, base, s)
    if pose.book:
        _book(cv)
        cv.ellipse(27, -29, 4.6, 4.6, skin, LIMB, LINE)
    if pose.asleep:
        _sleep_marks(cv)
    cv.at(0.0, 0.0)


def _head(cv: Canvas, scene: Scene, pose: Pose, base: float) -> None:
    cv.at(scene.x + pose.head[0] * scene.scale, base + pose.head[1] * scene.scale, scene.scale)
    HEADS[SPECIES[scene.character]](cv, BODY[scene.character], pose.asleep)


def _torso(cv: Canvas, scene: Scene, pose: Pose, base: float) -> None:
    """Arms, shirt and the number on its white field."""
    (tx, ty), (hw, hh), (pw, ph) = pose.torso, TORSO_HALF, PLATE_HALF
    skin, shirt = BODY[scene.character], SHIRT[scene.shirt]
    cv.at(scene.x, base, scene.scale)
    for path in pose.arms:
        cv.stroke(path, 8.6, shirt, TOP, LINE)
        x, y = path[-1]
        cv.ellipse(x, y, 5.4, 5.4, skin, LIMB, LINE)
    cv.rrect(tx - hw, ty - hh, tx + hw, ty + hh, 7, shirt, TOP, LINE)
    cv.rrect(tx - pw, ty - ph + 1.5, tx + pw, ty + ph + 1.5, 3, PLATE, NUMBER)
    for value, dx in zip(divmod(scene.number, 10), (-7.2, 7.2), strict=True):
        digit(cv, value, tx + dx, ty + 1.5, 1.0, NUMBER)


def _sleep_marks(cv: Canvas) -> None:
    """Two letters Z rising from the sleeper, in ink on white so that they show on every background; no class of their
    own, so a semantic map leaves them out."""
    if cv.semantic:
        return
    for x, y, r in ((2, -46, 4.0), (6, -60, 5.0)):
        path = [(x - r, y - r), (x + r, y - r), (x - r, y + r), (x + r, y + r)]
        cv.stroke(path, 3.6, WHITE, HEAD)
        cv.stroke(path, 1.7, DIGIT, HEAD)


def paint_shadow(cv: Canvas, scene: Scene, label: int, fill: Color) -> None:
    """Ellipse on the ground under the figure; a jumper's is smaller and below the feet."""
    pose = POSES[scene.action]
    width = 54.0 if pose.asleep else 17.0 if pose.lift else 29.0
    cv.at(0.0, 0.0).ellipse(scene.x, scene.y, width * scene.scale, 4.2 * scene.scale, fill, label)
