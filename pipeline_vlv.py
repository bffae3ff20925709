"""The pipelines of a VLV repo: image-to-text, image-text-to-text and image-to-image."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import ImageTextToTextPipeline, Pipeline
from transformers.utils import logging

try:
    from .chat_vlv import is_conversation
    from .images_vlv import load_image
    from .prompts_vlv import prompts_of
except ImportError:
    from chat_vlv import is_conversation
    from images_vlv import load_image
    from prompts_vlv import prompts_of

logger = logging.get_logger(__name__)


class _ProcessorReadsImages:
    """transformers' batching and `save_pretrained` ask for an image processor. They get the whole processor."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.image_processor = self.processor


class _ImagePipeline(_ProcessorReadsImages, Pipeline):
    """
    Gives one result per image. A single image that cannot be read raises an error. Among several images it gives a row
    `{..., "error": sentence}` in its place, so that the results of the others are kept.
    """

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __call__(self, inputs: Any, **kwargs):
        """
        Args:
            inputs: a path, URL, bytes, PIL image or array; or a list, generator, `datasets` column or torch dataset of
                them. Generators and torch datasets give an iterator, everything else gives a list.
        """
        if isinstance(inputs, Dataset):
            return super().__call__(inputs, **kwargs)
        if isinstance(inputs, (list, tuple)):
            return super().__call__(list(inputs), **kwargs) if inputs else []
        one = isinstance(inputs, (str, bytes, bytearray, dict, np.ndarray)) or hasattr(inputs, "read")
        if one or not isinstance(inputs, Iterable):
            return super().__call__(load_image(inputs), **kwargs)
        answers = super().__call__((image for image in inputs), **kwargs)
        return list(answers) if hasattr(inputs, "__len__") else answers

    def preprocess(self, image, crop=None, **asked):
        error = None
        try:
            image = load_image(image)
        except (ValueError, OSError) as reason:
            logger.warning(f"Left out: {reason}")
            # A blank image keeps the batch's shape. postprocess() discards its result.
            image, error = Image.new("RGB", (self.processor.image_width, self.processor.image_height)), str(reason)
        return {**self.processor(images=image, crop=crop, **asked), "error": error}


class _Asked(NamedTuple):
    """An image with its own prompt."""

    image: Any
    prompt: str


class VLVImageToTextPipeline(_ImagePipeline):
    """`pipeline("image-to-text")`: each image gives `[{"generated_text": caption}]`, a row per returned sequence."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.tokenizer = self.processor.tokenizer  # with which transformers pads the prompts of a batch

    def __call__(self, inputs: Any, prompt: str | Sequence[str | None] | None = None, **kwargs):
        """
        Args:
            inputs: as above.
            prompt (*optional*): what the captions are asked to be: one for all, or a list with one for each (`None`
                for none).
            kwargs: `style`, the name of a prompt of the checkpoint, and `words` instead (see the processor); `crop`;
                `batch_size`; and the arguments of `generate`.

        Raises:
            ValueError: the checkpoint takes no prompts, has no such style, or there are not as many prompts as images.
        """
        if prompt is None or isinstance(prompt, str):
            return super().__call__(inputs, **({"prompt": prompt} if prompt else {}), **kwargs)
        if isinstance(inputs, (str, bytes, dict)) or not hasattr(inputs, "__len__"):
            raise ValueError("A list of prompts needs a list of images: give one prompt for one image.")
        prompts = prompts_of(self.processor, prompt, None, None, len(inputs), "images")
        return super().__call__([_Asked(*pair) for pair in zip(inputs, prompts, strict=True)], **kwargs)

    def _sanitize_parameters(
        self, crop=None, prompt=None, style=None, words=None, generate_kwargs=None, **generation_arguments
    ):
        asked = {"prompt": prompt, "style": style, "words": words}
        asked = {name: value for name, value in asked.items() if value is not None}
        return {"crop": crop, **asked}, {**(generate_kwargs or {}), **generation_arguments}, {}

    def preprocess(self, image, crop=None, **asked):
        if isinstance(image, _Asked):
            image, asked["prompt"] = image
        # All images of a batch have token ids, or none.
        return super().preprocess(image, crop, **({"text": "", **asked} if asked else {}))

    def _forward(self, model_inputs, **generation_arguments):
        error = model_inputs.pop("error")
        ids = self.model.generate(**model_inputs, **generation_arguments)
        return {"generated_ids": ids.reshape(len(model_inputs["pixel_values"]), -1, ids.shape[-1]), "error": error}

    def postprocess(self, model_outputs):
        if model_outputs["error"]:
            return [{"generated_text": None, "error": model_outputs["error"]}]
        ids = model_outputs["generated_ids"]
        return [{"generated_text": caption} for caption in self.processor.batch_decode(ids.flatten(0, -2))]


class VLVReconstructionPipeline(_ImagePipeline):
    """`pipeline("image-to-image")`: each image gives its reconstruction from its caption embeddings."""

    def _sanitize_parameters(self, crop=None, seed=None, **sampling_arguments):
        if sampling_arguments.get("text") is not None:  # words to add to the image
            sampling_arguments["tokenizer"] = self.processor.decoder_tokenizer
        return {"crop": crop}, {"seed": seed, **sampling_arguments}, {}

    def _forward(self, model_inputs, seed=None, **sampling_arguments):
        pixel_values = model_inputs["pixel_values"]
        if seed is not None:  # one generator per image, so that an image does not depend on the others in its batch
            sampling_arguments["generator"] = [torch.Generator().manual_seed(seed) for _ in pixel_values]
        return {
            "images": self.model.reconstruct(pixel_values=pixel_values, output_type="pt", **sampling_arguments),
            "error": model_inputs["error"],
        }

    def postprocess(self, model_outputs):
        if model_outputs["error"]:
            return {"image": None, "error": model_outputs["error"]}
        pixels = model_outputs["images"].reshape(model_outputs["images"].shape[-3:]).permute(1, 2, 0)
        return Image.fromarray((pixels * 255).round().to(torch.uint8).cpu().numpy())


class VLVImageTextToTextPipeline(_ProcessorReadsImages, ImageTextToTextPipeline):
    """
    The stock `pipeline("image-text-to-text")`, for images with or without `text` (the beginning of the caption, which
    the model continues) and for conversations (see `chat_vlv.py`).
    """

    def check_model_type(self, supported_models):
        """Does nothing: the stock check logs an error for every class that is not part of transformers."""

    def __call__(self, images=None, text=None, **kwargs):
        """
        Args:
            images: an image or a list of them, each anything that `load_image` reads; or conversations; or a generator
                or torch dataset of `{"images": ..., "text": ...}`, which may also have a `prompt` each and gives an
                iterator.
            text (*optional*): the beginning of the caption, one for each image; or conversations.
            kwargs: `prompt`, `style` and `words`, as the processor takes them; and those of the stock pipeline.
        """
        if text is None and isinstance(images, (Iterator, Dataset)):
            return super().__call__(images, **kwargs)
        several = isinstance(images, (list, tuple))
        chats = images if text is None else text
        if is_conversation(chats) or (isinstance(chats, (list, tuple)) and chats and all(map(is_conversation, chats))):
            if images is not None and text is not None:
                raise ValueError("Conversations hold their images themselves: give no other images beside them.")
            for name in ("prompt", "style", "words"):
                if kwargs.get(name):
                    raise ValueError(
                        f"Conversations hold their prompt themselves, in the user's words: leave {name} out."
                    )
            return super().__call__(
                text=_begun(chats) if is_conversation(chats) else [_begun(it) for it in chats], **kwargs
            )
        if images is None:
            raise ValueError("There is no image: give images, or conversations that hold them.")
        if text is None:
            text = [""] * len(images) if several else ""
        count = 1 if isinstance(text, str) else len(text)
        if count != (len(images) if several else 1):
            raise ValueError(
                f"There are {len(images) if several else 1} images, but {count} texts: give one for each."
            )
        return Pipeline.__call__(self, {"images": images, "text": text}, **kwargs)

    def preprocess(self, inputs=None, **kwargs):
        if isinstance(inputs, dict):  # read with our own reader: transparency over white, clear errors
            images = inputs["images"]
            images = [load_image(image) for image in images] if isinstance(images, list) else load_image(images)
            if inputs.get("prompt") is not None:
                kwargs["prompt"] = inputs["prompt"]
            inputs = {**inputs, "images": images}
        return super().preprocess(inputs, **kwargs)

    def _forward(self, model_inputs, generate_kwargs=None):
        output = super()._forward(model_inputs, generate_kwargs)
        # The stock postprocess() removes the given text from the output, which here holds new tokens only. Given "a",
        # it would cut at the "a" of " large square". It gets an empty text, so that it removes nothing.
        output["input_ids"] = output["input_ids"][:, :0]
        return output


def _begun(conversation):
    """The conversation with a last message of the assistant in parts, as the stock pipeline continues it."""
    *before, last = conversation
    if last["role"] == "assistant" and isinstance(last.get("content"), str):
        last = {**last, "content": [{"type": "text", "text": last["content"]}]}
    return [*before, last]
