"""Draws a thing's tile onto a picture: as the artist drew it, or varied as another artist might draw it.

A model that saw three drawings of an owl may only know these three drawings. Varied drawings are recoloured part by
part, bent, stretched and outlined. The model has to learn what all drawings of an owl have in common.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

SUPERSAMPLING = 4
PARTS = 6  # number of colours of a drawing that are changed separately


@dataclass(frozen=True)
class Placement:
    """
    Where and how a tile is drawn in its cell.

    Args:
        radius: half of the tile's extent on the picture, in pixels.
        shift: right and down from the cell's middle, in pixels.
        turn: in radians.
        flip: -1 mirrors the drawing.
        aspect: width divided by height.
        bend: how far each corner of a 4x4 grid moves, in half-extents of the tile; (4, 4, 2).
    """

    radius: float
    shift: tuple[float, float]
    turn: float
    flip: int
    aspect: float = 1.0
    bend: np.ndarray | None = None


def put(picture: np.ndarray, tile: np.ndarray, corner: tuple[int, int], cell: int, place: Placement) -> None:
    """Draw a tile (float 0..1: RGB times alpha, then alpha) into one cell of a picture (float 0..1), in place."""
    left, top = corner
    side = cell * SUPERSAMPLING
    steps = (np.arange(side) + 0.5) / SUPERSAMPLING - cell / 2
    x, y = np.meshgrid((steps - place.shift[0]) / place.radius, (steps - place.shift[1]) / place.radius)
    cos, sin, stretch = np.cos(place.turn), np.sin(place.turn), place.aspect**0.5
    x, y = place.flip * (cos * x + sin * y) / stretch, (cos * y - sin * x) * stretch
    if place.bend is not None:
        where = np.linspace(0, 3, side)
        x, y = (
            along + _sample(place.bend[..., [axis]], *np.meshgrid(where, where))[..., 0]
            for axis, along in enumerate((x, y))
        )
    size = tile.shape[0]
    drawn = _sample(np.pad(tile, ((1, 1), (1, 1), (0, 0))), *((1 + along) * size / 2 + 0.5 for along in (x, y)))
    drawn = drawn.reshape(cell, SUPERSAMPLING, cell, SUPERSAMPLING, 4).mean((1, 3))
    under = picture[top : top + cell, left : left + cell]
    under *= 1 - drawn[..., 3:]
    under += drawn[..., :3]


def _sample(grid: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bilinear values of `grid` (H, W, C) at pixel coordinates. Outside, the values of the border are repeated."""
    height, width, _ = grid.shape
    x, y = x.clip(0, width - 1.001), y.clip(0, height - 1.001)
    left, top = x.astype(int), y.astype(int)
    right, low = (x - left)[..., None], (y - top)[..., None]
    flat, at = grid.reshape(-1, grid.shape[2]), top * width + left
    above = flat[at] * (1 - right) + flat[at + 1] * right
    below = flat[at + width] * (1 - right) + flat[at + width + 1] * right
    return above * (1 - low) + below * low


def premultiplied(tile: np.ndarray) -> np.ndarray:
    """A tile, uint8 RGBA, in the form that `put` reads."""
    values = tile.astype(np.float32) / 255
    return np.concatenate([values[..., :3] * values[..., 3:], values[..., 3:]], axis=-1)


def varied_placement(place: Placement, rng: np.random.Generator) -> Placement:
    """The placement, further turned, stretched, scaled and bent."""
    return Placement(
        place.radius * rng.normal(1, 0.06),
        place.shift,
        place.turn + rng.normal(0, 0.2),
        place.flip,
        np.exp(rng.normal(0, 0.2)),
        rng.normal(0, 0.07, (4, 4, 2)) if rng.random() < 0.7 else None,
    )


def varied_colours(tile: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A tile in other colours; some get an outline or a missing piece. uint8 RGBA -> uint8 RGBA."""
    alpha = tile[..., 3:].astype(np.float32) / 255
    colours = tile[..., :3].astype(np.float32) / 255
    parts = np.asarray(Image.fromarray(tile[..., :3]).quantize(PARTS, method=Image.Quantize.MEDIANCUT, kmeans=2))
    shifts = rng.normal(0, 0.1, 3) + (rng.normal(0, 0.12, (256, 3)) if rng.random() < 0.7 else np.zeros((256, 3)))
    colours += shifts[parts]
    if rng.random() < 0.7:
        colours = colours @ _hue_rotation(rng.normal(0, 0.5)).T
    gray = colours.mean(-1, keepdims=True)
    saturation = 0 if rng.random() < 0.08 else float(np.clip(rng.normal(1, 0.35), 0, 2))
    colours = gray + (colours - gray) * saturation
    colours = ((colours - 0.5) * rng.normal(1, 0.2) + 0.5 + rng.normal(0, 0.08)).clip(0, 1)
    if rng.random() < 0.25:  # an outline
        ink = rng.uniform(0, 0.3, 3) + (0.7 if rng.random() < 0.15 else 0)
        wide = _grown(alpha, int(rng.integers(1, 3)))
        colours, alpha = colours * alpha + ink * (1 - alpha), wide
    if rng.random() < 0.2:  # hide a piece
        size = len(tile)
        height, width = rng.integers(size // 8, size // 3, 2)
        top, left = rng.integers(0, size - size // 3, 2)
        alpha = alpha.copy()
        alpha[top : top + height, left : left + width] = 0
    return (np.concatenate([colours, alpha], axis=-1) * 255).astype(np.uint8)


def _hue_rotation(angle: float) -> np.ndarray:
    """The matrix (3, 3) that turns colours around the grey axis."""
    cos, third = np.cos(angle), 1 / 3
    sin = np.sin(angle) * third**0.5
    near, far = third * (1 - cos) - sin, third * (1 - cos) + sin
    same = cos + third * (1 - cos)
    return np.array([[same, near, far], [far, same, near], [near, far, same]])


def _grown(alpha: np.ndarray, by: int) -> np.ndarray:
    """The mask (H, W, 1), grown by `by` pixels in each direction."""
    padded = np.pad(alpha, ((by, by), (by, by), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * by + 1, 2 * by + 1), axis=(0, 1))
    return windows.max((-1, -2))


def roughened(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A whole picture (float 0..1), with a little blur and grain."""
    if rng.random() < 0.3:
        padded = np.pad(picture, ((1, 1), (1, 1), (0, 0)), mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(0, 1))
        picture = windows.mean((-1, -2))
    return picture + rng.normal(0, 0.01 * rng.random(), picture.shape)
