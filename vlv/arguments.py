"""The argument parser that all commands share."""

from argparse import Action, ArgumentDefaultsHelpFormatter
from difflib import get_close_matches
from typing import NoReturn

from transformers import HfArgumentParser

LARGEST_SEED = 2**63 - 1  # PyTorch takes up to 2**64 - 1; an evaluation adds the number of an image


def check_seed(seed: int) -> None:
    """Raises ValueError for a --seed that the generators of random numbers do not take."""
    if not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"--seed is {seed}; it must be between 0 and {LARGEST_SEED}.")


class _HelpFormatter(ArgumentDefaultsHelpFormatter):
    """Appends each default to its help, except `None`, which a user cannot give."""

    def _get_help_string(self, action: Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class CommandParser(HfArgumentParser):
    """`HfArgumentParser` whose errors are one line that names the fix.

    Dataclass fields become options. Positional arguments are added with `add_argument`; `parse` returns them as a
    namespace, after the dataclasses.
    """

    def __init__(self, *dataclass_types, **kwargs):
        super().__init__(dataclass_types, formatter_class=_HelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; {self.prog} --help lists the arguments\n")

    def parse(self, argv: list[str]) -> tuple:
        """Parse `argv` into the dataclasses, and the namespace of positional arguments, if there are any."""
        *parsed, unknown = self.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            near = get_close_matches(unknown[0].split("=")[0], known, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            self.error(f"unknown argument {unknown[0]}{hint}")
        return tuple(parsed)
