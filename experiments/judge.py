"""
How well the scores of captions tell wrong captions from right ones: the area under the ROC curve, for scenes whose
captions are wrong in one way each, and for the model's own captions of combinations that it never saw.
"""

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import torch
from matplotlib.figure import Figure
from torchmetrics.functional.classification import binary_auroc

from experiments.spoiling import spoilt_captions
from modeling_vlv import VLVModel
from processing_vlv import VLVProcessor
from vlv.captioning.captioner import Captioner
from vlv.captioning.settings import Decoding
from vlv.evaluation.results import Measurement
from vlv.judging.judge import Judge
from vlv.judging.scores import value_of
from vlv.scenes import sample_picture

DRAWS = (1, 2, 4, 8)
OWN = "own errors, never-seen combinations"


def run(model: VLVModel, processor: VLVProcessor, num: int) -> list[dict]:
    images, scenes = zip(*(sample_picture("test", index) for index in range(num)), strict=True)
    truths = [scene.caption for scene in scenes]
    spoilt = spoilt_captions(list(scenes))
    novel, hidden = zip(*(sample_picture("novel", index) for index in range(num)), strict=True)
    written = _captions(model, processor, novel)
    right = [caption == scene.caption for caption, scene in zip(written, hidden, strict=True)]
    # All captions of an image are scored at once, the true one first.
    captions = [[truth, *(texts[number] or "" for texts in spoilt.values())] for number, truth in enumerate(truths)]
    rows = []
    for name, draws in (*(("explained", draws) for draws in DRAWS), ("likelihood", None)):
        judge = Judge(model, processor, [name], draws or 1)
        values = _values(judge, images, captions, name)
        own = _values(judge, novel, [[caption] for caption in written], name)[:, 0]
        row = {"score": name, "draws": draws}
        for place, (kind, texts) in enumerate(spoilt.items(), start=1):
            exist = np.array([text is not None for text in texts])
            row[kind] = asdict(area(values[exist, 0], values[exist, place]))
        row[OWN] = asdict(area(own[np.array(right)], own[~np.array(right)]))
        rows.append({**row, "of them wrong": right.count(False)})
    return rows


def area(right: np.ndarray, wrong: np.ndarray) -> Measurement:
    """
    The share of (right, wrong) pairs in which the right caption has the larger score; its standard error is Hanley's
    and McNeil's (Radiology 143, 1982). Without captions of both kinds it is one half.
    """
    if not len(right) or not len(wrong):
        return Measurement(0.5, 0, 0.5)
    # As ranks: numbers outside of 0..1 would be taken for logits and rounded.
    _, ranks = np.unique(np.concatenate([right, wrong]), return_inverse=True)
    truths = torch.tensor([1] * len(right) + [0] * len(wrong))
    value = float(binary_auroc(torch.tensor(ranks / max(1, ranks.max())), truths))
    one, two = value / (2 - value), 2 * value**2 / (1 + value)
    variance = value * (1 - value) + (len(right) - 1) * (one - value**2) + (len(wrong) - 1) * (two - value**2)
    error = float(np.sqrt(max(0.0, variance) / (len(right) * len(wrong))))
    return Measurement(value, len(right) + len(wrong), error)


def _values(judge: Judge, images, captions: Sequence[Sequence[str]], by: str) -> np.ndarray:
    """Numbers (images, captions of each)."""
    scores = judge([judge.read(image) for image in images], captions)
    return np.array([[value_of(each, by) for each in of] for of in scores])


def _captions(model, processor, images):
    captioner = Captioner(model, processor, Decoding(max_new_tokens=48))
    return [best.text for _, (best, *_) in captioner.caption_images((str(i), it) for i, it in enumerate(images))]


def plot(rows: list[dict], figure: Figure) -> None:
    axes = figure.subplots()
    explained = [row for row in rows if row["score"] == "explained"]
    kinds = [name for name, value in rows[0].items() if isinstance(value, dict)]
    for number, kind in enumerate(kinds):
        values = [row[kind]["value"] for row in explained]
        axes.plot([row["draws"] for row in explained], values, marker="o", color=f"C{number}", label=kind)
        (other,) = (row[kind]["value"] for row in rows if row["score"] == "likelihood")
        axes.axhline(other, color=f"C{number}", linestyle=":", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="noise draws of explained (dotted: likelihood)", ylabel="area under the ROC curve")
    figure.legend(loc="outside right upper", fontsize="small")
