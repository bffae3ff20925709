"""Checks of `vlv train` before any long work: they refuse settings that would train nothing, or nothing useful."""

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from datasets import Dataset, IterableDataset
from transformers import Trainer, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from vlv.files import looks_like_path

if TYPE_CHECKING:
    from vlv.training.stage import Settings, Stage

# Settings that name a folder or a Hub id to read from, and what is expected there.
SOURCES = {
    "dataset": "a folder of images or a dataset on the Hub",
    "eval_dataset": "a folder of images or a dataset on the Hub",
    "model": "the folder or Hub id of a VLV",
    "encoder": "the folder or Hub id of a Florence-2",
    "decoder": "the folder or Hub id of a diffusion model",
    "caption_head": "the folder or Hub id of a language model",
    "vae": "the folder or Hub id of an AutoencoderKL",
}

# The Hub ids of these always have an owner.
OWNED = ("encoder", "decoder", "vae")


def require_arguments(stage_type: type["Stage"], settings: "Settings", args: TrainingArguments) -> None:
    """Raises ValueError for arguments of the Trainer that do not work with this stage."""
    if args.max_steps == 0 or (args.max_steps < 0 and args.num_train_epochs <= 0):
        name = "max_steps" if args.max_steps == 0 else "num_train_epochs"
        raise ValueError(f"{name} is {getattr(args, name):g}, which trains nothing: give at least 1.")
    smoothing = args.label_smoothing_factor
    if smoothing and not stage_type.smooths_labels:
        raise ValueError(
            f"label_smoothing_factor is {smoothing:g}, but the loss of stage '{settings.stage}' has no labels to"
            " smooth: leave it out."
        )
    if not 0 <= smoothing < 1:
        raise ValueError(f"label_smoothing_factor is {smoothing:g}: it must be at least 0 and less than 1.")
    if args.metric_for_best_model not in (None, "loss", "eval_loss"):
        raise ValueError(
            f"metric_for_best_model is {args.metric_for_best_model}: evaluations during training measure only the"
            " loss, so it must be eval_loss."
        )
    if args.remove_unused_columns:
        raise ValueError("remove_unused_columns must stay false: each stage chooses its own columns.")
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except ImportError as error:
        raise ValueError(f"The optimizer {args.optim.value} needs a package that is not installed: {error}") from error
    except ValueError:
        pass  # some optimizers ask for the model, which the Trainer gives them later
    for callback in get_reporting_integration_callbacks(args.report_to):
        try:
            callback()
        except (RuntimeError, ImportError) as error:
            raise ValueError(f"report_to: {error}") from error


def require_output_folder(args: TrainingArguments) -> None:
    """
    Makes the output folder.

    Raises:
        OSError: when it cannot be made, or when it holds training checkpoints and the run does not resume them. The
            checkpoints of both runs would be mixed: Trainer keeps those with the most steps, and a later --resume
            takes the last one.
    """
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"output_dir {folder} is a file: name a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    if not args.resume and (earlier := sorted(folder.glob("checkpoint-*"))):
        raise FileExistsError(
            f"{folder} holds {earlier[-1].name} of an earlier run: continue that run with --resume, choose another"
            " output_dir, or delete its checkpoints."
        )


def require_sources(settings: "Settings") -> None:
    """Raises FileNotFoundError for a setting that names a path that does not exist. The Hub is not asked for it."""
    for name, expected in SOURCES.items():
        source = getattr(settings, name, None)
        if not source or os.path.exists(os.path.expanduser(source)):
            continue
        if looks_like_path(source) or (name in OWNED and "/" not in source):
            raise FileNotFoundError(f"There is no folder {source}, which {name} names; it must be {expected}.")


def groups_by_length(args: TrainingArguments) -> bool:
    """Whether batches shall hold samples of similar length."""
    strategy = getattr(args, "train_sampling_strategy", None)
    return strategy == "group_by_length" or getattr(args, "group_by_length", False)  # transformers 5.0's


def require_at_least_1(settings: "Settings", *names: str) -> None:
    """Raises ValueError for a setting among `names`, a number or a list of them, that is below 1 or empty."""
    for name in names:
        numbers = _numbers(settings, name)
        if min(numbers, default=0) < 1:
            raise ValueError(f"{name} is {' '.join(map(str, numbers)) or 'empty'}: give at least 1.")


def require_multiples(settings: "Settings", **factors: int) -> None:
    """Raises ValueError for a setting among `factors`, a number or a list, that is not a multiple of its factor."""
    require_at_least_1(settings, *factors)
    for name, factor in factors.items():
        numbers = _numbers(settings, name)
        if any(number % factor for number in numbers):
            raise ValueError(f"{name} is {' '.join(map(str, numbers))}: give multiples of {factor}.")


def _numbers(settings: "Settings", name: str) -> list[int]:
    value = getattr(settings, name)
    return value if isinstance(value, list) else [value]


def require_separate(settings: "Settings", train: Dataset | IterableDataset, evaluation: Dataset) -> None:
    """Raises ValueError when the rows to evaluate on are the rows to train on."""
    chosen = [
        (os.path.realpath(source), str(split or rows.split or "train"))
        for source, split, rows in (
            (settings.dataset, settings.train_split, train),
            (settings.eval_dataset or settings.dataset, settings.eval_split, evaluation),
        )
    ]
    if chosen[0] == chosen[1]:
        raise ValueError(
            f"The rows to evaluate on are the rows to train on, split '{chosen[0][1]}' of {settings.dataset}: name"
            " another eval_dataset or eval_split, or leave both out, so that eval_size rows are held out."
        )


def require_a_batch(rows: int, settings: "Settings", args: TrainingArguments) -> None:
    """Raises ValueError when the rows to train on do not fill one batch, so that no step would be trained."""
    batch = args.train_batch_size * args.world_size if args.dataloader_drop_last else 1
    if rows < batch:
        processes = f" on {args.world_size} processes" if args.world_size > 1 else ""
        held_out = "" if settings.eval_dataset or settings.eval_split else f" after eval_size={settings.eval_size}"
        raise ValueError(
            f"{settings.dataset} has {rows} rows to train on{held_out}, but one batch takes {batch}{processes}: add"
            f" images, or lower per_device_train_batch_size{' or eval_size' if held_out else ''}."
        )


def require_finite(logs: dict[str, float], step: int) -> None:
    """Raises ValueError for a loss that is not a number: after it, the model learns nothing."""
    for name, value in logs.items():
        if name.endswith("loss") and not math.isfinite(value):
            raise ValueError(
                f"The {name} is {value} at step {step}, so the training stops: lower learning_rate, or train with"
                " --bf16 or in float32 instead of --fp16. Training checkpoints of earlier steps are kept for --resume."
            )
