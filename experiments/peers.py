"""The peers of VLV: captioners that were trained on the same captions without a diffusion teacher."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    Florence2ForConditionalGeneration,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from experiments.llava import image_tokens
from vlv.captioning.captioner import Caption
from vlv.tiny.encoder import EncoderSettings, ShortCaptioning, normalise

BATCH = 50


@dataclass
class Peer:
    """
    A trained captioner.

    Args:
        generate: images (B, 3, H, W), normalised, and settings of `generate` -> the captions' ids, without a prompt.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    generate: Callable[..., torch.Tensor]

    @torch.inference_mode()
    def write(self, images: Sequence[Image.Image], max_new_tokens: int) -> Iterator[Caption]:
        """Greedy captions of images, in order. The images have the size that it was trained on."""
        for start in range(0, len(images), BATCH):
            batch = np.stack([np.array(image) for image in images[start : start + BATCH]])
            pixel_values = normalise(torch.from_numpy(batch).permute(0, 3, 1, 2))
            ids = self.generate(pixel_values, max_new_tokens=max_new_tokens, num_beams=1, do_sample=False)
            ends = ids == self.tokenizer.eos_token_id
            num_tokens = torch.where(ends.any(1), ends.int().argmax(1) + 1, ids.shape[1])
            texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
            yield from map(Caption, texts, ends.any(1).tolist(), num_tokens.tolist())


def load_llava(folder: Path) -> Peer:
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = image_tokens(model)

    def generate(pixel_values, **settings):
        input_ids = prompt.expand(len(pixel_values), -1)
        settings["attention_mask"] = torch.ones_like(input_ids)
        return model.generate(input_ids=input_ids, pixel_values=pixel_values, **settings)[:, len(prompt) :]

    return Peer(model, AutoTokenizer.from_pretrained(folder), generate)


def load_florence(folder: Path) -> Peer:
    florence = Florence2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    captioning = ShortCaptioning(florence, tokenizer(EncoderSettings.task_prompt)["input_ids"])
    encoder = florence.model.language_model.encoder

    def generate(pixel_values, **settings):
        memory = encoder(inputs_embeds=captioning.embed(pixel_values))
        return florence.generate(encoder_outputs=memory, **settings)[:, 1:]  # the first id starts the decoder

    return Peer(florence, tokenizer, generate)


# The peers by the stage that trains them.
LOADERS = {"experiments.llava:LlavaStage": load_llava, "encoder": load_florence}
