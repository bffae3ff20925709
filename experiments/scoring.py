"""What the experiments share: pictures from caption embeddings, and their scores."""

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from modeling_vlv import VLVModel
from processing_vlv import VLVProcessor
from vlv.evaluation.results import Measurement
from vlv.scenes import Scene, compare
from vlv.scenes.reader import scene_reader

BATCH = 50


@torch.inference_mode()
def encode(model: VLVModel, processor: VLVProcessor, images: Sequence[Image.Image]) -> torch.Tensor:
    """Caption embeddings of the images, (N, Q, E)."""
    starts = range(0, len(images), BATCH)
    return torch.cat([model.encode(processor(images=images[at : at + BATCH])["pixel_values"]) for at in starts])


def rebuild(model: VLVModel, caption_embeds: torch.Tensor, seed: int = 0, **sampling) -> list[Image.Image]:
    """One picture for each row of embeddings. Picture i starts from the noise of seed + i, for all settings."""
    pictures = []
    for start in tqdm(range(0, len(caption_embeds), BATCH), unit="batch", leave=False):
        embeds = caption_embeds[start : start + BATCH]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(embeds))]
        each = {name: value[start : start + BATCH] for name, value in sampling.items() if name == "text"}
        pictures += model.reconstruct(caption_embeds=embeds, generator=generators, **sampling | each)
    return pictures


def scores(pictures: Sequence[Image.Image], truths: Sequence[Scene]) -> dict[str, dict]:
    """The shares of objects and of backgrounds that are right, as the scene reader reads them."""
    counts = [compare(found, truth) for found, truth in zip(scene_reader().read(pictures), truths, strict=True)]
    return {
        "objects right": share([it["objects_right"] for it in counts], [it["objects"] for it in counts]),
        "backgrounds right": share([it["background_right"] for it in counts]),
    }


def share(right: Sequence[float], total: Sequence[float] | None = None) -> dict:
    """`Measurement.share` as a dict for JSON. If `right` has sums, it is the mean over the `total` things."""
    return asdict(Measurement.share(np.array(right), None if total is None else np.array(total)))
