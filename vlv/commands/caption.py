"""`vlv caption`: write a caption for each image."""

import math
import sys
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

from tqdm import tqdm

from vlv.captioning.settings import Decoding, ModelOptions, RowOptions, option
from vlv.captioning.sink import CaptionFile, Printer, Sidecars, Sink
from vlv.captioning.sources import Source, open_source
from vlv.commands.parser import CommandParser


@dataclass(frozen=True)
class CaptionArguments:
    output: str | None = option(
        None,
        "File to write: .jsonl or .parquet with a row for each image, file_name (its path below the folder given) and "
        "text. Written into that folder as metadata.jsonl, it makes it an ImageFolder. A suffix alone, .txt, writes "
        "each caption into a file beside its image. Without --output, captions are printed, each behind its file's "
        "name and a tab. Images that could not be read are listed in failures.jsonl beside the output.",
    )
    existing: str = option(
        "skip",
        "What becomes of text files that are beside their images already (with --output .txt).",
        choices=["skip", "overwrite"],
    )
    resume: bool = option(
        False,
        "Go on with a run that was interrupted, or add to the output of one that was not; without either, begin.",
    )
    batch_size: str = option(
        "auto",
        "Images that are captioned at once; auto begins with a few and takes more as long as memory allows. "
        "A batch that turns out not to fit is halved.",
        metavar="N",
    )
    num_workers: int | None = option(
        None,
        "Processes that read images ahead of the model (default: as many as fit this machine). With 0 the main "
        "process reads them, and an image that crashes its decoder ends the run.",
    )
    engine: str = option(
        "local",
        "ray captions on a whole Ray cluster, or on all of this machine (needs vlv[ray]).",
        choices=["local", "ray"],
    )

    def __post_init__(self):
        if self.batch_size != "auto" and not (self.batch_size.isdecimal() and int(self.batch_size) > 0):
            raise ValueError(f"--batch_size is {self.batch_size}; it must be at least 1, or auto.")
        if self.num_workers is not None and self.num_workers < 0:
            raise ValueError(f"--num_workers is {self.num_workers}; it must be at least 0.")
        if self.output is not None and not self.output.endswith((".jsonl", ".parquet")) and not self.to_sidecars:
            raise ValueError(f"--output {self.output} must end in .jsonl or .parquet, or be a suffix alone: .txt")

    @property
    def to_sidecars(self) -> bool:
        name = self.output or ""
        return name.startswith(".") and name[1:].isalnum() and name not in (".jsonl", ".parquet")


def main(argv: list[str]) -> int | None:
    parser = CommandParser(
        CaptionArguments,
        Decoding,
        ModelOptions,
        RowOptions,
        prog="vlv caption",
        description="Write a caption for each image. An image that cannot be read is reported and left out.",
        epilog="example: vlv caption photos --output captions.jsonl --resume",
    )
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="Images, folders to search for images, patterns in quotes ('photos/**/*.jpg'), lists (.txt, a path in "
        "each line), .parquet files, WebDataset archives (.tar), and ids of data sets on the Hub (user/name).",
    )
    arguments, decoding, model, rows, inputs = parser.parse(argv)
    source = open_source(inputs.paths, rows)
    try:
        _caption(source, arguments, decoding, model)
    except KeyboardInterrupt:
        mend = ": the same command with --resume goes on from there" if arguments.output else ""
        print(f"\nvlv caption: interrupted{mend}", file=sys.stderr)
        return 130


def _caption(source: Source, arguments: CaptionArguments, decoding: Decoding, model: ModelOptions) -> None:
    # Imported only now: torch would keep --help and wrong arguments waiting.
    from accelerate import PartialState

    from vlv.captioning.engine import caption_locally, make_captioner
    from vlv.loading import find_captioner

    # One of the processes of `accelerate launch`, which take a part each, or the only one there is. The first to be
    # done waits for the last.
    processes = PartialState(cpu=model.device == "cpu", timeout=timedelta(days=30))
    find_captioner(model.model)
    sink = _open_sink(source, arguments, decoding, model)
    processes.wait_for_everyone()  # until all have seen what was done before
    batch_size = None if arguments.batch_size == "auto" else int(arguments.batch_size)
    make = partial(make_captioner, model, decoding, batch_size)
    if arguments.engine == "ray":
        from vlv.captioning.ray_engine import caption_with_ray

        batches = caption_with_ray(source, sink.done, make, model.model, batch_size)
    else:
        part, parts = processes.process_index, processes.num_processes
        batches = caption_locally(source, sink.done, make(), arguments.num_workers, part, parts)

    total = None if source.total is None else math.ceil(source.total / processes.num_processes)
    before = len(sink.done) // processes.num_processes
    with tqdm(
        total=total, initial=before, desc="Captioning", unit="image", disable=processes.process_index > 0
    ) as bar:
        for rows in batches:
            for row in rows:
                if "error" in row:
                    tqdm.write(f"vlv caption: left out: {row['error']}", file=sys.stderr)
            sink.add(rows)
            bar.update(len(rows))
    processes.wait_for_everyone()
    if not processes.is_main_process:
        return
    captioned, failures = sink.finish()
    elapsed = bar.format_dict["elapsed"]
    rate = (bar.n - bar.initial) * processes.num_processes / elapsed
    where = f", listed in {sink.failures}" if failures and arguments.output else ""
    print(
        f"vlv caption: {captioned} captioned, {len(failures)} left out{where}; "
        f"{tqdm.format_interval(elapsed)}, {rate:.1f} images/s",
        file=sys.stderr,
    )
    if failures and not captioned and not sink.done:
        raise ValueError("None of the images could be read.")


def _open_sink(source: Source, arguments: CaptionArguments, decoding: Decoding, model: ModelOptions) -> Printer | Sink:
    if arguments.output is None:
        return Printer()
    if not arguments.to_sidecars:
        target = CaptionFile(Path(arguments.output))
    elif source.files is None:
        raise ValueError("--output .txt needs image files: a row of a table has no place for a text file beside it.")
    else:
        target = Sidecars(source.files, arguments.output, arguments.existing == "overwrite")
    settings = {"existing": arguments.existing, **asdict(decoding)}
    settings |= {name: getattr(model, name) for name in ("model", "dtype", "quantization")}
    return Sink(target, settings, arguments.resume)
