"""A contact sheet of the worst and the best captions."""

from collections.abc import Sequence

import torch
from PIL import Image

from vlv.captioning.engine import read_source
from vlv.captioning.journal import Row
from vlv.captioning.sources import Pictures
from vlv.evaluation.pictures import embed_captions
from vlv.judging.judge import Judge
from vlv.judging.scores import value_of
from vlv.sheets import Pair, contact_sheet

EACH = 12  # images that are worst, and as many that are best


def make_sheet(judge: Judge, source: Pictures, rows: Sequence[Row], by: str) -> Image.Image:
    """
    The images with the worst captions, then those with the best ones, each beside what the teacher draws from its
    caption if the model can.

    Args:
        rows: of all images, with `file_name`, `text` and the scores.
        by: what they are ordered by.
    """
    ordered = sorted(rows, key=lambda row: value_of(row, by))
    each = min(EACH, -(-len(ordered) // 2))
    shown = [*ordered[:each], *ordered[max(each, len(ordered) - each) :][::-1]]
    wanted = {row["file_name"] for row in shown}
    images = {}
    for picture in source.pictures():
        if picture.name in wanted and picture.name not in images:
            images[picture.name] = judge.processor.preprocess_image(read_source(picture.source))
    shown = [row for row in shown if row["file_name"] in images]  # a finished output may have rows of other images
    captions = [row["text"] if isinstance(row["text"], str) else row["text"][0] for row in shown]
    drawn: Sequence[Image.Image | None] = [None] * len(shown)
    if judge.can_draw:
        drawn = judge.model.reconstruct(
            caption_embeds=embed_captions(judge.model, judge.processor, captions),
            generator=[torch.Generator().manual_seed(judge.seed) for _ in captions],
        )
    pairs = [
        Pair(images[row["file_name"]], picture, f"{_numbers(row, judge.names)}: {caption}")
        for row, picture, caption in zip(shown, drawn, captions, strict=True)
    ]
    beside = ", each beside what the decoder draws from its caption" if judge.can_draw else ""
    subtitle = f"{len(rows):,} images by {by}: first the worst {each}, then the best{beside}"
    return contact_sheet(pairs, "Worst and best captions", subtitle)


def _numbers(row, names):
    values = {name: row[name] for name in names if name in row}
    first = {name: value if isinstance(value, float | int) else value[0] for name, value in values.items()}
    return ", ".join(f"{name.replace('_', ' ')} {value:.2g}" for name, value in first.items())
