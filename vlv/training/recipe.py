"""Reads a recipe, and the settings on the command line that override it."""

from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainingArguments

from vlv.arguments import CommandParser
from vlv.training.registry import STAGE_CLASSES, stage_class
from vlv.training.stage import Settings, Stage

RECIPES = Path(__file__).parent / "recipes"
DESCRIPTION = (
    "Train or fine-tune with a recipe: a flat YAML file of a stage's settings and of transformers' TrainingArguments. "
    "A setting on the command line overrides the recipe."
)


@dataclass
class TrainArguments(TrainingArguments):
    """transformers' TrainingArguments with the defaults that suit this project."""

    resume: bool = field(
        default=False,
        metadata={"help": "Continue from the last training checkpoint in output_dir, if there is one."},
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Keep off: stages choose their own columns."})
    prediction_loss_only: bool = field(default=True, metadata={"help": "Evaluation keeps only losses, no logits."})
    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "Drop a short last batch, so that no process repeats another one's samples."}
    )
    logging_steps: float = field(default=50, metadata={"help": "Steps between two logs of the loss."})
    # To look at the loss in every step, the CPU would have to wait for the GPU in every step.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Replace NaN losses in the log."})
    ddp_timeout: int = field(
        default=3 * 3600,
        metadata={"help": "Seconds that processes wait for each other. Each also encodes its share of the images."},
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "How many training checkpoints to keep."})
    report_to: None | str | list[str] = field(
        default="none", metadata={"help": "Where to send the log: tensorboard, wandb, ..."}
    )

    def __post_init__(self):
        # On a machine without an accelerator, Trainer allows bf16 only with use_cpu.
        self.use_cpu |= not torch.accelerator.is_available()
        self.dataloader_pin_memory &= torch.cuda.is_available()
        # All processes must shuffle in the same way, whatever else each of them draws.
        self.data_seed = self.seed if self.data_seed is None else self.data_seed
        super().__post_init__()


def recipe_names() -> list[str]:
    """The recipes that come with this package."""
    return sorted(file.relative_to(RECIPES).with_suffix("").as_posix() for file in RECIPES.rglob("*.yaml"))


def find_recipe(name: str) -> Path:
    """
    A recipe's file: `name` itself, or the recipe of that name that comes with this package.

    Raises:
        FileNotFoundError: when there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    if name in recipe_names():
        return RECIPES / f"{name}.yaml"
    names = recipe_names()
    near = get_close_matches(name.removesuffix(".yaml").removeprefix("recipes/"), names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"the package has {', '.join(names)}."
    raise FileNotFoundError(f"There is no recipe {name}, neither as a file nor in the package; {hint}")


def read_recipe_file(file: Path) -> dict[str, Any]:
    """A recipe as it is written; raises ValueError when it is not a flat YAML mapping, or names no stage."""
    try:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not valid YAML: {error}") from None
    if not isinstance(recipe, dict) or "stage" not in recipe:
        raise ValueError(f"{file} must be a YAML mapping of settings that names its stage, e.g. 'stage: caption'.")
    return recipe


def read_recipe(argv: list[str]) -> tuple[type[Stage], Settings, TrainArguments]:
    """Reads the recipe that `argv` names, and the settings after it.

    Raises:
        ValueError: when the recipe is not a flat YAML mapping, names no stage, or has an unknown key.
        FileNotFoundError: when there is no such recipe.
    """
    file = find_recipe(argv[0])
    recipe = read_recipe_file(file)
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
    """The parser of a stage's settings and all training arguments. It allows no abbreviations: a typo could be one."""
    parser = CommandParser(
        settings_type, TrainArguments, prog="vlv train", description=DESCRIPTION, allow_abbrev=False
    )
    parser.add_argument("recipe", help="YAML file of settings, or the name of a recipe in the package")
    return parser


def overview_of_recipes() -> str:
    """The text of `vlv train --help` without a recipe."""
    return "\n".join(
        [
            "usage: vlv train RECIPE [--setting value ...]",
            "       vlv train --accelerate_config NAME [launch options ...] RECIPE [--setting value ...]",
            "",
            DESCRIPTION,
            "",
            f"recipes in the package: {', '.join(recipe_names())}",
            f"stages: {', '.join(STAGE_CLASSES)}, or a class of your own as package.module:Class",
            "",
            "vlv train RECIPE --help lists the settings of a recipe's stage.",
            "example: vlv train finetune-caption --dataset my_images --output_dir my_captioner",
        ]
    )


def changed_arguments(args: TrainArguments) -> dict[str, Any]:
    """The training arguments that differ from their defaults, as values of a recipe."""
    defaults = TrainArguments(output_dir=args.output_dir)
    current, plain = args.to_dict(), defaults.to_dict()
    return {name: value for name, value in current.items() if value != plain[name] or name == "output_dir"}
