"""`vlv demo`: caption and rebuild drawn scenes that the bundled checkpoint never saw."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from vlv import BUNDLED
from vlv.arguments import CommandParser, check_seed
from vlv.files import atomic_writer, locked, writing_to
from vlv.scenes import World, world_of, write_scenes
from vlv.scenes.folder import MARK
from vlv.sheets import Pair, contact_sheet

NUM_SCENES = 12
UNSEEN_ARTIST = 4  # of them are by an artist that no training saw, in a world that has artists


@dataclass
class DemoArguments:
    output: str = field(
        default="demo",
        metadata={
            "help": "Folder for the drawn scenes, captions.jsonl and reconstructions.png: new, empty, or an earlier "
            "output of this command, which is replaced."
        },
    )
    model: str | None = field(
        default=None, metadata={"help": f"Folder or Hub id of another VLV (default: the bundled {BUNDLED})."}
    )
    seed: int = field(default=0, metadata={"help": "Another seed draws other scenes."})
    device: str = field(default="auto", metadata={"help": "cpu, cuda, cuda:1, mps; auto takes the accelerator."})

    def __post_init__(self):
        check_seed(self.seed)


def main(argv: list[str]) -> None:
    parser = CommandParser(
        DemoArguments,
        prog="vlv demo",
        description=f"Draw {NUM_SCENES} scenes that the model never saw, caption them, and rebuild them from their "
        "caption embeddings. The scenes are those of the model's world.",
    )
    (arguments,) = parser.parse(argv)
    folder = Path(arguments.output)
    _check(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder), writing_to(folder):
        _run(arguments, folder)


def _check(folder: Path) -> None:
    """Raises FileExistsError for a folder with other files than an earlier output of this command."""
    # A killed run may have left its lock file and nothing else.
    is_used = folder.is_dir() and any(entry.name != ".lock" for entry in folder.iterdir())
    if is_used and not (folder / "scenes" / MARK).exists():
        raise FileExistsError(
            f"{folder} is not empty and was not written by this command; name a new or empty folder with --output."
        )


def _run(arguments: DemoArguments, folder: Path) -> None:
    # Imported only now, because importing torch would delay --help and the errors of wrong arguments.
    from processing_vlv import load_image
    from vlv.captioning.captioner import Captioner
    from vlv.captioning.settings import Decoding
    from vlv.models.loading import load_autoencoder
    from vlv.models.rebuilding import reconstruct_images, see

    model, processor = load_autoencoder(arguments.model, arguments.device)
    drawn = world_of(processor.decoder_image_size, arguments.model or BUNDLED)
    truths = _draw(drawn, folder, arguments.seed)
    images = [(name, load_image(folder / name)) for name in truths]
    captioner = Captioner(model, processor, Decoding(), batch_size=8)
    progress = tqdm(captioner.caption_images(images), desc="Captioning", total=NUM_SCENES, unit="image")
    captions = {name: best.text for name, (best, *_) in progress}
    seen = ((name, see(processor, image)) for name, image in images)
    progress = tqdm(reconstruct_images(model, seen), desc="Rebuilding", total=NUM_SCENES, unit="image")
    pairs = [
        Pair(image, reconstruction, _label(name, captions[name]), captions[name] == truths[name])
        for name, image, reconstruction in progress
    ]

    with atomic_writer(folder / "captions.jsonl") as file:
        for name, caption in captions.items():
            file.write(json.dumps({"file_name": name, "text": caption}) + "\n")
    sheet = contact_sheet(
        pairs,
        "Vision, language, vision",
        "Left: drawn scenes that the model never saw. Right: rebuilt from their caption embeddings alone. "
        "Below: the caption it wrote.",
    )
    sheet.save(folder / "reconstructions.png")

    Console().print(_table([(name, captions[name], truths[name]) for name in truths]))
    right = sum(captions[name] == truths[name] for name in truths)
    print(f"{right} of {NUM_SCENES} captions are exactly right.")
    print(f"The captions are in {folder / 'captions.jsonl'}; look at {folder / 'reconstructions.png'}.")


def _draw(drawn: World, folder: Path, seed: int) -> dict[str, str]:
    """Draw scenes into folders of `folder`. Returns their true captions by file."""
    numbers = {"scenes": ("test", NUM_SCENES)}
    if "artist" in drawn.splits:
        numbers = {"scenes": ("test", NUM_SCENES - UNSEEN_ARTIST), "unseen-artist": ("artist", UNSEEN_ARTIST)}
    truths = {}
    for name, (split, num) in numbers.items():
        scenes = write_scenes(folder / name, num, seed, split, drawn)
        rows = map(json.loads, (scenes / "metadata.jsonl").read_text(encoding="utf-8").splitlines())
        truths |= {f"{name}/{row['file_name']}": row["text"] for row in rows}
    return truths


def _label(name: str, caption: str) -> str:
    return f"An artist it never saw: {caption}" if name.startswith("unseen-artist") else caption


def _table(rows: list[tuple[str, str, str]]) -> Table:
    """File, caption and true caption side by side, wrapped to the terminal's width."""
    table = Table("", "file", "caption", "drawn", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for name, caption, truth in rows:
        mark = Text("✓", "green") if caption == truth else Text("✗", "red")
        table.add_row(mark, name, Text(caption), Text(truth))
    return table
