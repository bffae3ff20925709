"""Image files on disk: finding them, and reading them one by one past the broken ones."""

import glob
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

# What a folder is searched for. A file that is named itself is read whatever its suffix.
SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pbm"),
    *(".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
)


class ImageFile(NamedTuple):
    path: Path
    name: str  # its `file_name`: relative, with forward slashes, different for every file of a run


def find_images(paths: Iterable[str | os.PathLike]) -> list[ImageFile]:
    """
    List the image files that `paths` stand for, each once, in the order given.

    A folder stands for all images in it and its subfolders, sorted, hidden ones left out; a pattern (`photos/*.jpg`)
    for what it matches, sorted; a list, which is a `.txt` file, for the paths in its lines. What is not there, and a
    folder without images, is listed as it is: reading it says what is wrong, and costs the others nothing.
    Names are relative to the folder given, or to the deepest folder that holds everything given.

    Raises:
        FileNotFoundError: when there is no file at all.
    """
    paths = [path for given in paths for path in _expand(Path(given))]
    if not paths:
        raise FileNotFoundError("There are no images: the list of files is empty.")
    root = os.path.commonpath([os.path.abspath(path if path.is_dir() else path.parent) for path in paths])
    found = {}
    for path in paths:
        for file in (_images_in(path) or [path]) if path.is_dir() else [path]:
            absolute = os.path.abspath(file)
            found.setdefault(absolute, ImageFile(file, Path(os.path.relpath(absolute, root)).as_posix()))
    problems = [_problem(file.path) for file in found.values()]
    if all(problems):
        raise FileNotFoundError(" ".join(problems))
    return list(found.values())


def _expand(path: Path) -> list[Path]:
    """The paths that a list or a pattern stands for; any other path stands for itself."""
    if path.suffix.lower() == ".txt" and path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
        return [Path(line.strip()) for line in lines if line.strip()]
    if glob.has_magic(str(path)) and not path.exists():
        return [Path(match) for match in sorted(glob.glob(str(path), recursive=True))] or [path]
    return [path]


def _problem(path: Path) -> str | None:
    """What is wrong with a path, before it is opened."""
    if path.is_dir():
        return f"{path}: there are no images in this folder (looked for {' '.join(SUFFIXES)})."
    return None if path.exists() else f"{path}: there is no such file."


def _images_in(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in SUFFIXES
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )


def read_image(path: Path) -> Image.Image:
    """
    Read one file as an upright RGB image.

    Raises:
        OSError, ValueError: when it cannot be read; the sentence begins with its path.
    """
    from processing_vlv import load_image  # imported only when needed: torch comes with it

    if problem := _problem(path):
        raise ValueError(problem)
    return load_image(path)


def read_images(
    files: Iterable[ImageFile], report: Callable[[str], None], make: Callable[[Image.Image], Any] | None = None
) -> Iterator[tuple[ImageFile, Any]]:
    """
    Read the files as upright RGB images, in their order. One that cannot be read is left out and `report` is told
    why.

    Args:
        make: what is wanted of an image, in place of the image itself, which may be large. It is called in the process
            that reads.

    Raises:
        ValueError: at the end, when there were files and none of them could be read.
    """
    from vlv.reading import read_ahead  # imported only when needed: torch comes with it

    readable = unreadable = 0

    def read(path: Path) -> Any:
        image = read_image(path)
        return image if make is None else make(image)

    items = ((file, file.path) for file in files)
    for file, image, error in read_ahead(items, read, num_workers=1, number=2):
        if error is not None:
            unreadable += 1
            report(f"left out: {error}")
            continue
        readable += 1
        yield file, image
    if unreadable and not readable:
        raise ValueError("None of the images could be read.")
