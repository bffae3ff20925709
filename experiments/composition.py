"""Composition: one picture is rebuilt from the truncated and joined caption embeddings of two images."""

import torch
from matplotlib.figure import Figure

from experiments.scoring import encode, rebuild, share
from modeling_vlv import VLVModel
from processing_vlv import VLVProcessor
from vlv.scenes import sample_picture
from vlv.scenes.reader import scene_reader


def join(first: torch.Tensor, second: torch.Tensor, kept: int, how: str) -> torch.Tensor:
    """`kept` embeddings of the first image (B, Q, E), then embeddings of the second image up to Q."""
    length = first.shape[1]
    rest = {"from its start": second[:, : length - kept], "in its place": second[:, kept:]}[how]
    return torch.cat([first[:, :kept], rest], dim=1)


def run(model: VLVModel, processor: VLVProcessor, num: int) -> list[dict]:
    pairs = _pairs(num)
    first, second = (encode(model, processor, [pair[i][0] for pair in pairs]) for i in (0, 1))
    scenes = [(pair[0][1], pair[1][1]) for pair in pairs]
    rows = []
    queries = first.shape[1]
    for how in ("from its start", "in its place"):
        for kept in range(0, queries + 1, max(1, queries // 12)):
            found = scene_reader().read(rebuild(model, join(first, second, kept, how)))
            objects = [[one.objects[0] in it.objects for one in two] for it, two in zip(found, scenes, strict=True)]
            rows.append(
                {
                    "the second image's": how,
                    "embeddings of the first": kept,
                    "embeddings of the second": queries - kept,
                    "first object": share([it[0] for it in objects]),
                    "second object": share([it[1] for it in objects]),
                    "both objects": share([all(it) for it in objects]),
                    "first background": share(
                        [it.background == two[0].background for it, two in zip(found, scenes, strict=True)]
                    ),
                }
            )
    return rows


def _pairs(num):
    """Pairs of unseen scenes with one object each, at different places and on different backgrounds."""
    pairs, index = [], 0
    while len(pairs) < num:
        one, other = (sample_picture("test", index + offset, count=1) for offset in (0, 1))
        index += 2
        if one[1].objects[0].place != other[1].objects[0].place and one[1].background != other[1].background:
            pairs.append((one, other))
    return pairs


def plot(rows: list[dict], figure: Figure) -> None:
    ways = list(dict.fromkeys(row["the second image's"] for row in rows))
    for axes, how in zip(figure.subplots(1, len(ways), sharey=True), ways, strict=True):
        found = [row for row in rows if row["the second image's"] == how]
        for column in ("first object", "second object", "both objects", "first background"):
            kept = [row["embeddings of the first"] for row in found]
            axes.plot(kept, [row[column]["value"] for row in found], marker=".", label=column)
        axes.set(xlabel="embeddings of the first image", title=f"the second's {how}", ylabel="share of pictures")
        axes.legend(fontsize="small")
