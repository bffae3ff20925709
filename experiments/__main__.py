"""Runs experiments: `python -m experiments [NAME ...]`; see `python -m experiments --help`."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from experiments import MEASURED
from experiments.making import claimed
from experiments.trained import Plan
from vlv import cli
from vlv.arguments import CommandParser
from vlv.files import atomic_writer
from vlv.models.loading import load_whole
from vlv.provenance import git_commit


@dataclass
class ExperimentArguments:
    model: str = field(
        default="vlv-tiny", metadata={"help": f"Folder or Hub id of the VLV that {', '.join(MEASURED)} measure."}
    )
    num: int = field(default=500, metadata={"help": "Number of scenes that each score is measured on."})
    output: str = field(default="docs/results", metadata={"help": "Folder for the JSON."})
    work: str = field(default="outputs/experiments", metadata={"help": "Folder for the trained models."})


def main(argv: list[str], plan: Plan | None = None) -> None:
    plan = plan or Plan()
    trained = {experiment.name: experiment for experiment in plan.experiments()}
    names = [*MEASURED, *trained]
    parser = CommandParser(
        ExperimentArguments,
        prog="python -m experiments",
        description=f"Measure what docs/results.md shows: {', '.join(names)}. Existing JSON files are kept: delete a "
        "file to measure again. An interrupted training resumes. The command can run several times at once; each "
        "process then takes work that no other process is doing.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="experiments to run (default: all)")
    arguments, inputs = parser.parse(argv)
    wanted = inputs.names or names
    for name in wanted:
        if name not in names:
            parser.error(f"there is no experiment {name!r}; choose from {', '.join(names)}")
    work, output = Path(arguments.work), Path(arguments.output)
    planned = {name: partial(ask, name, arguments.model, arguments.num) for name in MEASURED if name in wanted}
    runs = {run.name for name in wanted if name in trained for row in trained[name].rows for run in row.runs}
    planned |= {run.name: partial(run.make, work, arguments.num) for run in plan.runs() if run.name in runs}
    while planned:
        planned = {
            name: measure
            for name, measure in planned.items()
            if not write(output / f"{name}.json", work / name, measure)
        }
        if planned:
            time.sleep(30)  # other processes are doing the remaining work


def write(file: Path, claim: Path, measure: Callable[[], dict[str, Any]]) -> bool:
    """Writes what `measure` returns, unless the file exists. False if another process is working on it."""
    if file.exists():
        return True
    start = time.perf_counter()
    try:
        with claimed(claim):
            if not file.exists():
                record = measure()
                with atomic_writer(file) as output:
                    output.write(json.dumps(record, indent=1) + "\n")
                print(f"{file}: {time.perf_counter() - start:.0f} s", flush=True)
        return True
    except BlockingIOError:
        return False


def ask(name: str, model: str, num: int) -> dict[str, Any]:
    """The rows of one experiment of `MEASURED`."""
    start = time.perf_counter()
    vlv, processor = load_whole(model)
    rows = import_module(f"experiments.{name}").run(vlv.float().eval(), processor, num)
    return {"commit": git_commit(), "seconds": round(time.perf_counter() - start), "rows": rows}


if __name__ == "__main__":
    sys.exit(cli.run("python -m experiments", lambda: main(sys.argv[1:]), is_process=True))
