"""The base class of all stages."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from PIL.Image import Image
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainingArguments

from vlv.data.rows import captions_of, load_rows, reading, require_column, require_text, row_number
from vlv.training.cache import as_tensors, compute_once
from vlv.training.checks import groups_by_length, require_separate, require_sources
from vlv.training.examples import squeeze
from vlv.training.failures import LeftOut
from vlv.training.muon import MuonAndOther, matrices_of, require_muon
from vlv.training.samples import Samples


@dataclass
class Settings:
    """The settings of every stage, besides the Trainer's own arguments."""

    stage: str | None = field(default=None, metadata={"help": "Which stage the recipe trains."})
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Folder of images (ImageFolder, with captions in its metadata.jsonl), of parquet files or of"
            " WebDataset tars; or a folder that save_to_disk wrote; or a dataset on the Hub."
        },
    )
    train_split: str | None = field(
        default=None, metadata={"help": "Split of `dataset` to train on (default: train)."}
    )
    eval_dataset: str | None = field(
        default=None,
        metadata={"help": "Folder or dataset to evaluate on (default: rows of `dataset` are held out)."},
    )
    eval_split: str | None = field(default=None, metadata={"help": "Split of `eval_dataset` to evaluate on."})
    eval_size: int = field(default=500, metadata={"help": "How many images to evaluate on."})
    image_column: str = field(default="image", metadata={"help": "Column that holds the images."})
    caption_column: str = field(
        default="text", metadata={"help": "Column that holds the captions: one per image, or a list."}
    )
    cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder for what is computed once per image before training (default: cache in output_dir). Runs"
            " with the same folder share it."
        },
    )
    muon_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Train the matrices of linear layers and convolutions by Muon at this rate, and all other weights"
            " by AdamW as before (default: AdamW for all). Not with FSDP or DeepSpeed."
        },
    )


class Stage:
    """One training run: its data, its model, what trains, and what is saved.

    The constructor is cheap: it checks the settings and sets `model`, so that the overview can be printed. Then
    `prepare` reads the data, which may take hours, and sets `train_dataset` and `eval_dataset`. `model(**batch)`
    returns at least `{"loss": ...}`, so that the stock Trainer can train it.
    """

    Settings = Settings
    smooths_labels = False  # whether the loss uses label_smoothing_factor

    model: nn.Module
    train_dataset: torch.utils.data.Dataset
    eval_dataset: torch.utils.data.Dataset

    def __init__(self, settings: Settings, args: TrainingArguments):
        self.settings, self.args = settings, args
        require_sources(settings)
        if settings.muon_learning_rate is not None:
            require_muon(settings.muon_learning_rate, args)
        roots = [folder for folder in (settings.dataset, settings.eval_dataset) if folder and os.path.isdir(folder)]
        self.left_out = LeftOut(Path(args.output_dir), settings.image_column, roots)

    def check(self) -> None:
        """Raises ValueError, before `prepare`, for settings with which the training could not start after it."""
        if self.settings.muon_learning_rate is not None and not matrices_of(self.model):
            parts = ", ".join(sorted({name.partition(".")[0] for name in self.trained()}))
            raise ValueError(f"muon_learning_rate is set, but no matrix of a layer trains, only {parts}.")
        if groups_by_length(self.args) and type(self).lengths is Stage.lengths:
            raise ValueError(
                f"group_by_length: the samples of stage '{self.settings.stage}' all have the same length."
            )

    def prepare(self) -> None:
        """Reads the data, computes the caches, and sets `train_dataset` and `eval_dataset`."""
        raise NotImplementedError

    @property
    def cache_folder(self) -> Path:
        return Path(self.settings.cache_dir or Path(self.args.output_dir) / "cache")

    def tell(self, line: str) -> None:
        """Prints a line about the run. Only the first process prints."""
        if self.args.process_index == 0:
            print(line, flush=True)

    def learning_rates(self) -> dict[nn.Parameter, float]:
        """The rates of the parameters that do not use the Trainer's `learning_rate`."""
        return {}

    def optimizer(self, optimizer: Optimizer) -> Optimizer:
        """The optimizer to train with, made of that which the Trainer's arguments ask for."""
        rate = self.settings.muon_learning_rate
        if rate is None:
            return optimizer
        return MuonAndOther(optimizer, matrices_of(self.model), rate)

    def load_data(self, streaming: bool = False) -> tuple[Dataset | IterableDataset, Dataset]:
        """The rows to train on and the rows to evaluate on. No row is in both.

        An exception: streamed rows to train on still hold the rows to evaluate on, if both come from one split.
        """
        settings = self.settings
        if settings.dataset is None:
            raise ValueError("There is nothing to train on: give the folder of images with --dataset.")
        if settings.eval_size < 1:
            raise ValueError(f"eval_size is {settings.eval_size}: evaluate on at least 1 image.")
        if self.args.process_index == 0 and not self.args.resume:
            self.left_out.clear()
        train, evaluation = self.load_rows(settings.dataset, settings.train_split, streaming), None
        if settings.eval_dataset or settings.eval_split:
            evaluation = self.load_rows(settings.eval_dataset or settings.dataset, settings.eval_split, streaming)
            require_separate(settings, train, evaluation)
        if streaming:
            source = train if evaluation is None else evaluation
            with reading(settings.dataset if evaluation is None else settings.eval_dataset or settings.dataset):
                first = list(source.take(settings.eval_size + 1))  # one more, to know whether a row is left
            if evaluation is None:
                self.require_rest(len(first))
            evaluation = Dataset.from_list(first[: settings.eval_size], features=source.features)
        elif evaluation is not None:
            evaluation = evaluation.select(range(min(settings.eval_size, len(evaluation))))
        else:
            self.require_rest(len(train))
            split = train.train_test_split(test_size=settings.eval_size, seed=self.args.seed)
            train, evaluation = split["train"], split["test"]
        for name, rows in (("dataset", train), ("eval_dataset", evaluation)):
            if isinstance(rows, Dataset) and len(rows) == 0:
                raise ValueError(f"There are no rows in {getattr(settings, name) or settings.dataset}.")
        return train, evaluation

    def load_rows(self, dataset: str, split: str | None, streaming: bool) -> Dataset | IterableDataset:
        with reading(dataset):
            return load_rows(dataset, split, streaming)

    def require_rest(self, count: int) -> None:
        """Raises ValueError when no row of `count` is left after eval_size rows are held out."""
        settings = self.settings
        if count <= settings.eval_size:
            raise ValueError(
                f"{settings.dataset} has {count} rows, of which eval_size={settings.eval_size} are to be held out:"
                " make eval_size smaller, or give another eval_dataset."
            )

    def read_once(
        self,
        rows: Dataset,
        read: Callable[[Image], dict[str, torch.Tensor]],
        compute: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
        key: Sequence[Any],
        description: str,
    ) -> tuple[Dataset, Dataset]:
        """The rows whose images can be read, and the results of `compute` (see `compute_once`)."""
        column = self.settings.image_column
        require_column(rows, column, "image_column")
        cached = compute_once(rows, column, read, compute, key, self.cache_folder, self.args, description)
        reasons = {number: reason for number, reason in enumerate(cached["unreadable"][:]) if reason}
        return self.leave_out(reasons, rows, cached)

    def read_images(self, rows: Dataset, size: int) -> tuple[Dataset, torch.Tensor]:
        """The rows whose images can be read, and the images: uint8 (N, 3, size, size), in memory."""
        rows, cached = self.read_once(rows, partial(squeeze, size=size), _images, [size], "Reading images")
        return rows, as_tensors(cached, torch.uint8)[:]["images"]

    def captioned(self, rows: Dataset) -> Dataset:
        """The rows that have a caption."""
        require_column(rows, self.settings.caption_column, "caption_column")
        require_text(rows, self.settings.caption_column)
        captions = enumerate(rows[self.settings.caption_column][:])
        reasons = {number: "there is no caption." for number, value in captions if not captions_of(value)}
        return self.leave_out(reasons, rows)[0]

    def leave_out(self, reasons: dict[int, str], *datasets: Dataset) -> Sequence[Dataset]:
        """
        The datasets, which have the same rows, without the rows in `reasons`. The reasons go to `failures.jsonl`.

        Raises:
            ValueError: when no row is left.
        """
        if not reasons:
            return datasets
        rows = datasets[0]
        if len(reasons) == len(rows):
            raise ValueError(f"None of the {len(rows)} rows can be used; the first: {reasons[0]}")
        if self.args.process_index == 0:
            for number, reason in reasons.items():
                self.left_out.add(rows[number], row_number(rows, number), reason)
        kept = [number for number in range(len(rows)) if number not in reasons]
        return [dataset.select(kept) for dataset in datasets]

    def lengths(self) -> list[int]:
        """The length of each sample to train on, for batches of similar length. Not where all have the same."""
        raise NotImplementedError

    def parts(self) -> dict[str, nn.Module]:
        """The parts of the model by name, for the overview at the start."""
        return {type(self.model).__name__: self.model}

    def trained(self) -> dict[str, nn.Parameter]:
        """The weights that train, by name."""
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}

    def state(self) -> dict[str, torch.Tensor]:
        """The tensors in a training checkpoint, by name: the weights that train. Frozen ones are in their source."""
        return dict(self.trained())

    def collate(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The dataset's batch -> the model's inputs."""
        return batch

    def loss_function(self) -> Callable[..., torch.Tensor] | None:
        """The Trainer's `compute_loss_func`. `None` if the model computes the loss itself."""
        return None

    def callbacks(self) -> list[TrainerCallback]:
        return []

    def finish(self) -> None:
        """Called when all steps are trained, before the final evaluation."""

    def samples(self) -> Samples | None:
        """The model's output for a few evaluation rows, for people to look at after each evaluation."""
        return None

    def save(self, folder: Path) -> None:
        """Writes the trained model in its native format."""
        raise NotImplementedError

    def evaluate(self) -> dict[str, float]:
        """Measures the trained model on the evaluation rows, with this stage's own metrics."""
        return {}


def _images(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"images": batch["images"]}
