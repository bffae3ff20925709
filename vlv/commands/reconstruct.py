"""`vlv reconstruct`: rebuild images from their caption embeddings, and show them beside the originals."""

import errno
import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from vlv import BUNDLED
from vlv.arguments import CommandParser, check_seed
from vlv.files import locked, writing_to
from vlv.images import ImageFile, find_images, read_images
from vlv.sheets import Pair, contact_sheet, side_by_side

CONTACT_SHEET = "contact_sheet.png"
ON_SHEET = 60  # pairs; no viewer could open a sheet of thousands


@dataclass
class ReconstructArguments:
    output: str = field(
        metadata={
            "help": "Folder to write to: one PNG per image, the original on the left and the reconstruction on the "
            f"right, and {CONTACT_SHEET} with the first {ON_SHEET} of them."
        }
    )
    model: str | None = field(
        default=None,
        metadata={"help": f"Folder or Hub id of a VLV (default: the bundled {BUNDLED}, for drawn scenes)."},
    )
    num_inference_steps: int = field(default=8, metadata={"help": "Sampling steps: more are slower and finer."})
    guidance_scale: float = field(
        default=2.0, metadata={"help": "How closely to follow the embeddings; 1 switches guidance off."}
    )
    num_queries: int | None = field(
        default=None,
        metadata={
            "help": "Read only so many of the leading caption embeddings, for a model that was trained with "
            "nested_queries (default: all)."
        },
    )
    text: str | None = field(
        default=None,
        metadata={"help": "Words to add to each image, for teachers whose text encoder the model holds."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the noise that sampling starts from."})
    batch_size: int = field(default=8, metadata={"help": "Images to rebuild at once."})
    device: str = field(default="auto", metadata={"help": "cpu, cuda, cuda:1, mps; auto takes the accelerator."})

    def __post_init__(self):
        for name in ("num_inference_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be at least 1.")
        check_seed(self.seed)


def main(argv: list[str]) -> None:
    parser = CommandParser(
        ReconstructArguments,
        prog="vlv reconstruct",
        description="Rebuild each image from its caption embeddings alone, and show it beside the original. An image "
        "that cannot be read is reported and left out.",
        epilog="example: vlv reconstruct photos --output rebuilt",
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="Image files, and folders to search for images.")
    arguments, inputs = parser.parse(argv)
    files = find_images(inputs.paths)
    folder = Path(arguments.output)
    targets = _targets(files, folder)

    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        _rebuild(files, targets, folder, arguments)
    print(folder / CONTACT_SHEET)


def _rebuild(
    files: list[ImageFile], targets: dict[ImageFile, Path], folder: Path, arguments: ReconstructArguments
) -> None:
    # Imported only now, because importing torch would delay --help and the errors of wrong arguments.
    from vlv.models.loading import load_autoencoder
    from vlv.models.rebuilding import reconstruct_images, see

    model, processor = load_autoencoder(arguments.model, arguments.device, caption_config=None)
    model.check_num_queries(arguments.num_queries)
    pairs = []
    with tqdm(total=len(files), desc="Rebuilding", unit="image") as progress, writing_to(folder):

        def report(problem: str) -> None:
            tqdm.write(f"vlv reconstruct: {problem}", file=sys.stderr)
            progress.update()

        rebuilt = reconstruct_images(
            model,
            read_images(files, report, partial(see, processor)),
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            num_inference_steps=arguments.num_inference_steps,
            guidance_scale=arguments.guidance_scale,
            num_queries=arguments.num_queries,
            text=arguments.text,
            tokenizer=processor.decoder_tokenizer,
        )
        for file, image, reconstruction in rebuilt:
            try:
                targets[file].parent.mkdir(parents=True, exist_ok=True)
                side_by_side(image, reconstruction).save(targets[file])
            except OSError as error:
                if error.errno != errno.ENAMETOOLONG:
                    raise
                report(f"left out: {file.path}: its name is too long for {targets[file].name}.")
                continue
            if len(pairs) < ON_SHEET:
                image.thumbnail((512, 512))
                pairs.append(Pair(image, reconstruction, file.name))
            progress.update()
        if not pairs:
            raise ValueError("None of the images could be rebuilt.")
        sheet = contact_sheet(
            pairs, "Reconstructions", f"original on the left, rebuilt on the right: {model.name_or_path}"
        )
        sheet.save(folder / CONTACT_SHEET)


def _targets(files: list[ImageFile], folder: Path) -> dict[ImageFile, Path]:
    """The path of each image's PNG: x.png for x.jpg, but x.jpg.png if several images are called x."""
    stems = Counter(PurePosixPath(file.name).with_suffix("") for file in files)
    targets = {}
    for file in files:
        name = PurePosixPath(file.name)
        stem = name.with_suffix("")
        targets[file] = folder / (f"{name}.png" if stems[stem] > 1 else f"{stem}.png")
    originals = {file.path.resolve() for file in files}
    for target in (*targets.values(), folder / CONTACT_SHEET):
        if target.resolve() in originals:
            raise ValueError(f"--output {folder} would overwrite the image {target}; choose another folder.")
    return targets
