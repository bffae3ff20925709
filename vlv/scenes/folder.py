"""A folder of drawn scenes: a Hugging Face ImageFolder with captions."""

import json
import os
import signal
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from vlv.scenes.doodles import Doodles
from vlv.scenes.grammar import GridScene
from vlv.scenes.questions import STYLES, ask, describes
from vlv.scenes.shapes import WORLD
from vlv.scenes.world import World

MARK = ".vlv-scenes.json"  # hidden from ImageFolder; marks a folder that this command wrote and may replace
_CHUNK = 500


def write_scenes(
    output_dir: str | os.PathLike,
    num: int,
    seed: int = 0,
    split: str = "test",
    world: World | Doodles = WORLD,
    prompts: bool = False,
) -> Path:
    """Draw `num` scenes of a world's split into a Hugging Face ImageFolder.

    The folder gets 000000.png, 000001.png, ... and metadata.jsonl with the columns `file_name`, `text` (the caption)
    and `short` (the list of a scene's `short_captions`). metadata.jsonl is written last and atomically, so an
    interrupted run leaves none. The same arguments give the same files.

    With `prompts`, `text` is a list: answers to the prompts in the list `prompt`, where "" stands for the caption (see
    `vlv.scenes.questions`). questions.jsonl then has the questions for `vlv evaluate`, and styles.json the styles.

    Returns:
        the folder.

    Raises:
        ValueError: when `num` is not positive, or the split is unknown or lacks scenes of some number of objects.
        FileExistsError: when the folder holds anything but an earlier output of this function.
    """
    if num < 1:
        raise ValueError(f"The number of scenes must be at least 1, not {num}.")
    world.key(split, 0, seed)
    if prompts and isinstance(world, Doodles):
        raise ValueError("Prompts are drawn for the worlds shapes and emoji, not for doodles.")
    if isinstance(world, World):  # raises now, before an earlier output is removed
        for count in range(1, world.max_objects + 1):
            world.sample_scene(split, 0, seed, count)
    settings = {"num": num, "seed": seed, "split": split, "world": world.name}
    if prompts:
        settings["prompts"] = True
    folder = _prepare_folder(Path(output_dir), settings)

    chunks = [range(start, min(start + _CHUNK, num)) for start in range(0, num, _CHUNK)]
    write_chunk = partial(_write_chunk, folder, world, split, seed, prompts)
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

    if prompts:
        _write_lines(folder / "questions.jsonl", [question for row in rows for question in row.pop("questions")])
        (folder / "styles.json").write_text(json.dumps(STYLES, indent=1) + "\n", encoding="utf-8")
    _write_lines(folder / "metadata.jsonl", rows)
    return folder


def _write_lines(file: Path, rows: list[dict]) -> None:
    unfinished = file.with_name(f".{file.name}.unfinished")
    unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    unfinished.replace(file)


def _prepare_folder(folder: Path, settings: dict) -> Path:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; name a folder to write the scenes to.")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()) and not (folder / MARK).exists():
        raise FileExistsError(
            f"{folder} is not empty and was not written by this command; name a new or empty folder."
        )
    (folder / MARK).write_text(json.dumps(settings) + "\n", encoding="utf-8")
    (folder / "metadata.jsonl").unlink(missing_ok=True)
    for name in ("questions.jsonl", "styles.json"):
        (folder / name).unlink(missing_ok=True)
    for picture in folder.glob("[0-9]" * 6 + ".png"):
        picture.unlink()
    return folder


def _write_chunk(
    folder: Path, world: World | Doodles, split: str, seed: int, prompts: bool, indices: range
) -> list[dict]:
    rows = []
    for index in indices:
        picture, scene = world.sample_picture(split, index, seed)
        name = f"{index:06d}.png"
        picture.save(folder / name)
        row = {"file_name": name, "text": scene.caption, "short": list(scene.short_captions())}
        if prompts and isinstance(world, World):
            row |= _prompts(scene, world, world.key(split, index, seed), name)
        rows.append(row)
    return rows


def _prompts(scene: GridScene, world: World, key: tuple[int, ...], name: str) -> dict:
    """The columns `text` and `prompt` of a scene, and its questions for `vlv evaluate`."""
    asked = ask(scene, world, np.random.default_rng((*key, 2)))  # the 2: see World.sample_picture
    questions = [
        {"image": name, "question": it.prompt, "answer": it.answer} | ({"choices": it.choices} if it.choices else {})
        for it in asked
        if not describes(it)
    ]
    return {
        "text": [it.answer for it in asked],
        "prompt": [it.prompt for it in asked],
        "questions": questions,
    }
