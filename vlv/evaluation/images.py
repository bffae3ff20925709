"""The images and reference captions that a model is measured on."""

import os
from functools import cached_property
from pathlib import Path

from PIL import Image

from vlv.data.rows import load_rows, local_path, open_image, require_column
from vlv.evaluation.words import words
from vlv.images import name_of
from vlv.provenance import fingerprint_images
from vlv.reading import Reader


class EvaluationData:
    """
    Args:
        dataset: a dataset that [`load_rows`] reads.
        split: a split of it.
        image_column, caption_column: columns of it. Captions are one string or a list of strings per image.
        num: how many images to use, from the first one on; all by default.

    Raises:
        OSError, ValueError: when there is no such dataset, split or column, or when it has no images.
    """

    def __init__(
        self,
        dataset: str,
        split: str | None = None,
        image_column: str = "image",
        caption_column: str = "text",
        num: int | None = None,
    ):
        self.name = Path(dataset).absolute().name
        rows = load_rows(dataset, split)
        require_column(rows, image_column, "--image_column")
        if len(rows) == 0:
            raise ValueError(f"There are no images in {dataset}.")
        root = Path(name_of(os.path.abspath(os.path.expanduser(dataset))))
        paths = rows.select_columns([image_column]).flatten()[f"{image_column}.path"]
        self.all_names = [_name(path, root) for path in paths]
        rows = rows.select(range(min(num or len(rows), len(rows))))
        self.images = rows[image_column]  # bytes and path of each image, undecoded
        self._read = Reader(open_image)  # in another process, because a damaged image must not end this one
        self._captions = rows[caption_column] if caption_column in rows.column_names else None
        self._caption_column = caption_column

    def __len__(self) -> int:
        return len(self.images)

    @property
    def names(self) -> list[str]:
        """The path of each image below the dataset's folder. Two rows may have the same image."""
        return self.all_names[: len(self)]

    def load(self, number: int) -> Image.Image:
        """Image `number` in RGB; raises ValueError if it cannot be read."""
        return self._read(self.images[number])

    @cached_property
    def references(self) -> list[list[str]]:
        """
        The captions of each image.

        Raises:
            ValueError: when the dataset has no captions, or an image has no caption with a word in it.
        """
        if self._captions is None:
            raise ValueError(
                f"The dataset {self.name} has no captions to compare with: no column {self._caption_column!r}. "
                "Choose a column with --caption_column, or choose metrics that need no captions."
            )
        references = []
        for name, captions in zip(self.names, self._captions, strict=True):
            captions = [captions] if isinstance(captions, str) else captions or []
            captions = [caption for caption in captions if caption and words(caption)]
            if not captions:
                raise ValueError(f"The image {name} has no caption in the column {self._caption_column!r}.")
            references.append(captions)
        return references

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the images, in order."""
        return fingerprint_images(
            image["bytes"] if image["bytes"] is not None else Path(local_path(image["path"])).read_bytes()
            for image in self.images
        )


def _name(path: str | None, root: Path) -> str:
    if path is None:
        return ""
    path = Path(path)
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()
