"""What the benchmarks of training share: runs of `vlv train` that take a few steps each turn, and their data."""

import json
import random
import string
import time
from pathlib import Path
from typing import Any

import measure
import torch
from transformers import TrainerCallback

from processing_vlv import VLVProcessor
from vlv.scenes import write_scenes
from vlv.training.recipe import read_recipe
from vlv.training.stage import Stage
from vlv.training.trainer import StageTrainer

RECIPES = Path(__file__).parents[1] / "vlv" / "training" / "recipes" / "tiny"
PADDED = "padded"  # the only one of the paper's settings that `vlv train` does not have


class Stopwatch(TrainerCallback):
    """The time of a whole training, including reading its first batch, and on a GPU its peak memory."""

    def __init__(self, device: torch.device):
        self.device = device

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.began = self.now()

    def on_train_end(self, args, state, control, **kwargs):
        self.seconds_per_step = (self.now() - self.began) / state.global_step
        self.peak_bytes = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None


def pad_to_max_length(stage: Stage) -> None:
    """Pads every caption to the longest length allowed, as the reference implementation does."""
    collate, length = stage.collate, stage.settings.max_length
    padding = {"input_ids": stage.processor.tokenizer.pad_token_id, "attention_mask": 0, "labels": -100}

    def padded(batch):
        inputs = collate(batch)
        for name, value in padding.items():
            inputs[name] = torch.nn.functional.pad(inputs[name], (0, length - inputs[name].shape[1]), value=value)
        return inputs

    stage.collate = padded


def make_data(folder: Path, count: int, processor: VLVProcessor | None) -> Path:
    """Drawn scenes. With a processor, their captions are random letters, whose lengths in tokens are drawn."""
    write_scenes(folder, count, split="train")
    if processor is None:
        return folder
    file = folder / "metadata.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    draw = random.Random(0)
    for row, length in zip(rows, measure.draw_lengths(count), strict=True):
        letters = "".join(draw.choices(string.ascii_lowercase, k=2 * length))
        row["text"] = processor.tokenizer.decode(processor.tokenizer(letters).input_ids[: length - 1])
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def common_settings(model: str, dataset: Path, batch_size: int, steps: int) -> dict[str, Any]:
    """The settings of `vlv train` that all sides share: only training steps, without evaluation or saving."""
    return {
        "dataset": dataset,
        "model": model,
        "eval_size": batch_size,
        "max_steps": steps,
        "per_device_train_batch_size": batch_size,
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "cache_dir": dataset.parent / "cache",
    }


class Side:
    """A run of `vlv train` that takes a few steps each turn."""

    def __init__(self, stage: str, settings: dict[str, Any], output_dir: Path):
        argv = [str(RECIPES / f"{stage}.yaml"), "--output_dir", str(output_dir)]
        # With so few steps, `auto` would switch the caches off.
        caches = {"cache_features": True} | ({"cache_latents": True} if stage == "autoencode" else {})
        for name, value in (caches | settings).items():
            if name != PADDED:
                argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        stage_class, stage_settings, args = read_recipe(argv)
        self.stage = stage_class(stage_settings, args)
        self.stage.prepare()
        if PADDED in settings:
            pad_to_max_length(self.stage)
        self.trainer, self.watch = StageTrainer(self.stage, args), Stopwatch(args.device)
        self.trainer.add_callback(self.watch)

    def __call__(self) -> float:
        """Seconds for an image."""
        self.trainer.train()
        # Frees the gradients and the optimizer's state for the next side.
        self.stage.model.zero_grad()
        self.trainer.optimizer = None
        self.trainer.accelerator.free_memory()
        return self.watch.seconds_per_step / self.trainer.args.per_device_train_batch_size
