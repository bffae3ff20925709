"""LoRA through peft: the language models train small adapters, and their own weights stay frozen."""

from collections.abc import Set
from dataclasses import dataclass, field, fields
from tempfile import TemporaryDirectory

from torch import nn

from modeling_vlv import VLVModel

# The modules of the parts that can get adapters. The small parts are trained whole.
ADAPTED = {
    "caption_head": ("caption_head",),
    "language_model": ("encoder.language_model.encoder", "encoder.language_model.decoder"),
}
WHOLE = ("prefix_projection", "projection")


@dataclass
class LoraSettings:
    lora_rank: int | None = field(
        default=None,
        metadata={
            "help": "Train the caption head, and the language_model if train_parts names it, through LoRA adapters of"
            " this rank."
        },
    )
    lora_alpha: float = field(default=16, metadata={"help": "Adapters are scaled by lora_alpha / lora_rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of the adapters' inputs."})
    lora_targets: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the layers that get adapters, or all-linear (default: peft's for the model)."},
    )
    merge_lora: bool = field(
        default=False,
        metadata={"help": "Add the adapters to the final weights instead of saving them beside the base model."},
    )


def require_rank(settings: LoraSettings) -> None:
    """Raises ValueError for settings of adapters when there are none."""
    names = [entry.name for entry in fields(LoraSettings) if getattr(settings, entry.name) != entry.default]
    if names and settings.lora_rank is None:
        raise ValueError(f"{', '.join(names)}: there are no adapters without lora_rank, so give it too.")


def add_adapters(model: VLVModel, train_parts: Set[str], settings: LoraSettings) -> None:
    """
    Freezes `model` and adds what trains: adapters for the language models of `train_parts`, and copies of the other
    parts. The adapters' file will hold both, so the base model and this file together are the trained model.

    Raises:
        ValueError: for parts that cannot be trained with LoRA, and for layers that do not exist.
    """
    from peft import LoraConfig

    if others := sorted(train_parts - ADAPTED.keys() - set(WHOLE)):
        raise ValueError(
            f"With lora_rank, train_parts can be {', '.join([*ADAPTED, *WHOLE])}, not {', '.join(others)}."
        )
    adapted = sorted(train_parts & ADAPTED.keys())
    if not adapted:
        raise ValueError(f"lora_rank is given, but train_parts names neither {' nor '.join(ADAPTED)}.")
    model.add_adapter(
        LoraConfig(
            r=settings.lora_rank,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            target_modules=[name for part in adapted for name in target_layers(model, part, settings.lora_targets)],
            modules_to_save=sorted(train_parts & set(WHOLE)),
        )
    )
    model.train(model.training)


def target_layers(model: VLVModel, part: str, targets: list[str] | None) -> list[str]:
    """The full names of a part's layers that get adapters."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    architecture = model.get_submodule(ADAPTED[part][0]).config.model_type
    targets = targets or DEFAULTS.get(architecture)
    if not isinstance(targets, list):
        raise ValueError(f"peft has no default layers for {architecture}: name them with lora_targets, or all-linear.")
    layers = [
        f"{root}.{name}"
        for root in ADAPTED[part]
        for name, module in model.get_submodule(root).named_modules()
        if name.rpartition(".")[2] in targets
        or (
            targets == ["all-linear"] and isinstance(module, nn.Linear) and module is not model.get_output_embeddings()
        )
    ]
    if not layers:
        raise ValueError(
            f"lora_targets {', '.join(targets)}: there are no such layers in the {part}, a {architecture}."
        )
    return layers


def merge_adapters(base: VLVModel, trained: VLVModel) -> VLVModel:
    """`base` with the adapters of `trained` added to its weights: an ordinary model."""
    from peft import PeftModel

    with TemporaryDirectory() as folder:
        trained.save_pretrained(folder)
        return PeftModel.from_pretrained(base, folder).merge_and_unload()
