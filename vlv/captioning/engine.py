"""The engine of one process: pictures are read ahead of the model, and captioned in batches."""

import os
import signal
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from processing_vlv import VLVProcessor, load_image
from vlv.captioning.captioner import Captioner
from vlv.captioning.settings import Decoding, ModelOptions
from vlv.captioning.sink import Row
from vlv.captioning.sources import Picture, Source
from vlv.images import read_image
from vlv.loading import load_captioner

FEW = 8  # images for which no worker processes are started
MOST_WORKERS = 8
READ_AHEAD = 256  # images at most: what is read ahead is held in shared memory


class Prepared(NamedTuple):
    """A picture that has been read: its pixels, or why there are none."""

    order: tuple[int, int]
    name: str
    pixel_values: torch.Tensor | None  # (3, H, W)
    error: str | None


class Reader(Dataset):
    """Reads pictures: a data set whose indices are the pictures themselves, so that a DataLoader hands them out."""

    def __init__(self, processor: VLVProcessor):
        self.processor = processor

    def __getitem__(self, picture: Picture) -> Prepared:
        order, name, source = picture
        try:
            if isinstance(source, Exception):
                raise source
            image = read_image(source) if isinstance(source, Path) else load_image(source)
            pixel_values = self.processor(images=image)["pixel_values"][0]
        except Exception as error:  # whatever a damaged file makes a decoder do, the other files go on
            return Prepared(order, name, None, " ".join(str(error).split()) or type(error).__name__)
        return Prepared(order, name, pixel_values, None)


def make_captioner(options: ModelOptions, decoding: Decoding, batch_size: int | None) -> Captioner:
    """The captioner that the options of the command ask for."""
    loading = {"device_map": options.device_map, "attn_implementation": options.attn_implementation}
    loading = {name: value for name, value in loading.items() if value is not None}
    model, processor = load_captioner(options.model, options.device, options.dtype, options.quantization, **loading)
    return Captioner(model, processor, decoding, batch_size, options.compile)


def caption_locally(
    source: Source,
    done: Collection[str],
    captioner: Captioner,
    num_workers: int | None = None,
    part: int = 0,
    parts: int = 1,
) -> Iterator[list[Row]]:
    """
    Caption the pictures that are not done, or one of several equal parts of them.

    Args:
        num_workers: processes that read pictures ahead of the model; `None` is a number that fits the machine.

    Yields:
        The rows of a batch, in the order of the input.
    """
    if num_workers is None:
        few = source.total is not None and source.total - len(done) <= FEW
        num_workers = 0 if few else max(1, min(_processors() - 1, MOST_WORKERS))
    pictures = (picture for picture in source.pictures(part, parts) if picture.name not in done)
    batch = []
    for prepared in read_ahead(pictures, captioner.processor, num_workers, 2 * captioner.largest):
        batch.append(prepared)
        if len(batch) >= captioner.batch_size:
            yield caption_batch(captioner, batch)
            batch = []
    if batch:
        yield caption_batch(captioner, batch)


def read_ahead(
    pictures: Iterable[Picture], processor: VLVProcessor, num_workers: int, number: int
) -> Iterator[Prepared]:
    """Read pictures, in their order; worker processes keep up to `number` of them at hand."""
    ahead = {"prefetch_factor": max(2, min(number, READ_AHEAD) // num_workers)} if num_workers else {}
    loader = DataLoader(
        Reader(processor),
        sampler=pictures,
        batch_size=None,
        num_workers=num_workers,
        worker_init_fn=_leave_ctrl_c_to_the_parent,
        **ahead,
    )
    return iter(loader)


def caption_batch(captioner: Captioner, batch: Sequence[Prepared]) -> list[Row]:
    """The rows of what has been read."""
    readable = [prepared for prepared in batch if prepared.error is None]
    captions = iter(
        captioner([prepared.name for prepared in readable], [prepared.pixel_values for prepared in readable])
    )
    rows = []
    for order, name, _, error in batch:
        row = {"order": list(order), "file_name": name}
        if error is None:
            texts = next(captions)
            row["text"] = texts if captioner.decoding.num_captions > 1 else texts[0]
        else:
            row["error"] = error
        rows.append(row)
    return rows


def _leave_ctrl_c_to_the_parent(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
