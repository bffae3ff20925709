"""The best of several captions, against greedy captions and beam search, on hard scenes."""

from dataclasses import asdict
from time import process_time

import torch
from matplotlib.figure import Figure

from modeling_vlv import VLVModel
from processing_vlv import VLVProcessor
from vlv.captioning.captioner import Captioner
from vlv.captioning.settings import Decoding
from vlv.judging.best_of import BestOf
from vlv.judging.judge import Judge
from vlv.scenes import sample_picture, world
from vlv.scenes.scorer import score_captions

LONGEST = 64  # tokens; a caption of three objects has about 30
BATCH = 50
# Scores that the judge computes for a choice.
NEEDS = {"explained": ("explained",), "likelihood": ("likelihood",), "both": ("explained", "likelihood")}


def ways() -> dict[str, Decoding]:
    """Greedy and beam search, the best of drawn captions, and the best of those that beam search finds."""
    listed = {"greedy": Decoding(LONGEST)}
    listed |= {f"{beams} beams": Decoding(LONGEST, num_beams=beams) for beams in (2, 4, 8, 16)}
    for count in (2, 4, 8):
        for by in NEEDS:
            listed[f"{count} drawn, best {by}"] = Decoding(LONGEST, num_captions=count, best_of=by)
    for by in ("explained", "both"):
        listed[f"8 beams, best {by}"] = Decoding(LONGEST, num_captions=8, num_beams=8, best_of=by)
    return listed


def run(model: VLVModel, processor: VLVProcessor, num: int) -> list[dict]:
    three = world("shapes", max_objects=3)
    pictures = {
        "never-seen combinations": [sample_picture("novel", index) for index in range(num)],
        "three objects": [three.sample_picture("test", index, count=3) for index in range(num)],
    }
    rows, greedy = [], 0.0
    for name, decoding in ways().items():
        row: dict = {"captions": name}
        start = process_time()  # of the processor: others on the machine do not count
        for kind, shown in pictures.items():
            captions = _write(model, processor, decoding, [image for image, _ in shown])
            scores = score_captions(captions, shown, kind, three)
            for score in ("exact", "objects_right"):
                row[f"{kind}: {score.replace('_', ' ')}"] = asdict(scores[f"captions/{kind}/{score}"])
        spent = process_time() - start
        greedy = greedy or spent
        rows.append({**row, "cost, greedy = 1": spent / greedy})
    return rows


@torch.no_grad()
def _write(model, processor, decoding, images):
    judge = Judge(model, processor, NEEDS.get(decoding.best_of, ("likelihood",)), batch_size=BATCH)
    contents = [judge.read(image) for image in images]
    names = [str(number) for number in range(len(images))]
    if decoding.best_of is not None:
        return BestOf(judge, decoding, BATCH)(names, contents)
    captioner = Captioner(model, processor, decoding, BATCH)
    return [best for best, *_ in captioner(names, [content["pixel_values"] for content in contents])]


def plot(rows: list[dict], figure: Figure) -> None:
    kinds = [name for name in rows[0] if name.endswith("objects right")]
    groups = {
        "greedy and beams": [],
        "drawn, best explained": [],
        "drawn, best likelihood": [],
        "drawn, best both": [],
    }
    groups |= {"beams, best of them": []}
    for row in rows:
        name = row["captions"]
        of = "beams, best of them" if "beams, best" in name else "greedy and beams"
        groups[name.partition(" ")[2] if "drawn" in name else of].append(row)
    for axes, kind in zip(figure.subplots(1, len(kinds)), kinds, strict=True):
        for label, found in groups.items():
            values = [row[kind] for row in found]
            axes.errorbar(
                [row["cost, greedy = 1"] for row in found],
                [it["value"] for it in values],
                [it["standard_error"] for it in values],
                marker="o",
                capsize=2,
                linestyle="none" if label == "beams, best of them" else "solid",
                label=label,
            )
        axes.set_xscale("log", base=2)
        axes.set(xlabel="cost (greedy = 1)", title=kind, ylabel="share")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
