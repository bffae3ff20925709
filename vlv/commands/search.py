"""`vlv search`: find images by the words of their captions."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from vlv.arguments import CommandParser
from vlv.files import atomic_writer
from vlv.sheets import SUFFIXES, check_name

if TYPE_CHECKING:
    from vlv.data.caption_index import Found


@dataclass
class SearchArguments:
    num: int = field(default=10, metadata={"help": "Most images to find."})
    images: str | None = field(
        default=None,
        metadata={"help": "Folder that the file names are relative to, for --sheet (default: that of the captions)."},
    )
    sheet: str | None = field(default=None, metadata={"help": f"Picture of what is found ({', '.join(SUFFIXES)})."})
    output: str | None = field(
        default=None, metadata={"help": "Also write what is found to this .jsonl: file_name, text, score."}
    )
    caption_column: str = field(default="text", metadata={"help": "Column of the captions."})

    def __post_init__(self):
        if self.num < 1:
            raise ValueError(f"--num is {self.num}; it must be at least 1.")
        check_name(self.sheet)
        if self.output is not None and Path(self.output).suffix != ".jsonl":
            raise ValueError(f"--output {self.output} must end in .jsonl.")
        if self.output is not None and os.path.exists(self.output):  # it may be the captions themselves
            raise FileExistsError(f"--output {self.output} exists already: move or delete it.")


def main(argv: list[str]) -> None:
    parser = CommandParser(
        SearchArguments,
        prog="vlv search",
        description="Find images by the words of their captions, without looking at the images. Captions score for "
        'each word, and for words that stand together; "double quotes" demand words as they are. Prints file and '
        "caption, the best first.",
        epilog="examples: vlv search 'a red circle on the left' captions.jsonl; "
        "vlv search '\"red circle\" mint' scenes --sheet found.png",
    )
    parser.add_argument("query", metavar="QUERY", help="What to find, in plain words.")
    parser.add_argument(
        "captions",
        metavar="CAPTIONS",
        help=".jsonl, .csv or .parquet file with file_name and text, as vlv caption writes it, or a folder of images "
        "with metadata.jsonl or text files.",
    )
    arguments, inputs = parser.parse(argv)
    from vlv.data.caption_index import CaptionIndex, match_of

    match_of(inputs.query)  # before the captions are read
    found = CaptionIndex(_captions(inputs.captions, arguments.caption_column)).search(inputs.query, arguments.num)
    for each in found:
        print(f"{each.file_name}\t{each.text}")
    if arguments.output is not None:
        with atomic_writer(Path(arguments.output)) as file:
            file.writelines(json.dumps(each._asdict()) + "\n" for each in found)
    if not found:
        from vlv.images import say

        say(f"no caption of {inputs.captions} has these words.")
    elif arguments.sheet is not None:
        captions = Path(inputs.captions)
        folder = arguments.images or (captions if captions.is_dir() else captions.parent)
        _draw(found, Path(folder), inputs.query, Path(arguments.sheet))


def _captions(source: str, column: str) -> Iterator[tuple[str, str]]:
    from vlv.data.caption_file import read_caption_file
    from vlv.data.rows import captions_of

    if os.path.isdir(source):
        from vlv.judging.pairs import DatasetPairs

        for picture in DatasetPairs(source, None, "image", column).pictures():
            yield from ((picture.name, text) for text in picture.captions)
    else:
        for name, value in read_caption_file(source, column).items():
            yield from ((name, text) for text in captions_of(value))


def _draw(found: "list[Found]", folder: Path, query: str, sheet: Path) -> None:
    from processing_vlv import load_image
    from vlv.sheets import Pair, contact_sheet

    pairs = [Pair(load_image(folder / each.file_name), None, each.text) for each in found]
    sheet.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(pairs, query, f"{len(found)} images, the best first", columns=5).save(sheet)
