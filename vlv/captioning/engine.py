"""The engine of one process: it reads pictures ahead of the model and works on them in batches."""

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image

from processing_vlv import VLVProcessor, load_image
from prompts_vlv import takes_prompts
from vlv.captioning.captioner import Caption, Captioner
from vlv.captioning.settings import Decoding, ModelOptions
from vlv.captioning.sink import Row
from vlv.captioning.sources import Picture, Pictures, Source
from vlv.images import read_image
from vlv.models.loading import load_captioner
from vlv.reading import read_ahead

FEW = 8  # up to this many images, one process reads
MOST_READERS = 8
READ_AHEAD = 256  # images at most, because they are held in memory


class Prepared(NamedTuple):
    """A picture that has been read: what was made of it, or the reason why it could not be read."""

    picture: Picture  # without its source
    content: Any
    error: str | None


class Sizes(Protocol):
    """Of batches."""

    batch_size: int  # pictures that are worked on at once
    largest: int  # what that may grow to


class Writer(Sizes, Protocol):
    """What writes the captions of prepared pictures: a `Captioner`, or an engine of somebody else's."""

    decoding: Decoding
    processor: VLVProcessor

    def __call__(
        self,
        names: Sequence[str],
        pixel_values: Sequence[torch.Tensor],
        prompts: Sequence[str | None] | None = None,
    ) -> list[list[Caption]]: ...

    def check_prompt(self, prompt: str | None) -> None:
        """Raises ValueError for a prompt that cannot be followed."""


def make_captioner(options: ModelOptions, decoding: Decoding, batch_size: int | None) -> Captioner:
    """The captioner for the options of the command."""
    loading = {"device_map": options.device_map, "attn_implementation": options.attn_implementation}
    loading = {name: value for name, value in loading.items() if value is not None}
    model, processor = load_captioner(options.model, options.device, options.dtype, options.quantization, **loading)
    return Captioner(model, processor, decoding, batch_size, options.compile)


def caption_locally(
    source: Source,
    done: Collection[str],
    captioner: Writer,
    num_workers: int | None = None,
    part: int = 0,
    parts: int = 1,
) -> Iterator[list[Row]]:
    """Caption the pictures that have no caption yet, or one of several equal parts of them, as [`work_locally`]."""
    check_source(source, captioner.processor)
    read = partial(read_pixels, captioner.processor)
    return work_locally(source, done, read, partial(caption_batch, captioner), captioner, num_workers, part, parts)


def work_locally(
    source: Pictures,
    done: Collection[str],
    read: Callable[[Any], Any],
    work: Callable[[Sequence[Prepared]], list[Row]],
    sizes: Sizes,
    num_workers: int | None = None,
    part: int = 0,
    parts: int = 1,
) -> Iterator[list[Row]]:
    """
    Work on the pictures that are not done yet, or on one of several equal parts of them.

    Args:
        read: the source of a picture -> what `work` needs of it. It runs in the processes that read.
        work: a batch of pictures -> their rows.
        sizes: how large a batch is; asked before each.
        num_workers: processes that read pictures ahead of the model; `None` chooses a number that fits the machine, 0
            reads in this process.

    Yields:
        The rows of a batch, in the order of the input.
    """
    if num_workers is None:
        few = source.total is not None and source.total - len(done) <= FEW
        num_workers = 1 if few else max(1, min(_processors() - 1, MOST_READERS))
    pictures = (picture for picture in source.pictures(part, parts) if picture.name not in done)
    batch = []
    for prepared in prepare(pictures, read, num_workers, 2 * sizes.largest):
        batch.append(prepared)
        if len(batch) >= sizes.batch_size:
            yield work(batch)
            batch = []
    if batch:
        yield work(batch)


def check_source(source: Source, processor: VLVProcessor) -> None:
    """Raises ValueError when the pictures have prompts and the checkpoint takes none."""
    if source.has_prompts and not takes_prompts(processor):
        raise ValueError(
            "This checkpoint takes no prompts, and the images have some: leave out --prompt_file and --prompt_column, "
            "or take a model that was trained with prompts."
        )


def prepare(
    pictures: Iterable[Picture], read: Callable[[Any], Any], num_workers: int, number: int
) -> Iterator[Prepared]:
    """Read pictures, in their order. `num_workers` processes read up to `number` of them ahead."""
    items = ((picture._replace(source=None), picture.source) for picture in pictures)
    for picture, content, error in read_ahead(items, read, num_workers, min(number, READ_AHEAD)):
        yield Prepared(picture, content, error)


def read_pixels(processor: VLVProcessor, source: Any) -> torch.Tensor:
    """The pixel values (3, H, W) of a picture. If the source is an error, it is raised."""
    return processor(images=read_source(source))["pixel_values"][0]


def read_source(source: Any) -> Image.Image:
    """The image of a picture's source. If the source is an error, it is raised."""
    if isinstance(source, Exception):
        raise source
    return read_image(source) if isinstance(source, Path) else load_image(source)


def caption_batch(captioner: Writer, batch: Sequence[Prepared]) -> list[Row]:
    """The rows of a batch: captions, or errors."""
    batch = check_prompts(captioner.check_prompt, batch)
    readable = [prepared for prepared in batch if prepared.error is None]
    names, prompts = [it.picture.name for it in readable], [it.picture.prompt for it in readable]
    captions = iter(captioner(names, [it.content for it in readable], prompts if any(prompts) else None))
    rows = []
    for picture, _, error in batch:
        row = begin_row(picture)
        if error is None:
            texts = [caption.text for caption in next(captions)]
            row["text"] = texts if captioner.decoding.num_captions > 1 else texts[0]
        else:
            row["error"] = error
        rows.append(row)
    return rows


def check_prompts(check: Callable[[str | None], None], batch: Sequence[Prepared]) -> list[Prepared]:
    """The pictures, each with the error that `check` raises for its own prompt, if there is any."""
    return [prepared._replace(error=prepared.error or _wrong_prompt(check, prepared.picture)) for prepared in batch]


def _wrong_prompt(check, picture):
    try:
        check(picture.prompt)
    except ValueError as error:
        return f"{picture.name}: {error}"
    return None


def begin_row(picture: Picture) -> Row:
    return {"order": list(picture.order), "file_name": picture.name}


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
