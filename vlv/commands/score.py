"""`vlv score`: how well captions fit their images."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from vlv import BUNDLED
from vlv.arguments import CommandParser, check_seed
from vlv.captioning.settings import model_name, option
from vlv.files import check_source, locked
from vlv.judging.scores import CHOICES, NUM_DRAWS, SCORES, value_of
from vlv.sheets import SUFFIXES, check_name

if TYPE_CHECKING:
    from vlv.captioning.engine import Prepared
    from vlv.captioning.journal import Row
    from vlv.captioning.sources import Pictures
    from vlv.judging.judge import Judge
    from vlv.judging.output import ScoreFile


@dataclass(frozen=True)
class ScoreArguments:
    output: str = option(
        None,
        "File to write, .jsonl: file_name, text and the scores of each image. An image with several captions has "
        "lists. Images that could not be scored are listed beside it, in a file of the same name that ends in "
        ".failures.jsonl.",
        required=True,
    )
    captions: str | None = option(
        None,
        "File with the captions, .jsonl, .csv or .parquet with file_name and text, as vlv caption writes them. "
        "DATASET is then what was captioned: a folder, image files, .parquet, .tar, or an id on the Hub (default: "
        "DATASET has the captions, in its metadata or in text files beside the images).",
    )
    scores: list[str] | None = option(
        None,
        "explained: how much of the decoder's denoising loss the caption removes; 1 is all of it, 0 is as good as no "
        "caption. likelihood: the caption head's mean log-probability of a token; at most 0. round_trip: how similar "
        "the picture that the decoder draws from the caption is to the image (needs --feature_extractor). (default: "
        "all that the model can)",
        choices=list(SCORES),
    )
    num_draws: int = option(NUM_DRAWS, "Noise draws of explained, which all captions share.")
    seed: int = option(0, "Seed of the noise.")
    feature_extractor: str | None = option(
        None, "round_trip: folder or id of a vision model, such as facebook/dinov2-base."
    )
    keep: float | None = option(
        None,
        "Copy the images whose captions are best into a new folder beside the output, OUTPUT without .jsonl and with "
        ".kept: a share of them, such as 0.9. It is an ImageFolder to train on; its files are hard links if possible.",
    )
    sheet: str | None = option(None, f"Picture to write ({', '.join(SUFFIXES)}): the worst and the best captions.")
    by: str | None = option(
        None,
        "What --keep and --sheet order images by. both is the mean of explained and exp(likelihood) (default: both, "
        "or the one of the two that there is).",
        choices=list(CHOICES),
    )
    resume: bool = option(
        False,
        "Continue an interrupted run, or add new images to a finished output. Existing rows are kept, even if their "
        "caption has changed.",
    )
    overwrite: bool = option(False, "Replace an existing output. Without it and --resume, none is changed.")
    batch_size: int | None = option(
        None, "Images to score at once (default: a few at first, then more as long as memory allows)."
    )
    num_workers: int | None = option(
        None, "Processes that read images ahead of the model (default: depends on the machine; 0: the main process)."
    )
    model: str | None = option(None, f"Folder or Hub id of a VLV (default: the bundled {BUNDLED}, for drawn scenes).")
    device: str = option("auto", "cpu, cuda, cuda:1, mps; auto takes the accelerator.")
    dtype: str = option(
        "auto",
        "auto is float32 on the CPU, and the saved dtype on other devices.",
        choices=["auto", "float32", "bfloat16", "float16"],
    )
    split: str | None = option(None, "Split of DATASET (default: train, or its only split).")
    image_column: str | None = option(None, "Column of the images (default: image).")
    caption_column: str = option("text", "Column of the captions: one for each image, or a list.")

    def __post_init__(self):
        for name in ("num_draws", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} is {value}; it must be at least 1.")
        if self.num_workers is not None and self.num_workers < 0:
            raise ValueError(f"--num_workers is {self.num_workers}; it must be at least 0.")
        check_seed(self.seed)
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ValueError(f"--keep is {self.keep}; it is a share, above 0 and at most 1.")
        check_name(self.sheet)
        if "round_trip" in (self.scores or ()) and self.feature_extractor is None:
            raise ValueError("--scores round_trip needs --feature_extractor.")

    @property
    def kept(self) -> Path:
        """The folder that --keep writes."""
        return Path(self.output).with_suffix(".kept")

    def order(self, names: tuple[str, ...]) -> str:
        """What images are ordered by; raises ValueError where that is not among the scores."""
        found = [name for name in ("explained", "likelihood") if name in names]
        by = self.by or ("both" if len(found) > 1 else next(iter(found), "explained"))
        needed = {"explained", "likelihood"} if by == "both" else {by}
        if (self.keep is not None or self.sheet is not None) and (lacking := needed - set(names)):
            raise ValueError(
                f"--by {by} needs the score {' and '.join(sorted(lacking))}; the run computes {_listed(names)}."
            )
        return by


def main(argv: list[str]) -> None:
    parser = CommandParser(
        ScoreArguments,
        prog="vlv score",
        description="Score how well captions fit their images, to find those that need a person. The captions may "
        "come from anywhere. An image that cannot be read or has no caption is reported and left out.",
        epilog="examples: vlv score photos --captions captions.jsonl --output scores.jsonl --sheet worst.png; "
        "vlv score dataset --output scores.jsonl --keep 0.9",
    )
    parser.add_argument(
        "dataset",
        metavar="DATASET",
        help="Folder of images with metadata.jsonl or text files, or of parquet or WebDataset files, or Hub id.",
    )
    arguments, inputs = parser.parse(argv)
    from vlv.processes import working_together  # imported only now, because importing torch would delay --help

    try:
        with working_together():
            _score(inputs.dataset, arguments)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command with --resume continues from here") from None


def _score(dataset: str, arguments: ScoreArguments) -> None:
    from vlv.captioning.engine import work_locally
    from vlv.captioning.filling import Words, fill
    from vlv.captioning.sink import Sink
    from vlv.judging.output import ScoreFile
    from vlv.judging.pairs import open_pairs
    from vlv.processes import join_processes

    processes = join_processes(arguments.device)  # each scores a part
    for name in ("model", "feature_extractor"):
        check_source(getattr(arguments, name), name)
    names = _names(arguments)
    by = arguments.order(names)
    output = ScoreFile(Path(arguments.output))
    if arguments.keep is not None and arguments.kept.exists():
        raise FileExistsError(f"--keep writes {arguments.kept}, which exists already: move or delete it.")
    source = open_pairs(dataset, arguments.captions, arguments.split, arguments.image_column, arguments.caption_column)
    settings = {name: getattr(arguments, name) for name in ("dtype", "num_draws", "seed", "feature_extractor")}
    settings |= {"model": model_name(arguments.model), "scores": list(names)}
    with ExitStack() as stack:
        if processes.is_main_process:
            stack.enter_context(locked(output.path))
        processes.wait_for_everyone()  # the first process has checked that no other run writes to this output
        sink = Sink(output, settings, arguments.resume, arguments.overwrite)
        processes.wait_for_everyone()  # until all have seen what was done before
        judge = _judge(arguments, names)
        clock = Clock(judge)
        batches = work_locally(
            *(source, sink.done, judge.read, clock.rows, judge, arguments.num_workers),
            *(processes.process_index, processes.num_processes),
        )
        fill(sink, batches, source.total, processes, Words("vlv score", "Scoring", "scored", "scored"))
        if processes.is_main_process:
            clock.report()
            _use(arguments, judge, source, output, by)


def _names(arguments: ScoreArguments) -> tuple[str, ...]:
    """The scores to compute: those asked for, or all that the checkpoint can give."""
    from vlv.images import say
    from vlv.judging.loading import check_scores, scores_missing

    if arguments.scores is not None:
        check_scores(arguments.model, arguments.scores)
        return tuple(name for name in SCORES if name in arguments.scores)
    wanted = SCORES if arguments.feature_extractor is not None else SCORES[:2]
    missing = scores_missing(arguments.model)
    names = tuple(name for name in wanted if name not in missing)
    if not names:
        raise ValueError(f"{', and '.join(dict.fromkeys(missing.values()))}: take another --model.")
    for name in wanted:
        if name in missing:
            say(f"{missing[name]}, so the scores have no {name}.")
    return names


def _judge(arguments: ScoreArguments, names: tuple[str, ...]) -> "Judge":
    from vlv.judging.loading import load_judge

    return load_judge(
        arguments.model,
        names,
        device=arguments.device,
        dtype=arguments.dtype,
        feature_extractor=arguments.feature_extractor,
        num_draws=arguments.num_draws,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
    )


class Clock:
    """Takes the time of scoring, and of greedy captions of a few of the same images to compare with."""

    def __init__(self, judge: "Judge"):
        self.judge = judge
        self.seconds, self.images, self.pairs = 0.0, 0, 0
        self.last: list[Any] = []

    def rows(self, batch: "list[Prepared]") -> "list[Row]":
        start = perf_counter()
        rows = self.judge.rows(batch)
        self.seconds += perf_counter() - start
        self.images += sum("error" not in row for row in rows)
        self.pairs += sum(len(it.picture.captions) for it in batch if it.error is None)
        self.last = [it.content for it in batch if it.error is None] or self.last
        return rows

    def report(self) -> None:
        """One line on stderr. Captions cost at most a tenth of the images."""
        from vlv.captioning.captioner import Captioner
        from vlv.captioning.settings import Decoding
        from vlv.images import say

        few = self.last[: self.images // 10]
        if not self.images:
            return
        line = f"a pair took {1000 * self.seconds / self.pairs:.3g} ms of the model"
        if few and self.judge.model.caption_head is not None:
            captioner = Captioner(self.judge.model, self.judge.processor, Decoding(), len(few))
            start = perf_counter()
            captioner([str(number) for number in range(len(few))], [content["pixel_values"] for content in few])
            line += f", a greedy caption {1000 * (perf_counter() - start) / len(few):.3g} ms ({len(few)} at once)"
        say(f"{line}.")


def _use(arguments: ScoreArguments, judge: "Judge", source: "Pictures", output: "ScoreFile", by: str) -> None:
    """Write what --sheet and --keep ask for."""
    from vlv.images import say
    from vlv.judging.keeping import keep
    from vlv.judging.output import best
    from vlv.judging.sheet import make_sheet

    if arguments.sheet is not None:
        Path(arguments.sheet).parent.mkdir(parents=True, exist_ok=True)
        make_sheet(judge, source, list(output.rows()), by).save(arguments.sheet)
    if arguments.keep is not None:
        names = best(_values(output, by), arguments.keep)
        count = keep(source, output.rows(), names, arguments.kept)
        say(f"kept {count:,} images in {arguments.kept}.")


def _values(output: "ScoreFile", by: str) -> Iterator[tuple[str, float]]:
    return ((row["file_name"], value_of(row, by)) for row in output.rows())


def _listed(names: tuple[str, ...]) -> str:
    return " and ".join(names)
