"""Runs experiments: `python -m experiments [NAME ...]`; see `python -m experiments --help`."""

import json
import sys
import time
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from experiments import EXPERIMENTS
from vlv.commands.parser import CommandParser
from vlv.evaluation.results import git_commit
from vlv.files import atomic_writer
from vlv.loading import load_whole


@dataclass
class ExperimentArguments:
    model: str | None = field(default=None, metadata={"help": "Folder or Hub id of a VLV (default: vlv-tiny)."})
    num: int = field(default=500, metadata={"help": "Scenes for each row of an experiment."})
    output: str = field(default="docs/results", metadata={"help": "Folder for the JSON."})


def main(argv: list[str]) -> None:
    parser = CommandParser(
        ExperimentArguments,
        prog="python -m experiments",
        description=f"Measure what docs/results.md shows: {', '.join(EXPERIMENTS)}. An experiment whose JSON is there "
        "is left as it is: delete the file to measure again.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="experiments to run (default: all)")
    arguments, inputs = parser.parse(argv)
    for name in inputs.names or EXPERIMENTS:
        if name not in EXPERIMENTS:
            parser.error(f"there is no experiment {name!r}, but {', '.join(EXPERIMENTS)}")
        file = Path(arguments.output, f"{name}.json")
        if file.exists():
            print(f"{file} is there already.")
            continue
        start = time.perf_counter()
        model, processor = load_whole(arguments.model)
        rows = import_module(f"experiments.{name}").run(model.float().eval(), processor, arguments.num)
        seconds = round(time.perf_counter() - start)
        with atomic_writer(file) as output:
            output.write(json.dumps({"commit": git_commit(), "seconds": seconds, "rows": rows}, indent=1) + "\n")
        print(f"{file}: {len(rows)} rows in {seconds} s")


if __name__ == "__main__":
    main(sys.argv[1:])
