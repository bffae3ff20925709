"""The course of a run: rows go into the sink as they are made, and the output is written at the end."""

import math
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from tqdm import tqdm

from vlv.captioning.journal import Row
from vlv.captioning.sink import Printer, Sink

if TYPE_CHECKING:
    from accelerate import PartialState


class Words(NamedTuple):
    """What a command's messages say."""

    command: str  # "vlv caption"
    doing: str  # "Captioning"
    done: str  # "captioned"
    possible: str  # "read", of which none could be


def fill(
    sink: Printer | Sink, batches: Iterable[list[Row]], total: int | None, processes: "PartialState", words: Words
) -> int:
    """
    Collect the rows as they are made, and write the output. Returns how many images are done.

    Args:
        total: images of all processes together; `None` if unknown.

    Raises:
        ValueError: not one image is done.
    """
    total = None if total is None else math.ceil(total / processes.num_processes)
    before = len(sink.done) // processes.num_processes
    with tqdm(total=total, initial=before, desc=words.doing, unit="image", disable=processes.process_index > 0) as bar:
        for rows in batches:
            for row in rows:
                if "error" in row:
                    tqdm.write(f"{words.command}: left out: {row['error']}", file=sys.stderr)
            sink.add(rows)
            bar.update(len(rows))
    done, failures = _finish(sink, processes)
    if not processes.is_main_process:
        return done
    elapsed = bar.format_dict["elapsed"]
    rate = (bar.n - bar.initial) * processes.num_processes / elapsed
    where = f", listed in {sink.failures}" if failures and isinstance(sink, Sink) else ""
    print(
        f"{words.command}: {done} {words.done}, {len(failures)} left out{where}; "
        f"{tqdm.format_interval(elapsed)}, {rate:.1f} images/s",
        file=sys.stderr,
    )
    if failures and not done and not sink.done:
        raise ValueError(f"None of the images could be {words.possible}.")
    return done


def _finish(sink: Printer | Sink, processes: "PartialState") -> tuple[int, list[Row]]:
    """Wait for all processes. Returns how many images are done, and the rows of those left out."""
    if isinstance(sink, Printer):
        from accelerate.utils import gather_object

        parts = gather_object([sink.finish()])  # each has printed its own
        failures = [row for _, rows in parts for row in rows]
        return sum(done for done, _ in parts), sorted(failures, key=lambda row: row["order"])
    processes.wait_for_everyone()
    return sink.finish() if processes.is_main_process else (0, [])
