"""The one place of an evaluation that writes captions."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import torch
from PIL import Image

from modeling_vlv import VLVModel
from processing_vlv import VLVProcessor


class Caption(NamedTuple):
    text: str
    ended: bool  # by its end-of-text token, not by the longest length allowed


@torch.inference_mode()
def write_captions(
    model: VLVModel, processor: VLVProcessor, images: Iterable[Image.Image], batch_size: int = 50, **generation
) -> Iterator[Caption]:
    """A caption of each image, in order, by greedy search unless `generation`, which goes to `generate`, says else."""
    end = model.generation_config.eos_token_id
    ends = torch.tensor(end if isinstance(end, list) else [end])
    images = iter(images)
    while batch := list(islice(images, batch_size)):
        pixel_values = processor(images=batch)["pixel_values"]
        ids = model.generate(pixel_values, **{"do_sample": False, "num_beams": 1, **generation}).cpu()
        ended = torch.isin(ids, ends).any(1).tolist()
        yield from map(Caption, processor.batch_decode(ids), ended)
