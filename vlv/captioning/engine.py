"""The engine of one process: it reads pictures ahead of the model and captions them in batches."""

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from processing_vlv import VLVProcessor, load_image
from prompts_vlv import takes_prompts
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
    prompt: str | None = None  # its own


class Writer(Protocol):
    """What writes the captions of prepared pictures: a `Captioner`, or an engine of somebody else's."""

    decoding: Decoding
    processor: VLVProcessor
    batch_size: int  # pictures that are captioned at once
    largest: int  # what that may grow to

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
    """
    Caption the pictures that have no caption yet, or one of several equal parts of them.

    Args:
        num_workers: processes that read pictures ahead of the model; `None` chooses a number that fits the machine, 0
            reads in this process.

    Yields:
        The rows of a batch, in the order of the input.
    """
    check_source(source, captioner.processor)
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


def check_source(source: Source, processor: VLVProcessor) -> None:
    """Raises ValueError when the pictures have prompts and the checkpoint takes none."""
    if source.has_prompts and not takes_prompts(processor):
        raise ValueError(
            "This checkpoint takes no prompts, and the images have some: leave out --prompt_file and --prompt_column, "
            "or take a model that was trained with prompts."
        )


def prepare(pictures: Iterable[Picture], processor: VLVProcessor, num_workers: int, number: int) -> Iterator[Prepared]:
    """Read pictures, in their order. `num_workers` processes read up to `number` of them ahead."""
    items = (((order, name, prompt), source) for order, name, source, prompt in pictures)
    for (order, name, prompt), pixel_values, error in read_ahead(
        items, partial(read_pixels, processor), num_workers, min(number, READ_AHEAD)
    ):
        yield Prepared(order, name, pixel_values, error, prompt)


def read_pixels(processor: VLVProcessor, source: Any) -> torch.Tensor:
    """The pixel values (3, H, W) of a picture. If the source is an error, it is raised."""
    if isinstance(source, Exception):
        raise source
    image = read_image(source) if isinstance(source, Path) else load_image(source)
    return processor(images=image)["pixel_values"][0]


def caption_batch(captioner: Writer, batch: Sequence[Prepared]) -> list[Row]:
    """The rows of a batch: captions, or errors."""
    batch = [_checked(captioner, prepared) for prepared in batch]
    readable = [prepared for prepared in batch if prepared.error is None]
    names, prompts = [it.name for it in readable], [it.prompt for it in readable]
    captions = iter(captioner(names, [it.pixel_values for it in readable], prompts if any(prompts) else None))
    rows = []
    for order, name, _, error, _ in batch:
        row = {"order": list(order), "file_name": name}
        if error is None:
            texts = [caption.text for caption in next(captions)]
            row["text"] = texts if captioner.decoding.num_captions > 1 else texts[0]
        else:
            row["error"] = error
        rows.append(row)
    return rows


def _checked(captioner: Writer, prepared: Prepared) -> Prepared:
    """A picture, with the error about its own prompt, if there is any."""
    if prepared.error is None and prepared.prompt is not None:
        try:
            captioner.check_prompt(prepared.prompt)
        except ValueError as error:
            return prepared._replace(error=f"{prepared.name}: {error}")
    return prepared


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
