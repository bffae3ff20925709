"""The engine of many processes and machines: the same steps as Ray Data actors."""

import json
import os
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from processing_vlv import VLVProcessor
from vlv.captioning.batches import largest_batch
from vlv.captioning.captioner import Captioner
from vlv.captioning.engine import Prepared, caption_batch, check_source, prepare, read_pixels
from vlv.captioning.sink import Row
from vlv.captioning.sources import Picture, Source
from vlv.models.loading import find_captioner

PARTS_PER_PROCESSOR = 4  # of the input: small parts, so that no processor waits long for the last one


def caption_with_ray(
    source: Source,
    done: Collection[str],
    make_captioner: Callable[[], Captioner],
    model: str | None,
    batch_size: int | None,
) -> Iterator[list[Row]]:
    """
    Caption the pictures that have no caption yet, on a whole Ray cluster (`RAY_ADDRESS`; by default this machine).
    Tasks read the pictures. Actors caption them: one on each GPU or, without GPUs, on the processors.

    Yields:
        Rows as they are finished, in any order.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    processor = VLVProcessor.from_pretrained(find_captioner(model))
    check_source(source, processor)
    ray.init(ignore_reinit_error=True, log_to_driver=False, logging_level="warning")
    ray.data.DataContext.get_current().enable_progress_bars = False
    resources = ray.cluster_resources()
    processors, gpus = int(resources["CPU"]), int(resources.get("GPU", 0))
    parts = min(len(source.shards), PARTS_PER_PROCESSOR * processors)
    work = ray.put((source, frozenset(done)))

    def read_part(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        source, done = ray.get(work)
        pictures = (picture for picture in source.pictures(int(row["id"]), parts) if picture.name not in done)
        for prepared in prepare(pictures, partial(read_pixels, processor), num_workers=1, number=1):
            yield _pack(prepared, processor)

    rows = (
        ray.data.range(parts, override_num_blocks=parts)
        .flat_map(read_part)
        .map_batches(
            _Actor,
            fn_constructor_args=[make_captioner],
            # With an automatic batch, the actor gets as many images as its largest batch.
            batch_size=batch_size or largest_batch("cuda" if gpus else "cpu"),
            num_gpus=1 if gpus else None,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=gpus or max(1, processors - 1)),
        )
    )
    for batch in rows.iter_batches(batch_size=None):
        yield [json.loads(row) for row in batch["row"]]


class _Actor:
    def __init__(self, make_captioner: Callable[[], Captioner]):
        self.captioner = make_captioner()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        return {"row": [json.dumps(row) for row in caption_batch(self.captioner, [_unpack(**row) for row in rows])]}


def _pack(prepared: Prepared, processor: VLVProcessor) -> dict[str, Any]:
    """A picture that has been read, as columns. One that could not be read has blank pixels, which are not used."""
    picture, pixel_values, error = prepared
    if pixel_values is None:
        pixel_values = torch.zeros(3, processor.image_height, processor.image_width)
    texts = {"name": picture.name, "error": error or "", "prompt": picture.prompt or ""}
    return {"order": np.array(picture.order), "pixel_values": pixel_values.numpy(), **texts}


def _unpack(order: np.ndarray, name: str, pixel_values: np.ndarray, error: str, prompt: str) -> Prepared:
    picture = Picture(tuple(order.tolist()), str(name), None, str(prompt) or None)
    return Prepared(picture, torch.tensor(pixel_values), str(error) or None)
