"""The engine that is vLLM: our readers prepare the pixels, and vLLM schedules and writes the captions."""

import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch
from transformers import GenerationConfig

from processing_vlv import VLVProcessor
from prompts_vlv import prompt_ids
from sampling_vlv import seed_of
from vlv.captioning.captioner import Caption, CaptionReader
from vlv.captioning.decoding import Spelling
from vlv.captioning.settings import Decoding, ModelOptions
from vlv.models.loading import find_captioner, read_config
from wording_vlv import Wishes

AT_ONCE = 256  # pictures that vLLM is given; how many of them it works on it decides itself
OWN_PROMPTS = 128  # tokens that are kept for the prompts of single images
# The options that vLLM follows, or that it has no use for here.
DECODING = {
    *("max_new_tokens", "min_new_tokens", "temperature", "top_p", "seed", "num_captions", "prefix"),
    *("repetition_penalty", "prompt", "style", "words", "trigger_words", "caption_prefix", "caption_suffix"),
    "clean_tags",
}
MODEL = {"model", "dtype"}


class VllmCaptioner:
    """
    Writes captions with vLLM, which loads the model itself. Greedy captions are those of our own engine, as far as
    rounding allows; what is drawn is other draws.

    Raises:
        ValueError: an option that vLLM does not follow, a checkpoint that it cannot read, or no vLLM.
    """

    def __init__(self, options: ModelOptions, decoding: Decoding, batch_size: int | None):
        _check(options, MODEL)
        _check(decoding, DECODING)
        source = find_captioner(options.model)
        if (Path(source) / "adapter_config.json").is_file():
            raise ValueError(
                f"{source} has LoRA adapters beside its weights, which --engine vllm does not read: train with "
                "--merge_lora, or take --engine local."
            )
        self.decoding, self.processor = decoding, VLVProcessor.from_pretrained(source)
        self.batch_size = self.largest = batch_size or AT_ONCE
        generation_config = GenerationConfig.from_pretrained(source)
        self.reading = CaptionReader(generation_config, self.processor)
        self.spelling = Spelling(decoding, self.processor.tokenizer, self.reading.eos_token_ids)
        self.wishes = Wishes(self.processor, **decoding.wishes)
        if self.wishes.wording_for().words is not None:
            raise ValueError(
                "--engine vllm follows --words only where the model was taught to: leave it out, or take --engine "
                "local."
            )
        config = read_config(source)
        self.others = config.num_queries + decoding.max_new_tokens  # positions that are not the prompt's
        self.room = len(self._before(self.wishes.prompt)) + (OWN_PROMPTS if self.wishes.taken else 0)
        self.length = min(self.others + self.room, config.caption_config.max_position_embeddings)
        self.check_prompt(self.wishes.prompt)
        self.penalty = decoding.repetition_penalty or generation_config.repetition_penalty or 1.0
        self.llm = self._start(source, options.dtype)

    def __call__(
        self,
        names: Sequence[str],
        pixel_values: Sequence[torch.Tensor],
        prompts: Sequence[str | None] | None = None,
    ) -> list[list[Caption]]:
        """As [`Captioner`]'s."""
        own = list(prompts or [None] * len(names))
        inputs = [
            # In a list: a tensor alone would be taken for the embeddings of an image.
            {"prompt_token_ids": self._before(self.wishes.prompt_for(prompt)), "multi_modal_data": {"image": [pixels]}}
            for pixels, prompt in zip(pixel_values, own, strict=True)
        ]
        answers = self.llm.generate(inputs, [self._sampling(name) for name in names], use_tqdm=False)
        return [
            [self.reading(list(it.token_ids), self.spelling, self.wishes.wording_for(prompt)) for it in answer.outputs]
            for answer, prompt in zip(answers, own, strict=True)
        ]

    def check_prompt(self, prompt: str | None) -> None:
        """Raises ValueError for a prompt that the checkpoint does not take, or that vLLM has no room for."""
        self.wishes.check(prompt)
        if prompt and (length := self.others + len(self._before(prompt))) > self.length:
            raise ValueError(
                f"The prompt {prompt[:60]!r} is too long: with it, image and caption have {length} tokens, and vLLM "
                f"has room for {self.length}. Shorten it, or lower --max_new_tokens."
            )

    def _before(self, prompt):
        return [*prompt_ids(self.processor.tokenizer, prompt), *self.spelling.prefix_ids]

    def _start(self, source, dtype):
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # before the import, which reads it
        try:
            from vllm import LLM
            from vllm.platforms import current_platform
        except ImportError as error:
            raise ValueError(
                f"--engine vllm needs vLLM, in an environment of its own: pip install 'vlv[vllm]' there ({error})."
            ) from error
        from vlv.serving.vllm_stopping import StopAtRepetition

        on_cpu = current_platform.is_cpu()
        if dtype == "auto" and on_cpu:
            dtype = "float32"
        return LLM(
            source,
            dtype=dtype,
            max_model_len=self.length,
            enforce_eager=on_cpu,  # compiling takes longer there than it saves
            mm_processor_cache_gb=0,  # no picture comes twice
            enable_prefix_caching=False,
            disable_log_stats=True,
            limit_mm_per_prompt={"image": 1},
            logits_processors=[StopAtRepetition] if self.reading.repetition is not None else None,
        )

    def _sampling(self, name):
        from vllm import SamplingParams

        decoding = self.decoding
        return SamplingParams(
            n=decoding.num_captions,
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            # As in our own engine, what is drawn for an image does not depend on the images beside it.
            seed=seed_of(decoding.seed, name) if decoding.temperature > 0 else None,
            max_tokens=decoding.max_new_tokens,
            min_tokens=decoding.min_new_tokens,
            repetition_penalty=self.penalty,
            detokenize=False,
        )


def _check(options: ModelOptions | Decoding, followed: set[str]) -> None:
    for field in fields(options):
        if field.name not in followed and getattr(options, field.name) != field.default:
            raise ValueError(f"--engine vllm does not follow --{field.name}: leave it out, or take --engine local.")
