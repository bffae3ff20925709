"""The settings of the search as arguments of transformers, and a logits processor that transformers lacks."""

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from sampling_vlv import SeededDraws, seed_of
from vlv.captioning.search import shrinking_search
from vlv.captioning.settings import Decoding


class Spelling:
    """
    The text of captions with a prefix or forced words, which the model did not choose itself.

    After such a part the model may continue without a space, as at the beginning of a caption. If two words would then
    run together, a space is added to the text. The tokens that the model reads are not changed.
    """

    def __init__(self, decoding: Decoding, tokenizer: PreTrainedTokenizerBase, eos_token_ids: Sequence[int]):
        self.tokenizer, self.eos_token_ids = tokenizer, list(eos_token_ids)
        # Tokens of words begin with their own space, so the prefix must not end with one.
        prefix = (decoding.prefix or "").rstrip()
        self.prefix = prefix
        self.prefix_ids = tokenizer(prefix, add_special_tokens=False).input_ids if prefix else []
        self.space = decoding.prefix is not None and prefix != decoding.prefix
        self.joints: set[tuple[int, ...]] = set()  # the token ids of captions up to where a forced word ends

    def text(self, ids: Sequence[int]) -> str:
        """The prefix, and what new token ids add to it."""
        end = next((place for place, token in enumerate(ids) if token in self.eos_token_ids), len(ids))
        lengths = {len(joint) for joint in self.joints}
        joints = [length for length in sorted(lengths) if length < end and tuple(ids[:length]) in self.joints]
        text = self._decode(ids[:0])
        length, space = len(text), self.space
        for place in (*joints, end):
            whole = self._decode(ids[:place])
            part, length = whole[length:], len(whole)
            text += f" {part}" if _run_together(text, part, space) else part
            space = False
        return text

    def _decode(self, ids: Sequence[int]) -> str:
        """Always from the beginning: some tokenizers drop a space before the first token that they decode."""
        return self.tokenizer.decode([*self.prefix_ids, *ids], skip_special_tokens=True)


def _run_together(text: str, part: str, space: bool) -> bool:
    """Whether a space must be added between two texts. `space`: the user's text has one there."""
    if not text or not part or not _is_of_words(part[0]):
        return False
    return space or _is_of_words(text[-1]) or text[-1] in ",.;:!?)]}"


def _is_of_words(character: str) -> bool:
    """Whether it is a letter or a digit of a script with spaces between words, unlike Chinese and Japanese."""
    return character.isalnum() and unicodedata.east_asian_width(character) not in "WF"


def generation_arguments(decoding: Decoding, names: Sequence[str], spelling: Spelling) -> dict[str, Any]:
    """The settings as arguments of `model.generate`, for the images with these names."""
    tokenizer = spelling.tokenizer
    sampled = decoding.temperature > 0
    arguments = {
        "max_new_tokens": decoding.max_new_tokens,
        "min_new_tokens": decoding.min_new_tokens or None,
        "num_beams": decoding.num_beams,
        "num_return_sequences": decoding.num_captions,
        "do_sample": sampled,
        "no_repeat_ngram_size": decoding.no_repeat_ngram_size or None,
        "repetition_penalty": decoding.repetition_penalty,
        "bad_words_ids": [ids for word in decoding.ban_words or () for ids in _spellings(word, tokenizer)] or None,
    }
    if decoding.num_beams == 1:
        arguments["custom_generate"] = shrinking_search
    processors: list[LogitsProcessor] = []
    if decoding.force_words:
        processors.append(ForcedWords(decoding, tokenizer, spelling))
    if sampled:
        # These are applied here already, because SeededDraws comes after them and leaves one token to choose.
        arguments |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        processors.append(TemperatureLogitsWarper(decoding.temperature))
        if decoding.top_p < 1:
            processors.append(TopPLogitsWarper(decoding.top_p))
        numbers = range(decoding.num_captions)
        processors.append(SeededDraws([seed_of(decoding.seed, number, name) for name in names for number in numbers]))
    arguments["logits_processor"] = LogitsProcessorList(processors)
    return {name: value for name, value in arguments.items() if value is not None}


def _spellings(word: str, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of a word inside a sentence and at its beginning, capitalised and not capitalised."""
    spellings = {space + form for form in (word, word.capitalize()) for space in ("", " ")}
    return [tokenizer(spelling, add_special_tokens=False).input_ids for spelling in sorted(spellings)]


class ForcedWords(LogitsProcessor):
    """
    Each caption holds all of the words before it ends. A missing word is written where the caption would have ended,
    or where only enough tokens are left for it, and the model continues from there.
    """

    def __init__(self, decoding: Decoding, tokenizer: PreTrainedTokenizerBase, spelling: Spelling):
        self.spelling, self.length = spelling, decoding.max_new_tokens
        self.words = [
            (
                re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE),
                tokenizer(f" {word}", add_special_tokens=False).input_ids,
            )
            for word in decoding.force_words
        ]
        # The next tokens of captions into which a word is being written. Beams change their rows, so the key is the
        # text that has been written, not the row.
        self.unwritten: dict[tuple[int, ...], list[int]] = {}

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        likeliest = scores.argmax(-1).tolist()
        eos_token_ids = self.spelling.eos_token_ids
        for row, ids in enumerate(input_ids.tolist()):
            word = self.unwritten.get(tuple(ids))
            if word is None:
                text = self.spelling.text(ids)
                missing = [tokens for pattern, tokens in self.words if not pattern.search(text)]
                if not missing:
                    continue
                scores[row, eos_token_ids] = -torch.inf
                if likeliest[row] not in eos_token_ids and self.length - len(ids) > sum(map(len, missing)):
                    continue
                word = missing[0]
            scores[row] = -torch.inf
            scores[row, word[0]] = 0.0
            if len(word) > 1:
                self.unwritten[(*ids, word[0])] = word[1:]
            else:
                self.spelling.joints.add((*ids, word[0]))
        return scores
