"""The shape that all stages share."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from vlv.data import load_rows
from vlv.monitor import Samples


@dataclass
class Settings:
    """What every stage needs to know besides the Trainer's own arguments."""

    stage: str | None = field(default=None, metadata={"help": "Which stage the recipe trains."})
    dataset: str | None = field(
        default=None,
        metadata={"help": "Folder of images (ImageFolder; captions in its metadata.jsonl), or a data set on the Hub."},
    )
    train_split: str | None = field(
        default=None, metadata={"help": "Split of `dataset` to train on (default: train)."}
    )
    eval_dataset: str | None = field(
        default=None,
        metadata={"help": "Folder or data set to evaluate on; without it, rows of `dataset` are held out."},
    )
    eval_split: str | None = field(default=None, metadata={"help": "Split of `eval_dataset` to evaluate on."})
    eval_size: int = field(default=500, metadata={"help": "How many images to evaluate on."})
    image_column: str = field(default="image", metadata={"help": "Column that holds the images."})
    caption_column: str = field(default="text", metadata={"help": "Column that holds the captions."})


class Stage:
    """One training run: its data, its model, what of it trains, what it leaves behind.

    A subclass loads everything in `__init__` and sets `model`, `train_dataset` and `eval_dataset`. `model(**batch)`
    returns at least `{"loss": ...}`, so that the stock Trainer can train it.
    """

    Settings = Settings

    model: nn.Module
    train_dataset: torch.utils.data.Dataset
    eval_dataset: torch.utils.data.Dataset

    def __init__(self, settings: Settings, args: TrainingArguments):
        self.settings, self.args = settings, args

    def load_data(self) -> tuple[Dataset, Dataset]:
        """The rows to train on and the rows to evaluate on, which are never the same."""
        settings = self.settings
        if settings.dataset is None:
            raise ValueError("Nothing to train on: give the folder of images with --dataset.")
        train = load_rows(settings.dataset, settings.train_split)
        if settings.eval_dataset or settings.eval_split:
            evaluation = load_rows(settings.eval_dataset or settings.dataset, settings.eval_split)
            evaluation = evaluation.select(range(min(settings.eval_size, len(evaluation))))
        else:
            if settings.eval_size >= len(train):
                raise ValueError(
                    f"{settings.dataset} has {len(train)} rows, of which eval_size={settings.eval_size} are to be held"
                    " out: make eval_size smaller, or give another eval_dataset."
                )
            split = train.train_test_split(test_size=settings.eval_size, seed=self.args.seed)
            train, evaluation = split["train"], split["test"]
        return train, evaluation

    def parts(self) -> dict[str, nn.Module]:
        """The parts of the model by name, for the overview at the start."""
        return {type(self.model).__name__: self.model}

    def state(self) -> dict[str, torch.Tensor]:
        """What a training checkpoint holds of the model, by name: what trains. The rest lies where it came from."""
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}

    def collate(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What the data set gives for a batch, as the model's inputs."""
        return batch

    def callbacks(self) -> list[TrainerCallback]:
        return []

    def samples(self) -> Samples | None:
        """What the model makes of a few evaluation rows, for people to look at after each evaluation."""
        return None

    def save(self, folder: Path) -> None:
        """Writes the trained model in its native format."""
        raise NotImplementedError

    def evaluate(self) -> dict[str, float]:
        """Measures the trained model against this stage's own target, on the evaluation rows."""
        return {}
