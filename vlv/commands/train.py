"""`vlv train`: train or fine-tune with a recipe."""

import os
from contextlib import nullcontext
from pathlib import Path

ACCELERATE = Path(__file__).parents[1] / "training" / "accelerate"


def main(argv: list[str]) -> None:
    if argv[:1] == ["--accelerate_config"]:
        return launch(argv[1:])

    # Imported only now, because importing torch would delay the --help of other commands.
    from vlv.files import locked
    from vlv.processes import check_launch, working_together
    from vlv.training.checks import require_arguments, require_output_folder
    from vlv.training.recipe import overview_of_recipes, read_recipe
    from vlv.training.run import run
    from vlv.training.sharding import check_fsdp

    if not argv or argv[0] in ("-h", "--help"):
        print(overview_of_recipes())
        if not argv:
            raise ValueError("Name a recipe: a YAML file, or one of the recipes above.")
        raise SystemExit(0)
    if argv[0].startswith("-"):
        raise ValueError(f"The recipe comes first: vlv train RECIPE {' '.join(argv)}")

    stage_type, settings, args = read_recipe(argv)
    require_arguments(stage_type, settings, args)
    require_output_folder(args)
    check_launch(args.distributed_state)
    check_fsdp(args)
    try:
        with working_together(), locked(args.output_dir) if args.process_index == 0 else nullcontext():
            run(stage_type, settings, args)
    except ImportError as error:  # peft, flash_attn, ...: the library's sentence says how to install it
        raise ValueError(str(error)) from error
    except (OSError, ValueError) as error:
        if str(error).startswith("Caught "):  # DataLoader writes a worker's traceback before the worker's message
            raise ValueError(str(error).strip().splitlines()[-1].partition(": ")[2]) from error
        raise


def launch(argv: list[str]) -> None:
    """
    Start the processes of a configuration of accelerate, each with the rest of the command line.

    Args:
        argv: the configuration, a YAML file or the name of one in the package; options of `accelerate launch`; then
            the recipe and its settings.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser

    names = sorted(file.stem for file in ACCELERATE.glob("*.yaml"))
    if not argv:
        raise ValueError(f"--accelerate_config wants a YAML file, or one of {', '.join(names)}.")
    config, *rest = argv
    file = config if os.path.isfile(config) else ACCELERATE / f"{config}.yaml"
    if not os.path.isfile(file):
        raise FileNotFoundError(
            f"--accelerate_config {config}: there is no such file, and the package has {', '.join(names)}."
        )
    # accelerate reads its own options up to the module, and passes everything after it to the module.
    recipe = next((place for place, word in enumerate(rest) if is_recipe(word)), None)
    if recipe is None:
        raise ValueError(f"--accelerate_config {config}: name a recipe after it.")
    options, training = rest[:recipe], rest[recipe:]
    launch_command(
        launch_command_parser().parse_args(["--config_file", str(file), *options, "-m", "vlv.train", *training])
    )


def is_recipe(word: str) -> bool:
    """Whether a word is the recipe, and not an option of `accelerate launch` or its value."""
    from vlv.training.recipe import recipe_names

    return word.endswith((".yaml", ".yml")) or word in recipe_names()
