"""`vlv scenes`: draw the demo dataset."""

from dataclasses import dataclass, field
from typing import Literal

from vlv.arguments import CommandParser, check_seed
from vlv.files import locked, writing_to
from vlv.scenes import World, world, write_scenes
from vlv.scenes.doodles import Doodles


@dataclass
class ScenesArguments:
    output: str = field(
        metadata={
            "help": "Folder to write to: new, empty, or an earlier output of this command, which is replaced. "
            "It becomes an ImageFolder: PNG files and a metadata.jsonl with the columns file_name, text (the caption) "
            "and short (a list: one description per object, and one of the background)."
        }
    )
    num: int = field(default=100, metadata={"help": "How many scenes to draw."})
    seed: int = field(default=0, metadata={"help": "Seed of the scenes: the same seed gives the same files."})
    split: Literal["train", "validation", "test", "novel", "artist"] = field(
        default="test",
        metadata={
            "help": "Which scenes to draw. The splits train, validation, test and novel have no scene in common, also "
            "when mirrored. The bundled models were trained on train. Novel scenes have a combination (of shape, "
            "colour and place, or of thing and place) that no other split has. artist (emoji world): test scenes by "
            "the artist whose drawings no training sees."
        },
    )
    world: Literal["shapes", "emoji", "doodles"] = field(
        default="emoji",
        metadata={
            "help": "emoji: things drawn by artists, 64 pixels wide, for vlv-emoji. shapes: coloured shapes, 32 "
            "pixels wide, for vlv-tiny. doodles: crayon drawings, 64 pixels wide, with captions of another grammar, "
            "to fine-tune on (splits train and test)."
        },
    )
    max_objects: int = field(
        default=2, metadata={"help": "Most objects of a scene; the bundled models were trained with 2."}
    )
    artwork: str | None = field(
        default=None,
        metadata={
            "help": "World emoji: folder of other drawings, with index.json and one sheet of tiles for each artist."
        },
    )
    artists: list[str] | None = field(
        default=None, metadata={"help": "World emoji: artists to draw, instead of those of the split."}
    )
    varied: float = field(
        default=0.0,
        metadata={
            "help": "World emoji: share of the pictures that is changed as another artist might draw them (recoloured "
            "part by part, bent, outlined), for training."
        },
    )

    prompts: bool = field(
        default=False,
        metadata={
            "help": "Make text a list of descriptions in several styles and of answers to questions, and prompt the "
            "list of what each was asked for. Also write questions.jsonl for vlv evaluate, and styles.json for vlv "
            "train."
        },
    )

    def __post_init__(self):
        check_seed(self.seed)
        if self.world != "emoji":
            for name in ("artwork", "artists", "varied"):
                if getattr(self, name):
                    raise ValueError(f"--{name} is for --world emoji; the world {self.world} has no artists.")
        if self.world == "doodles" and self.max_objects != 2:
            raise ValueError("--max_objects is for the worlds shapes and emoji; doodles have one or two things.")


def main(argv: list[str]) -> None:
    parser = CommandParser(
        ScenesArguments,
        prog="vlv scenes",
        description="Draw scenes with their exact captions, as a Hugging Face ImageFolder.",
        epilog="examples: vlv scenes --num 1000 --output scenes; vlv scenes --artists twemoji --output twemoji-scenes",
    )
    (arguments,) = parser.parse(argv)
    drawn = _world(arguments)
    with locked(arguments.output, beside=True), writing_to(arguments.output):
        folder = write_scenes(
            arguments.output, arguments.num, arguments.seed, arguments.split, drawn, arguments.prompts
        )
    print(f"{arguments.num} {arguments.split} scenes are in {folder}.")


def _world(arguments: ScenesArguments) -> World | Doodles:
    if arguments.world == "doodles":
        return Doodles()
    if arguments.world == "shapes":
        return world("shapes", max_objects=arguments.max_objects)
    from vlv.scenes.artwork import load_artwork

    artwork = load_artwork(arguments.artwork) if arguments.artwork else None
    settings = {"artists": arguments.artists, "varied": arguments.varied, "max_objects": arguments.max_objects}
    return world("emoji", artwork=artwork, **settings)
