"""`vlv info`: what a VLV is made of, and what stage 1 holds in memory."""

from math import prod
from pathlib import Path

from vlv import BUNDLED, find_bundled
from vlv.arguments import CommandParser


def main(argv: list[str]) -> None:
    parser = CommandParser(
        prog="vlv info",
        description="Print the parts of a VLV with their parameters, and their bytes in fp32 and bf16. Only the "
        "config is read, no weights. Of a recipe of stage 1 that names its parts, also print what a step holds in "
        "memory on one device.",
        epilog="examples: vlv info my-vlv; vlv info stage1-sana",
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL_OR_CONFIG_OR_RECIPE",
        help="Folder or Hub id of a VLV, a config.json, or a recipe: a YAML file or the name of one in the package "
        f"(default: the bundled {BUNDLED}).",
    )
    (inputs,) = parser.parse(argv)

    # Imported only now, because importing torch would delay --help and the errors of wrong arguments.
    from vlv.models.info import count_parts, format_parts
    from vlv.models.loading import read_config
    from vlv.training.recipe import recipe_names

    source = find_bundled(inputs.model)
    if Path(source).suffix in (".yaml", ".yml") or (source in recipe_names() and not Path(source).exists()):
        _print_recipe(source)
    else:
        print(format_parts(count_parts(read_config(source))))
        _print_prompts(source)


def _print_prompts(source):
    """The styles of a model that takes prompts; nothing of another one, or of a config alone."""
    from transformers import ProcessorMixin

    if Path(source).is_file():
        return
    try:
        settings, _ = ProcessorMixin.get_processor_dict(source)
    except OSError:
        return
    if settings.get("takes_prompts"):
        styles = settings.get("styles") or {}
        print(f"\nIt takes prompts{', and has the styles:' if styles else '.'}")
        for name, prompt in styles.items():
            print(f"  {name}: {prompt}")


def _print_recipe(name):
    from vlv.models.info import count_parts, format_parts
    from vlv.models.memory import format_memory, recipe_config, stage1_memory
    from vlv.training.recipe import find_recipe, read_recipe_file

    settings = read_recipe_file(find_recipe(name))
    config = recipe_config(settings)
    batch_size, half = settings.get("per_device_train_batch_size", 8), bool(settings.get("bf16"))
    print(format_parts(count_parts(config)))
    print()
    print(f"A step on one device, {'under bf16 autocast' if half else 'in fp32'}, without gradient checkpointing:")
    vision = config.encoder_config.vision_config
    size = settings.get("encoder_image_size", 768)  # as Florence-2's own processor
    image_tokens = (size // prod(vision.patch_stride)) ** 2 + 1
    muon = settings.get("muon_learning_rate") is not None
    print(format_memory(stage1_memory(config, settings.get("train_parts"), batch_size, half, image_tokens, muon)))
    print("The estimate counts what autograd keeps of one forward pass, without running it.")
