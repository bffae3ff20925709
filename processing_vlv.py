"""Processor of a VLV: images to tensors, captions to token ids and back."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, BatchFeature, PreTrainedConfig, ProcessorMixin
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils import logging

# VLVConfig is imported to register it. AutoTokenizer reads a repo's config.json, and asks the user to trust the repo's
# code where the class is not registered.
try:
    from .chat_vlv import choose_template, find_image, find_words, is_conversation
    from .configuration_vlv import VLVConfig  # noqa: F401
    from .images_vlv import cut_centre, list_images, load_image
    from .prompts_vlv import PROMPT_END, WORDS_IGNORED, check_styles, prompt_ids, prompts_of
    from .stopping_vlv import clean_caption
    from .wording_vlv import Wishes
except ImportError:
    from chat_vlv import choose_template, find_image, find_words, is_conversation
    from configuration_vlv import VLVConfig  # noqa: F401
    from images_vlv import cut_centre, list_images, load_image
    from prompts_vlv import PROMPT_END, WORDS_IGNORED, check_styles, prompt_ids, prompts_of
    from stopping_vlv import clean_caption
    from wording_vlv import Wishes

logger = logging.get_logger(__name__)
# The parts' own tokenizers. They are kept so that `vlv export` can write the parts again. A part may come without one.
PART_TOKENIZERS = ("encoder_tokenizer", "decoder_tokenizer")
HUB_KWARGS = ("revision", "token", "local_files_only", "cache_dir")


class VLVProcessor(ProcessorMixin):
    r"""
    Prepares images and captions for [`VLVModel`]. It always uses PIL, so that the pixels do not depend on which other
    libraries are installed.

    Args:
        tokenizer: the caption head's tokenizer (the decoder's, in a checkpoint without a caption head).
        image_height, image_width (`int`): pixels that the encoder reads; the whole image is resized to them.
        image_mean, image_std (`list[float]`): the encoder's normalisation of values in 0..1.
        decoder_image_size (`int`): pixels of a side of the square image that the decoder rebuilds.
        crop (`str`, *optional*): `None` reads the whole image, stretched to the encoder's size as in Florence-2.
            `"center"` first resizes the shorter side to `decoder_image_size` and cuts out the centre, as in the paper.
        clean_captions (`bool`): captions are cut at their last full stop, and repeated sentences are dropped, for a
            caption head that never learned to end them (see `stopping_vlv.py`).
        takes_prompts (`bool`): the caption head was trained with prompts (see `prompts_vlv.py`).
        styles (`dict[str, str]`, *optional*): prompts of this checkpoint that have a name.
        encoder_tokenizer, decoder_tokenizer (*optional*): the Florence-2's and the text-to-image model's own.
    """

    def __init__(
        self,
        tokenizer=None,
        image_height: int = 768,
        image_width: int = 768,
        image_mean: Sequence[float] = (0.485, 0.456, 0.406),
        image_std: Sequence[float] = (0.229, 0.224, 0.225),
        decoder_image_size: int = 384,
        crop: str | None = None,
        clean_captions: bool = False,
        takes_prompts: bool = False,
        styles: Mapping[str, str] | None = None,
        chat_template: str | None = None,
        **parts,
    ):
        super().__init__(tokenizer, chat_template=choose_template(chat_template, takes_prompts))
        self.image_height, self.image_width = image_height, image_width
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.decoder_image_size = decoder_image_size
        self.crop = _check_crop(crop)
        self.clean_captions = clean_captions
        self.takes_prompts, self.styles = takes_prompts, check_styles(styles)
        self._part_tokenizers = {name: parts[name] for name in PART_TOKENIZERS if parts.get(name) is not None}

    @property
    def encoder_tokenizer(self):
        """Florence-2's tokenizer, or `None`."""
        return self._part_tokenizers.get("encoder_tokenizer")

    @property
    def decoder_tokenizer(self):
        """The tokenizer of the diffusion model's text encoder, or `None`."""
        return self._part_tokenizers.get("decoder_tokenizer")

    def learn_prompts(self, styles: Mapping[str, str]) -> None:
        """Records that the caption head takes prompts, and adds `styles`. A conversation then begins with a prompt."""
        self.takes_prompts, self.styles = True, {**self.styles, **check_styles(styles)}
        self.chat_template: str = choose_template(getattr(self, "chat_template", None), True)

    @property
    def model_input_names(self) -> list[str]:
        return ["pixel_values", "decoder_pixel_values", "input_ids", "attention_mask", "labels"]

    # ---- images --------------------------------------------------------------------------------------------

    def preprocess_image(self, image: Any, crop: str | None = None) -> Image.Image:
        """The part of an image that the model sees (see `crop`), as a PIL image in RGB."""
        return self._crop(load_image(image), crop)

    def _crop(self, image, crop):
        return cut_centre(image, self.decoder_image_size) if (crop or self.crop) == "center" else image

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        prompt: str | Sequence[str | None] | None = None,
        style: str | None = None,
        words: str | None = None,
        crop: str | None = None,
        return_decoder_pixel_values: bool = False,
        return_labels: bool = False,
        return_tensors: str = "pt",
        max_length: int | None = None,
        **kwargs,
    ) -> BatchFeature:
        """
        Args:
            images: one image or several, each anything that `load_image` reads, or in a list of its own.
            text: one caption or several. Without `return_labels` they are beginnings for the model to continue, padded
                on the left. With it they are whole captions: the end-of-text token is added, padding is on the right.
            prompt (*optional*): what the captions are asked to be: one for all, or one for each (`None` for none). Its
                tokens come before those of the caption.
            style (`str`, *optional*): the name of a prompt among `styles` instead.
            words (`str`, *optional*): a number of words such as `20-40`, for a style that holds `{words}`.
            crop (`str`, *optional*): `"center"` instead of the whole image.
            return_decoder_pixel_values (`bool`): also the images as the decoder rebuilds them.
            return_labels (`bool`): also `labels`, the captions' ids with -100 on prompts and padding.
            return_tensors (`str`): only `"pt"` is supported.
            max_length (`int`, *optional*): cuts longer captions, including their end-of-text token. Prompts are whole.

        Returns:
            [`BatchFeature`] with, of shapes and in the order (batch, ...):

            - **pixel_values** `(B, 3, H, W)` float32, normalised.
            - **decoder_pixel_values** `(B, 3, h, w)` float32 in -1..1.
            - **input_ids**, **attention_mask**, **labels** `(B, T)` int64.

        Raises:
            ValueError: an argument is wrong, the checkpoint takes no prompts, or it has no such style.
            OSError: an image is not there or cannot be fetched.
        """
        images = [] if images is None else list_images(images)
        text = [] if text is None else [text] if isinstance(text, str) else list(text)
        if not images and not text:
            raise ValueError("Nothing to process: give images, text, or both.")
        if return_tensors != "pt":
            raise ValueError(f"return_tensors is {return_tensors!r}: VLV works on PyTorch tensors, 'pt'.")
        _check_crop(crop)
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length is {max_length}: give at least 1 token, or None for whole captions.")
        data = {}
        if images:
            # Nothing here changes an image, so none is copied: a large one would be held twice.
            seen = [self._crop(load_image(image, copy=False), crop) for image in images]
            data["pixel_values"] = self._normalise(seen)
            if return_decoder_pixel_values:
                data["decoder_pixel_values"] = self._for_decoder(seen)
        prompts = prompts_of(self, prompt, style, words, len(text or images), "texts" if text else "images")
        if text or any(prompts):
            data.update(self._tokenize(text or [""] * len(prompts), prompts, return_labels, max_length))
        return BatchFeature(data)

    def _normalise(self, images):
        pixels = _resize(images, (self.image_width, self.image_height), Image.Resampling.BICUBIC)
        mean, std = np.float32(self.image_mean), np.float32(self.image_std)
        # Florence-2's own image processor also rescales in double precision. The result equals its to the last bit.
        pixels = ((pixels * (1 / 255)).astype(np.float32) - mean) / std  # (B, H, W, 3)
        return torch.from_numpy(pixels.transpose(0, 3, 1, 2)).contiguous()

    def _for_decoder(self, images):
        pixels = _resize(images, 2 * (self.decoder_image_size,), Image.Resampling.BILINEAR)
        return torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2).contiguous()

    # ---- text ----------------------------------------------------------------------------------------------

    def _tokenize(self, text, prompts, return_labels, max_length):
        # No special tokens: a caption follows the image's prefix directly, without a begin-of-text token.
        ids = [self.tokenizer(caption, add_special_tokens=False).input_ids for caption in text]
        if return_labels:
            ids = [caption + [self.tokenizer.eos_token_id] for caption in ids]
        asked = [prompt_ids(self.tokenizer, prompt) for prompt in prompts]
        ids = [prompt + caption[:max_length] for prompt, caption in zip(asked, ids, strict=True)]
        length = max(map(len, ids))
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        input_ids = torch.full((len(ids), length), pad)
        attention_mask = torch.zeros_like(input_ids)
        for row, caption in enumerate(ids):
            filled = slice(0, len(caption)) if return_labels else slice(length - len(caption), length)
            input_ids[row, filled] = torch.tensor(caption, dtype=torch.long)
            attention_mask[row, filled] = 1
        data = {"input_ids": input_ids, "attention_mask": attention_mask}
        if return_labels:
            data["labels"] = input_ids.masked_fill(attention_mask == 0, -100)
            for row, prompt in enumerate(asked):
                data["labels"][row, : len(prompt)] = -100
        return data

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        tokenize: bool = False,
        return_dict: bool = False,
        crop: str | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs,
    ) -> Any:
        """
        One conversation or several, in the form of chat models (see `chat_vlv.py`). Of each, the model sees the one
        image, the user's last words, which are the prompt, and the text of a last message of the assistant, which
        begins the caption. All other text is ignored. So are the user's words where the checkpoint takes no prompts:
        a warning says so.

        Args:
            conversation: messages `{"role": ..., "content": ...}`, or a list of such conversations. The image is a
                part `{"type": "image"}` with `url`, `path`, `base64` or `image`: anything that `load_image` reads.
            tokenize (`bool`): without it, the text before the caption is returned, for each conversation: the prompt,
                if there is one, a line break, and the beginning of the caption.
            return_dict (`bool`): with `tokenize`, what `__call__` returns for these images and texts, instead of its
                `input_ids` alone.
            crop, processor_kwargs: as `__call__` takes them.
            kwargs: the other arguments of `ProcessorMixin.apply_chat_template`. They change nothing here.

        Raises:
            ValueError: a conversation is malformed, or has no image or several.
            OSError: the image is not there or cannot be fetched.
        """
        conversations = [conversation] if is_conversation(conversation) else list(conversation)
        images = [find_image(messages) for messages in conversations]
        text: list[str] = [super(VLVProcessor, self).apply_chat_template(it, chat_template) for it in conversations]
        prompts = [self.find_chat_prompt(messages) for messages in conversations]
        if not tokenize:
            return text[0] if is_conversation(conversation) else text
        text = [it.removeprefix(prompt + PROMPT_END) for it, prompt in zip(text, prompts, strict=True)]
        inputs = self(images=images, text=text, prompt=prompts, **{"crop": crop, **(processor_kwargs or {})})
        return inputs if return_dict else inputs["input_ids"]

    def find_chat_prompt(self, conversation: Sequence[Mapping[str, Any]]) -> str:
        """The prompt in a conversation; "", with a warning, where the checkpoint takes none."""
        words = find_words(conversation)
        if words and not self.takes_prompts:
            logger.warning_once(WORDS_IGNORED)
        return words if self.takes_prompts else ""

    def batch_decode(self, ids: torch.Tensor, skip_special_tokens: bool = True, **kwargs) -> list[str]:
        """Token ids (B, T) from `model.generate` -> B captions."""
        captions: list[Any] = [self.decode(caption, skip_special_tokens, **kwargs) for caption in ids]
        return captions

    def decode(self, ids: torch.Tensor, skip_special_tokens: bool = True, **kwargs) -> str | list[str]:
        """
        Token ids (T,) of one caption -> the caption; (B, T) of several -> a list, as the tokenizers do. With
        `skip_special_tokens=False` the text is what was written, also where the processor cleans captions.
        """
        text = self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, **kwargs)
        finish = self.finish_caption if skip_special_tokens else str
        return finish(text).strip() if isinstance(text, str) else [finish(caption).strip() for caption in text]

    def wishes(self, **wishes: Any) -> Wishes:
        """What is asked of captions, checked: the arguments of [`Wishes`]."""
        return Wishes(self, **wishes)

    def finish_caption(self, text: str) -> str:
        """The text of a caption, or of what continues one, cleaned where this checkpoint needs it; else as it is."""
        return clean_caption(text) if self.clean_captions else text

    def post_process_image_text_to_text(self, generated_outputs, skip_special_tokens=True, **kwargs) -> list[str]:
        """What the image-text-to-text pipeline calls: decoding that keeps the space between text and caption."""
        texts = self.tokenizer.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens)
        return [self.finish_caption(text) for text in texts] if skip_special_tokens else texts

    # ---- saving and loading --------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        output.pop("_part_tokenizers", None)
        output["part_tokenizers"] = list(self._part_tokenizers)
        if not self.takes_prompts:  # as checkpoints were saved before there were prompts
            del output["takes_prompts"], output["styles"]
        return output

    def save_pretrained(self, save_directory, **kwargs):
        """As `ProcessorMixin.save_pretrained`. Each part's tokenizer is saved in a subfolder of its own name."""
        saved = super().save_pretrained(save_directory, **kwargs)
        for name, tokenizer in self._part_tokenizers.items():
            tokenizer.save_pretrained(Path(save_directory) / name)
        return saved

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As `ProcessorMixin.from_pretrained`, with the parts' tokenizers that the repo has."""
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        hub_kwargs = {key: kwargs[key] for key in HUB_KWARGS if key in kwargs}
        settings, _ = cls.get_processor_dict(pretrained_model_name_or_path, **hub_kwargs)
        processor._part_tokenizers = {
            # These folders have no config.json. Without `config=`, AutoTokenizer would look for it, and fail offline.
            name: AutoTokenizer.from_pretrained(
                pretrained_model_name_or_path, subfolder=name, config=PreTrainedConfig(), **hub_kwargs
            )
            for name in settings.get("part_tokenizers", ())
        }
        return processor

    @classmethod
    def from_components(
        cls,
        encoder: str | os.PathLike,
        decoder: str | os.PathLike | None = None,
        caption_head: str | os.PathLike | None = None,
        *,
        image_size: int | None = None,
        encoder_image_size: int | None = None,
        crop: str | None = None,
        tokenizer: Any = None,
        **hub_kwargs,
    ) -> "VLVProcessor":
        """
        The processor that goes with `VLVModel.from_components` of the same parts.

        Args:
            encoder: id or folder of a Florence-2: its image size, normalisation and tokenizer.
            decoder (*optional*): id or folder of a text-to-image model in diffusers' layout: its image size, and the
                tokenizer of a Stable Diffusion 1.x or 2.x. Without a decoder, give `image_size`.
            caption_head (*optional*): id or folder of a decoder-only language model: the captions' tokenizer. Without
                a caption head, the decoder's or the encoder's tokenizer takes its place.
            image_size (`int`, *optional*): pixels of a reconstruction's side; the teacher's own by default.
            encoder_image_size (`int`, *optional*): pixels of a side that the encoder reads; by default the size that
                it was trained at, 768 for Florence-2. With 384 the vision tower does a quarter of the work; its
                positions of rows and columns stay as they are.
            crop (`str`, *optional*): as above.
            tokenizer (*optional*): of the captions, loaded already, instead of the caption head's.
            hub_kwargs: `revision`, `token`, `local_files_only`, ... as every part's `from_pretrained` takes them.

        Raises:
            ValueError: the encoder cannot read images of `encoder_image_size`.
        """
        # Imported only now: it brings the models along, which preparing images and captions does not need.
        try:
            from .components_vlv import load_florence_config, read_decoder_config, read_index, reading_part
            from .decoders_vlv import Decoder  # noqa: F401  (as above)
            from .families_vlv import build_decoder, family_of
            from .layers_vlv import check_encoder_size
        except ImportError:
            from components_vlv import load_florence_config, read_decoder_config, read_index, reading_part
            from families_vlv import build_decoder, family_of
            from layers_vlv import check_encoder_size
        with reading_part("encoder", encoder):
            images, _ = ImageProcessingMixin.get_image_processor_dict(encoder, **hub_kwargs)
            encoder_tokenizer = AutoTokenizer.from_pretrained(encoder, **hub_kwargs)
        if encoder_image_size is not None:
            check_encoder_size(encoder_image_size, load_florence_config(encoder, **hub_kwargs))
            images["size"] = {"height": encoder_image_size, "width": encoder_image_size}
        decoder_tokenizer = None
        if decoder is not None:
            with reading_part("decoder", decoder):
                if image_size is None:
                    image_size = build_decoder(read_decoder_config(decoder, **hub_kwargs)).image_size
                if family_of(read_index(decoder, **hub_kwargs)).reads_text_encoder:
                    decoder_tokenizer = AutoTokenizer.from_pretrained(decoder, subfolder="tokenizer", **hub_kwargs)
        if tokenizer is None and caption_head is not None:
            with reading_part("caption head", caption_head):
                tokenizer = AutoTokenizer.from_pretrained(caption_head, **hub_kwargs)
        tokenizer = tokenizer or decoder_tokenizer or encoder_tokenizer
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return cls(
            tokenizer,
            image_height=images["size"]["height"],
            image_width=images["size"]["width"],
            image_mean=images["image_mean"],
            image_std=images["image_std"],
            decoder_image_size=image_size,
            crop=crop,
            encoder_tokenizer=encoder_tokenizer,
            decoder_tokenizer=decoder_tokenizer,
        )


def _resize(images, size, filter):
    """PIL images in RGB -> pixels (B, H, W, 3), uint8."""
    return np.stack([np.asarray(image.resize(size, filter)) for image in images])


def _check_crop(crop):
    if crop not in (None, "center"):
        raise ValueError(f"crop is {crop!r}: choose None (the whole image) or 'center'.")
    return crop


VLVProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["VLVProcessor", "load_image"]
