"""From pixels to captions, in batches that fit into memory."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from PIL import Image

from modeling_vlv import VLVModel
from processing_vlv import VLVProcessor
from vlv.captioning.decoding import Spelling, generation_arguments
from vlv.captioning.memory import free_memory, memory_in_use, peak_memory
from vlv.captioning.settings import Decoding

# An automatic batch grows between these, as long as memory allows.
FIRST_BATCH = 4
LARGEST_BATCH = {"cpu": 64}
LARGEST_ON_ACCELERATOR = 256
SHARE_OF_MEMORY = 0.8


def largest_batch(device_type: str) -> int:
    """How far an automatic batch may grow on such a device."""
    return LARGEST_BATCH.get(device_type, LARGEST_ON_ACCELERATOR)


class Caption(NamedTuple):
    text: str
    ended: bool  # by its end-of-text token, not by the longest length allowed


class Captioner:
    """
    Writes captions: the one place that does, for the command, evaluation, a training's samples and publishing.

    The captions of an image are the same whatever the batch (in fp32; lower precisions round differently in different
    batches).

    Args:
        model, processor: from [`load_captioner`].
        decoding: what the captions are like.
        batch_size: images at once; `None` starts small and grows as far as free memory allows. What turns out not to
            fit is halved until it does.
        compile: decode with a static cache, which transformers compiles where it pays.
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
        self.device = next(model.parameters()).device
        self.largest = batch_size or largest_batch(self.device.type)
        self.batch_size = batch_size or FIRST_BATCH
        eos = model.generation_config.eos_token_id
        self.eos_token_ids = [] if eos is None else eos if isinstance(eos, list) else [eos]

    def __call__(self, names: Sequence[str], pixel_values: Sequence[torch.Tensor]) -> list[list[Caption]]:
        """
        Args:
            names: the images' names, which seed what is drawn for them.
            pixel_values: as many tensors of shape `(3, H, W)`, from the processor.

        Returns:
            For each image its captions, best first.

        Raises:
            ValueError: when not even one image fits into memory.
        """
        captions: list[list[Caption]] = []
        while len(captions) < len(names):
            batch = slice(len(captions), len(captions) + self.batch_size)
            before = memory_in_use(self.device)
            written = self._try(names[batch], torch.stack(tuple(pixel_values[batch])))
            if written is None:
                self._shrink(len(names[batch]))
            else:
                captions += written
                self._grow(len(written), peak_memory(self.device) - before)
        return captions

    def caption_images(self, images: Iterable[tuple[str, Image.Image]]) -> Iterator[tuple[str, list[Caption]]]:
        """Captions of PIL images of any mode and size, each behind its name, in order."""
        # Each is made small as it comes: a batch of large images would fill the memory.
        prepared = ((name, self.processor(images=image)["pixel_values"][0]) for name, image in images)
        while batch := list(islice(prepared, self.largest)):
            names, pixel_values = zip(*batch, strict=True)
            yield from zip(names, self(names, pixel_values), strict=True)

    @torch.no_grad()
    def write(self, names: Sequence[str], caption_embeds: torch.Tensor) -> list[list[Caption]]:
        """
        Captions of what has been encoded, in one batch.

        Args:
            caption_embeds: `(B, Q, E)`, from `model.encode`.
        """
        spelling = Spelling(self.decoding, self.processor.tokenizer, self.eos_token_ids)
        prefix_ids = torch.tensor(spelling.prefix_ids, dtype=torch.long).expand(len(names), -1)
        arguments = self.generation_arguments(names, spelling)
        with warnings.catch_warnings():
            # transformers warns that the image is not counted as repeated text, which is intended here.
            warnings.filterwarnings("ignore", message="Passing `(repetition_penalty|no_repeat_ngram_size)`")
            ids = self.model.generate(caption_embeds=caption_embeds, input_ids=prefix_ids, **arguments).tolist()
        captions = [
            Caption(spelling.text(row).strip(), any(token in self.eos_token_ids for token in row)) for row in ids
        ]
        each = self.decoding.num_captions
        return [captions[start : start + each] for start in range(0, len(captions), each)]

    def generation_arguments(self, names: Sequence[str], spelling: Spelling) -> dict[str, Any]:
        """What `model.generate` is told, for the images of these names."""
        arguments = generation_arguments(self.decoding, names, spelling)
        if self.compile:  # for which the batch must keep its shape
            arguments.pop("custom_generate", None)
            arguments["cache_implementation"] = "static"
        return arguments

    def _try(self, names, pixel_values):
        """The captions, or `None` when memory did not suffice."""
        try:
            return self._caption(names, pixel_values)
        except RuntimeError as error:
            if not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
                raise
        return None  # only out here is the memory free that the failed attempt held

    @torch.no_grad()
    def _caption(self, names, pixel_values):
        return self.write(names, self.model.encode(pixel_values))

    def _shrink(self, failed):
        clear_device_cache(garbage_collection=True)
        if failed == 1:
            raise ValueError(
                "Not even one image at a time fits into memory: lower --num_beams, --num_captions or "
                "--max_new_tokens, or take --dtype bfloat16 or --quantization."
            )
        self.batch_size = self.largest = failed // 2

    def _grow(self, images, used):
        if images == self.batch_size < self.largest:
            fitting = int(SHARE_OF_MEMORY * free_memory(self.device) * images / max(used, 1))
            self.batch_size = max(self.batch_size, min(2 * self.batch_size, self.largest, fitting))
