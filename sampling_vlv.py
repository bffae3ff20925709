"""Draws the words of sampled captions from seeds, so that the same captions can be drawn again."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList, PreTrainedModel


def seed_of(*parts: int | str) -> int:
    """The seed of what is drawn for one caption: equal parts give equal seeds, in every process."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=7).digest(), "big")


class SeededDraws(LogitsProcessor):
    """
    Draws each token, and leaves only that one to choose. It must be the last processor. A draw depends on the seed of
    the caption and the position of the token, so a caption does not depend on the others in its batch.

    Args:
        seeds: one for each caption of the batch.
    """

    def __init__(self, seeds: Sequence[int]):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def keep(self, rows: torch.LongTensor) -> None:
        """Only these rows of the batch remain."""
        self.generators = [self.generators[row] for row in rows.tolist()]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        cumulated = scores.float().softmax(-1).cumsum(-1)
        draws = torch.stack([torch.rand(1, generator=generator) for generator in self.generators]).to(scores.device)
        tokens = torch.searchsorted(cumulated, draws * cumulated[:, -1:], right=True)
        tokens = tokens.clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens, 0.0)


class SeededSearch:
    """
    For `generate(custom_generate=...)`: the sampling of `generate` with its temperature, `top_k`, `top_p` and the
    others, drawn from seeds.

    Args:
        seed: of all images, or one for each. The captions of one image (`num_return_sequences`) are different draws.
        num_images: of the batch.

    Raises:
        ValueError: not as many seeds as images, or sampling by beams, which has no rows of their own.
    """

    def __init__(self, seed: int | Sequence[int], num_images: int, generation_config: GenerationConfig):
        seeds = [seed] * num_images if isinstance(seed, int) else list(seed)
        if len(seeds) != num_images:
            raise ValueError(f"There are {len(seeds)} seeds for {num_images} images: give one seed, or one for each.")
        if (generation_config.num_beams or 1) > 1:
            raise ValueError(
                f"num_beams is {generation_config.num_beams}, and seed works without beams only: set one beam."
            )
        numbers = range(generation_config.num_return_sequences or 1)
        self.seeds = [seed_of(seed, number) for seed in seeds for number in numbers]

    def __call__(
        self, model: PreTrainedModel, input_ids: torch.LongTensor, logits_processor: LogitsProcessorList, **kwargs: Any
    ) -> Any:
        processors = LogitsProcessorList([*logits_processor, SeededDraws(self.seeds)])
        return GenerationMixin._sample(model, input_ids, logits_processor=processors, **kwargs)


__all__ = ["SeededDraws", "SeededSearch", "seed_of"]
