"""The engine of one process: it reads pictures ahead of the model and captions them in batches."""

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from processing_vlv import VLVProcessor, load_image
from vlv.captioning.captioner import Caption, Captioner
from vlv.captioning.settings import Decoding, ModelOptions
from vlv.captioning.sink import Row
from vlv.captioning.sources import Picture, Source
from vlv.images import read_image
from vlv.models.loading import load_captioner
from vlv.reading import read_ahead

FEW = 8  # up to this many images, one process reads
MOST_READERS = 8
READ_AHEAD = 256  # images at most, because they are held in memory


class Prepared(NamedTuple):
    """A picture that has been read: its pixels, or the reason why it could not be read."""

    order: tuple[int, int]
    name: str
    pixel_values: torch.Tensor | None  # (3, H, W)
    error: str | None


class Writer(Protocol):
    """What writes the captions of prepared pictures: a `Captioner`, or an engine of somebody else's."""

    decoding: Decoding
    processor: VLVProcessor
    batch_size: int  # pictures that are captioned at once
    largest: int  # what that may grow to

    def __call__(self, names: Sequence[str], pixel_values: Sequence[torch.Tensor]) -> list[list[Caption]]: ...


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
    """
    Caption the pictures that have no caption yet, or one of several equal parts of them.

    Args:
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
    for prepared in prepare(pictures, captioner.processor, num_workers, 2 * captioner.largest):
        batch.append(prepared)
        if len(batch) >= captioner.batch_size:
            yield caption_batch(captioner, batch)
            batch = []
    if batch:
        yield caption_batch(captioner, batch)


def prepare(pictures: Iterable[Picture], processor: VLVProcessor, num_workers: int, number: int) -> Iterator[Prepared]:
    """Read pictures, in their order. `num_workers` processes read up to `number` of them ahead."""
    items = (((order, name), source) for order, name, source in pictures)
    for (order, name), pixel_values, error in read_ahead(
        items, partial(read_pixels, processor), num_workers, min(number, READ_AHEAD)
    ):
        yield Prepared(order, name, pixel_values, error)


def read_pixels(processor: VLVProcessor, source: Any) -> torch.Tensor:
    """The pixel values (3, H, W) of a picture. If the source is an error, it is raised."""
    if isinstance(source, Exception):
        raise source
    image = read_image(source) if isinstance(source, Path) else load_image(source)
    return processor(images=image)["pixel_values"][0]


def caption_batch(captioner: Writer, batch: Sequence[Prepared]) -> list[Row]:
    """The rows of a batch: captions, or errors."""
    readable = [prepared for prepared in batch if prepared.error is None]
    captions = iter(
        captioner([prepared.name for prepared in readable], [prepared.pixel_values for prepared in readable])
    )
    rows = []
    for order, name, _, error in batch:
        row = {"order": list(order), "file_name": name}
        if error is None:
            texts = [caption.text for caption in next(captions)]
            row["text"] = texts if captioner.decoding.num_captions > 1 else texts[0]
        else:
            row["error"] = error
        rows.append(row)
    return rows


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
