"""The world of vlv-tiny: coloured shapes, in pictures 32 pixels wide."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from vlv.scenes.grammar import PLACES, RGB, GridObject, GridScene, mirrored_place
from vlv.scenes.world import World, share_of

SHAPES = ("circle", "square", "triangle", "cross")
# The colours are far apart in CIELAB: two objects by at least 33, an object and a background by 35, two backgrounds
# by 23.
COLOURS: dict[str, RGB] = {
    "red": (222, 36, 42),
    "yellow": (255, 206, 22),
    "green": (24, 148, 60),
    "blue": (28, 78, 216),
    "purple": (128, 38, 160),
    "pink": (255, 112, 178),
    "cyan": (12, 186, 222),
    "black": (22, 22, 26),
}
SIZES = {"small": 4.0, "large": 6.8}
BACKGROUNDS: dict[str, RGB] = {
    "white": (252, 252, 252),
    "gray": (158, 162, 170),
    "cream": (252, 232, 190),
    "mint": (186, 238, 208),
    "lavender": (206, 196, 246),
}
NOVEL_SHARE = 0.12


@dataclass(frozen=True)
class SceneObject(GridObject):
    """One shape at one place. Each field is a word of `WORLD`; others raise ValueError."""

    known = {"size": SIZES, "colour": COLOURS, "shape": SHAPES, "place": PLACES}

    size: str
    colour: str
    shape: str
    place: str


@dataclass(frozen=True)
class Scene(GridScene):
    """Shapes on a background. Every shape is symmetric, so that a mirrored picture shows the mirrored scene."""

    objects_are = SceneObject
    places = PLACES
    backgrounds = BACKGROUNDS

    objects: tuple[SceneObject, ...]
    background: str


@cache
def is_novel(shape: str, colour: str, place: str) -> bool:
    """Whether this combination, like its mirror image, is kept out of train, validation and test."""
    return share_of(f"{colour} {shape} at the {min(place, mirrored_place(place))}") < NOVEL_SHARE


class ShapesWorld(World):
    name = "shapes"
    image_size = 32
    shapes = SHAPES
    colours = COLOURS
    sizes = SIZES
    backgrounds = BACKGROUNDS
    scene_type = Scene
    words = {name: tuple(known) for name, known in SceneObject.known.items()}
    subject = "shape"

    def holds_novel(self, scene: Scene) -> bool:
        return any(is_novel(item.shape, item.colour, item.place) for item in scene.objects)

    def draw(self, scene: Scene, seed: int | Sequence[int]) -> Image.Image:
        """Paint a scene.

        Args:
            seed: of each object's small shift (at most 1 px) and change of size (at most 3 %), so that two pictures
                of one scene differ. No object leaves its cell of the grid.

        Returns:
            an RGB image of `image_size` squared (32x32).
        """
        rng = np.random.default_rng(seed)
        picture = Image.new("RGB", (self.image_size,) * 2, BACKGROUNDS[scene.background])
        cell_width, cell_height = self.image_size / self.columns, self.image_size / self.rows
        for item in scene.objects:
            row, column = divmod(PLACES.index(item.place), self.columns)
            radius = SIZES[item.size] * rng.uniform(0.97, 1.03)
            shift_x, shift_y = (
                rng.uniform(-room, room)
                for room in (min(1.0, cell / 2 - radius) for cell in (cell_width, cell_height))
            )
            # The cell's pixels, and the same box in the stencil's coordinates.
            left, top = int(column * cell_width), int(row * cell_height)
            width, height = math.ceil(cell_width), math.ceil(cell_height)
            scale = _STENCIL_RADIUS / radius
            x = _STENCIL_SIZE / 2 - scale * ((column + 0.5) * cell_width + shift_x - left)
            y = _STENCIL_SIZE / 2 - scale * ((row + 0.5) * cell_height + shift_y - top)
            box = (x, y, x + scale * width, y + scale * height)
            mask = _stencil(item.shape).resize((width, height), Image.Resampling.HAMMING, box=box)
            picture.paste(COLOURS[item.colour], (left, top), mask)
        return picture


WORLD = ShapesWorld()


def _outline(shape: str) -> list[tuple[float, float]]:
    """The corners of a shape of half-extent 1 around (0, 0), with y pointing down. Every shape is symmetric in x."""
    if shape == "circle":
        return [(0.95 * math.cos(t), 0.95 * math.sin(t)) for t in np.linspace(0, 2 * math.pi, 96)]
    if shape == "square":
        return [(-0.87, -0.87), (0.87, -0.87), (0.87, 0.87), (-0.87, 0.87)]
    if shape == "triangle":
        return [(0, -0.95), (1, 0.8), (-1, 0.8)]
    if shape == "cross":
        arm = 0.34
        corner = [(arm, -1), (arm, -arm), (1, -arm)]
        right = [*corner, *((x, -y) for x, y in reversed(corner))]
        return [*right, *((-x, y) for x, y in reversed(right))]
    raise ValueError(f"No outline is known for the shape '{shape}'.")


_STENCIL_RADIUS, _STENCIL_SIZE = 64, 400  # with a margin, for cells around small and shifted objects


@cache
def _stencil(shape: str) -> Image.Image:
    """A large mask of the shape. Cutting a fractional box from it and shrinking it gives an anti-aliased object."""
    oversampling = 4
    middle, radius = oversampling * _STENCIL_SIZE / 2, oversampling * _STENCIL_RADIUS
    mask = Image.new("L", (oversampling * _STENCIL_SIZE,) * 2)
    ImageDraw.Draw(mask).polygon([(middle + radius * x, middle + radius * y) for x, y in _outline(shape)], fill=255)
    return mask.reduce(oversampling)


# Short names for the methods of the world.
draw, parse_caption, split_of = WORLD.draw, WORLD.parse_caption, WORLD.content_split
sample_scene, sample_picture = WORLD.sample_scene, WORLD.sample_picture
SPLIT_NAMES = WORLD.splits
