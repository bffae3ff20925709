"""
What each speed lever of training is worth: the time of a step with it, over the time of a step without.

    python benchmarks/training_levers.py [--levers cache_latents ...] [--model M] [--output FILE]

Each lever is a pair of runs of `vlv train` that differ in nothing else. They take turns, a few steps each, so that
whatever else the machine does meets both alike; the medians of their turns are compared. Data are drawn scenes whose
captions are between one and ten sentences long. Prints a line per lever and writes them all as JSON.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, set_seed
from transformers.utils import is_liger_kernel_available

from vlv.evaluation.results import git_commit
from vlv.scenes import write_scenes
from vlv.stages.base import Stage
from vlv.train import TrainArguments, read_recipe
from vlv.trainer import StageTrainer

RECIPES = Path(__file__).parents[1] / "recipes" / "tiny"
STAGE_1, STAGE_2 = "autoencode", "caption"
BATCHES = 40  # of data, the last of which is for evaluation


@dataclass
class Lever:
    """Settings that switch it on and off, and what both runs share. `handicap` does to the stage without it what no
    setting does."""

    stage: str
    on: dict[str, Any] = field(default_factory=dict)
    off: dict[str, Any] = field(default_factory=dict)
    both: dict[str, Any] = field(default_factory=dict)
    handicap: Callable[[Stage], None] = lambda stage: None


def pad_to_max_length(stage: Stage) -> None:
    """Every caption as long as the longest may be, as the reference implementation does it."""
    collate, length = stage.collate, stage.settings.max_length
    padding = {"input_ids": stage.processor.tokenizer.pad_token_id, "attention_mask": 0, "labels": -100}

    def padded(batch):
        inputs = collate(batch)
        for name, value in padding.items():
            inputs[name] = torch.nn.functional.pad(inputs[name], (0, length - inputs[name].shape[1]), value=value)
        return inputs

    stage.collate = padded


LEVERS = {
    "cache_latents": Lever(STAGE_1, {"cache_latents": True}, {"cache_latents": False}),
    "cache_features": Lever(STAGE_1, {"cache_features": True}, {"cache_features": False}),
    "both caches": Lever(
        STAGE_1,
        {"cache_latents": True, "cache_features": True},
        {"cache_latents": False, "cache_features": False},
    ),
    "cache_features in stage 2": Lever(STAGE_2, {"cache_features": True}, {"cache_features": False}),
    "captions padded to the longest of the batch": Lever(STAGE_2, handicap=pad_to_max_length),
    "group_by_length": Lever(
        STAGE_2,
        {"train_sampling_strategy": "group_by_length"},
        {"train_sampling_strategy": "random"},
        {"max_steps": BATCHES - 1},  # a whole epoch, for its batches are of different lengths
    ),
    "bf16": Lever(STAGE_1, {"bf16": True}, {"bf16": False}),
    "bf16 in stage 2": Lever(STAGE_2, {"bf16": True}, {"bf16": False}),
    "sdpa in stage 2": Lever(STAGE_2, {"attn_implementation": "sdpa"}, {"attn_implementation": "eager"}),
    # These three take time, and are worth it for the memory that they save: see peak_bytes, on a GPU.
    "gradient checkpointing of the UNet": Lever(STAGE_1, {"gradient_checkpointing_parts": ["unet"]}),
    "gradient checkpointing of the encoder": Lever(STAGE_1, {"gradient_checkpointing_parts": ["encoder"]}),
    "gradient checkpointing of the caption head": Lever(STAGE_2, {"gradient_checkpointing_parts": ["caption_head"]}),
    "torch_compile": Lever(STAGE_1, {"torch_compile": True}, {"torch_compile": False}),
    "fused AdamW": Lever(STAGE_2, {"optim": "adamw_torch_fused"}, {"optim": "adamw_torch"}),
}
if is_liger_kernel_available():
    LEVERS["Liger kernels"] = Lever(STAGE_2, {"use_liger_kernel": True}, {"use_liger_kernel": False})


class Stopwatch(TrainerCallback):
    """The time of a whole training, from before its first batch is read, and on a GPU the most memory it took."""

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


def make_data(folder: Path, count: int) -> Path:
    """Drawn scenes, whose captions are repeated between one and ten times."""
    write_scenes(folder, count, split="train")
    file = folder / "metadata.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["text"] = "; ".join([row["text"]] * (1 + number % 10))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def make_run(lever: Lever, settings: dict[str, Any], output_dir: Path) -> tuple[Stage, TrainArguments]:
    """One of a lever's two runs, with its data loaded, and its arguments."""
    argv = [str(RECIPES / f"{lever.stage}.yaml"), "--output_dir", str(output_dir)]
    for name, value in settings.items():
        argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    stage_type, stage_settings, args = read_recipe(argv)
    set_seed(args.seed)
    return stage_type(stage_settings, args), args


def measure(lever: Lever, common: dict[str, Any], rounds: int, folder: Path) -> dict[str, Any]:
    """Both runs of a lever by turns: the median time of a step of each, and the ratio of these."""
    trainers, watches, turns = {}, {}, {}
    for name, settings in (("on", lever.on), ("off", lever.off)):
        stage, args = make_run(lever, {**common, **lever.both, **settings}, folder / name)
        if name == "off":
            lever.handicap(stage)
        trainers[name], watches[name], turns[name] = StageTrainer(stage, args), Stopwatch(args.device), []
        trainers[name].add_callback(watches[name])
    for turn in range(rounds + 1):
        for name, trainer in trainers.items():
            trainer.train()
            if turn:  # the first one warms up
                turns[name].append(watches[name].seconds_per_step)
    on, off = (statistics.median(turns[name]) for name in ("on", "off"))
    peaks = {name: watch.peak_bytes for name, watch in watches.items()}
    return {"seconds_on": on, "seconds_off": off, "ratio": on / off, "peak_bytes": peaks, "turns": turns}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levers", nargs="*", default=list(LEVERS), choices=LEVERS, metavar="NAME", help="which ones")
    parser.add_argument("--model", default="vlv-tiny", help="VLV to train (default: the bundled one)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8, help="steps of each turn")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each run")
    parser.add_argument("--output", type=Path, default=Path("training_levers.json"))
    arguments = parser.parse_args()

    report = {
        "commit": git_commit(),
        "machine": {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
            "cores": os.cpu_count(),
            "torch": torch.__version__,
        },
        "settings": {name: str(value) for name, value in vars(arguments).items() if name != "output"},
        "levers": {},
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        common = {
            "dataset": make_data(folder / "scenes", BATCHES * arguments.batch_size),
            "model": arguments.model,
            "eval_size": arguments.batch_size,
            "max_steps": arguments.steps,
            "per_device_train_batch_size": arguments.batch_size,
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
        }
        for name in arguments.levers:
            found = measure(LEVERS[name], common, arguments.rounds, folder / "runs")
            shutil.rmtree(folder / "runs")
            print(
                "{}: {seconds_on:.3f} s a step, {seconds_off:.3f} s without: {ratio:.2f}".format(name, **found),
                flush=True,
            )
            report["levers"][name] = found
            arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
