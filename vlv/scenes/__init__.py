"""The drawn worlds. The content of a scene is known, so captions and reconstructions of it can be scored exactly.

A scene is one or two objects on a 2x2 grid of places. There are two worlds: `shapes` for vlv-tiny, whose names are
imported below, and `emoji` for vlv-emoji. `world(name)` returns either one; both have the interface of `World`.
"""

from vlv.scenes.folder import write_scenes
from vlv.scenes.grammar import RGB, compare, mirrored_place
from vlv.scenes.shapes import (
    SPLIT_NAMES,
    WORLD,
    Scene,
    SceneObject,
    ShapesWorld,
    draw,
    is_novel,
    parse_caption,
    sample_picture,
    sample_scene,
    split_of,
)
from vlv.scenes.world import World

__all__ = [
    "RGB",
    "SPLIT_NAMES",
    "WORLD",
    "WORLDS",
    "Scene",
    "SceneObject",
    "ShapesWorld",
    "World",
    "compare",
    "draw",
    "is_novel",
    "mirrored_place",
    "parse_caption",
    "sample_picture",
    "sample_scene",
    "split_of",
    "world",
    "world_of",
    "write_scenes",
]

WORLDS = ("shapes", "emoji")


def world(name: str, **settings) -> World:
    """
    A world by name.

    Args:
        settings: `max_objects`, and for the emoji world those of `vlv.scenes.emoji.EmojiWorld`.

    Raises:
        ValueError: for an unknown name.
    """
    if name == "shapes":
        return ShapesWorld(**settings) if settings else WORLD
    if name == "emoji":
        from vlv.scenes.emoji import EmojiWorld

        return EmojiWorld(**settings)
    raise ValueError(f"There is no world '{name}'; the worlds are: {', '.join(WORLDS)}.")


def world_of(size: int, source: str, name: str | None = None) -> World:
    """
    The world that a model is shown and measured on: the one whose pictures have the `size` that the model rebuilds.

    Args:
        source: the model's name, for the message.
        name: a world that must be the one.

    Raises:
        ValueError: when there is no such world, or when `name` is another world.
    """
    worlds = [world(known) for known in WORLDS]
    for drawn in worlds:
        if drawn.image_size == size and name in (None, drawn.name):
            return drawn
    known = ", ".join(f"{drawn.name} ({drawn.image_size} pixels)" for drawn in worlds)
    raise ValueError(
        f"{source} rebuilds pictures of {size} pixels, which is not the size of "
        f"{f'the world {name}' if name else 'any world of scenes'}; the worlds are {known}."
    )
