"""Where images and their captions come from: a dataset that has both, or images and a file of captions."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlv.captioning.settings import RowOptions
from vlv.captioning.sources import Picture, Pictures, open_source
from vlv.data.caption_file import read_caption_file
from vlv.data.rows import captions_of, load_rows, local_path, reading, require_column, require_text
from vlv.images import name_of, say


class DatasetPairs:
    """
    The images of a dataset that has captions.

    Args:
        dataset: what [`load_rows`] reads: a folder with metadata or text files beside the images, parquet files,
            WebDataset archives, or a Hub id.

    Raises:
        OSError, ValueError: when there is no such dataset, split or column.
    """

    def __init__(self, dataset: str, split: str | None, image_column: str, caption_column: str):
        with reading(dataset):
            rows = load_rows(dataset, split)
        require_column(rows, image_column, "--image_column")
        if caption_column not in rows.column_names:
            raise ValueError(
                f"{dataset} has no captions: no column '{caption_column}', only {', '.join(rows.column_names)}. "
                "Choose one with --caption_column, or name a file of captions with --captions."
            )
        require_text(rows, caption_column)
        self.rows, self.total = rows, len(rows)
        self.image_column, self.caption_column = image_column, caption_column
        self.root = name_of(os.path.abspath(os.path.expanduser(dataset)))

    def pictures(self, part: int = 0, parts: int = 1) -> Iterator[Picture]:
        for number in range(part, self.total, parts):
            row = self.rows[number]
            image = row[self.image_column]
            name = self._name(image, number)
            yield with_captions(Picture((0, number), name, _source(image, name)), row[self.caption_column])

    def _name(self, image, number):
        """The path below the dataset's folder; an image that is in a table has its number."""
        path = image and image["bytes"] is None and image["path"]
        if not path:
            return str(number)
        return Path(os.path.relpath(path, self.root)).as_posix() if path.startswith(self.root + os.sep) else path


class CaptionedPictures:
    """
    Images, and a file with their captions.

    Args:
        pictures: the images, named as `vlv caption` names them.
        file: .jsonl, .csv or .parquet with `file_name` and a column of captions.

    Raises:
        OSError, ValueError: when it cannot be read, or has no captions.
    """

    def __init__(self, pictures: Pictures, file: str, caption_column: str):
        self.source, self.total = pictures, pictures.total
        self.captions = read_caption_file(file, caption_column)

    def pictures(self, part: int = 0, parts: int = 1) -> Iterator[Picture]:
        for picture in self.source.pictures(part, parts):
            yield with_captions(picture, self.captions.get(picture.name))


def open_pairs(
    dataset: str, captions: str | None, split: str | None, image_column: str | None, caption_column: str
) -> Pictures:
    """The images of `dataset` with their captions, which are in the file `captions` if it is given."""
    if captions is None:
        return DatasetPairs(dataset, split, image_column or "image", caption_column)
    options = RowOptions(split=split or "train", image_column=image_column)
    pairs = CaptionedPictures(open_source([dataset], options), captions, caption_column)
    files = getattr(pairs.source, "files", None)
    if files is not None:
        names = {file.name for file in files}
        if unknown := sum(name not in names for name in pairs.captions):
            say(f"{captions}: skipped {unknown:,} captions of images that {dataset} lacks.")
    return pairs


def with_captions(picture: Picture, captions: Any) -> Picture:
    """The picture with its captions; without any, and where they are not text, it cannot be read."""
    try:
        texts = tuple(captions_of(captions))
    except ValueError as error:
        return picture._replace(source=ValueError(f"{picture.name}: {error}"))
    if not texts:
        return picture._replace(source=ValueError(f"{picture.name}: there is no caption."))
    return picture._replace(captions=texts)


def _source(image, name):
    """An input of `read_source`, which names the image in its errors."""
    if image is None:
        return ValueError(f"{name}: the row has no image.")
    if image["bytes"] is None and "://" not in image["path"]:
        return Path(local_path(image["path"]))
    return {**image, "path": name} if image["bytes"] is not None else image
