"""How exactly vlv-tiny-prompts follows its styles and answers questions, on unseen scenes, beside vlv-tiny."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from experiments.scoring import encode, share
from modeling_vlv import VLVModel
from processing_vlv import VLVProcessor
from vlv import bundled_checkpoint
from vlv.captioning.captioner import Captioner
from vlv.captioning.settings import Decoding
from vlv.models.loading import load_captioner
from vlv.scenes import WORLD
from vlv.scenes.questions import Asked, ask

SPLITS = {"test": "seen combinations", "novel": "never-seen combinations"}
KINDS = {  # in the order of the table
    "caption": "nothing: the full caption",
    "full": "full",
    "short": "short",
    "tags": "tags",
    "words": "a number of words",
    "place": "what is at a place",
    "count": "how many",
    "yes or no": "yes or no",
    "colour": "a colour",
    "size": "a size",
    "name": "a name",
    "background": "the background",
    "refusal": "what is not there",
}
SEED = 7  # of what is asked; the training asked with other ones


def asked_about(split: str, num: int) -> list[tuple[int, Asked]]:
    """What is asked about the first scenes of a split: the number of the scene, and each prompt once."""
    pairs = []
    for number in range(num):
        scene = WORLD.sample_scene(split, number)
        found = {it.prompt: it for it in ask(scene, WORLD, np.random.default_rng((SEED, number)))}
        pairs += [(number, it) for it in found.values()]
    return pairs


def answers(model: VLVModel, processor: VLVProcessor, split: str, pairs: Sequence[tuple[int, str]]) -> list[str]:
    """What a captioner writes for pairs of a scene's number and a prompt."""
    numbers = sorted({number for number, _ in pairs})
    embeds = encode(model, processor, [WORLD.sample_picture(split, number)[0] for number in numbers])
    places = {number: place for place, number in enumerate(numbers)}
    captioner = Captioner(model, processor, Decoding(max_new_tokens=48))
    # Prompts of one length need no padding.
    order = sorted(range(len(pairs)), key=lambda place: len(pairs[place][1]))
    written = [""] * len(pairs)
    for start in range(0, len(order), 128):
        batch = order[start : start + 128]
        rows = embeds[[places[pairs[place][0]] for place in batch]]
        captions = captioner.write([str(place) for place in batch], rows, [pairs[place][1] for place in batch])
        for place, (best, *_) in zip(batch, captions, strict=True):
            written[place] = best.text
    return written


def run(model: VLVModel, processor: VLVProcessor, num: int) -> list[dict]:
    taught = load_captioner(bundled_checkpoint("vlv-tiny-prompts"), "cpu")
    rows = {"without": {"asked for": "nothing, of vlv-tiny"}}
    rows |= {kind: {"asked for": name} for kind, name in KINDS.items()}
    for split, name in SPLITS.items():
        pairs = asked_about(split, num)
        captions = [(number, it) for number, it in pairs if it.kind == "caption"]
        before = answers(model, processor, split, [(number, "") for number, _ in captions])
        rows["without"] |= _score(name, before, captions)
        written = answers(*taught, split, [(number, it.prompt) for number, it in pairs])
        for kind in KINDS:
            of_kind = [place for place, (_, it) in enumerate(pairs) if it.kind == kind]
            rows[kind] |= _score(name, [written[place] for place in of_kind], [pairs[place] for place in of_kind])
    return list(rows.values())


def _score(name, written, pairs):
    """The share of exact answers. Answers about one scene are not independent, so scenes are the units."""
    scenes = {number: place for place, number in enumerate(sorted({number for number, _ in pairs}))}
    places = [scenes[number] for number, _ in pairs]
    right = np.bincount(places, [text == it.answer for text, (_, it) in zip(written, pairs, strict=True)])
    return {f"{name}, exact": share(right, np.bincount(places)), f"{name}, n": len(pairs)}


def plot(rows: list[dict], figure: Figure) -> None:
    axes = figure.subplots()
    labels = [row["asked for"] for row in rows]
    for name in SPLITS.values():
        scores = [row[f"{name}, exact"] for row in rows]
        errors = [it["standard_error"] for it in scores]
        axes.errorbar([it["value"] for it in scores], labels, xerr=errors, marker="o", linestyle="none", label=name)
    axes.set(xlabel="exact")
    axes.invert_yaxis()
    axes.legend()
