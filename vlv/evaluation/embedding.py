"""Images and texts as vectors, by any pretrained model of transformers' own classes."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import MODEL_MAPPING, AutoImageProcessor, AutoModel, AutoTokenizer

from components_vlv import reading_part
from vlv.data.rows import open_image


def is_clip(config) -> bool:
    """Whether a config belongs to a model that embeds both images and texts, such as CLIP or SigLIP."""
    model_class = MODEL_MAPPING.get(type(config), None)
    return hasattr(model_class, "get_image_features") and hasattr(model_class, "get_text_features")


class Embedder:
    """
    Args:
        source: id or folder of a pretrained model.
        device: a torch device.
        batch_size: images or texts at once.

    Raises:
        OSError, ValueError: there is no such model, or weights of it are missing.
    """

    def __init__(self, source: str, device: str = "cpu", batch_size: int = 50):
        self.source, self.batch_size = source, batch_size
        with reading_part("model", source):
            model, info = AutoModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
        # A classifier's backbone is often saved without the pooler of its class. The pooler would then be random.
        self.has_pooler = not any("pooler" in key for key in info["missing_keys"])
        if missing := [key for key in info["missing_keys"] if "pooler" not in key]:
            raise ValueError(f"{source} lacks {len(missing)} of the weights that its config needs: {missing[0]}, …")
        self.model = model.to(device).eval()

    @torch.inference_mode()
    def embed_images(self, images: Sequence[Any]) -> Tensor:
        """
        One vector for each image, (N, D) float32 on the CPU: a CLIP's image features; of other models the pooled
        output or, without a pooler, the mean of the last hidden states.

        Args:
            images: sources that `open_image` reads.
        """
        with reading_part("image processor", self.source):
            processor = AutoImageProcessor.from_pretrained(self.source)

        def embed(batch):
            pixels = processor(images=[open_image(image) for image in batch], return_tensors="pt")["pixel_values"]
            pixels = pixels.to(self.model.device, self.model.dtype)
            if is_clip(self.model.config):
                return _pooled(self.model.get_image_features(pixel_values=pixels))
            output = self.model(pixel_values=pixels)
            if self.has_pooler and getattr(output, "pooler_output", None) is not None:
                return output.pooler_output.flatten(1)
            states = output.last_hidden_state  # (B, T, D) of a transformer, (B, D, H, W) of a convolutional network
            return states.mean(1) if states.ndim == 3 else states.flatten(2).mean(2)

        return self._in_batches(images, embed)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """
        One vector for each text, (N, D) float32 on the CPU: a CLIP's text features; of other models the mean of the
        last hidden states, which most sentence encoders are trained for. Longer texts are cut at the model's limit.
        """
        with reading_part("tokenizer", self.source):
            tokenizer = AutoTokenizer.from_pretrained(self.source)
        longest = min(tokenizer.model_max_length, _positions(self.model.config))
        padding = "max_length" if is_clip(self.model.config) else True  # SigLIP was trained only with this padding

        def embed(batch):
            inputs = tokenizer(batch, padding=padding, truncation=True, max_length=longest, return_tensors="pt")
            inputs = inputs.to(self.model.device)
            if is_clip(self.model.config):
                return _pooled(self.model.get_text_features(**inputs))
            states = self.model(**inputs).last_hidden_state
            mask = inputs["attention_mask"][..., None]
            return (states * mask).sum(1) / mask.sum(1).clamp(min=1)

        return self._in_batches(texts, embed)

    def _in_batches(self, items: Sequence[Any], embed: Callable[[Sequence[Any]], Tensor]) -> Tensor:
        starts = tqdm(range(0, len(items), self.batch_size), desc="Embedding", unit="batch", leave=False, disable=None)
        vectors = torch.cat([embed(items[start : start + self.batch_size]).cpu() for start in starts])
        if not vectors.isfinite().all():
            raise ValueError(f"{self.source} gives vectors that are not finite; it cannot measure anything.")
        return vectors


@lru_cache(maxsize=2)
def load_embedder(source: str, device: str = "cpu", batch_size: int = 50) -> Embedder:
    """An [`Embedder`]. The last one is cached, because several metrics in a row use the same one."""
    return Embedder(source, device, batch_size)


def _pooled(output) -> Tensor:
    """The features of an output. Some releases of transformers return them without an output object."""
    return getattr(output, "pooler_output", output)


def _positions(config) -> int:
    config = getattr(config, "text_config", config)
    return getattr(config, "max_position_embeddings", None) or 10**9
