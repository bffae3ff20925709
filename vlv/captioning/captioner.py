"""From pixels to captions, in batches that fit into memory."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from PIL import Image
from transformers import GenerationConfig

from modeling_vlv import VLVModel
from processing_vlv import VLVProcessor
from prompts_vlv import prompt_ids
from stopping_vlv import RepeatedSentence
from vlv.captioning.batches import Batches
from vlv.captioning.decoding import Spelling, generation_arguments
from vlv.captioning.settings import Decoding
from wording_vlv import Wishes, Wording


class Caption(NamedTuple):
    text: str
    ended: bool  # with its end-of-text token; not at the longest length allowed, and not because it repeated itself
    num_tokens: int  # written by the model, including the end-of-text token


class CaptionReader:
    """Reads captions out of token ids, as this checkpoint ends them."""

    def __init__(self, generation_config: GenerationConfig, processor: VLVProcessor):
        eos = generation_config.eos_token_id
        self.eos_token_ids: list[int] = [] if eos is None else eos if isinstance(eos, list) else [eos]
        self.repetition = RepeatedSentence.of(generation_config)  # `None` where captions end by themselves
        self.processor = processor

    def __call__(self, ids: Sequence[int], spelling: Spelling, wording: Wording) -> Caption:
        """The caption of new token ids, as `model.generate` returns them: what comes after its end is ignored."""
        repeated = None if self.repetition is None else self.repetition.find(ids)
        ids = ids[:repeated]
        end = next((place for place, token in enumerate(ids) if token in self.eos_token_ids), None)
        prefix, text = spelling.text(()), spelling.text(ids)
        text = prefix + self.processor.finish_caption(text.removeprefix(prefix))
        return Caption(wording.finish(text.strip()), end is not None, len(ids) if end is None else end + 1)


class Captioner(Batches):
    """
    Writes captions: the one place that does, for the command, evaluation, a training's samples and publishing.

    The captions of an image are the same whatever the batch (in fp32; lower precisions round differently in different
    batches).

    Args:
        model, processor: from [`load_captioner`].
        decoding: how captions are written.
        batch_size: images at once (see [`Batches`]).
        compile: decode with a static cache, which transformers compiles on a GPU.
    """

    def __init__(
        self,
        model: VLVModel,
        processor: VLVProcessor,
        decoding: Decoding,
        batch_size: int | None = None,
        compile: bool = False,
    ):
        self.model, self.processor, self.decoding, self.compile = model, processor, decoding, compile
        model.check_num_queries(decoding.num_queries)  # before the first image is read
        super().__init__(
            next(model.parameters()).device,
            batch_size,
            "lower --num_beams, --num_captions or --max_new_tokens, or use --dtype bfloat16 or --quantization",
        )
        self.reading = CaptionReader(model.generation_config, processor)
        self.wishes = Wishes(processor, **decoding.wishes)
        self.check_prompt(self.wishes.prompt)
        self.eos_token_ids, self.repetition = self.reading.eos_token_ids, self.reading.repetition

    def __call__(
        self,
        names: Sequence[str],
        pixel_values: Sequence[torch.Tensor],
        prompts: Sequence[str | None] | None = None,
    ) -> list[list[Caption]]:
        """
        Args:
            names: the images' names, which seed the sampling of their captions.
            pixel_values: as many tensors of shape `(3, H, W)`, from the processor.
            prompts: as many prompts; an image without one gets that of `decoding`.

        Returns:
            For each image its captions, best first.

        Raises:
            ValueError: when not even one image fits into memory.
        """
        return self.in_batches(self._caption, names, pixel_values, prompts or [None] * len(names))

    def caption_images(self, images: Iterable[tuple[str, Image.Image]]) -> Iterator[tuple[str, list[Caption]]]:
        """(name, captions) for each PIL image, of any mode and size, in order."""
        # Each image is resized at once, because a batch of large images would fill the memory.
        prepared = ((name, self.processor(images=image)["pixel_values"][0]) for name, image in images)
        while batch := list(islice(prepared, self.largest)):
            names, pixel_values = zip(*batch, strict=True)
            yield from zip(names, self(names, pixel_values), strict=True)

    @torch.no_grad()
    def write(
        self, names: Sequence[str], caption_embeds: torch.Tensor, prompts: Sequence[str | None] | None = None
    ) -> list[list[Caption]]:
        """
        Captions for caption embeddings, in one batch.

        Args:
            caption_embeds: `(B, Q, E)`, from `model.encode`.
            prompts: as in `__call__`.
        """
        spelling = Spelling(self.decoding, self.processor.tokenizer, self.eos_token_ids)
        prompts = list(prompts or [None] * len(names))
        asked: dict[str, Any] = {}
        if self.wishes.taken:
            asked["prompt"] = [self.wishes.prompt_for(prompt) for prompt in prompts]
        inputs = self.processor(text=[spelling.prefix] * len(names), **asked)
        wordings = [self.wishes.wording_for(prompt) for prompt in prompts]
        arguments = self.generation_arguments(names, spelling)
        arguments["logits_processor"][:0] = self.wishes.limits(prompts, spelling.text, self.eos_token_ids)
        with warnings.catch_warnings():
            # transformers warns that the image is not counted as repeated text, which is intended here.
            warnings.filterwarnings("ignore", message="Passing `(repetition_penalty|no_repeat_ngram_size)`")
            ids = self.model.generate(caption_embeds=caption_embeds, **inputs, **arguments).tolist()
        each = self.decoding.num_captions
        captions = [self.reading(row, spelling, wordings[number // each]) for number, row in enumerate(ids)]
        return [captions[start : start + each] for start in range(0, len(captions), each)]

    def check_prompt(self, prompt: str | None) -> None:
        """Raises ValueError where the checkpoint takes no prompts, or this one leaves no room for a caption."""
        self.wishes.check(prompt)
        if prompt:
            queries = self.model.check_num_queries(self.decoding.num_queries)
            prefix = Spelling(self.decoding, self.processor.tokenizer, ()).prefix_ids
            self.model.check_text_length(len(prompt_ids(self.processor.tokenizer, prompt)) + len(prefix), queries)

    def generation_arguments(self, names: Sequence[str], spelling: Spelling) -> dict[str, Any]:
        """The arguments of `model.generate` for the images with these names."""
        arguments = generation_arguments(self.decoding, names, spelling)
        if self.compile:  # compiled code needs batches of one shape
            arguments.pop("custom_generate", None)
            arguments["cache_implementation"] = "static"
        return arguments

    @torch.no_grad()
    def _caption(self, names, pixel_values, prompts):
        caption_embeds = self.model.encode(torch.stack(tuple(pixel_values)), num_queries=self.decoding.num_queries)
        return self.write(names, caption_embeds, prompts)
