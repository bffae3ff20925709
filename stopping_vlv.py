"""
Ends captions: of a caption head that never learned to end them, and at a wished number of words.

The paper's captioners were trained without an end-of-text token. Such a checkpoint is marked in its generation config
(`sentence_end_ids`) and in its processor (`clean_captions`). What is about them does not affect other checkpoints.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    StoppingCriteria,
    StoppingCriteriaList,
)

# Shorter texts that end with a full stop are not sentences, but numbers such as 1.1.1 or abbreviations.
SHORTEST_SENTENCE = 4  # tokens


class RepeatedSentence(StoppingCriteria):
    """
    Stops a caption after a repeated sentence. A model that cannot end its captions would repeat itself for ever.

    Args:
        sentence_end_ids: the tokens that can end a sentence (see [`find_sentence_ends`]).
    """

    def __init__(self, sentence_end_ids: Sequence[int]):
        self.sentence_end_ids = frozenset(sentence_end_ids)
        self._ends = torch.tensor(sorted(self.sentence_end_ids))

    @classmethod
    def of(cls, generation_config: GenerationConfig) -> "RepeatedSentence | None":
        """The criterion of a checkpoint, from its generation config; `None` for a model that ends its captions."""
        ids = getattr(generation_config, "sentence_end_ids", None)
        return cls(ids) if ids else None

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs) -> torch.BoolTensor:
        """Token ids (B, T) of the captions so far -> whether each caption stops here (B,)."""
        self._ends = self._ends.to(input_ids.device)
        stops = torch.isin(input_ids[:, -1], self._ends)
        for row in stops.nonzero()[:, 0].tolist():
            stops[row] = self.find(input_ids[row].tolist()) is not None
        return stops

    def find(self, ids: Sequence[int]) -> int | None:
        """The number of a caption's token ids (T,) up to and including the first repeated sentence, or `None`."""
        start, sentences = 0, set()
        for place, token in enumerate(ids, start=1):
            if token not in self.sentence_end_ids:
                continue
            sentence = tuple(ids[start:place])
            if len(sentence) >= SHORTEST_SENTENCE and sentence in sentences:
                return place
            sentences.add(sentence)
            start = place
        return None


class WordRange(LogitsProcessor):
    """
    No caption ends before it has the least words, and each ends with the first word beyond the most. What is then
    beyond its last sentence is for `wording_vlv.Wording` to cut.

    Args:
        words: the least and the most words.
        text_of: new token ids of a caption -> its text so far.
        eos_token_ids: the tokens that end captions. Without any, no caption is ended here.
        images: whether it holds for each image of the batch.
    """

    def __init__(
        self,
        words: tuple[int, int],
        text_of: Callable[[list[int]], str],
        eos_token_ids: Sequence[int],
        images: Sequence[bool],
    ):
        self.least, self.most = words
        self.text_of, self.eos_token_ids = text_of, list(eos_token_ids)
        self.images = list(images)
        self.rows: list[bool] | None = None

    def keep(self, rows: torch.LongTensor) -> None:
        if self.rows is not None:
            self.rows = [self.rows[row] for row in rows.tolist()]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if not self.eos_token_ids:
            return scores
        if self.rows is None:  # an image has several rows where it has several captions
            each = len(scores) // len(self.images)
            self.rows = [holds for holds in self.images for _ in range(each)]
        for row, ids in enumerate(input_ids.tolist()):
            if not self.rows[row]:
                continue
            count = len(self.text_of(ids).split())
            if count < self.least:
                scores[row, self.eos_token_ids] = -torch.inf
            elif count > self.most:
                scores[row] = -torch.inf
                scores[row, self.eos_token_ids[0]] = 0.0
        return scores


def stopping_criteria(
    generation_config: GenerationConfig, given: StoppingCriteriaList | None = None
) -> StoppingCriteriaList:
    """The criteria that `generate` was called with, and the checkpoint's own."""
    repetition = RepeatedSentence.of(generation_config)
    return StoppingCriteriaList([*(given or ()), *([] if repetition is None else [repetition])])


def stop_at_repetition(model: PreTrainedModel, processor: ProcessorMixin, on: bool = True) -> None:
    """Marks a model and its processor as unable to end captions, or with `on=False` as able to."""
    model.generation_config.sentence_end_ids = find_sentence_ends(processor.tokenizer) if on else None
    # If a generation config was made from a model's config, transformers loads only the entries that it knows.
    model.generation_config._from_model_config = False
    processor.clean_captions = on


def find_sentence_ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of all tokens that can end a sentence: their text ends with `.`, `!` or `?`, then any white space."""
    ids = range(len(tokenizer))
    texts = tokenizer.batch_decode([[token] for token in ids], skip_special_tokens=True)
    return [token for token, text in zip(ids, texts, strict=True) if text.rstrip().endswith((".", "!", "?"))]


def clean_caption(text: str) -> str:
    """
    Cleans a caption as the paper's code does. It is cut at its last full stop, if it has one, and repeated sentences
    are removed. White space at the beginning is kept, because the text may continue a given one.
    """
    caption = text.lstrip()
    begun = text[: len(text) - len(caption)]
    caption = caption[: caption.rfind(".") + 1] or caption
    sentences = re.split(r"(?<=[.!?])\s+", caption)
    return begun + " ".join(dict.fromkeys(filter(None, sentences)))


__all__ = [
    "RepeatedSentence",
    "WordRange",
    "clean_caption",
    "find_sentence_ends",
    "stop_at_repetition",
    "stopping_criteria",
]
