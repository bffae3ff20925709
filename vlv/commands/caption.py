"""`vlv caption`: write a caption for each image."""

from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vlv.arguments import CommandParser
from vlv.captioning.journal import Row
from vlv.captioning.outputs import EXISTING, FORMATS, Output, is_suffix, open_output
from vlv.captioning.settings import Decoding, ModelOptions, RowOptions, model_name, option
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
    from vlv.processes import working_together  # imported only now: see below

    try:
        with working_together():
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
    from vlv.captioning.filling import Words, fill
    from vlv.models.loading import find_captioner
    from vlv.processes import join_processes

    processes = join_processes(model.device)  # each captions a part
    if arguments.engine != "local" and processes.num_processes > 1:
        raise ValueError(
            f"--engine {arguments.engine} starts its own processes: run it without torchrun or accelerate launch."
        )
    find_captioner(model.model)
    if decoding.best_of is not None and arguments.engine != "local":
        raise ValueError(
            f"--engine {arguments.engine} does not follow --best_of: leave it out, or take --engine local."
        )
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
        if decoding.best_of is not None:
            batches = _choose(source, sink.done, arguments, decoding, model, batch_size, processes)
        elif arguments.engine == "ray":
            from vlv.captioning.ray_engine import caption_with_ray

            batches = caption_with_ray(source, sink.done, make, model.model, batch_size)
        else:
            part, parts = processes.process_index, processes.num_processes
            batches = caption_locally(source, sink.done, make(), arguments.num_workers, part, parts)
        fill(sink, batches, source.total, processes, Words("vlv caption", "Captioning", "captioned", "read"))


def _choose(
    source: Source,
    done: Collection[str],
    arguments: CaptionArguments,
    decoding: Decoding,
    model: ModelOptions,
    batch_size: int | None,
    processes: "PartialState",
) -> Iterator[list[Row]]:
    """Captions by --best_of."""
    from vlv.judging.best_of import BestOf, choose_locally
    from vlv.judging.loading import check_scores, load_judge

    for name in ("quantization", "device_map", "attn_implementation", "compile"):
        if getattr(model, name):
            raise ValueError(f"--best_of does not follow --{name}: leave it out.")
    names = ("explained", "likelihood") if decoding.best_of == "both" else (str(decoding.best_of),)
    check_scores(model.model, names)
    judge = load_judge(model.model, names, model.device, model.dtype, batch_size=batch_size, captions=True)
    best_of = BestOf(judge, decoding, batch_size)
    return choose_locally(
        source, done, best_of, arguments.num_workers, processes.process_index, processes.num_processes
    )


def _open_output(source: Source, arguments: CaptionArguments, decoding: Decoding) -> Output | None:
    if arguments.output is None:
        return None
    existing = "overwrite" if arguments.overwrite else arguments.existing
    return open_output(arguments.output, source.files, decoding.writes_several, existing)


def _open_sink(
    output: Output | None,
    arguments: CaptionArguments,
    decoding: Decoding,
    model: ModelOptions,
    prompt_column: str | None,
) -> Printer | Sink:
    if output is None:
        return Printer()
    settings = {"model": model_name(model.model), "dtype": model.dtype, "quantization": model.quantization}
    settings |= asdict(decoding) | {"prompt_file": arguments.prompt_file, "prompt_column": prompt_column}
    return Sink(output, settings, arguments.resume, arguments.overwrite)
