"""How much of an image the leading queries hold alone: quality against `num_queries`."""

from dataclasses import asdict

from matplotlib.figure import Figure

from experiments.scoring import encode, rebuild, scores
from modeling_vlv import VLVModel
from processing_vlv import VLVProcessor
from vlv.captioning.captioner import Captioner
from vlv.captioning.settings import Decoding
from vlv.scenes import sample_picture
from vlv.scenes.scorer import score_captions


def lengths(queries: int) -> list[int]:
    """One query, an eighth, a quarter, half, three quarters and all of them."""
    return sorted({1, *(max(1, queries * eighths // 8) for eighths in (1, 2, 4, 6, 8))})


def run(model: VLVModel, processor: VLVProcessor, num: int) -> list[dict]:
    pictures = [sample_picture("test", index) for index in range(num)]
    images, truths = zip(*pictures, strict=True)
    embeds = encode(model, processor, images)
    rows = []
    for number in lengths(model.config.num_queries):
        captioner = Captioner(model, processor, Decoding(max_new_tokens=48), num)
        written = captioner.write([str(index) for index in range(num)], embeds[:, :number])
        captions = score_captions([best for best, *_ in written], pictures, "test")
        rebuilt = scores(rebuild(model, embeds[:, :number]), truths)
        rows.append(
            {
                "queries": number,
                "objects rebuilt": rebuilt["objects right"],
                "backgrounds rebuilt": rebuilt["backgrounds right"],
                "objects in captions": asdict(captions["captions/test/objects_right"]),
            }
        )
    return rows


def plot(rows: list[dict], figure: Figure) -> None:
    axes = figure.subplots()
    for name in ("objects rebuilt", "objects in captions"):
        values = [row[name] for row in rows]
        axes.errorbar(
            [row["queries"] for row in rows],
            [it["value"] for it in values],
            [it["standard_error"] for it in values],
            marker="o",
            label=name,
        )
    axes.set(xlabel="leading queries", ylabel="right")
    axes.legend()
