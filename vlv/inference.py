"""Captions and reconstructions of many images, in batches."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

import torch
from PIL import Image

from modeling_vlv import VLVModel
from processing_vlv import VLVProcessor
from vlv.captioning.captioner import Captioner
from vlv.captioning.settings import Decoding

Key = TypeVar("Key")


def caption_images(
    model: VLVModel,
    processor: VLVProcessor,
    images: Iterable[tuple[Key, Image.Image]],
    batch_size: int = 8,
    decoding: Decoding | None = None,
) -> Iterator[tuple[Key, str]]:
    """Write a caption for each image, in order. Keys come back untouched."""
    captioner = Captioner(model, processor, decoding or Decoding(), batch_size)
    for keys, pictures in _batches(images, batch_size):
        captions = captioner([str(key) for key in keys], processor(images=pictures)["pixel_values"])
        yield from zip(keys, (best for best, *_ in captions), strict=True)


@torch.inference_mode()
def reconstruct_images(
    model: VLVModel,
    processor: VLVProcessor,
    images: Iterable[tuple[Key, Image.Image]],
    batch_size: int = 8,
    seed: int = 0,
    **sampling,
) -> Iterator[tuple[Key, Image.Image, Image.Image]]:
    """
    Rebuild each image, in order: its key, the part of the image that the model sees, and the reconstruction.

    `sampling` goes to `model.reconstruct`. Every image starts from the noise of `seed`, so that its reconstruction
    depends on no other image of the run.
    """
    for keys, pictures in _batches(images, batch_size):
        pictures = [processor.preprocess_image(picture) for picture in pictures]
        inputs = processor(images=pictures, return_tensors="pt")
        generators = [torch.Generator().manual_seed(seed) for _ in pictures]
        rebuilt = model.reconstruct(pixel_values=inputs["pixel_values"], generator=generators, **sampling)
        yield from zip(keys, pictures, rebuilt, strict=True)


def _batches(
    images: Iterable[tuple[Key, Image.Image]], size: int
) -> Iterator[tuple[tuple[Key, ...], list[Image.Image]]]:
    images = iter(images)
    while batch := list(islice(images, size)):
        keys, pictures = zip(*batch, strict=True)
        yield keys, list(pictures)
