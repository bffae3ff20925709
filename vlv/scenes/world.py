"""What all drawn worlds share besides the grammar: the grid, the splits, and random access to scenes.

(split, index, seed) always gives the same scene and the same picture, on every machine.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
from PIL import Image

from vlv.scenes.grammar import PLACES, RGB, GridScene, parse

# The splits' shares of all scenes without a combination of the split "novel".
SHARES = {"train": 0.90, "validation": 0.05, "test": 0.05}
# A split without a scene among so many random ones has none: where there are any, they are about 1 in 100 or more.
MOST_DRAWS = 5_000


class World(ABC):
    """A world of scenes: its words, its pictures and its splits. Lengths are in pixels.

    Args:
        max_objects: most objects in a scene of a split.

    Raises:
        ValueError: when it is less than 1, or more than there are places.
    """

    name: str
    image_size: int
    columns: int = 2
    rows: int = 2
    places: tuple[str, ...] = PLACES
    sizes: Mapping[str, float]  # half of an object's extent
    backgrounds: Mapping[str, RGB]
    scene_type: type[GridScene]
    splits: tuple[str, ...] = (*SHARES, "novel")
    unseen: tuple[str, ...] = ("test", "novel")  # the splits to measure on

    def __init__(self, max_objects: int = 2):
        if not 1 <= max_objects <= len(self.places):
            raise ValueError(f"max_objects is {max_objects}; a scene has 1 to {len(self.places)} objects.")
        self.max_objects = max_objects

    @property
    @abstractmethod
    def words(self) -> dict[str, tuple[str, ...]]:
        """The fields of an object's phrase, in their order, with the allowed words of each; `place` is last."""

    @property
    @abstractmethod
    def subject(self) -> str:
        """The field of `words` that says what an object is, such as "shape"."""

    @abstractmethod
    def draw(self, scene: GridScene, seed: int | Sequence[int]) -> Image.Image:
        """Draw a scene. The seed sets the small differences between two pictures of it."""

    @abstractmethod
    def holds_novel(self, scene: GridScene) -> bool:
        """Whether the scene has a combination that train, validation and test never show, also not mirrored."""

    def parse_caption(self, text: str) -> GridScene:
        """Parse a full description into its scene; raises ValueError for any other text."""
        return parse(text, self.scene_type, self.words)

    def content_split(self, scene: GridScene) -> str:
        """The split of a scene and of its mirror image. It depends only on their content."""
        if self.holds_novel(scene):
            return "novel"
        share = share_of(min(scene.caption, scene.mirrored().caption))
        for split, size in SHARES.items():
            share -= size
            if share < 0:
                return split
        return split

    def sample_scene(self, split: str, index: int, seed: int = 0, count: int | None = None) -> GridScene:
        """The scene number `index` of a split, for a seed.

        The number of objects is `count`, or else uniform in 1..`max_objects`. For each number, all scenes of the split
        are equally likely.

        Raises:
            ValueError: for an unknown split, or one without scenes of so many objects, as in a small artwork.
        """
        rng = np.random.default_rng(self.key(split, index, seed))
        count = int(rng.integers(1, self.max_objects + 1)) if count is None else count
        for _ in range(MOST_DRAWS):
            scene = self._random_scene(rng, count)
            if self.content_split(scene) == self.content_of(split):
                return scene
        raise ValueError(
            f"The split '{split}' of this world has no scene with {count} object{'s' if count > 1 else ''}: choose "
            f"another split, {f'at most {count - 1} objects (max_objects), ' if count > 1 else ''}or artwork of more "
            "things."
        )

    def content_of(self, split: str) -> str:
        """The split of `content_split` that a split's scenes come from."""
        return split

    def sample_picture(
        self, split: str, index: int, seed: int = 0, count: int | None = None
    ) -> tuple[Image.Image, GridScene]:
        """The picture number `index` of a split, for a seed, and the scene that it shows (see `sample_scene`)."""
        scene = self.sample_scene(split, index, seed, count)
        key = (*self.key(split, index, seed), 1)  # the 1 gives other random numbers than those that chose the scene
        return self.draw(scene, key), scene

    def key(self, split: str, index: int, seed: int) -> tuple[int, int, int]:
        return key_among(self.splits, split, index, seed)

    @cached_property
    def _attributes(self) -> tuple[tuple[str, ...], ...]:
        return tuple(words for name, words in self.words.items() if name != "place")

    def _random_scene(self, rng: np.random.Generator, count: int) -> GridScene:
        places = sorted(rng.permutation(len(self.places))[:count].tolist())
        names = rng.integers(0, [len(known) for known in self._attributes], size=(count, len(self._attributes)))
        objects = tuple(
            self.scene_type.objects_are(
                *(known[choice] for known, choice in zip(self._attributes, choices, strict=True)), self.places[place]
            )
            for place, choices in zip(places, names.tolist(), strict=True)
        )
        return self.scene_type(objects, tuple(self.backgrounds)[rng.integers(len(self.backgrounds))])


def key_among(splits: Sequence[str], split: str, index: int, seed: int) -> tuple[int, int, int]:
    """The numbers that stand for one scene; raises ValueError for an unknown split or a negative number."""
    if split not in splits:
        raise ValueError(f"There is no split '{split}'; the splits are: {', '.join(splits)}.")
    if seed < 0 or index < 0:
        raise ValueError(f"Seeds and indices of scenes start at 0; got seed {seed}, index {index}.")
    return (seed, splits.index(split), index)


def share_of(text: str) -> float:
    """A number in [0, 1) that depends only on the text: it is the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64
