"""How precisely `vlv search` finds unseen scenes in the captions that the model wrote of them."""

from collections.abc import Callable

from matplotlib.figure import Figure

from experiments.scoring import encode, share
from modeling_vlv import VLVModel
from processing_vlv import VLVProcessor
from vlv.captioning.captioner import Captioner
from vlv.captioning.settings import Decoding
from vlv.data.caption_index import EMPTY, CaptionIndex
from vlv.scenes import Scene, SceneObject, sample_picture

SEED = 1  # scenes that the search was not made with
FOUND = 10  # images of each search
KINDS = ("a thing", "a thing on one side", "everything about a thing", "two things")
ALONE, TOGETHER = "words alone", "words close together too"


def ask(kind: str, scene: Scene) -> tuple[str, Callable[[Scene], bool]]:
    """A query about a scene, and whether another scene fits it."""
    first, *others = scene.objects
    named = f"a {first.colour} {first.shape}"
    if kind == "a thing":
        return named, lambda it: any(_alike(first, other) for other in it.objects)
    if kind == "a thing on one side":
        side = first.place.split()[1]
        return f"{named} on the {side}", lambda it: any(
            _alike(first, other) and other.place.endswith(side) for other in it.objects
        )
    if kind == "everything about a thing":
        return first.phrase, lambda it: first in it.objects
    (other,) = others
    return f"{named} and a {other.colour} {other.shape}", lambda it: all(
        any(_alike(wanted, found) for found in it.objects) for wanted in (first, other)
    )


def _alike(wanted: SceneObject, found: SceneObject) -> bool:
    return (wanted.colour, wanted.shape) == (found.colour, found.shape)


def run(model: VLVModel, processor: VLVProcessor, num: int) -> list[dict]:
    """Searches among twice as many scenes as there are queries of each kind."""
    pictures = [sample_picture("test", index, SEED) for index in range(2 * num)]
    embeds = encode(model, processor, [image for image, _ in pictures])
    names = [str(number) for number in range(len(pictures))]
    captions = Captioner(model, processor, Decoding(max_new_tokens=64)).write(names, embeds)
    index = CaptionIndex((name, best.text) for name, (best, *_) in zip(names, captions, strict=True))
    scenes = dict(zip(names, (scene for _, scene in pictures), strict=True))
    return [_row(kind, index, scenes, num) for kind in KINDS]


def _row(kind: str, index: CaptionIndex, scenes: dict[str, Scene], num: int) -> dict:
    asked = [ask(kind, scene) for scene in scenes.values() if kind != "two things" or len(scene.objects) == 2][:num]
    row: dict = {"query": kind, "example": asked[0][0], "n": len(asked)}
    for way in (ALONE, TOGETHER):
        right, total = [], []
        for query, fits in asked:
            # Between commas, each word is alone.
            words = query if way == TOGETHER else ", ".join(word for word in query.split() if word not in EMPTY)
            most = min(FOUND, sum(map(fits, scenes.values())))
            found = index.search(words, most)
            right.append(sum(fits(scenes[each.file_name]) for each in found))
            total.append(most)
        row[way] = share(right, total)
    return row


def plot(rows: list[dict], figure: Figure) -> None:
    axes = figure.subplots()
    kinds = [row["query"] for row in rows]
    for way in (ALONE, TOGETHER):
        errors = [row[way]["standard_error"] for row in rows]
        axes.errorbar(kinds, [row[way]["value"] for row in rows], errors, marker="o", linestyle="none", label=way)
    axes.set(ylabel=f"right among {FOUND}")
    axes.legend()
