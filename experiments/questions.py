"""Questions about unseen scenes, answered by the model from the image, or read in the captions that it writes."""

import re
from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from experiments.scoring import share
from experiments.styles import KINDS, answers, asked_about
from modeling_vlv import VLVModel
from processing_vlv import VLVProcessor
from vlv import bundled_checkpoint
from vlv.evaluation.answering import ImageAnswerer
from vlv.evaluation.questions import Question
from vlv.evaluation.vqa import vqa_accuracy
from vlv.models.loading import load_captioner
from vlv.scenes import WORLD
from vlv.scenes.questions import NONE, NOTHING, NUMBERS, STYLES

ASKED = ("place", "count", "yes or no", "colour", "size", "name", "background", "refusal")
FREE, CHOICE, CAPTION, SHORT = "the image", "the image, of choices", "the full caption", "the short caption"


def read_answer(question: str, caption: str) -> str:
    """
    The answer that an exact reader finds in a caption of the grammar, full or short; "" where it says nothing of it.
    """
    things, _, ground = caption.partition(" on a ")
    found = re.findall(r"a (\w+) (\w+) (\w+)(?: at the (\w+ \w+))?(?: and |, |$)", things)
    objects = [dict(zip(("size", "colour", "shape", "place"), words, strict=True)) for words in found]
    if question == "What colour is the background?":
        return ground.removesuffix(" background")
    if match := re.fullmatch(r"What is at the (.+)\?", question):
        if not all(item["place"] for item in objects):
            return ""
        found = [f"a {item['size']} {item['colour']} {item['shape']}" for item in objects if item["place"] == match[1]]
        return found[0] if found else NOTHING
    if match := re.fullmatch(r"How many (?:(\w+) )?shapes are there\?", question):
        count = sum(match[1] is None or match[1] in item.values() for item in objects)
        return NUMBERS[count] if count < len(NUMBERS) else ""
    if match := re.fullmatch(r"Is there a (.+)\?", question):
        return "yes" if any(match[1] == f"{i['size']} {i['colour']} {i['shape']}" for i in objects) else "no"
    if match := re.fullmatch(r"What (\w+) is the (\w+)\?", question):
        found = [item[match[1]] for item in objects if item["shape"] == match[2]]
    elif match := re.fullmatch(r"Which shape is (\w+)\?", question):
        found = [item["shape"] for item in objects if match[1] in item.values()]
    else:
        return ""
    return found[0] if found else NONE


def run(model: VLVModel, processor: VLVProcessor, num: int) -> list[dict]:
    """`model` and `processor` are not used: only a model that takes prompts answers questions."""
    taught = load_captioner(bundled_checkpoint("vlv-tiny-prompts"), "cpu")
    pairs = [(number, it) for number, it in asked_about("test", num) if it.kind in ASKED]
    captions = answers(*taught, "test", [(number, "") for number in range(num)])
    shorts = answers(*taught, "test", [(number, STYLES["short"]) for number in range(num)])
    answerer = ImageAnswerer(*taught)
    free = [Question(str(number), it.prompt, (it.answer,)) for number, it in pairs]
    chosen = [Question(str(number), it.prompt, (it.answer,), it.choices) for number, it in pairs]
    given = {
        FREE: list(answerer.answer(free, _load)),
        CHOICE: list(answerer.answer([question for question in chosen if question.choices], _load)),
        CAPTION: [read_answer(it.prompt, captions[number]) for number, it in pairs],
        SHORT: [read_answer(it.prompt, shorts[number]) for number, it in pairs],
    }
    rows = [_row("all", pairs, given, lambda kind: True)]
    return rows + [_row(KINDS[kind], pairs, given, kind.__eq__) for kind in ASKED]


def _load(name: str) -> Image.Image:
    return WORLD.sample_picture("test", int(name))[0]


def _row(name: str, pairs: list, given: dict[str, list[str]], wanted: Callable[[str], bool]) -> dict:
    row: dict = {"questions": name, "n": sum(wanted(it.kind) for _, it in pairs)}
    for source, texts in given.items():
        asked = [pair for pair in pairs if pair[1].choices] if source == CHOICE else pairs
        scored = [
            (number, vqa_accuracy(text, [it.answer]))
            for (number, it), text in zip(asked, texts, strict=True)
            if wanted(it.kind)
        ]
        if not scored:
            row[source] = None
            continue
        scenes = {number: place for place, number in enumerate(sorted({number for number, _ in scored}))}
        places = [scenes[number] for number, _ in scored]
        row[source] = share(np.bincount(places, [score for _, score in scored]), np.bincount(places))
    return row


def plot(rows: list[dict], figure: Figure) -> None:
    axes = figure.subplots()
    for source in (FREE, CHOICE, CAPTION, SHORT):
        shown = [row for row in rows if row[source] is not None]
        labels, values = [row["questions"] for row in shown], [row[source]["value"] for row in shown]
        errors = [row[source]["standard_error"] for row in shown]
        axes.errorbar(values, labels, xerr=errors, marker="o", linestyle="none", label=source)
    axes.set(xlabel="right")
    axes.invert_yaxis()
    axes.legend()
