"""The time and the quality of reconstructions by solver, steps and guidance."""

import time
from collections.abc import Sequence

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from matplotlib.figure import Figure
from PIL import Image

from experiments.scoring import encode, rebuild, scores
from modeling_vlv import VLVModel
from processing_vlv import VLVProcessor
from vlv.evaluation.metrics.frechet import frechet_distance
from vlv.scenes import sample_picture
from vlv.scenes.reader import scene_reader, to_pixels

PAPER = ("DDPM", 50, 2.0)
OTHER_NOISE = "DDPM, other noise"  # the distance of the paper's setting from itself: no solver can be closer
SOLVERS = {
    "DDPM": DDPMScheduler,
    OTHER_NOISE: DDPMScheduler,
    "DDIM": DDIMScheduler,
    "DPM-Solver++": DPMSolverMultistepScheduler,
    "UniPC": UniPCMultistepScheduler,
}
SETTINGS = [
    PAPER,
    (OTHER_NOISE, *PAPER[1:]),
    *(("DDIM", steps, 2.0) for steps in (20, 10, 5)),
    *(("DPM-Solver++", steps, 2.0) for steps in (20, 10, 8, 6, 4)),
    *(("UniPC", steps, 2.0) for steps in (10, 8, 6, 4)),
    *(("DDIM", 20, guidance) for guidance in (1.0, 1.5, 3.0, 5.0)),
]


@torch.inference_mode()
def reader_features(images: Sequence[Image.Image]) -> torch.Tensor:
    """The features for FID, (N, features): the mean of the scene reader's last map."""
    reader = scene_reader()
    batches = torch.stack([to_pixels(image) for image in images]).split(100)
    return torch.cat([reader.backbone(reader.enlarge(batch)).last_hidden_state.mean((2, 3)) for batch in batches])


def run(model: VLVModel, processor: VLVProcessor, num: int) -> list[dict]:
    images, truths = zip(*(sample_picture("test", index) for index in range(num)), strict=True)
    caption_embeds = encode(model, processor, images)
    originals, reference = reader_features(images), None
    rows = []
    for solver, steps, guidance in SETTINGS:
        start = time.perf_counter()
        scheduler = SOLVERS[solver].from_config(model.config.decoder_config["scheduler"])
        seed = num if solver == OTHER_NOISE else 0
        sampling = {"num_inference_steps": steps, "guidance_scale": guidance, "scheduler": scheduler}
        pictures = rebuild(model, caption_embeds, seed, **sampling)
        seconds = time.perf_counter() - start
        drawn = reader_features(pictures)
        reference = drawn if reference is None else reference  # the paper's setting comes first
        rows.append(
            {
                "solver": solver,
                "steps": steps,
                "guidance": guidance,
                **scores(pictures, truths),
                "FID to the originals": frechet_distance(originals, drawn),
                # The distance of a set to itself is 0, without rounding errors.
                "FID to the paper's setting": 0.0 if drawn is reference else frechet_distance(reference, drawn),
                "seconds per 100 images": 100 * seconds / num,
            }
        )
    return rows


def plot(rows: list[dict], figure: Figure) -> None:
    steps, guidance = figure.subplots(1, 2, sharey=True)
    for solver in [name for name in SOLVERS if name != OTHER_NOISE]:
        found = [row for row in rows if row["solver"] == solver and row["guidance"] == PAPER[2]]
        _curve(steps, found, "steps", solver)
    _curve(guidance, sorted((r for r in rows if (r["solver"], r["steps"]) == ("DDIM", 20)), key=_guidance), "guidance")
    steps.set(xlabel="sampling steps", ylabel="objects right", xscale="log")
    guidance.set(xlabel="guidance scale (DDIM, 20 steps)")
    steps.legend()


def _guidance(row):
    return row["guidance"]


def _curve(axes, rows, column, label=None):
    values = [row["objects right"] for row in rows]
    axes.errorbar(
        [row[column] for row in rows],
        [it["value"] for it in values],
        [it["standard_error"] for it in values],
        marker="o",
        label=label,
    )
