"""
A user's own drawings: a bundled model is fine-tuned on a few captioned crayon drawings, and captions held-out ones.

    python -m experiments.doodles [--model NAME] [--work outputs/experiments] [--output FILE]

Two recipes are compared: finetune-caption trains the caption head alone, finetune-all the encoder too. The command
prints a table.
"""

import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from experiments.making import Checkpoint, Scenes, Training
from experiments.report import spread, table
from vlv import BUNDLED, bundled_checkpoint, cli, load_captioner
from vlv.arguments import CommandParser
from vlv.captioning.captioner import Captioner
from vlv.captioning.settings import Decoding
from vlv.evaluation.results import Measurement
from vlv.files import atomic_writer
from vlv.provenance import git_commit
from vlv.scenes.doodles import Doodle, Doodles

HELD_OUT = 300
RECIPES = ("finetune-caption", "finetune-all")
COUNTS = (50, 200, 800)
SEEDS = (0, 1, 2)


@dataclass
class DoodlesArguments:
    model: str = field(default=BUNDLED, metadata={"help": "Bundled model to fine-tune."})
    work: Path = field(default=Path("outputs/experiments"), metadata={"help": "Folder for the trained models."})
    output: Path = field(default=Path("docs/results/doodles.json"), metadata={"help": "JSON file to write."})


def fine_tuned(recipe: str, model: str, count: int, seed: int) -> Training:
    return Training(recipe, {"model": Checkpoint(model), "dataset": Scenes(count, "train", "doodles"), "seed": seed})


def scores(captions: Sequence[str], doodles: Sequence[Doodle]) -> dict[str, Measurement]:
    """
    The share of captions that are exactly right, of things whose name is in the caption, and of things whose colour
    and name are: a model that was not fine-tuned has another grammar.
    """
    pairs = list(zip(captions, doodles, strict=True))
    total = [len(doodle.things) for doodle in doodles]

    def things(phrases) -> Measurement:
        found = [sum(f" {phrase} " in f" {caption} " for phrase in phrases(doodle)) for caption, doodle in pairs]
        return Measurement.share(found, total)

    return {
        "captions exact": Measurement.share([caption == doodle.caption for caption, doodle in pairs]),
        "names right": things(lambda doodle: [name for _, name in doodle.things]),
        "colour and name right": things(lambda doodle: [" ".join(thing) for thing in doodle.things]),
    }


def measure(folder: Path | str) -> dict[str, dict[str, Any]]:
    images, doodles = zip(*(Doodles().sample_picture("test", index) for index in range(HELD_OUT)), strict=True)
    captioner = Captioner(*load_captioner(str(folder)), Decoding(max_new_tokens=48), batch_size=50)
    captions = [best.text for _, (best, *_) in captioner.caption_images((str(i), it) for i, it in enumerate(images))]
    return {name: asdict(score) for name, score in scores(captions, doodles).items()}


def rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each recipe and number of drawings: the mean over the seeds."""
    found: dict[tuple[str | None, int], list[dict]] = {}
    for run in record["runs"]:
        found.setdefault((run["recipe"], run["drawings"]), []).append(run)
    return [
        {
            "recipe": recipe or "none",
            "captioned drawings": count,
            "seeds": len(runs),
            **{name: spread([run["scores"][name] for run in runs]) for name in runs[0]["scores"]},
            "minutes": sum(run["seconds"] for run in runs) / len(runs) / 60,
        }
        for (recipe, count), runs in found.items()
    ]


def main(argv: list[str]) -> None:
    parser = CommandParser(DoodlesArguments, prog="python -m experiments.doodles", description=__doc__)
    (arguments,) = parser.parse(argv)
    before = measure(bundled_checkpoint(arguments.model))
    runs = [{"recipe": None, "drawings": 0, "seed": None, "scores": before, "seconds": 0.0}]
    for recipe, count, seed in itertools.product(RECIPES, COUNTS, SEEDS):
        folder = fine_tuned(recipe, arguments.model, count, seed).make(arguments.work.absolute())
        seconds = json.loads((folder / "training.json").read_text(encoding="utf-8"))["seconds"]
        run = {"recipe": recipe, "drawings": count, "seed": seed, "scores": measure(folder), "seconds": seconds}
        runs.append(run)
    record = {"model": arguments.model, "held_out": HELD_OUT, "commit": git_commit(), "runs": runs}
    with atomic_writer(arguments.output) as file:
        file.write(json.dumps(record, indent=1) + "\n")
    print(table(rows(record)))


if __name__ == "__main__":
    sys.exit(cli.run("python -m experiments.doodles", lambda: main(sys.argv[1:]), is_process=True))
