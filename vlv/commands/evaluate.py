"""`vlv evaluate`: measure a VLV."""

from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vlv import tiny_checkpoint
from vlv.commands.parser import CommandParser
from vlv.evaluation.results import Measurement, write_results
from vlv.evaluation.scenes import SceneScorer, mirror
from vlv.loading import load_autoencoder
from vlv.scenes import sample_picture


@dataclass
class EvaluateArguments:
    model: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a VLV (default: the bundled vlv-tiny)."}
    )
    metrics: str = field(
        default="scenes", metadata={"help": "What to measure; scenes: captions and reconstructions of drawn scenes."}
    )
    output: str | None = field(
        default=None,
        metadata={"help": "JSON file to write (default: results.json in the folder --model, if it is one)."},
    )
    num: int = field(default=1000, metadata={"help": "Scenes to measure on; they are drawn, and none was trained on."})
    seed: int = field(
        default=0, metadata={"help": "Seed of the scenes and of the noise that pictures are drawn from."}
    )
    num_inference_steps: int = field(default=20, metadata={"help": "Sampling steps of every picture drawn."})
    guidance_scale: float = field(default=2.0, metadata={"help": "Classifier-free guidance of every picture drawn."})
    batch_size: int = field(default=50, metadata={"help": "Images at once."})
    device: str = field(default="auto", metadata={"help": "cpu, cuda, cuda:1, mps; auto takes the accelerator."})

    def __post_init__(self):
        if self.metrics != "scenes":
            raise ValueError(f"--metrics {self.metrics} is unknown; there is: scenes.")
        for name in ("num", "batch_size", "num_inference_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be at least 1.")


def main(argv: list[str]) -> None:
    parser = CommandParser(
        EvaluateArguments,
        prog="vlv evaluate",
        description="Measure a VLV on drawn scenes that it never saw, beside ceilings and floors; prints a table and "
        "writes results.json.",
        epilog="example: vlv evaluate --num 200",
    )
    (arguments,) = parser.parse(argv)
    model, processor = load_autoencoder(arguments.model, arguments.device)
    scorer = SceneScorer(
        model,
        processor,
        batch_size=arguments.batch_size,
        num_inference_steps=arguments.num_inference_steps,
        guidance_scale=arguments.guidance_scale,
        seed=arguments.seed,
    )
    test = [sample_picture("test", index, arguments.seed) for index in range(arguments.num)]
    novel = [sample_picture("novel", index, arguments.seed) for index in range(arguments.num)]
    metrics = {
        **scorer.ceilings(test, "test"),
        **scorer.reconstructions(test, "test"),
        **scorer.reconstructions(novel, "novel"),
    }
    metrics |= scorer.floors(test, "test")
    if model.caption_head is not None:
        metrics |= (
            scorer.captions(test, "test") | scorer.captions(mirror(test), "mirrored") | scorer.captions(novel, "novel")
        )
    Console().print(table(metrics))
    folder = Path(arguments.model or tiny_checkpoint())
    output = Path(arguments.output) if arguments.output else folder / "results.json" if folder.is_dir() else None
    if output is not None:
        settings = {name: value for name, value in vars(arguments).items() if name in _SETTINGS}
        write_results(output, metrics, settings)
        print(f"written to {output}")


# What the numbers depend on; where they were computed and in which batches is no part of them.
_SETTINGS = ("num", "seed", "num_inference_steps", "guidance_scale")


def table(metrics: dict[str, Measurement]) -> Table:
    """One line for each metric, with its error and what it was measured on."""
    result = Table("metric", "scenes", "score")
    for column in ("value", "standard error", "n"):
        result.add_column(column, justify="right")
    previous = None
    for name, measured in metrics.items():
        what, scenes, score = name.split("/")
        if previous not in (None, what):
            result.add_section()
        shown, previous = what if what != previous else "", what
        result.add_row(
            shown,
            scenes,
            score.replace("_", " "),
            f"{measured.value:.4f}",
            f"{measured.standard_error:.4f}",
            str(measured.n),
        )
    return result
