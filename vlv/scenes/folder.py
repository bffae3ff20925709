"""A folder of drawn scenes: a Hugging Face ImageFolder with captions."""

import json
import os
import signal
from functools import partial
from multiprocessing import Pool
from pathlib import Path

from tqdm.auto import tqdm

from vlv.scenes.shapes import WORLD
from vlv.scenes.world import World

_MARK = ".vlv-scenes.json"  # hidden from ImageFolder; marks a folder that this command wrote and may replace
_CHUNK = 500


def write_scenes(
    output_dir: str | os.PathLike, num: int, seed: int = 0, split: str = "test", world: World = WORLD
) -> Path:
    """Draw `num` scenes of a world's split into a Hugging Face ImageFolder.

    The folder gets 000000.png, 000001.png, ... and metadata.jsonl with the columns `file_name`, `text` (the caption)
    and `short` (the list of a scene's `short_captions`). metadata.jsonl is written last and atomically, so an
    interrupted run leaves none. The same arguments give the same files.

    Returns:
        the folder.

    Raises:
        ValueError: when `num` is not positive or the split unknown.
        FileExistsError: when the folder holds anything but an earlier output of this function.
    """
    if num < 1:
        raise ValueError(f"The number of scenes must be at least 1, not {num}.")
    world.key(split, 0, seed)
    settings = {"num": num, "seed": seed, "split": split, "world": world.name}
    folder = _prepare_folder(Path(output_dir), settings)

    chunks = [range(start, min(start + _CHUNK, num)) for start in range(0, num, _CHUNK)]
    write_chunk = partial(_write_chunk, folder, world, split, seed)
    rows = []
    with tqdm(total=num, desc=f"Drawing {split} scenes", unit="scene") as progress:
        if len(chunks) == 1:
            rows += write_chunk(chunks[0])
            progress.update(num)
        else:
            # The parent handles Ctrl-C, and the end of this block ends the workers.
            with Pool(min(len(chunks), os.cpu_count() or 1), signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
                for written in pool.imap(write_chunk, chunks):
                    rows += written
                    progress.update(len(written))

    unfinished = folder / ".metadata.jsonl.unfinished"
    unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    unfinished.replace(folder / "metadata.jsonl")
    return folder


def _prepare_folder(folder: Path, settings: dict) -> Path:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; name a folder to write the scenes to.")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()) and not (folder / _MARK).exists():
        raise FileExistsError(
            f"{folder} is not empty and was not written by this command; name a new or empty folder."
        )
    (folder / _MARK).write_text(json.dumps(settings) + "\n", encoding="utf-8")
    (folder / "metadata.jsonl").unlink(missing_ok=True)
    for picture in folder.glob("[0-9]" * 6 + ".png"):
        picture.unlink()
    return folder


def _write_chunk(folder: Path, world: World, split: str, seed: int, indices: range) -> list[dict]:
    rows = []
    for index in indices:
        picture, scene = world.sample_picture(split, index, seed)
        name = f"{index:06d}.png"
        picture.save(folder / name)
        rows.append({"file_name": name, "text": scene.caption, "short": list(scene.short_captions())})
    return rows
