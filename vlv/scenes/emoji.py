"""The world of vlv-emoji: things drawn by four artists, in pictures 64 pixels wide."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import ClassVar

import numpy as np
from PIL import Image

from vlv.scenes import hands
from vlv.scenes.artwork import Artwork, bundled_artwork
from vlv.scenes.grammar import PLACES, RGB, GridObject, GridScene
from vlv.scenes.world import World, share_of

SIZES = {"small": 9.5, "large": 14.5}
BACKGROUNDS: dict[str, RGB] = {
    "cream": (252, 236, 198),
    "mint": (186, 238, 208),
    "sky": (168, 214, 250),
    "lavender": (206, 196, 246),
    "rose": (250, 186, 192),
    "navy": (44, 58, 98),
}
# The bundled artist whose drawings no training sees. docs/vlv-emoji.md says why it is this one.
UNSEEN_ARTIST = "noto-v1"
# The share of things that never appear in one of the two rows in train, validation and test.
NOVEL_SHARE = 0.24


@dataclass(frozen=True)
class Thing(GridObject):
    """One thing at one place. The artwork defines the names of things."""

    known = {"size": SIZES, "place": PLACES}

    size: str
    name: str
    place: str


@dataclass(frozen=True)
class EmojiScene(GridScene):
    objects_are = Thing
    places = PLACES
    backgrounds = BACKGROUNDS

    objects: tuple[Thing, ...]
    background: str


@cache
def is_novel(name: str, place: str) -> bool:
    """Whether this combination, like its mirror image, is kept out of train, validation and test."""
    share = share_of(name) / NOVEL_SHARE
    return share < 1 and place.startswith("top" if share < 0.5 else "bottom")


class EmojiWorld(World):
    """
    Each picture is by one artist. The split `artist` has the scenes of `test`, drawn by the artist whose drawings no
    training sees. The other artists draw the other splits.

    Args:
        artwork: the bundled one by default.
        artists: the artists, instead of those of the split.
        varied: share of the pictures that is changed as another artist might draw them (recoloured part by part, bent,
            outlined), for training.
        max_objects: most things in a scene of a split.

    Raises:
        ValueError: for an artist that the artwork lacks, or another wrong argument.
    """

    name = "emoji"
    image_size = 64
    sizes = SIZES
    backgrounds = BACKGROUNDS
    scene_type = EmojiScene
    subject = "name"
    splits: ClassVar[tuple[str, ...]] = (*World.splits, "artist")
    unseen = (*World.unseen, "artist")

    def __init__(
        self,
        artwork: Artwork | None = None,
        artists: Sequence[str] | None = None,
        varied: float = 0.0,
        max_objects: int = 2,
    ):
        super().__init__(max_objects)
        self.artwork = artwork or bundled_artwork()
        for artist in artists or ():
            if artist not in self.artwork.artists:
                raise ValueError(
                    f"There is no artist '{artist}' in this artwork; its artists are:"
                    f" {', '.join(self.artwork.artists)}."
                )
        if not 0 <= varied <= 1:
            raise ValueError(f"varied is a share of the pictures, between 0 and 1, not {varied}.")
        self.artists, self.varied = tuple(artists or ()), varied

    @cached_property
    def words(self) -> dict[str, tuple[str, ...]]:
        return {"size": tuple(SIZES), "name": self.artwork.names, "place": PLACES}

    def holds_novel(self, scene: EmojiScene) -> bool:
        return any(is_novel(item.name, item.place) for item in scene.objects)

    def content_of(self, split: str) -> str:
        return "test" if split == "artist" else split

    def artists_of(self, split: str) -> tuple[str, ...]:
        """The artists of a split; raises ValueError if it has none."""
        if self.artists:
            return self.artists
        artists = tuple(artist for artist in self.artwork.artists if (artist == UNSEEN_ARTIST) == (split == "artist"))
        if not artists:
            raise ValueError(
                f"The split '{split}' of this artwork has no artist; choose one of {', '.join(self.artwork.artists)}."
            )
        return artists

    def key(self, split: str, index: int, seed: int) -> tuple[int, int, int]:
        key = super().key(split, index, seed)
        self.artists_of(split)
        return key

    def sample_picture(
        self, split: str, index: int, seed: int = 0, count: int | None = None
    ) -> tuple[Image.Image, EmojiScene]:
        scene = self.sample_scene(split, index, seed, count)
        key = (*self.key(split, index, seed), 1)
        artists = self.artists_of(split)
        return self.draw(scene, key, artists[np.random.default_rng((*key, 1)).integers(len(artists))]), scene

    def draw(self, scene: EmojiScene, seed: int | Sequence[int], artist: str | None = None) -> Image.Image:
        """Paint a scene.

        Args:
            seed: of each thing's small shift, turn, change of size, and mirroring.
            artist: the artist; by default the first one of the train split.

        Returns:
            an RGB image of `image_size` squared (64x64).
        """
        rng = np.random.default_rng(seed)
        tiles = self.artwork.tiles[artist or self.artists_of("train")[0]]
        varied = rng.random() < self.varied
        cell = self.image_size // self.columns
        picture = np.empty((self.image_size,) * 2 + (3,), np.float32)
        picture[:] = np.float32(BACKGROUNDS[scene.background]) / 255
        for item in scene.objects:
            row, column = divmod(PLACES.index(item.place), self.columns)
            radius = SIZES[item.size] * rng.uniform(0.96, 1.04)
            room = min(2.0, cell / 2 - radius)
            place = hands.Placement(
                radius, tuple(rng.uniform(-room, room, 2)), rng.uniform(-0.08, 0.08), int(rng.choice((-1, 1)))
            )
            tile = tiles[self.artwork.names.index(item.name)]
            if varied:
                tile, place = hands.varied_colours(tile, rng), hands.varied_placement(place, rng)
            hands.put(picture, hands.premultiplied(tile), (column * cell, row * cell), cell, place)
        if varied:
            picture = hands.roughened(picture, rng)
        return Image.fromarray((picture * 255 + 0.5).clip(0, 255).astype(np.uint8))
