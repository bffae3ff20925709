"""Where pictures come from: image files, and rows of parquet files, WebDataset archives and datasets on the Hub."""

import glob
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from prompts_vlv import as_prompt
from vlv.captioning.settings import RowOptions
from vlv.images import SUFFIXES, ImageFile, find_images, name_of

if TYPE_CHECKING:
    from datasets import IterableDataset

BUILDERS = {".parquet": "parquet", ".tar": "webdataset", ".tar.gz": "webdataset", ".tgz": "webdataset"}


class Picture(NamedTuple):
    """An image on its way to the model."""

    order: tuple[int, int]  # its shard and row in the input
    name: str  # its `file_name`
    source: Any  # a path, or another input of `processing_vlv.load_image`, or the error that takes the image's place
    prompt: str | None = None  # its own
    captions: tuple[str, ...] = ()  # that it has already, where they are scored


class Pictures(Protocol):
    """Where pictures come from: a `Source`, or one whose pictures have captions."""

    total: int | None

    def pictures(self, part: int = 0, parts: int = 1) -> Iterator[Picture]: ...


@dataclass(frozen=True)
class TableShard:
    """One parquet file, archive, or shard of a dataset. It is opened only when it is read."""

    name: str
    open: Callable[[], "IterableDataset"]
    options: RowOptions

    def __iter__(self) -> Iterator[tuple[str, Any, str | None]]:
        try:
            dataset = self.open().decode(False)
            column = self._find_image_column(dataset)
            prompt_column = self._find_prompt_column(dataset)
            for number, row in enumerate(dataset):
                name = self._name(row, number, column)
                yield name, *_prompted(_image_of_row(row[column], name), row.get(prompt_column), name)
        except Exception as error:  # each library has its own errors; the other tables are still read
            reason = name_of(" ".join(str(error).split()))  # it may name the file, in bytes that are not UTF-8
            yield self.name, ValueError(f"{self.name}: it cannot be read ({reason})"), None

    def _find_image_column(self, dataset: "IterableDataset") -> str:
        from datasets import Image

        wanted, features = self.options.image_column, dataset.features or {}
        columns = [wanted] if wanted else [name for name, kind in features.items() if isinstance(kind, Image)]
        columns = [name for name in columns or ["image"] if name in features]
        if not columns:
            raise ValueError(f"name the column of the images with --image_column: there are {', '.join(features)}")
        return columns[0]

    def _find_prompt_column(self, dataset: "IterableDataset") -> str | None:
        column, features = self.options.prompt_column, dataset.features or {}
        if column is not None and features and column not in features:
            raise ValueError(f"there is no column {column} of prompts: there are {', '.join(features)}")
        return column

    def _name(self, row: dict[str, Any], number: int, column: str) -> str:
        if self.options.id_column is not None:
            return str(row[self.options.id_column])
        return f"{self.name}/{row['__key__']}.{column}" if "__key__" in row else f"{self.name}/{number}"


def _image_of_row(image: Any, name: str) -> Any:
    """An input of `load_image` that carries the row's name, so that an error about the image names the row."""
    if image is None:
        return ValueError(f"{name}: the row has no image.")
    if isinstance(image, bytes):
        return {"bytes": image, "path": name}
    return {**image, "path": name} if isinstance(image, dict) and image["bytes"] else image


def _prompted(image: Any, prompt: Any, name: str) -> tuple[Any, str | None]:
    """The image of a row and its prompt, or the error that says that the prompt is not text."""
    try:
        return image, as_prompt(prompt) or None
    except ValueError as error:
        return ValueError(f"{name}: {error}"), None


class Source:
    """
    All the pictures of a run, in shards. An image file is a shard of one picture; a table is a shard of many.

    It holds no pictures and can be pickled, so that any process can read its part of them.
    """

    def __init__(
        self,
        shards: Sequence[ImageFile | TableShard],
        total: int | None,
        prompts: Mapping[str, str] | None = None,
        has_prompts: bool = False,
    ):
        self.shards = shards
        self.total = total  # number of pictures; `None` if unknown
        self.prompts = prompts or {}  # by the names of the pictures
        self.has_prompts = has_prompts or bool(prompts)  # whether pictures may have their own prompt

    def pictures(self, part: int = 0, parts: int = 1) -> Iterator[Picture]:
        """
        The pictures, or those of one of `parts` equal parts. A part is whole shards where there are at least as many
        shards as parts; otherwise it is some rows of every shard.
        """
        by_shard = len(self.shards) >= parts
        for number, shard in enumerate(self.shards):
            if by_shard and number % parts != part:
                continue
            rows = enumerate([(shard.name, shard.path, None)] if isinstance(shard, ImageFile) else shard)
            for row, (name, source, prompt) in rows if by_shard else islice(rows, part, None, parts):
                yield Picture((number, row), name, source, prompt or self.prompts.get(name))

    @property
    def files(self) -> list[ImageFile] | None:
        """The image files, or `None` if some pictures are rows of tables, which are not files."""
        files = [shard for shard in self.shards if isinstance(shard, ImageFile)]
        return files if len(files) == len(self.shards) else None


def open_source(paths: Sequence[str], options: RowOptions | None = None, prompt_file: str | None = None) -> Source:
    """
    The pictures that command-line paths stand for: image files, folders, patterns and lists of them (as
    [`find_images`]), `.parquet` files, WebDataset `.tar` archives, and ids of datasets on the Hub.

    Args:
        prompt_file: JSON Lines with the prompts of some of the pictures: `file_name` and `prompt`.

    Raises:
        OSError, ValueError: when there are no such files and no such dataset, or the prompts cannot be read.
    """
    options = options or RowOptions()
    prompts = {} if prompt_file is None else read_prompts(prompt_file)
    ids = list(filter(_is_dataset_id, paths))
    files = [path for path in paths if path not in ids]
    shards, counts = [], []
    for file in find_images(files) if files else []:
        kind = _builder(file.location)
        shards.append(file if kind is None else _open_file(file, kind, options))
        counts.append(1 if kind is None else _count_rows(file.path))
    for dataset_id in ids:
        tables, count = _open_dataset(dataset_id, options)
        shards += tables
        counts.append(count)
    source = Source(shards, None if None in counts else sum(counts), prompts, options.prompt_column is not None)
    if prompts and source.files is not None and not any(file.name in prompts for file in source.files):
        raise ValueError(
            f"None of the images has a prompt in {prompt_file}: it names {next(iter(prompts))}, and the images are "
            f"{source.files[0].name}, ... (file_name is what the output calls an image)."
        )
    return source


def read_prompts(file: str) -> dict[str, str]:
    """
    The prompts of pictures, by name, from JSON Lines with `file_name` and `prompt`.

    Raises:
        OSError: there is no such file.
        ValueError: a line is another thing; the sentence names it.
    """
    prompts: dict[str, str] = {}
    for number, line in enumerate(Path(file).read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
                raise ValueError("it is no object with file_name and prompt")
            if row["file_name"] in prompts:
                raise ValueError(f"{row['file_name']} has a prompt already")
            prompts[row["file_name"]] = as_prompt(row.get("prompt"))
        except ValueError as error:
            raise ValueError(f"{file}, line {number} is not a prompt: {str(error).rstrip('.')}.") from error
    return {name: prompt for name, prompt in prompts.items() if prompt}


def _is_dataset_id(path: str) -> bool:
    shape = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path)
    if not shape or path.lower().endswith((*SUFFIXES, *BUILDERS, ".txt")):
        return False
    return not os.path.lexists(path) and not os.path.isdir(os.path.dirname(path))


def _builder(path: str) -> str | None:
    """The name of the `datasets` builder that reads a table; `None` for an image."""
    path = path.lower()
    if not path.endswith(tuple(BUILDERS)):
        return None
    return next(builder for suffix, builder in BUILDERS.items() if path.endswith(suffix))


def _open_file(file: ImageFile, kind: str, options: RowOptions) -> TableShard:
    return TableShard(file.name, partial(_load_file, kind, file.location), options)


def _load_file(kind: str, path: str) -> "IterableDataset":
    from datasets import load_dataset

    return load_dataset(kind, data_files=glob.escape(path), split="train", streaming=True)


def _count_rows(path: Path) -> int | None:
    if path.suffix.lower() != ".parquet":
        return None
    from pyarrow import ArrowException
    from pyarrow.parquet import read_metadata

    try:
        with path.open("rb") as file:  # pyarrow refuses names that are not UTF-8
            return read_metadata(file).num_rows
    except (OSError, ArrowException):
        return 1  # reading it fails, which counts as one picture


def _open_dataset(dataset_id: str, options: RowOptions) -> tuple[list[TableShard], int | None]:
    from datasets import load_dataset

    try:
        dataset = load_dataset(dataset_id, split=options.split, streaming=True)
    except ValueError as error:
        raise ValueError(f"The dataset {dataset_id} cannot be read: {error}") from error
    except Exception as error:  # the Hub's client and `datasets` raise many kinds of errors for a missing dataset
        raise FileNotFoundError(
            f"{dataset_id}: there is no such file or folder, and no such dataset was found on the Hub "
            f"({' '.join(str(error).split())})."
        ) from error
    count = dataset.num_shards
    tables = [
        TableShard(f"{dataset_id}/{options.split}/{number}", partial(dataset.shard, count, number), options)
        for number in range(count)
    ]
    split = (dataset.info.splits or {}).get(options.split)
    return tables, split.num_examples if split else None
