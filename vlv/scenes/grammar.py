"""What all drawn worlds share: objects on a grid, the grammar of captions, and the scores of a scene."""

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
    One thing at one place. Each world has a frozen dataclass for it. Its fields are the words of the phrase, in their
    order; the last one is `place`.
    """

    known: ClassVar[Mapping[str, Collection[str]]]  # the allowed words of each field; others raise ValueError

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
    Objects on a background. They are in reading order, and no two have the same place; otherwise ValueError is raised.
    Each world has a frozen dataclass for it, with the fields `objects` and `background`.

    The scenes of every split have 1 to `max_objects` objects. A scene can have any number of objects that fits the
    grid, because a reader or a captioner may find more objects, or none.
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
            raise ValueError(f"A scene's objects must be in reading order at different places, not at: {places}.")

    @cached_property
    def caption(self) -> str:
        """The one full description of this scene."""
        phrases = [item.phrase for item in self.objects]
        listed = " and ".join(filter(None, (", ".join(phrases[:-1]), *phrases[-1:])))
        return f"{listed} on a {self.background} background".strip()

    def short_captions(self) -> tuple[str, ...]:
        """Descriptions of one thing each: each object alone, then the background alone."""
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
    """Parse a full description into its scene: the exact inverse of `GridScene.caption`.

    Args:
        words: the allowed words of each field of the scene's objects, in the order of the phrase, `place` last.

    Raises:
        ValueError: for any text that is not exactly a caption of this grammar; the sentence says what is wrong.
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
        raise ValueError(f"The caption '{text}' must join its objects with commas and 'and': '{scene.caption}'.")
    return scene


def compare(predicted: GridScene | None, truth: GridScene) -> Counter:
    """Compare a predicted scene with the true scene. `Counter.update` adds the counts of many scenes.

    Objects are matched by their place. An object that is only in the true scene is wrong in all its words. An object
    that is only in the predicted scene is counted in `extra_objects` and makes `exact` 0, but it does not change
    `objects_right`. `predicted=None` (a text that cannot be parsed) has nothing right and nothing extra.

    Returns:
        totals: `scenes` (1) and `objects` (those of the true scene);
        of the scene: `exact` (all objects and the background are right, no object is extra), `background_right`;
        of the true objects: `objects_right` (all words are right), `place_right` (an object is at this place), and a
        count for each other word of the phrase, such as `size_right`;
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
