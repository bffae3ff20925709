"""Finds image files on disk, in the same way for every command, and reads them, leaving out the damaged ones."""

import codecs
import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from fsspec.utils import glob_translate
from PIL import Image

# A folder is searched for these suffixes, which are those of the formats that `images_vlv.py` opens. A file that is
# named itself is read with any suffix.
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".dib"),
    *(".avif", ".avifs", ".heic", ".heics", ".heif", ".heifs", ".hif", ".jxl", ".qoi", ".ico", ".icns", ".cur"),
    *(".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c", ".pbm", ".pgm", ".ppm", ".pnm", ".pfm", ".psd", ".dds", ".blp"),
    *(".dcx", ".pcx", ".fit", ".fits", ".fli", ".flc", ".ftc", ".ftu", ".gbr", ".im", ".msp", ".pcd", ".pxr", ".sgi"),
    *(".bw", ".rgb", ".rgba", ".ras", ".xbm", ".xpm", ".tga", ".icb", ".vda", ".vst"),
)
KNOWN_SUFFIXES = frozenset(SUFFIXES)
MOST_PROBLEMS = 3  # in one message

logger = logging.getLogger(__name__)


class ImageFile(NamedTuple):
    location: str  # as the system spells it; not a `Path`, because there may be millions
    name: str  # its `file_name`: relative, with forward slashes, and different for every file of a run (see `name_of`)

    @property
    def path(self) -> Path:
        return Path(self.location)


class Folder(NamedTuple):
    """The files in a folder and its sub-folders: sorted paths relative to it, with forward slashes."""

    images: list[str]
    others: list[str]
    hidden: int  # files and folders whose names begin with a dot; they are skipped
    closed: list[str]  # sub-folders that could not be entered, and why


def name_of(path: str) -> str:
    r"""
    The name of a file in rows, reports and metadata: its relative path, as text that any format can hold.

    Bytes that are not UTF-8 are written as `\xe9`. If a name already contains a backslash that looks like this, the
    backslash is written as `\x5c`. All other names are the path itself. `location_of` is the inverse.
    """
    if path.isascii() and "\\x" not in path:
        return path
    path = re.sub(r"\\(?=x[0-9a-f]{2})", r"\\x5c", path)
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def location_of(name: str) -> str:
    """The path with this name, as the system spells it: the inverse of `name_of`."""
    if "\\x" not in name:
        return name
    return os.fsdecode(re.sub(rb"\\x([0-9a-f]{2})", lambda byte: bytes.fromhex(byte[1].decode()), os.fsencode(name)))


def list_folder(folder: str | os.PathLike) -> Folder:
    """
    All files in a folder and its sub-folders. Links to folders are followed, but no folder is searched twice.

    Raises:
        OSError: when the folder itself cannot be entered.
    """
    folder = os.fspath(folder)
    contents = Folder([], [], 0, [])
    hidden, pending = 0, [""]
    links: list[str] = []
    # A link to a folder that contains this one would be a loop.
    seen = {_identity(parent) for parent in Path(folder).resolve().parents}
    while pending or links:
        inside = pending.pop() if pending else links.pop(0)  # links last, so that a file is found at its own path
        location = os.path.join(folder, inside)
        try:
            identity = _identity(location)
            if identity in seen:
                continue
            with os.scandir(location) as scanned:
                entries = sorted(scanned, key=lambda entry: entry.name)
        except OSError as error:
            if not inside:
                raise OSError(f"{name_of(folder)}: this folder cannot be entered ({error.strerror}).") from error
            contents.closed.append(f"{name_of(inside)} ({error.strerror})")
            continue
        seen.add(identity)
        for entry in entries:
            path = f"{inside}/{entry.name}" if inside else entry.name
            if entry.name.startswith("."):
                hidden += 1
            elif _is_folder(entry):
                (links if entry.is_symlink() else pending).append(path)
            elif is_image_name(path) and (entry.is_symlink() or entry.is_file()):  # reading reports dead links
                contents.images.append(path)
            else:
                contents.others.append(path)
    for paths in (contents.images, contents.others, contents.closed):
        paths.sort(key=lambda path: path.replace("/", "\0"))  # folder by folder
    return contents._replace(hidden=hidden)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links
        return False


def is_image_name(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in KNOWN_SUFFIXES


def report_passed_over(folder: str | os.PathLike, contents: Folder, used: int = 0) -> None:
    """Print which files in a folder are not images. `used` of them are used for something else."""
    kinds = Counter(os.path.splitext(path)[1].lower() or "no suffix" for path in contents.others)
    listed = ", ".join(f"{name_of(kind)} {count}" for kind, count in kinds.most_common(6))
    others = len(contents.others) - used
    parts = [f"{_count(others, 'file')} not named as an image ({listed})"] if others else []
    if contents.hidden:
        parts.append(f"{_count(contents.hidden, 'hidden file or folder', 'hidden files and folders')}")
    if parts:
        say(f"{name_of(os.fspath(folder))}: skipped {' and '.join(parts)}.")
    if contents.closed:
        say(f"{name_of(os.fspath(folder))}: these folders cannot be entered: {_some(contents.closed, ', ')}.")


def say(text: str) -> None:
    """Print a remark about the input. In a run of many processes, only the first one prints."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning(text)


def find_images(paths: Iterable[str | os.PathLike]) -> list[ImageFile]:
    """
    List the image files that `paths` name, each once, in the given order.

    A folder names all images in it and its sub-folders, sorted and without hidden ones. A pattern (`photos/*.jpg`)
    names its matches, sorted. A list, which is a `.txt` file, names the paths in its lines. A `.txt` file beside an
    image of the same name is that image's caption and is skipped. A path that does not exist, or a folder without
    images, is listed too: reading it reports the error, and the other images are still read.
    Names are relative to the given folder, or to the deepest folder that contains everything given.

    Raises:
        FileNotFoundError: when there are no files at all.
    """
    places = _without_captions([place for path in paths for place in _match(os.fspath(path))])
    places = [file for place in places for file in (_read_list(place) if _is_text_file(place) else [place])]
    if not places:
        raise FileNotFoundError("There are no images: the list of files is empty.")
    folders = {place for place in places if os.path.isdir(place)}
    parents = {os.path.dirname(place) for place in places if place not in folders}
    root = os.path.commonpath([os.path.abspath(folder) for folder in folders | parents])
    prefixes = {folder: _prefix(folder, root) for folder in folders | parents}
    found: dict[str, ImageFile] = {}
    for place in places:
        if place in folders:
            files = [(os.path.join(place, inside), prefixes[place] + inside) for inside in _images_in(place)]
            files = files or [(place, prefixes[place].rstrip("/"))]
        else:
            files = [(place, prefixes[os.path.dirname(place)] + os.path.basename(place))]
        for location, name in files:
            name = name_of(name.replace(os.sep, "/"))
            found.setdefault(name, ImageFile(location, name))
    if all(_problem(file.location) for file in found.values()):
        raise FileNotFoundError(_some([_problem(file.location) for file in found.values()], " "))
    return list(found.values())


def _match(path: str) -> list[str]:
    """The matches of a pattern, sorted. Another path, or a pattern without matches, is returned unchanged."""
    path = str(Path(path))
    if not glob.has_magic(path) or os.path.lexists(path):
        return [path]
    matches = _match_deep(path) if "**" in Path(path).parts else glob.glob(path)
    return sorted(matches, key=lambda match: match.replace(os.sep, "\0")) or [path]


def _match_deep(path: str) -> list[str]:
    """The matches of a pattern with `**`. Python's own `glob` never ends when links form a loop."""
    parts = Path(path).parts
    first = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    folder = os.path.join(*parts[:first]) if first else os.curdir
    matches = re.compile(glob_translate("/".join(parts[first:]))).match
    try:
        contents = list_folder(folder)
    except OSError:
        return []
    # A folder that matches names the images in it.
    found = [file for file in contents.images if any(map(matches, (file, *map(str, PurePosixPath(file).parents))))]
    if parts[-1] != "**":
        found += filter(matches, contents.others)
    return [str(Path(folder, file)) for file in found]


def _is_text_file(path: str) -> bool:
    return path.lower().endswith(".txt") and os.path.isfile(path)


def _without_captions(places: list[str]) -> list[str]:
    """The paths without text files that are captions of the images beside them; `photos/*` matches both."""
    if len(places) < 2:
        return places  # a single file is a list, not a caption
    stems: dict[str, set[str]] = {}

    def is_caption(place: str) -> bool:
        if not _is_text_file(place):
            return False
        folder, name = os.path.split(place)
        if folder not in stems:
            stems[folder] = {os.path.splitext(entry)[0] for entry in os.listdir(folder or ".") if is_image_name(entry)}
        return os.path.splitext(name)[0] in stems[folder]

    kept = [place for place in places if not is_caption(place)]
    if len(kept) < len(places):
        say(f"Skipped {_count(len(places) - len(kept), 'caption')} (.txt) beside an image of the same name.")
    return kept


def _read_list(path: str) -> list[str]:
    lines = (line.rstrip("\r") for line in read_text(path).split("\n"))
    return [str(Path(line if os.path.lexists(line) else line.strip())) for line in lines if line.strip()]


def read_text(path: str | os.PathLike) -> str:
    """The text of a file in UTF-8, or in UTF-16 as Windows writes it. Other bytes are kept as in file names."""
    content = Path(path).read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16", "replace")
    if b"\0" in content[:2]:
        return content.decode("utf-16-be" if content[:1] == b"\0" else "utf-16-le", "replace")
    return content.decode("utf-8-sig", "surrogateescape")


def _images_in(folder: str) -> list[str]:
    try:
        contents = list_folder(folder)
    except OSError:
        return []  # reading it reports why
    report_passed_over(folder, contents)
    return contents.images


def _prefix(folder: str, root: str) -> str:
    relative = os.path.relpath(folder or ".", root)
    return "" if relative == os.curdir else relative + os.sep


def _identity(folder: str | os.PathLike) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _problem(location: str) -> str | None:
    """What is wrong with a path, before it is opened."""
    if os.path.isdir(location):
        closed = None if os.access(location, os.R_OK | os.X_OK) else "this folder cannot be entered."
        return f"{name_of(location)}: {closed or 'there are no images in this folder.'}"
    return None if os.path.lexists(location) else f"{name_of(location)}: there is no such file."


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _some(items: list[str], separator: str) -> str:
    """The first few items, and how many more there are."""
    more = len(items) - MOST_PROBLEMS
    return separator.join(items[:MOST_PROBLEMS]) + (f"{separator}… and {more} more" if more > 0 else "")


def read_image(path: Path) -> Image.Image:
    """
    Read one file as an upright RGB image.

    Raises:
        OSError, ValueError: when it cannot be read; the sentence begins with its path.
    """
    from images_vlv import load_image

    if os.path.isdir(path):
        raise ValueError(_problem(os.fspath(path)))
    return load_image(path)


def read_images(
    files: Iterable[ImageFile], report: Callable[[str], None], make: Callable[[Image.Image], Any] | None = None
) -> Iterator[tuple[ImageFile, Any]]:
    """
    Read the files as upright RGB images, in their order. An image that cannot be read is left out, and `report` is
    called with the reason.

    Args:
        make: called on each image in the process that reads it; its result is returned instead of the image, which
            may be large.

    Raises:
        ValueError: at the end, if there were files and none of them could be read.
    """
    from vlv.reading import read_ahead  # imported only when needed, because it imports torch

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
