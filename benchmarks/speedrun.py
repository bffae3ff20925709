"""
The speed run: stage 1 of the tiny world until 0.90 of the objects in validation scenes are rebuilt right.

    python -m benchmarks.speedrun [RUN ...] [--seeds 0 1 2] [--work outputs/speedrun] [--output FILE] [--picture FILE]

All runs start from the same four parts: vlv-tiny's teacher (UNet, VAE and text encoder) and a tiny Florence-2, which
the command trains first, with new queries and projections. The scenes have 32 pixels a side, and the Florence-2 is
trained on them scaled up to 64. `paper` is the paper's recipe, which scales images of 384 pixels up to the 768 that
Florence-2 is trained on; its learning rate is tuned, by the runs `paper at ...`. `ours` is our recipe with Muon, which
does not scale up. The other runs change one thing of it.

A run measures itself while it trains, with the weights that it would save, and leaves a curve of objects right against
steps. flops.py counts the operations of a denoising sample for the same settings; what measuring takes is left out.
The record names the scenes that a finished long run rebuilds wrong, beside those that the teacher draws wrong from the
true captions. An interrupted command continues where it was, and a run that is in the output is not repeated. The
command can run several times at once: each then takes runs that no other does.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL.Image import Image
from transformers import TrainerCallback, TrainingArguments

from benchmarks import flops
from experiments.making import Assembled, Scenes, Training, claimed
from experiments.scoring import encode, rebuild, scores
from modeling_vlv import VLVModel
from processing_vlv import VLVProcessor
from vlv import bundled_checkpoint
from vlv.evaluation.pictures import embed_captions
from vlv.files import atomic_writer
from vlv.models.loading import load_autoencoder, read_config
from vlv.models.published import published_config
from vlv.provenance import git_commit
from vlv.scenes import Scene, compare, sample_picture
from vlv.scenes.reader import scene_reader
from vlv.training.autoencode import AutoencodeStage
from vlv.training.recipe import read_recipe
from vlv.training.vlv_settings import VLVSettings

TARGET = 0.90
IMAGES, EVALUATION = 40_000, 100
FLORENCE_STEPS = 1200
FULL_SIDE = 64  # pixels that the tiny Florence-2 is trained on; the scenes, of 32 pixels, are scaled up for it
QUERIES = 24
PUBLISHED_SIZE, PUBLISHED_SAMPLES = 768, 128  # pixels that Florence-2 is trained on; samples of a step on each device
RECIPES = Path(__file__).parent / "recipes"
RESULTS = Path(__file__).parent / "results"
CURVE = "curve.jsonl"
MEASURED_SCENES = 200  # validation scenes of a point of the curve
FINISHED_SCENES = 1000  # and of a finished model, where the last point of the curve is too rough


def florence() -> Training:
    settings = {"image_size": FULL_SIDE, "max_steps": FLORENCE_STEPS, "muon_learning_rate": 2e-3}
    sets = {"dataset": Scenes(IMAGES), "eval_dataset": Scenes(EVALUATION, "validation")}
    return Training("tiny/encoder", sets | settings)


@dataclass(frozen=True)
class Run:
    """
    A recipe, and the settings that it is run with.

    Args:
        model: settings of the config of the model that it starts from.
        long: measure the finished model on more scenes than the points of its curve.
    """

    recipe: str
    steps: int
    settings: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    long: bool = False

    @property
    def file(self) -> str:
        return str(RECIPES / f"speedrun-{self.recipe}.yaml")

    def training(self, seed: int) -> Training:
        common = {
            "model": Assembled(seed, self.model, encoder=florence()),
            "dataset": Scenes(IMAGES),
            "eval_dataset": Scenes(EVALUATION, "validation"),
            "eval_size": EVALUATION,
            "max_steps": self.steps,
            "seed": seed,
        }
        return Training(self.file, common | self.settings)


LEVER_STEPS = 300
# These are not in the recipe, because a command cannot take them out.
MUON = {"muon_learning_rate": 2e-3}
SHIFTED = {"timestep_shift_steps": 400}


def paper(**settings) -> Run:
    return Run("paper", 4800, {"save_steps": 200} | settings, long=True)


def ours(steps: int = 3200, model: dict[str, Any] | None = None, **settings) -> Run:
    return Run("ours", steps, {"save_steps": 100} | MUON | SHIFTED | settings, model or {}, long=True)


def half(queries: int = QUERIES, **settings) -> Run:
    """Our recipe with half of its steps, and so many queries."""
    return ours(1600, {"num_queries": queries}, **settings)


def lever(steps: int = LEVER_STEPS, model: dict[str, Any] | None = None, **settings) -> Run:
    """A short run of our recipe with one thing changed, measured twice."""
    return Run("ours", steps, {"save_steps": steps // 2} | MUON | settings, model or {})


RUNS = {
    "ours": ours(),
    "ours, as long as the paper": ours(4800),
    "paper": paper(),
    "paper at 8.75e-5": paper(learning_rate=8.75e-5),
    "paper at 1.75e-4": paper(learning_rate=1.75e-4),
    "paper at 7e-4": paper(learning_rate=7e-4),
    # What one thing is worth, in short runs: `base` is our recipe in these.
    "base": lever(),
    "AdamW for all": Run("ours", LEVER_STEPS, {"save_steps": LEVER_STEPS // 2}),
    "Muon at 1e-3": lever(muon_learning_rate=1e-3),
    "Muon at 4e-3": lever(muon_learning_rate=4e-3),
    "timesteps not shifted": lever(timestep_shift=1),
    "timesteps logit-normal": lever(timestep_shift=1, timestep_density="logit_normal"),
    "min-SNR 5": lever(min_snr_gamma=5),
    "4 noise draws, 8 images a step": lever(noise_draws=4, per_device_train_batch_size=8),
    "16 images a step, as many samples": lever(2 * LEVER_STEPS, per_device_train_batch_size=16),
    "64 images a step, as many samples": lever(LEVER_STEPS // 2, per_device_train_batch_size=64),
    "8 noise draws, 4 images a step": lever(noise_draws=8, per_device_train_batch_size=4),
    "encoder at the full size": lever(encoder_image_size=FULL_SIDE),
    "no average of the weights": lever(average_decay=1e-6),  # as good as none
    "projection started at the mean": lever(model={"projection_start": "mean"}),
    "text encoder bypassed": lever(model={"bypass_text_encoder": True}),
    # Nested queries, beside models that are trained with all, with half and with a quarter of them.
    "nested queries": half(nested_queries=True),
    "24 queries": half(),
    "12 queries": half(12),
    "6 queries": half(6),
}


class Measure(TrainerCallback):
    """Writes a line of the curve whenever a checkpoint is due."""

    def __init__(self, stage: AutoencodeStage):
        self.stage = stage

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % args.save_steps and state.global_step != args.max_steps:
            return
        average, trained = self.stage.average, []
        if average is not None:  # which is what would be saved
            trained = [weight.detach().clone() for weight in average.trained]
            average.take()
        line = {
            "step": state.global_step,
            "objects right": objects_right(*rebuilt(self.stage.model, self.stage.processor, MEASURED_SCENES)),
        }
        for weight, before in zip(average.trained if average is not None else (), trained, strict=True):
            weight.data.copy_(before)
        with (Path(args.output_dir) / CURVE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class MeasuredStage(AutoencodeStage):
    """Stage 1, measured while it trains."""

    def callbacks(self) -> list[TrainerCallback]:
        return [*super().callbacks(), Measure(self)]


def rebuilt(
    model: VLVModel, processor: VLVProcessor, scenes: int, num_queries: int | None = None
) -> tuple[list[Image], list[Scene]]:
    """What the model rebuilds of the first validation scenes, and the scenes."""
    images, truths = validation(scenes)
    training = model.training
    embeds = encode(model.eval(), processor, images)
    pictures = rebuild(model, embeds, num_queries=num_queries)
    model.train(training)
    return pictures, truths


def drawn_from_captions(scenes: int) -> tuple[list[Image], list[Scene]]:
    """What the frozen teacher draws from the true captions of the first validation scenes, and the scenes."""
    model, processor = load_autoencoder(str(bundled_checkpoint("vlv-tiny")))
    _, truths = validation(scenes)
    with torch.inference_mode():
        embeds = embed_captions(model, processor, [truth.caption for truth in truths])
    return rebuild(model, embeds), truths


def validation(scenes: int) -> tuple[list[Image], list[Scene]]:
    images, truths = zip(*(sample_picture("validation", index) for index in range(scenes)), strict=True)
    return list(images), list(truths)


def objects_right(pictures: list[Image], truths: list[Scene]) -> dict[str, float]:
    """The share of objects that the reader finds right in the pictures."""
    return scores(pictures, truths)["objects right"]


def wrong(pictures: list[Image], truths: list[Scene]) -> list[str]:
    """The captions of the scenes in which the reader finds an object wrong."""
    found = zip(scene_reader().read(pictures), truths, strict=True)
    counts = [(compare(read, truth), truth.caption) for read, truth in found]
    return [caption for count, caption in counts if count["objects_right"] < count["objects"]]


def finished(run: Run, folder: Path) -> dict[str, Any]:
    """
    Objects right of the finished model with all queries; of a nested one also with half and a quarter of them. Of a
    long run also which scenes are wrong.
    """
    model, processor = load_autoencoder(str(folder))
    every = model.config.num_queries
    numbers = [every // 4, every // 2, every] if "nested_queries" in run.settings else [every]
    scenes = FINISHED_SCENES if run.long else MEASURED_SCENES
    pictures = {number: rebuilt(model, processor, scenes, number) for number in numbers}
    right = {str(number): objects_right(*drawn) for number, drawn in pictures.items()}
    return {"objects_right": right} | ({"wrong": wrong(*pictures[every])} if run.long else {})


# ---- the record --------------------------------------------------------------------------------------------


def curve(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of a run; of a step that was repeated after an interruption, the last one."""
    lines = [json.loads(line) for line in (folder / CURVE).read_text(encoding="utf-8").splitlines()]
    yield from sorted({line["step"]: line for line in lines}.values(), key=lambda line: line["step"])


def steps_to(target: float, measured: list[tuple[int, float]]) -> float | None:
    """Steps until `target`, on straight lines between the measurements (steps, value)."""
    step, value = 0, 0.0
    for next_step, next_value in measured:
        if next_value >= target:
            share = (target - value) / (next_value - value) if next_value > value else 1.0
            return step + (next_step - step) * share
        step, value = next_step, next_value
    return None


def read(run: Run) -> tuple[VLVSettings, TrainingArguments]:
    argv = [run.file, "--output_dir", "unused"]
    for name, value in run.settings.items():
        argv += [f"--{name}", str(value)]
    _, settings, args = read_recipe(argv)
    return settings, args


def operations(run: Run, start: Path) -> float:
    """Operations for a denoising sample, of training from the model in the folder `start`."""
    settings, args = read(run)
    muon_batch = None if settings.muon_learning_rate is None else args.per_device_train_batch_size
    how = flops.Stage1(settings.encoder_image_size or FULL_SIDE, settings.noise_draws, muon_batch=muon_batch)
    return flops.per_unit(how, flops.stage_1(read_config(str(start)), how))


def published_operations(run: Run) -> float:
    """The same at the published size, where the paper's gradient checkpointing counts, and Muon hardly does."""
    settings, _ = read(run)
    size = PUBLISHED_SIZE * (settings.encoder_image_size or FULL_SIDE) // FULL_SIDE
    muon_batch = None if settings.muon_learning_rate is None else PUBLISHED_SAMPLES // settings.noise_draws
    how = flops.Stage1(size, settings.noise_draws, checkpointing=run.recipe == "paper", muon_batch=muon_batch)
    config = published_config()
    config.bypass_text_encoder = run.model.get("bypass_text_encoder", False)
    config.num_queries = config.num_queries * run.model.get("num_queries", QUERIES) // QUERIES
    return flops.per_unit(how, flops.stage_1(config, how))


def measure(name: str, run: Run, seed: int, work: Path) -> dict[str, Any]:
    """Trains one run, as far as that is not done, and returns its record."""
    training = run.training(seed)
    folder = training.make(work)
    settings, args = read(run)
    samples = args.per_device_train_batch_size * settings.noise_draws
    each, published = operations(run, training.settings["model"].make(work)), published_operations(run)
    lines = list(curve(folder))
    reached = steps_to(TARGET, [(line["step"], line["objects right"]["value"]) for line in lines])
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    return {
        "run": name,
        "seed": seed,
        "steps": run.steps,
        "samples_of_a_step": samples,
        "operations_of_a_sample": each,
        "published_operations_of_a_sample": published,
        "curve": lines,
        "steps_to_target": reached,
        "operations_to_target": reached and reached * samples * each,
        "published_operations_to_target": reached and reached * samples * published,
        "seconds_to_target": reached and record["seconds"] * reached / run.steps,
        **finished(run, folder),
        "denoising_loss": record["evaluation"]["denoising_loss"],
        "commit": git_commit(),
    }


def draw(records: list[dict[str, Any]], picture: Path) -> None:
    """Learning curves: objects right against operations, a line for each seed of `paper` and `ours`."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, colour in (("paper", "tab:orange"), ("ours", "tab:blue")):
        for number, record in enumerate(one for one in records if one["run"] == name):
            each = record["samples_of_a_step"] * record["operations_of_a_sample"] / 1e15
            axes.plot(
                [each * line["step"] for line in record["curve"]],
                [line["objects right"]["value"] for line in record["curve"]],
                color=colour,
                label=None if number else name,
            )
    axes.axhline(TARGET, color="grey", linewidth=0.8)
    axes.set(xlabel="operations, in 1e15", ylabel="objects right", xscale="log")
    axes.legend()
    figure.savefig(picture, dpi=120)


def measure_teacher() -> dict[str, Any]:
    """What no stage 1 is expected to exceed: the teacher's own drawings from the true captions."""
    drawn = drawn_from_captions(FINISHED_SCENES)
    return {"objects_right": objects_right(*drawn), "wrong": wrong(*drawn)}


def recorded(output: Path) -> dict[str, Any]:
    if output.is_file():
        return json.loads(output.read_text(encoding="utf-8"))
    return {"speedrun": []}


def save(output: Path, record: dict[str, Any]) -> None:
    with atomic_writer(output) as file:
        file.write(json.dumps(record, indent=1) + "\n")


def write(name: str, seed: int, work: Path, output: Path, picture: Path) -> bool:
    """Writes the record of a run, unless there is one. False if another command is working on it."""

    def is_there() -> bool:
        return any((record["run"], record["seed"]) == (name, seed) for record in recorded(output)["speedrun"])

    if is_there():
        return True
    try:
        record = measure(name, RUNS[name], seed, work)
    except BlockingIOError:
        return False
    with claimed(output, wait=True):
        if not is_there():
            before = recorded(output)
            records = [*before["speedrun"], record]
            save(output, {**before, "speedrun": records})
            draw(records, picture)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"of: {'; '.join(RUNS)} (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("outputs/speedrun"), help="folder for what is trained")
    parser.add_argument("--output", type=Path, default=RESULTS / "speedrun.json", help="JSON file to write")
    parser.add_argument("--picture", type=Path, default=Path("docs/speedrun.png"), help="learning curves to draw")
    arguments = parser.parse_args()
    if unknown := set(arguments.runs) - set(RUNS):
        parser.error(f"there is no run {unknown.pop()!r}, but {'; '.join(RUNS)}")
    work = arguments.work.absolute()
    if "teacher" not in recorded(arguments.output):
        teacher = measure_teacher()
        with claimed(arguments.output, wait=True):
            save(arguments.output, {"teacher": teacher, **recorded(arguments.output)})
    planned = [(name, seed) for seed in arguments.seeds for name in arguments.runs or RUNS]
    while planned:
        planned = [one for one in planned if not write(*one, work, arguments.output, arguments.picture)]
        if planned:
            time.sleep(30)  # other commands are doing the remaining runs


if __name__ == "__main__":
    main()
