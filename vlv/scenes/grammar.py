"""What all drawn worlds share in words: things on a grid, the grammar of their captions, and how a scene is scored."""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from functools import cached_property
from itertools import pairwise
from typing import ClassVar

RGB = tuple[int, int, int]

PLACES = (  # in reading order, row by row
    *("top left", "top right"),
    *("bottom left", "bottom right"),
)


class GridObject:
    """
    One thing at one place. A world's own class is a frozen dataclass; its fields are the words of its phrase in their
    order, and the last one is `place`.
    """

    known: ClassVar[Mapping[str, Collection[str]]]  # the words that a field can be; any other raises ValueError

    def __post_init__(self):
        for name, known in self.known.items():
            check_known(name, getattr(self, name), known)

    @property
    def phrase(self) -> str:
        """The object in words: "a large red circle at the top left"."""
        *words, place = (getattr(self, field.name) for field in fields(self))
        return f"a {' '.join(words)} at the {place}"

    def mirrored(self) -> "GridObject":
        return replace(self, place=mirrored_place(self.place))


class GridScene:
    """
    Objects in reading order, no two at one place, on a background; raises ValueError otherwise. A world's own class is
    a frozen dataclass with the fields `objects` and `background`.

    The scenes of every split have 1 to `max_objects` objects. Any number that fits the grid is a scene, because a
    reader or a captioner may find more of them, or none.
    """

    objects_are: ClassVar[type[GridObject]]
    places: ClassVar[tuple[str, ...]]
    backgrounds: ClassVar[Collection[str]]
    objects: tuple[GridObject, ...]
    background: str

    def __post_init__(self):
        check_known("background", self.background, self.backgrounds)
        positions = [self.places.index(item.place) for item in self.objects]
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

    def mirrored(self) -> "GridScene":
        """The scene that a picture of this one shows after `ImageOps.mirror`."""
        objects = sorted((item.mirrored() for item in self.objects), key=lambda item: self.places.index(item.place))
        return replace(self, objects=tuple(objects))


def mirrored_place(place: str) -> str:
    swap = {"left": "right", "right": "left"}
    return " ".join(swap.get(word, word) for word in place.split())


def check_known(what: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise ValueError(f"There is no {what} '{name}' in this world; its {what}s are: {', '.join(known)}.")


_CAPTION = re.compile(r"(.+) on a (\w+) background")


def parse(text: str, scene_type: type[GridScene], words: Mapping[str, Collection[str]]) -> GridScene:
    """Read a full description back into the scene it describes, the exact inverse of `GridScene.caption`.

    Args:
        words: the words that each field of the scene's objects can be, in the order of the phrase, `place` last.

    Raises:
        ValueError: saying what is wrong, for any text that is not letter for letter a caption of this grammar.
    """
    whole = _CAPTION.fullmatch(text)
    if whole is None:
        raise ValueError(f"The caption '{text}' does not end in 'on a <colour> background'.")
    listed, background = whole.groups()
    *attributes, places = ("|".join(map(re.escape, known)) for known in words.values())
    pattern = re.compile(f"a {' '.join(f'({known})' for known in attributes)} at the ({places})")
    objects = []
    for phrase in re.split(", | and ", listed):
        match = pattern.fullmatch(phrase)
        if match is None:
            form = " ".join(f"<{name}>" for name in words if name != "place")
            raise ValueError(f"In the caption '{text}', '{phrase}' is not of the form 'a {form} at the <place>'.")
        objects.append(scene_type.objects_are(*match.groups()))
    scene = scene_type(tuple(objects), background)
    if scene.caption != text:
        raise ValueError(f"The caption '{text}' must join its objects by commas and a last 'and': '{scene.caption}'.")
    return scene


def compare(predicted: GridScene | None, truth: GridScene) -> Counter:
    """Count what a predicted scene gets right of the true one. Counts of many scenes add up with `Counter.update`.

    Objects are matched by their place. An object that the truth has and the prediction lacks is wrong in everything;
    one that only the prediction has is counted in `extra_objects`, takes nothing from `objects_right`, and makes
    `exact` 0. `predicted=None` (a text that cannot be parsed) has nothing right and nothing extra.

    Returns:
        totals: `scenes` (1) and `objects` (those of the truth);
        of the scenes: `exact` (every object and the background right, none extra), `background_right`;
        of the truth's objects: `objects_right` (all its words right), `place_right` (something is there), and one for
        each other word of its phrase, as `size_right` (of what is there);
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
    for attribute in (attribute.name for attribute in fields(truth.objects_are)):
        counts[f"{attribute}_right"] = sum(
            there is not None and getattr(there, attribute) == getattr(item, attribute) for there, item in pairs
        )
    return counts
