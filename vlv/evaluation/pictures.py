"""Draws the pictures of an evaluation: from the embeddings of images, or from captions."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from PIL import Image

from modeling_vlv import VLVModel
from processing_vlv import VLVProcessor


@torch.inference_mode()
def draw(
    paint: Callable[[Sequence[Any], list[torch.Generator]], Sequence[Image.Image]],
    items: Sequence[Any],
    batch_size: int = 50,
    seed: int = 0,
    start: int = 0,
) -> Iterator[Image.Image]:
    """
    A picture of each item, from `start` on, in order.

    Args:
        paint: a batch of items -> their pictures. Picture i starts from the noise of `seed + i`, for any batch size,
            also when an interrupted run continues.
    """
    for first in range(start, len(items), batch_size):
        batch = items[first : first + batch_size]
        yield from paint(batch, [torch.Generator().manual_seed(seed + first + number) for number in range(len(batch))])


def encode_images(model: VLVModel, processor: VLVProcessor, images: Sequence[Image.Image]) -> torch.Tensor:
    """The images' caption embeddings (B, Q, E)."""
    return model.encode(processor(images=list(images))["pixel_values"])


def embed_captions(model: VLVModel, processor: VLVProcessor, captions: Sequence[str]) -> torch.Tensor:
    """
    The captions' word embeddings (B, Q, E), which the decoder was trained with, cut at the text encoder's positions.

    Raises:
        ValueError: when the checkpoint lacks its decoder's tokenizer.
    """
    tokenizer = decoder_tokenizer(processor)
    positions = model.config.text_encoder_config.max_position_embeddings
    ids = tokenizer(
        list(captions), padding="max_length", max_length=positions, truncation=True, return_tensors="pt"
    ).input_ids
    return model.text_encoder.embeddings.token_embedding(ids.to(model.device))


def decoder_tokenizer(processor: VLVProcessor):
    """The tokenizer of the decoder's text encoder; raises ValueError if the checkpoint lacks it."""
    if processor.decoder_tokenizer is None:
        raise ValueError(
            "The checkpoint lacks its decoder's tokenizer (folder decoder_tokenizer), so its decoder cannot draw "
            "captions. Only Stable Diffusion 1 and 2 have one here: name another text-to-image model with "
            "--text_to_image."
        )
    return processor.decoder_tokenizer
