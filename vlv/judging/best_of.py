"""Writes several captions of an image and keeps the best one."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from vlv.captioning.batches import Batches
from vlv.captioning.captioner import Caption, Captioner
from vlv.captioning.engine import Prepared, begin_row, check_prompts, check_source, work_locally
from vlv.captioning.journal import Row
from vlv.captioning.settings import Decoding
from vlv.captioning.sources import Source
from vlv.judging.judge import Judge
from vlv.judging.scores import value_of


class BestOf(Batches):
    """
    Args:
        judge: scores the captions of each image, which its model writes.
        decoding: how they are written, how many, and by which scores the best one is kept.
        batch_size: images at once (see [`Batches`]).
    """

    def __init__(self, judge: Judge, decoding: Decoding, batch_size: int | None = None):
        super().__init__(judge.device, batch_size, "lower --num_captions or --max_new_tokens, or use --dtype bfloat16")
        self.judge, self.by = judge, decoding.best_of
        self.captioner = Captioner(judge.model, judge.processor, replace(decoding, best_of=None), self.largest)

    def __call__(
        self,
        names: Sequence[str],
        contents: Sequence[Mapping[str, torch.Tensor]],
        prompts: Sequence[str | None] | None = None,
    ) -> list[Caption]:
        """
        The best caption of each image.

        Args:
            names: the images' names, which seed the sampling of their captions.
            contents: what `judge.read` returns for the images.
            prompts: the images' own prompts, if they have any.

        Raises:
            ValueError: when not even one image fits into memory.
        """
        return self.in_batches(self._choose, names, contents, prompts or [None] * len(names))

    def rows(self, batch: Sequence[Prepared]) -> list[Row]:
        """The rows of a batch: captions, or errors."""
        batch = check_prompts(self.captioner.check_prompt, batch)
        readable = [prepared for prepared in batch if prepared.error is None]
        names, prompts = ([getattr(it.picture, name) for it in readable] for name in ("name", "prompt"))
        captions = iter(self(names, [prepared.content for prepared in readable], prompts))
        return [
            {**begin_row(picture), **({"error": error} if error else {"text": next(captions).text})}
            for picture, _, error in batch
        ]

    @torch.no_grad()
    def _choose(self, names, contents, prompts):
        pixel_values = torch.stack([content["pixel_values"] for content in contents])
        embeds = self.judge.model.encode(pixel_values, num_queries=self.captioner.decoding.num_queries)
        # Draws are often the same; each text is scored once.
        written = [{it.text: it for it in captions} for captions in self.captioner.write(names, embeds, prompts)]
        contents = [{**content, "caption_embeds": embed} for content, embed in zip(contents, embeds, strict=True)]
        asked = [self.captioner.wishes.prompt_for(prompt) for prompt in prompts]
        scores = self.judge(contents, [list(texts) for texts in written], asked)
        return [self._best(list(texts.values()), of) for texts, of in zip(written, scores, strict=True)]

    def _best(self, captions, scores):
        values = [value_of(each, self.by) for each in scores]
        return captions[values.index(max(values))]


def choose_locally(
    source: Source,
    done: Collection[str],
    best_of: BestOf,
    num_workers: int | None = None,
    part: int = 0,
    parts: int = 1,
) -> Iterator[list[Row]]:
    """The best caption of each picture that has none yet, or of one of several equal parts, as [`work_locally`]."""
    check_source(source, best_of.judge.processor)
    return work_locally(source, done, best_of.judge.read, best_of.rows, best_of, num_workers, part, parts)
