"""`vlv caption`: write a caption for each image."""

import json
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field

from tqdm import tqdm

from vlv.commands.parser import CommandParser
from vlv.files import atomic_writer
from vlv.images import find_images, read_images


@dataclass
class CaptionArguments:
    model: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a VLV (default: the bundled vlv-tiny, for drawn scenes)."}
    )
    output: str | None = field(
        default=None,
        metadata={
            "help": "File to write, such as captions.jsonl: one JSON object per image with file_name (its path below "
            "the folder given) and text. Written into that folder as metadata.jsonl, it makes it an ImageFolder. "
            "Without --output, the captions are printed, each behind its file's name and a tab."
        },
    )
    batch_size: int = field(default=8, metadata={"help": "Images that are captioned at once."})
    max_new_tokens: int = field(default=300, metadata={"help": "Longest caption, in tokens."})
    num_beams: int = field(default=1, metadata={"help": "Beams of the search; 1 is greedy, the paper uses 4."})
    device: str = field(default="auto", metadata={"help": "cpu, cuda, cuda:1, mps; auto takes the accelerator."})

    def __post_init__(self):
        for name in ("batch_size", "max_new_tokens", "num_beams"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be at least 1.")
        if self.output is not None and not self.output.endswith(".jsonl"):
            raise ValueError(f"--output {self.output} must end in .jsonl, the format that is written.")


def main(argv: list[str]) -> None:
    parser = CommandParser(
        CaptionArguments,
        prog="vlv caption",
        description="Write a caption for each image. An image that cannot be read is reported and left out.",
        epilog="example: vlv caption photos --output captions.jsonl",
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="Image files, and folders to search for images.")
    arguments, inputs = parser.parse(argv)
    files = find_images(inputs.paths)

    # Imported only now: torch would keep --help and wrong arguments waiting.
    from vlv.inference import caption_images
    from vlv.loading import load_captioner

    with atomic_writer(arguments.output) if arguments.output else nullcontext() as file:
        model, processor = load_captioner(arguments.model, arguments.device)
        with tqdm(total=len(files), desc="Captioning", unit="image") as progress:

            def report(problem: str) -> None:
                tqdm.write(f"vlv caption: {problem}", file=sys.stderr)
                progress.update()

            captions = caption_images(
                model,
                processor,
                read_images(files, report),
                batch_size=arguments.batch_size,
                max_new_tokens=arguments.max_new_tokens,
                num_beams=arguments.num_beams,
            )
            for (_, name), caption in captions:
                if file is None:
                    tqdm.write(f"{name}\t{' '.join(caption.split())}")
                else:
                    file.write(json.dumps({"file_name": name, "text": caption}, ensure_ascii=False) + "\n")
                progress.update()
