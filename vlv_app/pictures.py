"""Picture files on the server: what visitors uploaded, and what the model made for them."""

import os
import re
import secrets
import shutil
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple
from urllib.parse import quote

import torch
from gradio.utils import get_upload_folder
from PIL import Image, UnidentifiedImageError

from vlv_app.settings import refusal

MEGABYTES = 20  # of a picture file
SHOWN_PIXELS = 768  # of the longer side of a picture on the page
# What visitors are told, where it can be read here: PIL reads some formats only with a plugin.
NAMED_FORMATS = {
    **{name: name for name in ("JPEG", "PNG", "GIF", "TIFF", "BMP", "AVIF")},
    "WEBP": "WebP",
    "HEIF": "HEIC",
    "JXL": "JPEG XL",
}


def formats() -> str:
    """The common formats of pictures that can be read here, in words."""
    Image.init()
    names = [word for name, word in NAMED_FORMATS.items() if name in Image.OPEN]
    return f"{', '.join(names[:-1])} or {names[-1]}"


class Shown(NamedTuple):
    """A picture file that the page can show."""

    id: str  # its place in the server's folder of files
    name: str  # for people, and for downloads
    width: int
    height: int

    @property
    def path(self) -> str:
        return os.path.join(get_upload_folder(), self.id)

    @property
    def url(self) -> str:
        """Relative to the page, which may be served under any address."""
        return f"gradio_api/file={quote(self.path)}"


class PictureFiles:
    """
    The files of one app. They are in Gradio's own folder, from which Gradio serves them, and which it empties.

    Args:
        processor: the model's, which reads images.
    """

    def __init__(self, processor: Any):
        self.processor = processor
        self.made: set[str] = set()  # for Gradio, to delete when they are old
        self._reading = Lock()  # one image at a time: a large one takes a gigabyte while it is read

    def read(self, file: str | None, field: str) -> tuple[torch.Tensor, Image.Image]:
        """
        An image file as the model sees it: `pixel_values` (1, 3, H, W), and a picture for the page.

        Args:
            file: a path on the server.
            field: what the page calls the input, for the sentence about what is wrong.

        Raises:
            gr.Error: there is no file, or it cannot be read.
        """
        if not file:
            raise refusal(f"{field}: choose a picture first.")
        size = os.path.getsize(file) / 1e6
        if size > MEGABYTES:
            raise refusal(
                f"{field}, {Path(file).name}: the file has {size:.0f} MB, and {MEGABYTES} MB is the maximum file "
                "size: make it smaller first."
            )
        try:
            with self._reading:
                image = self.processor.preprocess_image(file)
                pixel_values = self.processor(images=image)["pixel_values"]
                image.thumbnail((SHOWN_PIXELS, SHOWN_PIXELS))
                return pixel_values, image
        except (OSError, ValueError) as error:
            # The file's name is the visitor's; the folder in front of it is the server's.
            sentence = str(error).replace(file, Path(file).name)
            if isinstance(error.__cause__, UnidentifiedImageError):
                sentence += f" Pictures can be {formats()}."
            raise refusal(f"{field}, {sentence}") from error

    def show(self, image: Image.Image, name: str) -> Shown:
        """Save a picture as PNG, under a name that downloads of it get."""
        shown = Shown(f"{secrets.token_hex(20)}/{_file_name(name)}.png", f"{name}.png", *image.size)
        os.makedirs(os.path.dirname(shown.path))
        image.save(shown.path, compress_level=1)
        self.made.add(shown.path)
        return shown

    def keep(self, file: str) -> str:
        """Copy a file of this machine to where uploads are; its id."""
        id = f"{secrets.token_hex(20)}/{Path(file).name}"
        path = os.path.join(get_upload_folder(), id)
        os.makedirs(os.path.dirname(path))
        shutil.copyfile(file, path)
        self.made.add(path)
        return id

    @staticmethod
    def path_of(id: Any, field: str) -> str | None:
        """The path of an uploaded file; raises `gr.Error` where it is not there (any more)."""
        if not id:
            return None
        folder = os.path.realpath(get_upload_folder())
        path = os.path.realpath(os.path.join(folder, str(id)))
        if not path.startswith(folder + os.sep) or not os.path.isfile(path):
            raise refusal(f"{field}: the server does not have this picture any more; choose it again.")
        return path

    @staticmethod
    def id_of(path: str) -> str:
        """The id of an uploaded file."""
        return os.path.relpath(path, get_upload_folder())


def _file_name(name: str) -> str:
    """A name that every file system takes."""
    return re.sub(r"[^\w.-]+", "_", name)[:80] or "picture"
