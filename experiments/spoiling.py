"""Captions that are wrong in one way each, which is known."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from vlv.scenes import WORLD, Scene

Change = Callable[[Scene, np.random.Generator], Scene | None]


def _change_word(field: str) -> Change:
    """One word of one object becomes another; a place becomes a free one."""

    def change(scene: Scene, rng: np.random.Generator) -> Scene:
        number = int(rng.integers(len(scene.objects)))
        item = scene.objects[number]
        taken = {other.place for other in scene.objects} if field == "place" else {getattr(item, field)}
        word = str(rng.choice([word for word in WORLD.words[field] if word not in taken]))
        return _with(scene, number, replace(item, **{field: word}))

    return change


def _change_object(scene: Scene, rng: np.random.Generator) -> Scene:
    """One object becomes another at its place: every word is drawn again, colour and shape until they differ."""
    number = int(rng.integers(len(scene.objects)))
    item = scene.objects[number]
    words = {name: str(rng.choice(known)) for name, known in WORLD.words.items() if name != "place"}
    for name in ("colour", "shape"):
        words[name] = str(rng.choice([word for word in WORLD.words[name] if word != getattr(item, name)]))
    return _with(scene, number, replace(item, **words))


def _leave_out(scene: Scene, rng: np.random.Generator) -> Scene | None:
    """One of several objects is missing; `None` where there is only one."""
    if len(scene.objects) == 1:
        return None
    number = int(rng.integers(len(scene.objects)))
    return replace(scene, objects=scene.objects[:number] + scene.objects[number + 1 :])


def _change_background(scene: Scene, rng: np.random.Generator) -> Scene:
    return replace(scene, background=str(rng.choice([it for it in WORLD.backgrounds if it != scene.background])))


def _with(scene, number, item):
    objects = [*scene.objects[:number], item, *scene.objects[number + 1 :]]
    return replace(scene, objects=tuple(sorted(objects, key=lambda it: WORLD.places.index(it.place))))


CHANGES: dict[str, Change] = {
    "object": _change_object,
    "colour": _change_word("colour"),
    "shape": _change_word("shape"),
    "size": _change_word("size"),
    "place": _change_word("place"),
    "left out": _leave_out,
    "background": _change_background,
}
SWAPPED = "swapped"  # the caption of another scene


def spoilt_captions(scenes: list[Scene], seed: int = 0) -> dict[str, list[str | None]]:
    """The captions of all scenes for each way to be wrong. `None`: a scene cannot be wrong in that way."""
    captions: dict[str, list[str | None]] = {SWAPPED: [_another(scenes, number) for number in range(len(scenes))]}
    for name, change in CHANGES.items():
        rng = np.random.default_rng((seed, list(CHANGES).index(name)))
        changed = [change(scene, rng) for scene in scenes]
        captions[name] = [scene and scene.caption for scene in changed]
    return captions


def _another(scenes, number):
    """The caption of the next scene that has another one."""
    for offset in range(1, len(scenes)):
        caption = scenes[(number + offset) % len(scenes)].caption
        if caption != scenes[number].caption:
            return caption
    return None
