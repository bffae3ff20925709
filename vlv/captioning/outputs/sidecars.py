"""Captions as text files beside the images."""

import errno
import os
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path, PurePosixPath

from vlv.captioning.journal import Row
from vlv.captioning.outputs.base import Output, captions_of
from vlv.files import writing_to
from vlv.images import SUFFIXES, ImageFile

EXISTING = ("skip", "overwrite", "append", "prepend")


class Sidecars(Output):
    """
    A text file beside each image, with the image's name and another suffix. Several captions are several lines.

    Args:
        files: the images.
        suffix: of the text files.
        existing: what happens to a text file that already exists and is not empty.
    """

    def __init__(self, files: Sequence[ImageFile], suffix: str, several: bool = False, existing: str = "skip"):
        if suffix.lower() in SUFFIXES:
            raise ValueError(f"--output {suffix} is a suffix of images: choose a suffix for text, such as .txt.")
        self.suffix, self.existing, self.options = suffix, existing, {"existing": existing}
        self.images = {file.name: os.fspath(file.path) for file in files}
        image = os.path.abspath(files[0].path)
        self.root = Path(image).parents[len(PurePosixPath(files[0].name).parts) - 1]  # of the images' names
        self._check_places()
        super().__init__(self._home() / f"captions{suffix}", several)

    def __str__(self) -> str:
        return f"{self.root}: the {self.suffix} file of each image"

    @property
    def exists(self) -> bool:
        return any(self._text(image) for image in self.images.values())

    def check_new(self) -> None:
        """Does nothing: `existing` says what happens to each file."""

    def names(self) -> set[str]:
        if self.existing == "overwrite":
            return set()
        captioned = {name for name, image in self.images.items() if self._text(image)}
        return captioned if self.existing == "skip" else set()

    def publish(self, rows: Iterable[Row], kept: set[str]) -> list[Row]:
        left_out = []
        for row in rows:
            # Images that were captioned before a run was resumed may not be among the images now.
            image = self.images.get(row["file_name"]) or str(self.root / row["file_name"])
            if not os.path.exists(image):
                left_out.append({**row, "error": f"{image}: the image does not exist any more."})
                continue
            try:
                self._write(image, captions_of(row))
            except OSError as error:
                if error.errno != errno.ENAMETOOLONG:
                    raise
                left_out.append({**row, "error": f"{image}: its name is too long for a sidecar ({self.suffix})."})
        return left_out

    def _write(self, image: str, captions: list[str]) -> None:
        path = self._sidecar(image)
        text = self._text(image)
        if text:
            if self.existing == "skip":  # written by hand in the meantime
                return
            lines = text.splitlines()
            if self.existing == "append" and not _all(str.endswith, lines[-len(captions) :], captions):
                captions = [f"{text} {caption}" for caption in captions]
            elif self.existing == "prepend" and not _all(str.startswith, lines[: len(captions)], captions):
                captions = [f"{caption} {text}" for caption in captions]
            elif self.existing != "overwrite":  # a killed run may have written this caption already
                return
        if os.path.islink(path):
            path = os.path.realpath(path)
        folder = os.path.dirname(path) or "."
        unfinished = os.path.join(folder, f".captions{self.suffix}.unfinished")
        with writing_to(folder):
            with open(unfinished, "w", encoding="utf-8") as file:
                file.writelines(f"{caption}\n" for caption in captions)
            os.replace(unfinished, path)

    def _sidecar(self, image: str) -> str:
        return os.path.splitext(image)[0] + self.suffix

    def _text(self, image: str) -> str:
        """The text in the sidecar of an image. An empty sidecar counts as missing."""
        path = self._sidecar(image)
        try:
            with open(path, encoding="utf-8-sig") as file:
                return file.read().strip()
        except UnicodeDecodeError:
            if self.existing in ("append", "prepend"):
                raise ValueError(f"{path} is not UTF-8 text, so no caption can be added to it.") from None
            return "not UTF-8"
        except FileNotFoundError:
            return ""
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                return ""
            raise

    def _check_places(self) -> None:
        """Checks, before any work, that each sidecar has its own path and can be written."""
        owners: dict[str, str] = {}
        images = set(self.images.values())
        for image in images:
            path = self._sidecar(image)
            if path in images:
                raise ValueError(f"--output {self.suffix} would overwrite the image {path}: choose another suffix.")
            if (owner := owners.setdefault(path, image)) is not image:
                first, second = sorted((owner, image))
                raise ValueError(f"{first} and {second} would share the sidecar {path}: rename one of them.")
        for folder in sorted({os.path.dirname(image) or "." for image in images}):
            if os.path.isdir(folder) and not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(f"{folder} cannot be written to, so it cannot hold sidecars.")

    def _home(self) -> Path:
        """The folder of the journal: the folder of all images, or else the first folder that the user may write to."""
        folders = (Path(os.path.abspath(image)).parent for image in self.images.values())
        for folder in chain([self.root], folders):
            if folder != folder.parent and os.access(folder, os.W_OK | os.X_OK):
                return folder
        return self.root


def _all(test, texts, parts) -> bool:
    return len(texts) == len(parts) and all(map(test, texts, parts))
