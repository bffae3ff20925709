"""`vlv evaluate`: measure a VLV."""

import os
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.table import Table

from vlv import BUNDLED, find_bundled
from vlv.arguments import CommandParser, check_seed
from vlv.evaluation.scores import FAMILIES, SCENES, check_options, find_scores
from vlv.files import check_source, locked, writing_to

if TYPE_CHECKING:
    from vlv.evaluation.results import Measurement

NUM_SCENES = 1000


@dataclass
class EvaluateArguments:
    model: str | None = field(
        default=None, metadata={"help": f"Folder or Hub id of a VLV (default: the bundled {BUNDLED})."}
    )
    metrics: str = field(
        default=SCENES,
        metadata={
            "help": "What to measure, separated by commas. scenes: captions and reconstructions of drawn scenes, "
            "whose content is known exactly. On the images of --dataset: "
            + "; ".join(f"{family} ({', '.join(scores)})" for family, scores in FAMILIES.items())
            + ". A family means all of its scores; family/score is a single score, such as reconstruction/fid."
        },
    )
    output: str | None = field(
        default=None,
        metadata={
            "help": "JSON file to write (default, for scenes: results.json in the folder --model, if it is a folder). "
            "Captions, pictures and answers are kept beside it, in a folder of the same name that ends in .work. When "
            "the command runs again after an interruption, or with more metrics, it uses them."
        },
    )
    dataset: str | None = field(
        default=None,
        metadata={"help": "Folder of images, or of parquet or WebDataset files, or Hub id: what to measure on."},
    )
    split: str | None = field(
        default=None, metadata={"help": "Split of --dataset (default: train, or its only split)."}
    )
    image_column: str = field(default="image", metadata={"help": "Column of --dataset with the images."})
    caption_column: str = field(
        default="text", metadata={"help": "Column of --dataset with reference captions: one per image, or a list."}
    )
    world: Literal["shapes", "emoji"] | None = field(
        default=None,
        metadata={"help": "World of the scenes (default: the one whose pictures are the model's size)."},
    )
    num: int | None = field(
        default=None,
        metadata={"help": f"Scenes to draw (default: {NUM_SCENES}), or first images of --dataset (default: all)."},
    )
    seed: int = field(
        default=0,
        metadata={"help": "Seed of the scenes, of the noise that pictures are drawn from, and of --shots."},
    )
    max_new_tokens: int = field(default=300, metadata={"help": "Longest caption of an image of --dataset, in tokens."})
    num_beams: int = field(default=1, metadata={"help": "Beams of those captions; 1 is greedy, the paper uses 4."})
    num_inference_steps: int = field(default=8, metadata={"help": "Sampling steps of every picture drawn."})
    guidance_scale: float = field(default=2.0, metadata={"help": "Classifier-free guidance of reconstructions."})
    guidance_scales: list[float] = field(
        default_factory=lambda: [1.0, 2.0, 3.0, 4.0],
        metadata={"help": "caption_to_image: draw all captions once at each scale, such as --guidance_scales 1 2 4."},
    )
    text_to_image: str | None = field(
        default=None,
        metadata={
            "help": "caption_to_image: folder or id of the diffusers pipeline that draws the captions (default: the "
            "model's own decoder)."
        },
    )
    clip: str | None = field(
        default=None,
        metadata={
            "help": "Folder or id of a CLIP, such as openai/clip-vit-base-patch32: clip_score, clip_similarity."
        },
    )
    sentence_encoder: str | None = field(
        default=None,
        metadata={
            "help": "Folder or id of a sentence encoder, such as sentence-transformers/all-mpnet-base-v2: "
            "text_similarity."
        },
    )
    feature_extractor: str | None = field(
        default=None,
        metadata={
            "help": "Folder or id of a vision model, such as facebook/dinov2-base: fid, kid, feature_similarity."
        },
    )
    questions: str | None = field(
        default=None,
        metadata={
            "help": "questions: JSON Lines file. Each line has image (its path below the folder of --dataset), "
            "question, answer (or a list of annotators' answers) and, for multiple choice, choices."
        },
    )
    llm: str | None = field(
        default=None, metadata={"help": "questions: folder or id of the language model that answers from captions."}
    )
    shots: int = field(
        default=0, metadata={"help": "questions: solved examples about other images to show with each question."}
    )
    answer_from: Literal["caption", "image"] = field(
        default="caption",
        metadata={
            "help": "questions: who answers: caption, the language model --llm, which reads the model's captions; or "
            "image, the model itself, which must take prompts."
        },
    )
    batch_size: int = field(default=50, metadata={"help": "Images at once."})
    device: str = field(default="auto", metadata={"help": "cpu, cuda, cuda:1, mps; auto takes the accelerator."})

    def __post_init__(self):
        for name in ("num", "batch_size", "num_inference_steps", "max_new_tokens", "num_beams"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} is {value}; it must be at least 1.")
        check_seed(self.seed)
        if self.shots < 0:
            raise ValueError(f"--shots is {self.shots}; it must be at least 0.")
        if self.answer_from == "image":
            for name in ("llm", "shots"):
                if getattr(self, name):
                    raise ValueError(f"--{name} is for --answer_from caption: with image, the model itself answers.")
        if self.metrics == SCENES:
            if self.dataset is not None:
                raise ValueError(
                    f"--metrics scenes draws its own images; for {self.dataset}, choose from {', '.join(FAMILIES)}."
                )
            for option in fields(self):
                if option.name not in _OF_SCENES and getattr(self, option.name) != _default(option):
                    raise ValueError(
                        f"--{option.name} is for --dataset: leave it out, or name the images to measure on and choose "
                        f"--metrics from {', '.join(FAMILIES)}."
                    )
            return
        if self.world is not None:
            raise ValueError("--world is for drawn scenes: leave it out, or leave out --metrics and --dataset.")
        # The model that answers from the image takes the place of the language model.
        given = vars(self) | ({"llm": self.model or ""} if self.answer_from == "image" else {})
        check_options(find_scores(self.metrics), given)
        for name in ("dataset", "output"):
            if getattr(self, name) is None:
                raise ValueError(f"--metrics {self.metrics} needs --{name}.")


def _default(option: Field) -> Any:
    return option.default if option.default_factory is MISSING else option.default_factory()


def main(argv: list[str]) -> None:
    parser = CommandParser(
        EvaluateArguments,
        prog="vlv evaluate",
        description="Measure a VLV, print a table, and write the scores with their settings, commit and versions. "
        "Without --dataset it is measured on unseen drawn scenes and compared with ceilings and floors.",
        epilog="examples: vlv evaluate --num 200; "
        "vlv evaluate --dataset photos --metrics captions/bleu_4,reconstruction/psnr --output results.json",
    )
    (arguments,) = parser.parse(argv)
    # Imported only now, because importing torch would delay --help and the errors of wrong arguments.
    from vlv.evaluation.results import write_results

    for option in ("model", "dataset", *_MODELS):
        check_source(getattr(arguments, option), option)
    output = _output(arguments)
    if output is None:
        Console().print(table(_measure(arguments)))
        return
    with locked(output), writing_to(output.parent):
        metrics = _measure(arguments)
        Console().print(table(metrics))
        settings = {name: getattr(arguments, name) for name in _settings(arguments)}
        write_results(output, metrics, settings, () if arguments.metrics == SCENES else _LIBRARIES)
    print(f"written to {output}")


def _output(arguments: EvaluateArguments) -> Path | None:
    """The file of the results. Without --output it is `None`, unless the default file can be written."""
    if arguments.output is not None:
        return Path(arguments.output)
    folder = Path(find_bundled(arguments.model))
    return folder / "results.json" if folder.is_dir() and os.access(folder, os.W_OK) else None


def _measure(arguments: EvaluateArguments) -> "dict[str, Measurement]":
    return measure_scenes(arguments) if arguments.metrics == SCENES else measure_dataset(arguments)


def measure_scenes(arguments: EvaluateArguments) -> "dict[str, Measurement]":
    """Ceilings, reconstructions, floors and captions on drawn scenes."""
    from vlv.models.loading import load_autoencoder
    from vlv.scenes import world_of
    from vlv.scenes.scorer import SceneScorer, mirror

    arguments.num = arguments.num or NUM_SCENES
    model, processor = load_autoencoder(arguments.model, arguments.device)
    drawn = world_of(processor.decoder_image_size, arguments.model or BUNDLED, arguments.world)
    arguments.world = drawn.name
    scorer = SceneScorer(
        model,
        processor,
        drawn,
        batch_size=arguments.batch_size,
        num_inference_steps=arguments.num_inference_steps,
        guidance_scale=arguments.guidance_scale,
        seed=arguments.seed,
    )
    pictures = {
        split: [drawn.sample_picture(split, index, arguments.seed) for index in range(arguments.num)]
        for split in drawn.unseen
    }
    metrics = scorer.ceilings(pictures["test"], "test")
    for split, images in pictures.items():
        if split != "test":
            metrics |= scorer.drawings(images, split)
    for split, images in pictures.items():
        metrics |= scorer.reconstructions(images, split)
    metrics |= scorer.floors(pictures["test"], "test")
    if model.caption_head is not None:
        for name, images in {"test": pictures["test"], "mirrored": mirror(pictures["test"]), **pictures}.items():
            metrics |= scorer.captions(images, name)
    return metrics


def measure_dataset(arguments: EvaluateArguments) -> "dict[str, Measurement]":
    """The scores asked for on the images of a dataset."""
    if missing := [name for name in _LIBRARIES if find_spec(name) is None]:
        raise ValueError(
            f"--metrics {arguments.metrics} needs {', '.join(missing)}, not installed: pip install 'vlv[evaluate]'"
        )
    from vlv.evaluation.images import EvaluationData
    from vlv.evaluation.scorer import DatasetScorer
    from vlv.evaluation.work import Work

    data = EvaluationData(
        arguments.dataset, arguments.split, arguments.image_column, arguments.caption_column, arguments.num
    )
    scorer = DatasetScorer(
        data,
        Work(Path(arguments.output).with_suffix(".work")),
        find_scores(arguments.metrics),
        **{option.name: getattr(arguments, option.name) for option in fields(DatasetScorer)[3:]},
    )
    return scorer.measure()


# The settings that the numbers depend on. The device and the batch size do not change them.
_SETTINGS = {
    SCENES: ("world", "num", "seed", "num_inference_steps", "guidance_scale"),
    "captions": ("max_new_tokens", "num_beams", "clip", "sentence_encoder"),
    "reconstruction": ("seed", "num_inference_steps", "guidance_scale", "clip", "feature_extractor"),
    "caption_to_image": (
        *("max_new_tokens", "num_beams", "seed", "num_inference_steps", "guidance_scales", "text_to_image"),
        *("clip", "feature_extractor"),
    ),
    "questions": ("max_new_tokens", "num_beams", "questions", "llm", "shots", "seed", "answer_from"),
}
_OF_SCENES = ("model", "metrics", "output", "batch_size", "device", *_SETTINGS[SCENES])  # the options to measure them
_MODELS = ("clip", "sentence_encoder", "feature_extractor", "text_to_image", "llm")
_OF_DATA = ("dataset", "split", "image_column", "caption_column", "num")
_LIBRARIES = ("datasets", "evaluate", "pycocoevalcap", "torchmetrics")


def _settings(arguments: EvaluateArguments) -> list[str]:
    """The names of the settings that have a value and that the chosen metrics depend on."""
    if arguments.metrics == SCENES:
        return list(_SETTINGS[SCENES])
    families = dict.fromkeys(family for family, _ in find_scores(arguments.metrics))
    names = dict.fromkeys((*_OF_DATA, *(name for family in families for name in _SETTINGS[family])))
    return [name for name in names if getattr(arguments, name) is not None]


def table(metrics: "Mapping[str, Measurement]") -> Table:
    """One line for each metric, with its standard error, if it has one, and what it was measured on."""
    result = Table("metric", "images", "score")
    for column in ("value", "standard error", "n"):
        result.add_column(column, justify="right")
    previous = None
    for name, measured in metrics.items():
        what, images, score = name.split("/")
        if previous not in (None, what):
            result.add_section()
        shown, previous = what.replace("_", " ") if what != previous else "", what
        result.add_row(
            shown,
            images,
            score.replace("_", " "),
            f"{measured.value:.4f}",
            "" if measured.standard_error is None else f"{measured.standard_error:.4f}",
            str(measured.n),
        )
    return result
