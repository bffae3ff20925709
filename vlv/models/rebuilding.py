"""Rebuilds images from their caption embeddings in batches, for the command, the demo and publishing."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple, TypeVar

import torch
from PIL import Image

from modeling_vlv import VLVModel
from processing_vlv import VLVProcessor

Key = TypeVar("Key")
Item = TypeVar("Item")
SHOWN_PIXELS = 2048  # of the longer side of an image that is shown to people


class Seen(NamedTuple):
    """An image as the model reads it, and as people see it. Both are small, even if the image is large."""

    pixel_values: torch.Tensor  # (3, H, W)
    shown: Image.Image  # the part of it that the model sees


def see(processor: VLVProcessor, image: Image.Image) -> Seen:
    """The data of an image that are kept to rebuild it."""
    shown = processor.preprocess_image(image)
    pixel_values = processor(images=shown)["pixel_values"][0]
    shown.thumbnail((SHOWN_PIXELS, SHOWN_PIXELS))
    return Seen(pixel_values, shown)


@torch.inference_mode()
def reconstruct_images(
    model: VLVModel, images: Iterable[tuple[Key, Seen]], batch_size: int = 8, seed: int = 0, **sampling
) -> Iterator[tuple[Key, Image.Image, Image.Image]]:
    """
    Rebuild each image, in order: its key, the part of the image that the model sees, and the reconstruction.

    `sampling` goes to `model.reconstruct`. Every image starts from the noise of `seed`, so that its reconstruction
    depends on no other image of the run.
    """
    for keys, seen in _batches(images, batch_size):
        pixel_values, shown = zip(*seen, strict=True)
        generators = [torch.Generator().manual_seed(seed) for _ in shown]
        pixel_values = torch.stack(pixel_values)
        rebuilt = model.reconstruct(pixel_values=pixel_values, generator=generators, **sampling)
        yield from zip(keys, shown, rebuilt, strict=True)


def _batches(items: Iterable[tuple[Key, Item]], size: int) -> Iterator[tuple[tuple[Key, ...], list[Item]]]:
    items = iter(items)
    while batch := list(islice(items, size)):
        keys, values = zip(*batch, strict=True)
        yield keys, list(values)
