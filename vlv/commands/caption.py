"""`vlv caption`: write a caption for each image."""

import math
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from vlv import tiny_checkpoint
from vlv.arguments import CommandParser
from vlv.captioning.journal import Row
from vlv.captioning.outputs import EXISTING, FORMATS, Output, is_suffix, open_output
from vlv.captioning.settings import Decoding, ModelOptions, RowOptions, option
from vlv.captioning.sink import Printer, Sink
from vlv.captioning.sources import Source, open_source
from vlv.files import locked

if TYPE_CHECKING:
    from accelerate import PartialState


@dataclass(frozen=True)
class CaptionArguments:
    output: str | None = option(
        None,
        "File to write: .jsonl or .parquet with a row for each image: file_name (its path below the given folder) and "
        "text. With metadata.jsonl in that folder as the output, the folder becomes an ImageFolder. A suffix alone, "
        ".txt, writes each caption into a file beside its image. Without --output, each caption is printed after its "
        "file's name and a tab. Images that could not be captioned are listed beside the output, in a file of the "
        "same name that ends in .failures.jsonl.",
    )
    resume: bool = option(
        False,
        "Continue an interrupted run, or add new images to a finished output. Existing rows are kept.",
    )
    overwrite: bool = option(False, "Replace an existing output. Without it and --resume, none is changed.")
    existing: str = option(
        "skip",
        "With --output .txt, what happens to text files that already exist: skip keeps them and captions the other "
        "images, overwrite replaces them as --overwrite does, append and prepend add the caption after or before "
        "their text. An empty file counts as missing.",
        choices=list(EXISTING),
    )
    prompt_file: str | None = option(
        None,
        "JSON Lines with a prompt for some of the images: file_name (as in the output) and prompt. An image without "
        "one gets that of --prompt or --style, if there is any.",
    )
    batch_size: str = option(
        "auto",
        "Images to caption at once; auto starts with a few and takes more as long as memory allows. "
        "A batch that does not fit into memory is halved.",
        metavar="N",
    )
    num_workers: int | None = option(
        None,
        "Processes that read images ahead of the model (default: depends on the machine). With 0 the main process "
        "reads them, and an image that crashes its decoder ends the run.",
    )
    engine: str = option(
        "local",
        "ray: caption on a whole Ray cluster, or on all of this machine (needs vlv[ray]). vllm: caption with vLLM "
        "(needs vlv[vllm], in an environment of its own).",
        choices=["local", "ray", "vllm"],
    )

    def __post_init__(self):
        if self.batch_size != "auto" and not (self.batch_size.isdecimal() and int(self.batch_size) > 0):
            raise ValueError(f"--batch_size is {self.batch_size}; it must be at least 1, or auto.")
        if self.num_workers is not None and self.num_workers < 0:
            raise ValueError(f"--num_workers is {self.num_workers}; it must be at least 0.")
        if self.output is not None and not self.to_sidecars and Path(self.output).suffix not in FORMATS:
            formats = " or ".join(FORMATS)
            raise ValueError(f"--output {self.output} must end in {formats}, or be a suffix alone: .txt")
        if self.overwrite and self.existing in ("append", "prepend"):
            raise ValueError(f"--overwrite and --existing {self.existing} contradict each other: choose one.")

    @property
    def to_sidecars(self) -> bool:
        return is_suffix(self.output or "")


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
        "each line), .parquet files, WebDataset archives (.tar), and ids of datasets on the Hub (user/name).",
    )
    arguments, decoding, model, rows, inputs = parser.parse(argv)
    from vlv.processes import said_when_lost  # imported only now: see below

    try:
        with said_when_lost():
            source = open_source(inputs.paths, rows, arguments.prompt_file)
            _caption(source, arguments, decoding, model, rows.prompt_column)
    except KeyboardInterrupt:
        hint = ("the same command with --resume continues from here",) if arguments.output else ()
        raise KeyboardInterrupt(*hint) from None


def _caption(
    source: Source, arguments: CaptionArguments, decoding: Decoding, model: ModelOptions, prompt_column: str | None
) -> None:
    # Imported only now, because importing torch would delay --help and the errors of wrong arguments.
    from vlv.captioning.engine import Writer, caption_locally, make_captioner
    from vlv.models.loading import find_captioner
    from vlv.processes import join_processes

    processes = join_processes(model.device)  # each captions a part
    if arguments.engine != "local" and processes.num_processes > 1:
        raise ValueError(
            f"--engine {arguments.engine} starts its own processes: run it without torchrun or accelerate launch."
        )
    find_captioner(model.model)
    output = _open_output(source, arguments, decoding)
    with locked(output.path) if output is not None and processes.is_main_process else nullcontext():
        processes.wait_for_everyone()  # the first process has checked that no other run writes to this output
        sink = _open_sink(output, arguments, decoding, model, prompt_column)
        processes.wait_for_everyone()  # until all have seen what was done before
        batch_size = None if arguments.batch_size == "auto" else int(arguments.batch_size)
        make: Callable[[], Writer] = partial(make_captioner, model, decoding, batch_size)
        if arguments.engine == "vllm":
            from vlv.captioning.vllm_engine import VllmCaptioner

            make = partial(VllmCaptioner, model, decoding, batch_size)
        if arguments.engine == "ray":
            from vlv.captioning.ray_engine import caption_with_ray

            batches = caption_with_ray(source, sink.done, make, model.model, batch_size)
        else:
            part, parts = processes.process_index, processes.num_processes
            batches = caption_locally(source, sink.done, make(), arguments.num_workers, part, parts)
        _fill(sink, batches, source, processes)


def _open_output(source: Source, arguments: CaptionArguments, decoding: Decoding) -> Output | None:
    if arguments.output is None:
        return None
    existing = "overwrite" if arguments.overwrite else arguments.existing
    return open_output(arguments.output, source.files, decoding.num_captions > 1, existing)


def _open_sink(
    output: Output | None,
    arguments: CaptionArguments,
    decoding: Decoding,
    model: ModelOptions,
    prompt_column: str | None,
) -> Printer | Sink:
    if output is None:
        return Printer()
    settings = {"model": _name(model.model), "dtype": model.dtype, "quantization": model.quantization}
    settings |= asdict(decoding) | {"prompt_file": arguments.prompt_file, "prompt_column": prompt_column}
    return Sink(output, settings, arguments.resume, arguments.overwrite)


def _name(model: str | None) -> str:
    """A model's name that is the same wherever the command is run."""
    if model is None:
        return Path(tiny_checkpoint()).name
    return os.path.realpath(model) if os.path.isdir(model) else model


def _fill(sink: Printer | Sink, batches: Iterable[list[Row]], source: Source, processes: "PartialState") -> None:
    """Collect the captions as they are written, and write the output."""
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
    captioned, failures = _finish(sink, processes)
    if not processes.is_main_process:
        return
    elapsed = bar.format_dict["elapsed"]
    rate = (bar.n - bar.initial) * processes.num_processes / elapsed
    where = f", listed in {sink.failures}" if failures and isinstance(sink, Sink) else ""
    print(
        f"vlv caption: {captioned} captioned, {len(failures)} left out{where}; "
        f"{tqdm.format_interval(elapsed)}, {rate:.1f} images/s",
        file=sys.stderr,
    )
    if failures and not captioned and not sink.done:
        raise ValueError("None of the images could be read.")


def _finish(sink: Printer | Sink, processes: "PartialState") -> tuple[int, list[Row]]:
    """Wait for all processes. Returns how many images were captioned, and the rows of those left out."""
    if isinstance(sink, Printer):
        from accelerate.utils import gather_object

        parts = gather_object([sink.finish()])  # each has printed its own
        failures = [row for _, rows in parts for row in rows]
        return sum(captioned for captioned, _ in parts), sorted(failures, key=lambda row: row["order"])
    processes.wait_for_everyone()
    return sink.finish() if processes.is_main_process else (0, [])
