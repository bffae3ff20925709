"""Crayon drawings with captions, to fine-tune on: pictures that no bundled model was trained on, as a user's own are.

Their captions have another grammar than those of the worlds.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from vlv.scenes.grammar import RGB
from vlv.scenes.world import key_among, share_of

SIZE, FINE = 64, 4  # pixels of a picture; how many times finer it is drawn
PAPER, INK = (250, 247, 240), (52, 46, 44)
CRAYONS: dict[str, RGB] = {
    "red": (214, 60, 56),
    "orange": (238, 140, 48),
    "yellow": (236, 198, 52),
    "green": (74, 158, 84),
    "blue": (64, 112, 198),
    "purple": (134, 84, 172),
}
TEST_SHARE = 0.25  # of all captions

Points = list[tuple[float, float]]  # in a square from -1 to 1; y points down


def _round(x: float, y: float, width: float, height: float = 0, start: float = 0, end: float = 360) -> Points:
    """An ellipse or a part of it. The angles are in degrees, clockwise from the right."""
    angles = np.radians(np.linspace(start, end, max(6, int((end - start) / 12))))
    return [(x + width * math.cos(angle), y + (height or width) * math.sin(angle)) for angle in angles]


def _rays(count: int, inner: float, outer: float, turn: float = -90) -> Points:
    """The outline of a star."""
    radii = [(outer, inner)[number % 2] for number in range(2 * count)]
    angles = [math.radians(turn + 180 * number / count) for number in range(2 * count)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for radius, angle in zip(radii, angles, strict=True)]


_HEART = [
    (0.85 * math.sin(t) ** 3, -(0.68 * math.cos(t) - 0.26 * math.cos(2 * t) - 0.1 * math.cos(3 * t)))
    for t in np.linspace(0, 2 * math.pi, 30)
]
_CLOUD = [
    *_round(-0.5, 0.2, 0.38, 0.34, 90, 270),
    *_round(-0.15, -0.2, 0.42, 0.4, 190, 320),
    *_round(0.4, -0.05, 0.4, 0.38, 250, 360),
    *_round(0.6, 0.25, 0.3, 0.28, 300, 450),
]
# Closed outlines, which are filled with crayon, and open lines.
SUBJECTS: dict[str, tuple[list[Points], list[Points]]] = {
    "house": (
        [[(-0.7, 0.85), (-0.7, -0.1), (0, -0.85), (0.7, -0.1), (0.7, 0.85)]],
        [[(-0.7, -0.1), (0.7, -0.1)], [(-0.2, 0.85), (-0.2, 0.3), (0.2, 0.3), (0.2, 0.85)]],
    ),
    "sailboat": (
        [[(-0.85, 0.4), (0.85, 0.4), (0.5, 0.85), (-0.5, 0.85)], [(0.05, -0.85), (0.7, 0.2), (0.05, 0.2)]],
        [[(-0.05, 0.4), (-0.05, -0.9)]],
    ),
    "fir tree": (
        [[(0, -0.9), (0.45, -0.2), (0.25, -0.2), (0.7, 0.5), (-0.7, 0.5), (-0.25, -0.2), (-0.45, -0.2)]],
        [[(-0.15, 0.5), (-0.15, 0.9), (0.15, 0.9), (0.15, 0.5)]],
    ),
    "sun": (
        [_round(0, 0, 0.5)],
        [
            [(0.62 * math.cos(a), 0.62 * math.sin(a)), (0.92 * math.cos(a), 0.92 * math.sin(a))]
            for a in np.linspace(0, 2 * math.pi, 9)[:-1]
        ],
    ),
    "moon": ([_round(-0.1, 0, 0.8, 0.85, 60, 300) + _round(0.15, 0, 0.5, 0.68, 290, 70)], []),
    "star": ([_rays(5, 0.4, 0.92)], []),
    "heart": ([_HEART], []),
    "cloud": ([_CLOUD], []),
    "fish": (
        [_round(-0.15, 0, 0.62, 0.42) + [(0.4, 0.1), (0.88, 0.42), (0.88, -0.42), (0.4, -0.1)]],
        [_round(-0.5, -0.08, 0.06)],
    ),
    "balloon": ([_round(0, -0.25, 0.52, 0.62)], [[(0, 0.37), (0.1, 0.55), (-0.08, 0.72), (0.05, 0.92)]]),
    "kite": (
        [[(0, -0.9), (0.55, -0.25), (0, 0.5), (-0.55, -0.25)]],
        [[(0, -0.9), (0, 0.5)], [(-0.55, -0.25), (0.55, -0.25)], [(0, 0.5), (0.2, 0.65), (0.05, 0.8), (0.25, 0.95)]],
    ),
    "mushroom": (
        [_round(0, -0.05, 0.82, 0.72, 180, 360)],
        [
            [(-0.28, -0.05), (-0.22, 0.85), (0.22, 0.85), (0.28, -0.05)],
            _round(-0.3, -0.35, 0.12),
            _round(0.3, -0.3, 0.1),
        ],
    ),
    "umbrella": (
        [_round(0, 0, 0.88, 0.75, 180, 360)],
        [[(0, -0.75), (0, 0.7)], _round(0.14, 0.7, 0.14, 0.18, 0, 180)],
    ),
    "snowman": ([_round(0, -0.5, 0.34), _round(0, 0.35, 0.52)], [_round(-0.1, -0.55, 0.04), _round(0.1, -0.55, 0.04)]),
    "cup": ([[(-0.6, -0.5), (0.4, -0.5), (0.3, 0.75), (-0.5, 0.75)]], [_round(0.38, 0.05, 0.38, 0.35, 270, 450)]),
    "flag": ([[(-0.5, -0.85), (0.8, -0.6), (0.8, 0.1), (-0.5, -0.05)]], [[(-0.5, -0.95), (-0.5, 0.95)]]),
}


@dataclass(frozen=True)
class Doodle:
    """Things from left to right, each a colour and a name."""

    things: tuple[tuple[str, str], ...]

    @property
    def caption(self) -> str:
        return "a crayon drawing of " + " beside ".join(self.short_captions())

    def short_captions(self) -> tuple[str, ...]:
        return tuple(f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {name}" for colour, name in self.things)


class Doodles:
    """
    Drawings of one or two things, 64 pixels wide. As in a `World`, (split, index, seed) always gives the same picture.
    `train` and `test` have no caption in common.
    """

    name = "doodles"
    image_size = SIZE
    splits = ("train", "test")

    def key(self, split: str, index: int, seed: int) -> tuple[int, int, int]:
        return key_among(self.splits, split, index, seed)

    def sample_picture(self, split: str, index: int, seed: int = 0) -> tuple[Image.Image, Doodle]:
        rng = np.random.default_rng(self.key(split, index, seed))
        while True:
            names = rng.permutation(len(SUBJECTS))[: rng.integers(1, 3)]
            doodle = Doodle(tuple((str(rng.choice(list(CRAYONS))), list(SUBJECTS)[name]) for name in names))
            if (share_of(doodle.caption) < TEST_SHARE) == (split == "test"):
                return draw(doodle, rng), doodle


def draw(doodle: Doodle, rng: np.random.Generator) -> Image.Image:
    """Draw with an unsteady hand: an RGB image of 64x64 pixels."""
    picture = Image.new("RGB", (SIZE * FINE,) * 2, PAPER)
    count = len(doodle.things)
    for place, (colour, name) in enumerate(doodle.things):
        radius = SIZE * FINE * rng.uniform(0.19, 0.24) * (1.5 if count == 1 else 1)
        middle = SIZE * FINE * (np.array([(place + 0.5) / count, 0.5]) + rng.uniform(-0.03, 0.03, 2))
        closed, open_lines = (
            [_placed(points, middle, radius, rng) for points in outlines] for outlines in SUBJECTS[name]
        )
        for outline in closed:
            _crayon(picture, outline, CRAYONS[colour], rng)
        pen = ImageDraw.Draw(picture)
        for line in [*([*outline, outline[0]] for outline in closed), *open_lines]:
            pen.line(line, fill=INK, width=round(FINE * rng.uniform(1.1, 1.6)), joint="curve")
    return picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def _placed(points: Points, middle: np.ndarray, radius: float, rng: np.random.Generator) -> Points:
    """Points of the unit square on the picture, each a little off."""
    shaken = np.array(points) + rng.normal(0, 0.02, (len(points), 2))
    return [(float(x), float(y)) for x, y in shaken * radius + middle]


def _crayon(picture: Image.Image, outline: Points, colour: RGB, rng: np.random.Generator) -> None:
    """Fill an outline with slanted strokes that leave some paper."""
    inside, strokes = (Image.new("L", picture.size) for _ in range(2))
    ImageDraw.Draw(inside).polygon(outline, fill=255)
    pen, side = ImageDraw.Draw(strokes), picture.width
    slant = side * rng.uniform(0.5, 1.0)
    for start in np.arange(-slant, side, 1.7 * FINE):
        start += rng.normal(0, FINE / 3)
        pen.line([(start, 0), (start + slant, side)], fill=int(rng.integers(190, 256)), width=round(1.3 * FINE))
    strokes = strokes.filter(ImageFilter.GaussianBlur(FINE / 3))
    picture.paste(colour, mask=ImageChops.multiply(inside, strokes))
