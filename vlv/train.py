"""`vlv train RECIPE.yaml [--setting value ...]`, also `accelerate launch -m vlv.train RECIPE.yaml`.

A recipe is a flat YAML file of the stage's settings and of TrainingArguments; the command line has the last word.
"""

import json
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.utils.data import IterableDataset
from transformers import TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from vlv.checks import require_a_batch, require_arguments, require_output_folder
from vlv.commands.parser import CommandParser
from vlv.evaluation.results import git_commit
from vlv.files import locked, replaced_together, writing_to
from vlv.processes import check_launch, said_when_lost
from vlv.sharding import check_fsdp
from vlv.stages import stage_class
from vlv.stages.base import Settings, Stage
from vlv.trainer import StageTrainer, last_whole_checkpoint


@dataclass
class TrainArguments(TrainingArguments):
    """transformers' TrainingArguments with the defaults that suit this project."""

    resume: bool = field(
        default=False, metadata={"help": "Go on from the last training checkpoint in output_dir, if there is one."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Kept off: stages choose their own columns."})
    prediction_loss_only: bool = field(default=True, metadata={"help": "Evaluation gathers losses, no logits."})
    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "Drop the last short batch: no process repeats another one's samples."}
    )
    logging_steps: float = field(default=50, metadata={"help": "Log the loss every so many steps."})
    # A look at the loss on every step would make the CPU wait for the GPU every time.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Replace NaN losses in the log."})
    ddp_timeout: int = field(
        default=3 * 3600,
        metadata={"help": "Seconds that processes wait for each other, also while each encodes its share of images."},
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "How many training checkpoints to keep."})
    report_to: None | str | list[str] = field(
        default="none", metadata={"help": "Where to report to: tensorboard, ..."}
    )

    def __post_init__(self):
        # Trainer allows bf16 on a machine without an accelerator only when told that the CPU is meant.
        self.use_cpu |= not torch.accelerator.is_available()
        self.dataloader_pin_memory &= torch.cuda.is_available()
        # All processes shuffle alike, whatever else each of them draws.
        self.data_seed = self.seed if self.data_seed is None else self.data_seed
        super().__post_init__()


def main(argv: list[str] | None = None) -> None:
    stage_type, settings, args = read_recipe(sys.argv[1:] if argv is None else argv)
    require_arguments(stage_type, settings, args)
    require_output_folder(args)
    check_launch(args.distributed_state)
    check_fsdp(args)
    try:
        with said_when_lost(), locked(args.output_dir) if args.process_index == 0 else nullcontext():
            run(stage_type, settings, args)
    except ImportError as error:  # peft, flash_attn, ...: the library's sentence says how to install it
        raise ValueError(str(error)) from error
    except (OSError, ValueError) as error:
        if str(error).startswith("Caught "):  # DataLoader puts a worker's traceback in front of the worker's sentence
            raise ValueError(str(error).strip().splitlines()[-1].partition(": ")[2]) from error
        raise


def run(stage_type: type[Stage], settings: Settings, args: TrainArguments) -> None:
    """Trains, evaluates and saves."""
    output_dir = Path(args.output_dir)
    set_seed(args.seed)
    stage = stage_type(settings, args)
    if not isinstance(stage.train_dataset, IterableDataset):
        require_a_batch(len(stage.train_dataset), settings, args)
    trainer = StageTrainer(stage, args)
    stage.tell(overview(stage, args))

    if args.world_size > 1:
        set_seed(args.seed + args.process_index)  # each process draws noise of its own
    last = checkpoint_to_resume(stage, args)
    distributed = trainer.accelerator.distributed_type.value  # accelerate forgets it in changed_arguments
    started, commit = time.time(), git_commit()  # of the code that runs, whatever is committed meanwhile
    if last and steps_of(last) == args.max_steps:
        stage.tell(f"{last} has all {args.max_steps} steps: none is trained. A larger max_steps trains longer.")
        trainer.restore(last)
    else:
        trainer.train(resume_from_checkpoint=last and str(last))
    seconds = time.time() - started
    if trainer.state.global_step == 0:
        raise ValueError("No step was trained: the data gave no batch.")

    metrics = trainer.evaluate()
    with trainer.whole_model():
        if trainer.is_world_process_zero():
            stage.model.eval()
            with replaced_together(output_dir) as folder, writing_to(output_dir):
                stage.save(folder)
    with trainer.all_methods():
        metrics |= stage.evaluate()
    if trainer.is_world_process_zero():
        record = {
            "recipe": {**vars(settings), **changed_arguments(args)},
            "seed": args.seed,
            "commit": commit,
            "versions": {
                name: version(name) for name in ("torch", "transformers", "diffusers", "datasets", "accelerate")
            },
            "device": str(args.device),
            "processes": args.world_size,
            "distributed": distributed,
            "steps": trainer.state.global_step,
            "seconds": round(seconds, 1),
            "resumed_from": last.name if last else None,
            "evaluation": metrics,
            "log": trainer.state.log_history,
        }
        (output_dir / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(
            f"{settings.stage}: {output_dir}\n"
            + "\n".join(f"  {name}: {value:.4g}" for name, value in metrics.items())
        )
        if left_out := stage.left_out.summary():
            print(left_out)


def checkpoint_to_resume(stage: Stage, args: TrainArguments) -> Path | None:
    """
    The training checkpoint to start from. Where --resume has nothing to continue, this is said.

    Raises:
        ValueError: when it was trained for more steps than max_steps.
    """
    if not args.resume:
        return None
    last = last_whole_checkpoint(Path(args.output_dir))
    if last is None:
        stage.tell(f"There is no whole training checkpoint in {args.output_dir}: the training starts at step 0.")
        return None
    if 0 < args.max_steps < steps_of(last):
        raise ValueError(f"{last} has more steps than max_steps={args.max_steps}: give a larger max_steps.")
    return last


def steps_of(checkpoint: Path) -> int:
    return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).global_step


def read_recipe(argv: list[str]) -> tuple[type[Stage], Settings, TrainArguments]:
    """Reads the recipe that `argv` names, and the settings after it.

    Raises:
        ValueError: for a recipe that is no flat YAML mapping, names no stage, or has an unknown key.
        FileNotFoundError: when there is no such recipe.
    """
    if not argv or argv[0].startswith("-"):
        recipe_parser(Settings).parse(argv)
    file = Path(argv[0])
    if not file.is_file():
        raise FileNotFoundError(f"There is no recipe {file}; the ones that come with this project are in recipes/.")
    try:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not valid YAML: {error}") from None
    if not isinstance(recipe, dict) or "stage" not in recipe:
        raise ValueError(f"{file} must be a YAML mapping of settings that names its stage, e.g. 'stage: caption'.")

    stage_type = stage_class(recipe["stage"])
    parser = recipe_parser(stage_type.Settings)
    known = [entry.name for kind in (stage_type.Settings, TrainArguments) for entry in fields(kind) if entry.init]
    for key in recipe:
        if key not in known:
            near = get_close_matches(key, known, n=1, cutoff=0)
            raise ValueError(f"{file} has an unknown setting '{key}'; did you mean '{near[0]}'?")
    parser.set_defaults(**recipe)
    settings, args, _ = parser.parse(argv)
    if settings.stage != recipe["stage"]:
        raise ValueError(f"{file} is a recipe for the stage '{recipe['stage']}'; --stage cannot change it.")
    return stage_type, settings, args


def recipe_parser(settings_type: type[Settings]) -> CommandParser:
    """Of a stage's settings and all training arguments; a name cut short is no name, lest a typo pass for another."""
    parser = CommandParser(settings_type, TrainArguments, prog="vlv train", description=__doc__, allow_abbrev=False)
    parser.add_argument("recipe", help="YAML file of settings")
    return parser


def changed_arguments(args: TrainArguments) -> dict[str, Any]:
    """The training arguments that differ from their defaults, as a recipe would give them."""
    defaults = TrainArguments(output_dir=args.output_dir)
    current, plain = args.to_dict(), defaults.to_dict()
    return {name: value for name, value in current.items() if value != plain[name] or name == "output_dir"}


def overview(stage: Stage, args: TrainArguments) -> str:
    """What trains and what is frozen, part by part, and the memory that this takes."""
    lines = [f"{'part':<24} {'trains':>12} {'frozen':>12} {'weights':>10}"]
    for name, part in stage.parts().items():
        lines.append(part_line(name, part))
    lines.append(part_line("all", stage.model))
    gradients = sum(p.numel() * p.element_size() for p in stage.model.parameters() if p.requires_grad)
    lines.append(f"On top of the weights: gradients {gradients / 2**20:.1f} MB,")
    if args.optim in ("adamw_torch", "adamw_torch_fused"):
        lines[-1] += f" AdamW's two moments {2 * gradients / 2**20:.1f} MB,"
    lines[-1] += " activations, cached inputs."
    return "\n".join(lines)


def part_line(name: str, part: nn.Module) -> str:
    parameters = list(part.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    total = sum(p.numel() for p in parameters)
    size = sum(p.numel() * p.element_size() for p in parameters)
    return f"{name:<24} {trained:>12,} {total - trained:>12,} {size / 2**20:>7.1f} MB"


if __name__ == "__main__":
    from vlv.cli import main as command

    sys.exit(command(["train", *sys.argv[1:]]))
