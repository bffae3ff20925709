"""
The speed run: stage 1 of the tiny world until 0.90 of the objects of validation scenes are rebuilt right.

    python -m benchmarks.speedrun [RUN ...] [--seeds 0 1 2] [--work outputs/speedrun] [--output FILE]

All runs start from the same four parts: vlv-tiny's teacher, the tiny Florence-2 of `experiments/parts`, and new queries
and projections. `paper` is the paper's recipe, its learning rate tuned; `ours` is what won; the others change one thing of
`ours`. Each run measures itself while it trains, with the weights that it would save, and leaves a curve of objects
right against steps. Operations are counted by flops.py for the same settings, evaluation left out. An interrupted
command continues where it was, and a run that is in the output is not repeated. Each seed of a run takes about an hour of one
CPU core.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

# flops
from experiments.making import Assembled, Scenes, Training
from experiments.scoring import encode, rebuild, scores
from vlv.scenes import sample_picture
from vlv.training.autoencode import AutoencodeStage

TARGET = 0.90
MEASURED_STEPS, MEASURED_SCENES = 200, 200
IMAGES, EVALUATION = 40_000, 100
RECIPES = Path(__file__).parent / "recipes"
CURVE = "curve.jsonl"


@dataclass(frozen=True)
class Run:
    """A recipe, and the settings that it is run with."""

    recipe: str
    steps: int
    settings: dict[str, Any] = field(default_factory=dict)

    def training(self, seed: int) -> Training:
        common = {
            "model": Assembled(seed),
            "dataset": Scenes(IMAGES),
            "eval_dataset": Scenes(EVALUATION, "validation"),
            "eval_size": EVALUATION,
            "max_steps": self.steps,
            "seed": seed,
        }
        return Training(str(RECIPES / f"speedrun-{self.recipe}.yaml"), common | self.settings)


RUNS = {
    "paper": Run("paper", 9600, {"learning_rate": 7e-4}),
    "ours": Run("ours", 1600),
    "ours, one noise draw": Run("ours", 1600, {"noise_draws": 1}),
    "ours, one learning rate": Run("ours", 1600, {"learning_rate": 7e-4, "encoder_learning_rate": 7e-4}),
}


class Measure(TrainerCallback):
    """Writes a line of the curve every so many steps."""

    def __init__(self, stage: AutoencodeStage):
        self.stage = stage
        self.images, self.truths = zip(
            *(sample_picture("validation", index) for index in range(MEASURED_SCENES)), strict=True
        )

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % MEASURED_STEPS and state.global_step != args.max_steps:
            return
        model, start = self.stage.model, time.perf_counter()
        training = model.training
        pictures = rebuild(model.eval(), encode(model, self.stage.processor, self.images))
        model.train(training)
        found = scores(pictures, self.truths)["objects right"]
        line = {"step": state.global_step, **found, "measuring_seconds": time.perf_counter() - start}
        with (Path(args.output_dir) / CURVE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class MeasuredStage(AutoencodeStage):
    """Stage 1, measured while it trains."""

    def callbacks(self) -> list[TrainerCallback]:
        return [*super().callbacks(), Measure(self)]


def curve(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of a run; of a step that was repeated after an interruption, the last one."""
    lines = [json.loads(line) for line in (folder / CURVE).read_text(encoding="utf-8").splitlines()]
    yield from sorted({line["step"]: line for line in lines}.values(), key=lambda line: line["step"])
