"""Decides whether the output of frozen parts is computed once per image and kept on disk."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from transformers import TrainingArguments
from transformers.hf_argparser import string_to_bool

# The cache may take this share of the free disk space. The rest is for checkpoints and for other users of the disk.
COMFORTABLE = 0.5

AUTO = "auto"


def parse_switch(name: str, value: bool | str) -> bool | str:
    """`True`, `False` or `"auto"`, from a recipe's or a command line's spelling; raises ValueError for others."""
    if isinstance(value, str) and value.lower() == AUTO:
        return AUTO
    try:
        return string_to_bool(value)
    except Exception as error:  # argparse's own, or an AttributeError for a number
        raise ValueError(f"{name} is {value!r}: give auto, true or false.") from error


def times_seen(rows: int, args: TrainingArguments) -> float:
    """How often the training sees each image."""
    if args.max_steps <= 0:
        return args.num_train_epochs
    return args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size / rows


@dataclass
class Cost:
    """The cost of a cache: the bytes that must still be written, and the free bytes on its disk."""

    missing: int
    free: int

    def __str__(self) -> str:
        return f"{self.missing / 1e9:,.3g} GB of the {self.free / 1e9:,.3g} GB that are free"


def choose(
    switches: Mapping[str, bool | str], seen: float, cost: Callable[[tuple[str, ...]], Cost]
) -> dict[str, tuple[bool, str]]:
    """
    Decides which caches are on.

    Args:
        switches: the settings of the caches and their values, the smallest cache first.
        seen: how often each image is used.
        cost: names of settings -> the cost of their caches together.

    Returns:
        For each setting, whether its cache is on; and the reason, if its value is `"auto"`.
    """
    chosen = {name: (value is True, "") for name, value in switches.items()}
    auto = [name for name, value in switches.items() if value == AUTO]
    while auto:
        needed = cost(tuple(name for name in switches if chosen[name][0] or name in auto))
        fits = needed.missing <= COMFORTABLE * needed.free
        if not needed.missing:
            reason = "it is on the disk already"
        elif seen <= 1:
            reason = f"each image is used {seen:.2g} times, and a cache pays from the second time on"
        else:
            reason = f"it {'takes' if fits else 'would take'} {needed}, and each image is used {seen:,.3g} times"
        if not needed.missing or (seen > 1 and fits):
            return chosen | dict.fromkeys(auto, (True, reason))
        chosen[auto.pop()] = (False, reason)
    return chosen
