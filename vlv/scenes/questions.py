"""What can be asked about a scene, with the true answers: styles of description, and questions.

Both worlds share it, because it is made of the words of their grammar. All answers follow from the scene alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np

from vlv.scenes.grammar import GridObject, GridScene
from vlv.scenes.world import World

# The named prompts of a model that is trained on these pairs. The first asks for what it writes without a prompt.
STYLES = {
    "full": "Describe it in full.",
    "short": "Describe it briefly.",
    "tags": "List its tags.",
    "words": "Describe it in {words} words.",
}
NOTHING = "nothing"  # is at an empty place
NONE = "none"  # of the objects is meant
NUMBERS = (NONE, "one", "two", "three", "four")
CAPTIONS = 3  # how often the caption without a prompt is among the pairs of a scene, so that it is not unlearned


@dataclass(frozen=True)
class Asked:
    """
    A prompt about a scene and its true answer.

    Args:
        kind: the style or kind of question; "caption" without a prompt, "refusal" where what it asks for is not there.
        choices: answers to choose from, with the true one, for questions that have a few possible answers.
    """

    kind: str
    prompt: str
    answer: str
    choices: tuple[str, ...] = ()


def ask(scene: GridScene, world: World, rng: np.random.Generator) -> list[Asked]:
    """Pairs of each kind about a scene, in a fixed order. `rng` draws what they ask for."""
    return [
        *[Asked("caption", "", scene.caption)] * CAPTIONS,
        Asked("full", STYLES["full"], scene.caption),
        Asked("short", STYLES["short"], short(scene)),
        Asked("tags", STYLES["tags"], tags(scene)),
        *_of_lengths(scene, rng),
        *_of_places(scene, rng),
        *_counts(scene, world, rng),
        *_yes_or_no(scene, world, rng),
        *_attributes(scene, world, rng),
        Asked("background", "What colour is the background?", scene.background, tuple(world.backgrounds)),
    ]


def describes(asked: Asked) -> bool:
    """Whether it is asked for a description; otherwise it is a question."""
    return asked.kind == "caption" or asked.kind in STYLES


def short(scene: GridScene) -> str:
    """One short description: what is there, without places and background."""
    return " and ".join(f"a {described(item)}" for item in scene.objects)


def tags(scene: GridScene) -> str:
    """What is there as comma-separated tags, each once."""
    return ", ".join(dict.fromkeys([*map(described, scene.objects), f"{scene.background} background"]))


def described(item: GridObject) -> str:
    """An object without its place: "large red circle"."""
    return " ".join(getattr(item, name) for name in _words(item))


def in_words(scene: GridScene, most: int) -> str:
    """The longest of three descriptions with at most so many words: all, without places, or short."""
    versions = _versions(scene)
    return next((text for text in versions if len(text.split()) <= most), versions[-1])


def _versions(scene: GridScene) -> list[str]:
    return [scene.caption, f"{short(scene)} on a {scene.background} background", short(scene)]


def _of_lengths(scene: GridScene, rng: np.random.Generator) -> Iterator[Asked]:
    """Two of the lengths of `in_words`, each with a range of words that only this one fills best."""
    lengths = [len(text.split()) for text in _versions(scene)]
    for place in rng.permutation(len(lengths))[:2].tolist():
        length = lengths[place]
        room = lengths[place - 1] - length if place else 9
        least, most = length - int(rng.integers(min(length, 6))), length + int(rng.integers(room))
        yield Asked("words", STYLES["words"].format(words=f"{least}-{most}"), in_words(scene, most))


def _of_places(scene: GridScene, rng: np.random.Generator) -> Iterator[Asked]:
    """What is at a filled place and at an empty one, if there are any."""
    found = {item.place: f"a {described(item)}" for item in scene.objects}
    for places, kind in ((list(found), "place"), ([it for it in scene.places if it not in found], "refusal")):
        if places:
            place = places[rng.integers(len(places))]
            yield Asked(kind, f"What is at the {place}?", found.get(place, NOTHING))


def _counts(scene: GridScene, world: World, rng: np.random.Generator) -> Iterator[Asked]:
    """How many objects there are, and how many of one colour or size."""
    choices = NUMBERS[: world.max_objects + 1]
    noun = _noun(world)
    yield Asked("count", f"How many {noun}s are there?", NUMBERS[len(scene.objects)], choices)
    names = [name for name in world.words if name not in ("place", world.subject)]
    name = names[rng.integers(len(names))]
    here = [getattr(item, name) for item in scene.objects]
    known = world.words[name]
    value = here[rng.integers(len(here))] if rng.random() < 0.6 else known[rng.integers(len(known))]
    yield Asked("count", f"How many {value} {noun}s are there?", NUMBERS[here.count(value)], choices)


def _yes_or_no(scene: GridScene, world: World, rng: np.random.Generator) -> Iterator[Asked]:
    """Whether there is an object: one that is there, and one that differs from it in one word, if there is any."""
    here = {described(item) for item in scene.objects}
    item = scene.objects[rng.integers(len(scene.objects))]
    yield Asked("yes or no", f"Is there a {described(item)}?", "yes", ("yes", "no"))
    own = {word: getattr(item, word) for word in _words(item)}
    # A world of few things may show every other one.
    if all(" ".join((own | {name: word}).values()) in here for name in own for word in world.words[name]):
        return
    while True:
        name = _words(item)[rng.integers(len(_words(item)))]
        known = world.words[name]
        asked = " ".join((own | {name: known[rng.integers(len(known))]}).values())
        if asked not in here:
            yield Asked("yes or no", f"Is there a {asked}?", "no", ("yes", "no"))
            return


def _attributes(scene: GridScene, world: World, rng: np.random.Generator) -> Iterator[Asked]:
    """The colour and size of a named object, and the name of what has a colour or size; also of what is not there."""
    subject, noun = world.subject, _noun(world)
    for name in (name for name in world.words if name not in ("place", subject)):
        for known, asked, kind, prompt in (
            (subject, name, name, f"What {name} is the {{}}?"),
            (name, subject, "name", f"Which {noun} is {{}}?"),
        ):
            answers: dict[str, set[str]] = {}
            for item in scene.objects:
                answers.setdefault(getattr(item, known), set()).add(getattr(item, asked))
            clear = [value for value, answer in answers.items() if len(answer) == 1]
            if clear:
                value = clear[rng.integers(len(clear))]
                (answer,) = answers[value]
                yield Asked(kind, prompt.format(value), answer, _some(answer, world.words[asked], rng))
            absent = [value for value in world.words[known] if value not in answers]
            if absent and rng.random() < 0.4:
                yield Asked("refusal", prompt.format(absent[rng.integers(len(absent))]), NONE)


def _some(answer: str, known: tuple[str, ...], rng: np.random.Generator) -> tuple[str, ...]:
    """Up to four of the known words, with the answer, in random order."""
    others = [word for word in known if word != answer]
    chosen = [answer, *(others[place] for place in rng.permutation(len(others))[:3])]
    return tuple(chosen[place] for place in rng.permutation(len(chosen)))


def _words(item: GridObject) -> list[str]:
    """The fields of an object except its place, in the order of its phrase."""
    return [field.name for field in fields(item) if field.name != "place"]


def _noun(world: World) -> str:
    return "shape" if world.subject == "shape" else "thing"
