"""
Where a caption ends whose caption head never learnt to end: the captioners of the paper were trained without an
end-of-text token. The checkpoint says so in its generation config (`sentence_end_ids`) and in its processor
(`clean_captions`). Other checkpoints say neither, and nothing here touches them.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    StoppingCriteria,
    StoppingCriteriaList,
)

# What ends in a full stop and is shorter is no sentence: a number such as 1.1.1, an abbreviation.
SHORTEST_SENTENCE = 4  # tokens


class RepeatedSentence(StoppingCriteria):
    """
    Stops a caption at the end of a sentence that the caption already holds. From there a model that cannot end goes
    round in circles.

    Args:
        sentence_end_ids: the tokens that can end a sentence (see [`find_sentence_ends`]).
    """

    def __init__(self, sentence_end_ids: Sequence[int]):
        self.sentence_end_ids = frozenset(sentence_end_ids)
        self._ends = torch.tensor(sorted(self.sentence_end_ids))

    @classmethod
    def of(cls, generation_config: GenerationConfig) -> "RepeatedSentence | None":
        """The criterion of a checkpoint, by its generation config; `None` for a model that ends by itself."""
        ids = getattr(generation_config, "sentence_end_ids", None)
        return cls(ids) if ids else None

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs) -> torch.BoolTensor:
        """Token ids (B, T) of what was written so far -> for each caption whether it stops here (B,)."""
        self._ends = self._ends.to(input_ids.device)
        stops = torch.isin(input_ids[:, -1], self._ends)
        for row in stops.nonzero()[:, 0].tolist():
            stops[row] = self.find(input_ids[row].tolist()) is not None
        return stops

    def find(self, ids: Sequence[int]) -> int | None:
        """How many of a caption's token ids (T,) there are up to the first repeated sentence, that one included."""
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


def stopping_criteria(
    generation_config: GenerationConfig, given: StoppingCriteriaList | None = None
) -> StoppingCriteriaList:
    """The given criteria of a call of `generate`, and the checkpoint's own."""
    repetition = RepeatedSentence.of(generation_config)
    return StoppingCriteriaList([*(given or ()), *([] if repetition is None else [repetition])])


def stop_at_repetition(model: PreTrainedModel, processor: ProcessorMixin, on: bool = True) -> None:
    """Marks a model and its processor as one that never learnt to end, or with `on=False` as one that did."""
    model.generation_config.sentence_end_ids = find_sentence_ends(processor.tokenizer) if on else None
    # Of a generation config that was made from a model's config, transformers loads only the entries that it knows.
    model.generation_config._from_model_config = False
    processor.clean_captions = on


def find_sentence_ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of all tokens that can end a sentence: their text ends in `.`, `!` or `?`, and perhaps white space."""
    ids = range(len(tokenizer))
    texts = tokenizer.batch_decode([[token] for token in ids], skip_special_tokens=True)
    return [token for token, text in zip(ids, texts, strict=True) if text.rstrip().endswith((".", "!", "?"))]


def clean_caption(text: str) -> str:
    """
    A caption as the paper's code leaves it: cut at its last full stop, if it has one, and each sentence once. White
    space at the beginning stays, because the text may continue a given one.
    """
    caption = text.lstrip()
    begun = text[: len(text) - len(caption)]
    caption = caption[: caption.rfind(".") + 1] or caption
    sentences = re.split(r"(?<=[.!?])\s+", caption)
    return begun + " ".join(dict.fromkeys(filter(None, sentences)))


__all__ = ["RepeatedSentence", "clean_caption", "find_sentence_ends", "stop_at_repetition", "stopping_criteria"]
