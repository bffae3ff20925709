"""`vlv scenes`: draw the demo data set."""

from dataclasses import dataclass, field
from typing import Literal

from vlv.commands.parser import CommandParser
from vlv.files import locked, writing_to
from vlv.scenes import write_scenes


@dataclass
class ScenesArguments:
    output: str = field(
        metadata={
            "help": "Folder to write to: new, empty, or an earlier output of this command, which is replaced. "
            "It becomes an ImageFolder: PNG files and a metadata.jsonl with the columns file_name, text (the caption) "
            "and short (one description per object and one of the background)."
        }
    )
    num: int = field(default=100, metadata={"help": "How many scenes to draw."})
    seed: int = field(default=0, metadata={"help": "Another seed draws other scenes; the same one, the same files."})
    split: Literal["train", "validation", "test", "novel"] = field(
        default="test",
        metadata={
            "help": "Which scenes to draw. The four share no scene, nor the mirror image of one: train is what "
            "vlv-tiny learned from; novel scenes hold a combination of shape, colour and place that occurs in none "
            "of the others."
        },
    )


def main(argv: list[str]) -> None:
    parser = CommandParser(
        ScenesArguments,
        prog="vlv scenes",
        description="Draw scenes of coloured shapes with their exact captions, as a Hugging Face ImageFolder.",
        epilog="example: vlv scenes --num 1000 --output scenes",
    )
    (arguments,) = parser.parse(argv)
    with locked(arguments.output, beside=True), writing_to(arguments.output):
        folder = write_scenes(arguments.output, arguments.num, arguments.seed, arguments.split)
    print(f"{arguments.num} {arguments.split} scenes are in {folder}.")
