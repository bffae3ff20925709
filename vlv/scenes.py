"""The drawn world: scenes of coloured shapes, the one grammar of their captions, their pictures, and their splits.

A scene is one or two objects on a 2x2 grid of places. Everything in it is known, so whatever a model says or paints
of it can be scored exactly. Scenes are made by random access: (split, index, seed) names one scene for ever, on every
machine.
"""

import hashlib
import json
import math
import os
import re
import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cache, cached_property, partial
from itertools import pairwise
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

RGB = tuple[int, int, int]


@dataclass(frozen=True)
class World:
    """What scenes are made of. Lengths are in pixels."""

    image_size: int = 32
    columns: int = 2
    rows: int = 2
    max_objects: int = 2
    shapes: tuple[str, ...] = ("circle", "square", "triangle", "cross")
    # Far apart in CIELAB: two objects differ by 33 at least, an object and a background by 35, two backgrounds by 23.
    colours: dict[str, RGB] = field(
        default_factory=lambda: {
            "red": (222, 36, 42),
            "yellow": (255, 206, 22),
            "green": (24, 148, 60),
            "blue": (28, 78, 216),
            "purple": (128, 38, 160),
            "pink": (255, 112, 178),
            "cyan": (12, 186, 222),
            "black": (22, 22, 26),
        }
    )
    sizes: dict[str, float] = field(default_factory=lambda: {"small": 4.0, "large": 6.8})  # half of the extent
    backgrounds: dict[str, RGB] = field(
        default_factory=lambda: {
            "white": (252, 252, 252),
            "gray": (158, 162, 170),
            "cream": (252, 232, 190),
            "mint": (186, 238, 208),
            "lavender": (206, 196, 246),
        }
    )
    places: tuple[str, ...] = (  # in reading order, row by row
        *("top left", "top right"),
        *("bottom left", "bottom right"),
    )


WORLD = World()

# Shares of all content. What is held out of the first three makes the fourth split, "novel".
SPLITS = {"train": 0.90, "validation": 0.05, "test": 0.05}
SPLIT_NAMES = (*SPLITS, "novel")
NOVEL_SHARE = 0.12


@dataclass(frozen=True)
class SceneObject:
    """One shape at one place; each field is a name from `WORLD`, anything else raises ValueError."""

    size: str
    colour: str
    shape: str
    place: str

    def __post_init__(self):
        for name, known in zip(("size", "colour", "shape", "place"), _KNOWN, strict=True):
            _check_known(name, getattr(self, name), known)

    @property
    def phrase(self) -> str:
        """The object in words: "a large red circle at the top left"."""
        return f"a {self.size} {self.colour} {self.shape} at the {self.place}"

    def mirrored(self) -> "SceneObject":
        return SceneObject(self.size, self.colour, self.shape, mirrored_place(self.place))


@dataclass(frozen=True)
class Scene:
    """Objects in reading order, no two at one place, on a background; raises ValueError otherwise.

    The scenes of every split have 1 to `WORLD.max_objects` objects. Any number that fits the grid is a scene, because
    a reader or a captioner may find more of them, or none.
    """

    objects: tuple[SceneObject, ...]
    background: str

    def __post_init__(self):
        _check_known("background", self.background, WORLD.backgrounds)
        positions = [WORLD.places.index(item.place) for item in self.objects]
        if any(after <= before for before, after in pairwise(positions)):
            places = ", ".join(item.place for item in self.objects)
            raise ValueError(f"A scene's objects must stand in reading order at different places, not at: {places}.")

    @cached_property
    def caption(self) -> str:
        """The one full description of this scene."""
        phrases = [item.phrase for item in self.objects]
        listed = " and ".join(filter(None, (", ".join(phrases[:-1]), *phrases[-1:])))
        return f"{listed} on a {self.background} background".strip()

    def short_captions(self) -> tuple[str, ...]:
        """Descriptions of one thing each: every object alone, then the background alone; never the whole scene."""
        return (*(item.phrase for item in self.objects), f"a {self.background} background")

    def mirrored(self) -> "Scene":
        """The scene that a picture of this one shows after `ImageOps.mirror` (every shape is symmetric)."""
        objects = sorted((item.mirrored() for item in self.objects), key=lambda item: WORLD.places.index(item.place))
        return Scene(tuple(objects), self.background)


def mirrored_place(place: str) -> str:
    swap = {"left": "right", "right": "left"}
    return " ".join(swap.get(word, word) for word in place.split())


def _check_known(what: str, name: str, known) -> None:
    if name not in known:
        raise ValueError(f"There is no {what} '{name}' in this world; its {what}s are: {', '.join(known)}.")


_KNOWN = (WORLD.sizes, WORLD.colours, WORLD.shapes, WORLD.places)
_OBJECT = re.compile("a ({}) ({}) ({}) at the ({})".format(*("|".join(known) for known in _KNOWN)))
_CAPTION = re.compile(r"(.+) on a (\w+) background")


def parse_caption(text: str) -> Scene:
    """Read a full description back into the scene it describes, the exact inverse of `Scene.caption`.

    Raises ValueError, saying what is wrong, for any text that is not letter for letter a caption of this grammar.
    """
    whole = _CAPTION.fullmatch(text)
    if whole is None:
        raise ValueError(f"The caption '{text}' does not end in 'on a <colour> background'.")
    listed, background = whole.groups()
    objects = []
    for phrase in re.split(", | and ", listed):
        match = _OBJECT.fullmatch(phrase)
        if match is None:
            raise ValueError(
                f"In the caption '{text}', '{phrase}' is not of the form 'a <size> <colour> <shape> at the <place>'."
            )
        objects.append(SceneObject(*match.groups()))
    scene = Scene(tuple(objects), background)
    if scene.caption != text:
        raise ValueError(f"The caption '{text}' must join its objects by commas and a last 'and': '{scene.caption}'.")
    return scene


# --- drawing ---


def _outline(shape: str) -> list[tuple[float, float]]:
    """The corners of a shape of half-extent 1 around (0, 0), y pointing down; every one is symmetric in x."""
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


_STENCIL_RADIUS, _STENCIL_SIZE = 64, 400  # the margin lets a cell around a small, shifted object be cut from it


@cache
def _stencil(shape: str) -> Image.Image:
    """A large mask of the shape; objects are anti-aliased by cutting any fractional box from it and shrinking that."""
    oversampling = 4
    middle, radius = oversampling * _STENCIL_SIZE / 2, oversampling * _STENCIL_RADIUS
    mask = Image.new("L", (oversampling * _STENCIL_SIZE,) * 2)
    ImageDraw.Draw(mask).polygon([(middle + radius * x, middle + radius * y) for x, y in _outline(shape)], fill=255)
    return mask.reduce(oversampling)


def draw(scene: Scene, seed: int | Sequence[int]) -> Image.Image:
    """Paint a scene.

    Args:
        seed: seeds each object's small shift (up to 1 px either way) and change of size (up to 3 %), so that two
            pictures of one scene are not equal. No object leaves its cell of the grid.

    Returns:
        an RGB image of `WORLD.image_size` squared (32x32).
    """
    rng = np.random.default_rng(seed)
    picture = Image.new("RGB", (WORLD.image_size,) * 2, WORLD.backgrounds[scene.background])
    cell_width, cell_height = WORLD.image_size / WORLD.columns, WORLD.image_size / WORLD.rows
    for item in scene.objects:
        row, column = divmod(WORLD.places.index(item.place), WORLD.columns)
        radius = WORLD.sizes[item.size] * rng.uniform(0.97, 1.03)
        shift_x, shift_y = (
            rng.uniform(-room, room) for room in (min(1.0, cell / 2 - radius) for cell in (cell_width, cell_height))
        )
        # The cell's pixels, and the same box in the stencil's coordinates.
        left, top = int(column * cell_width), int(row * cell_height)
        width, height = math.ceil(cell_width), math.ceil(cell_height)
        scale = _STENCIL_RADIUS / radius
        x = _STENCIL_SIZE / 2 - scale * ((column + 0.5) * cell_width + shift_x - left)
        y = _STENCIL_SIZE / 2 - scale * ((row + 0.5) * cell_height + shift_y - top)
        box = (x, y, x + scale * width, y + scale * height)
        mask = _stencil(item.shape).resize((width, height), Image.Resampling.HAMMING, box=box)
        picture.paste(WORLD.colours[item.colour], (left, top), mask)
    return picture


# --- splits ---


def _share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone, on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


@cache
def is_novel(shape: str, colour: str, place: str) -> bool:
    """Whether this combination, like its mirror image, is kept out of train, validation and test."""
    return _share(f"{colour} {shape} at the {min(place, mirrored_place(place))}") < NOVEL_SHARE


def split_of(scene: Scene) -> str:
    """The one split that a scene belongs to, with its mirror image, by content alone."""
    if any(is_novel(item.shape, item.colour, item.place) for item in scene.objects):
        return "novel"
    share = _share(min(scene.caption, scene.mirrored().caption))
    for split, size in SPLITS.items():
        share -= size
        if share < 0:
            return split
    return split


def sample_scene(split: str, index: int, seed: int = 0, count: int | None = None) -> Scene:
    """The scene number `index` of a split under a seed.

    The number of objects is `count`, or else uniform in 1..`WORLD.max_objects`; given it, every scene of the split is
    equally likely.

    Raises:
        ValueError: for a split other than train, validation, test and novel.
    """
    rng = np.random.default_rng(_key(split, index, seed))
    count = int(rng.integers(1, WORLD.max_objects + 1)) if count is None else count
    while True:
        scene = _random_scene(rng, count)
        if split_of(scene) == split:
            return scene


def _key(split: str, index: int, seed: int) -> tuple[int, int, int]:
    if split not in SPLIT_NAMES:
        raise ValueError(f"There is no split '{split}'; the splits are: {', '.join(SPLIT_NAMES)}.")
    if seed < 0 or index < 0:
        raise ValueError(f"Seeds and indices of scenes start at 0; got seed {seed}, index {index}.")
    return (seed, SPLIT_NAMES.index(split), index)


_NAMES = tuple(tuple(known) for known in (WORLD.sizes, WORLD.colours, WORLD.shapes))
_BACKGROUNDS = tuple(WORLD.backgrounds)


def _random_scene(rng: np.random.Generator, count: int) -> Scene:
    places = sorted(rng.permutation(len(WORLD.places))[:count].tolist())
    names = rng.integers(0, [len(known) for known in _NAMES], size=(count, len(_NAMES))).tolist()
    objects = tuple(
        SceneObject(*(known[choice] for known, choice in zip(_NAMES, choices, strict=True)), WORLD.places[place])
        for place, choices in zip(places, names, strict=True)
    )
    return Scene(objects, _BACKGROUNDS[rng.integers(len(_BACKGROUNDS))])


def sample_picture(split: str, index: int, seed: int = 0, count: int | None = None) -> tuple[Image.Image, Scene]:
    """`sample_scene`, drawn: the picture number `index` of a split under a seed, and the scene it shows."""
    scene = sample_scene(split, index, seed, count)
    key = (*_key(split, index, seed), 1)  # the 1: other random numbers than those that chose the scene
    return draw(scene, key), scene


# --- a folder of scenes ---

_MARK = ".vlv-scenes.json"  # hidden from ImageFolder; says that the folder's pictures are ours to replace
_CHUNK = 500


def write_scenes(output_dir: str | os.PathLike, num: int, seed: int = 0, split: str = "test") -> Path:
    """Draw `num` scenes of a split into a Hugging Face ImageFolder.

    The folder gets 000000.png, 000001.png, ... and metadata.jsonl with the columns `file_name`, `text` (the caption)
    and `short` (the list of `Scene.short_captions`). metadata.jsonl appears last and whole: an interrupted run leaves
    none. The same arguments give the same files.

    Returns:
        the folder.

    Raises:
        ValueError: when `num` is not positive or the split unknown.
        FileExistsError: when the folder holds anything but an earlier output of this function.
    """
    if num < 1:
        raise ValueError(f"The number of scenes must be at least 1, not {num}.")
    _key(split, 0, seed)
    folder = _prepare_folder(Path(output_dir), {"num": num, "seed": seed, "split": split})

    chunks = [range(start, min(start + _CHUNK, num)) for start in range(0, num, _CHUNK)]
    write_chunk = partial(_write_chunk, folder, split, seed)
    rows = []
    with tqdm(total=num, desc=f"Drawing {split} scenes", unit="scene") as progress:
        if len(chunks) == 1:
            rows += write_chunk(chunks[0])
            progress.update(num)
        else:
            # Ctrl-C is the parent's to handle: leaving the block ends the workers.
            with Pool(min(len(chunks), os.cpu_count() or 1), signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
                for written in pool.imap(write_chunk, chunks):
                    rows += written
                    progress.update(len(written))

    unfinished = folder / ".metadata.jsonl.unfinished"
    unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    unfinished.replace(folder / "metadata.jsonl")
    return folder


def _prepare_folder(folder: Path, settings: dict) -> Path:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; name a folder to write the scenes to.")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()) and not (folder / _MARK).exists():
        raise FileExistsError(
            f"{folder} is not empty and was not written by this command; name a new or empty folder."
        )
    (folder / _MARK).write_text(json.dumps(settings) + "\n", encoding="utf-8")
    (folder / "metadata.jsonl").unlink(missing_ok=True)
    for picture in folder.glob("[0-9]" * 6 + ".png"):
        picture.unlink()
    return folder


def _write_chunk(folder: Path, split: str, seed: int, indices: range) -> list[dict]:
    rows = []
    for index in indices:
        picture, scene = sample_picture(split, index, seed)
        name = f"{index:06d}.png"
        picture.save(folder / name)
        rows.append({"file_name": name, "text": scene.caption, "short": list(scene.short_captions())})
    return rows


# --- scoring ---


def compare(predicted: Scene | None, truth: Scene) -> Counter:
    """Count what a predicted scene gets right of the true one. Counts of many scenes add up with `Counter.update`.

    Objects are matched by their place. An object that the truth has and the prediction lacks is wrong in everything;
    one that only the prediction has is counted in `extra_objects`, takes nothing from `objects_right`, and makes
    `exact` 0. `predicted=None` (a text that cannot be parsed) has nothing right and nothing extra.

    Returns:
        totals: `scenes` (1) and `objects` (those of the truth);
        of the scenes: `exact` (every object and the background right, none extra), `background_right`;
        of the truth's objects: `objects_right` (shape, colour, size and place all right), `place_right` (something
        is there), and `shape_right`, `colour_right`, `size_right` (of what is there);
        and `extra_objects`.
    """
    found = {item.place: item for item in predicted.objects} if predicted else {}
    pairs = [(found.get(item.place), item) for item in truth.objects]
    counts = Counter(
        scenes=1,
        objects=len(pairs),
        exact=int(predicted == truth),
        background_right=int(predicted is not None and predicted.background == truth.background),
        objects_right=sum(there == item for there, item in pairs),
        extra_objects=len(found.keys() - {item.place for item in truth.objects}),
    )
    for attribute in (attribute.name for attribute in fields(SceneObject)):
        counts[f"{attribute}_right"] = sum(
            there is not None and getattr(there, attribute) == getattr(item, attribute) for there, item in pairs
        )
    return counts
