"""The settings of the search as transformers takes them, and the two processors of logits that it lacks."""

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase, TopPLogitsWarper

from vlv.captioning.search import shrinking_search
from vlv.captioning.settings import Decoding


def generation_arguments(
    decoding: Decoding, names: Sequence[str], tokenizer: PreTrainedTokenizerBase, eos_token_ids: Sequence[int]
) -> dict[str, Any]:
    """The settings as arguments of `model.generate`, for the images of these names."""
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
    processors = []
    if decoding.force_words:
        processors.append(ForcedWords(decoding, tokenizer, eos_token_ids))
    if sampled:
        # The processor leaves one token to draw from: what these would do is done by then.
        arguments |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        processors.append(SeededSampling(decoding, names))
    arguments["logits_processor"] = LogitsProcessorList(processors)
    return {name: value for name, value in arguments.items() if value is not None}


def _spellings(word: str, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of a word within a sentence and at its beginning, capitalised and not."""
    spellings = {space + form for form in (word, word.capitalize()) for space in ("", " ")}
    return [tokenizer(spelling, add_special_tokens=False).input_ids for spelling in sorted(spellings)]


class SeededSampling(LogitsProcessor):
    """
    Draws each token with a random number that is fixed by the seed, the image's name, the caption's number and the
    token's place, so that what is drawn for an image does not depend on the images that share its batch.
    """

    def __init__(self, decoding: Decoding, names: Sequence[str]):
        self.temperature = decoding.temperature
        self.top_p = TopPLogitsWarper(decoding.top_p) if decoding.top_p < 1 else None
        draws = []
        for name in names:
            for number in range(decoding.num_captions):
                digest = hashlib.blake2b(f"{decoding.seed}/{number}/{name}".encode(), digest_size=7).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
                draws.append(torch.rand(decoding.max_new_tokens, generator=generator))
        self.draws = torch.stack(draws)  # (rows, max_new_tokens), in 0..1

    def keep(self, rows: torch.LongTensor) -> None:
        self.draws = self.draws[rows.to(self.draws.device)]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores = scores.float() / self.temperature
        if self.top_p is not None:
            scores = self.top_p(input_ids, scores)
        cumulated = scores.softmax(-1).cumsum(-1)
        draws = self.draws[:, input_ids.shape[1], None].to(scores.device)
        tokens = torch.searchsorted(cumulated, draws * cumulated[:, -1:], right=True)
        tokens = tokens.clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens, 0.0)


class ForcedWords(LogitsProcessor):
    """
    No caption ends before it holds all of the words. One that it lacks is written where the caption would have
    ended, or where the room for it runs out, and the model goes on from there.
    """

    def __init__(self, decoding: Decoding, tokenizer: PreTrainedTokenizerBase, eos_token_ids: Sequence[int]):
        self.tokenizer, self.eos_token_ids = tokenizer, list(eos_token_ids)
        self.prefix, self.length = decoding.prefix or "", decoding.max_new_tokens
        self.words = [
            (
                re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE),
                tokenizer(f" {word}", add_special_tokens=False).input_ids,
            )
            for word in decoding.force_words
        ]
        # How a caption goes on while a word is being written into it. Beams change their rows: only what was written
        # tells one from another.
        self.unwritten: dict[tuple[int, ...], list[int]] = {}

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        likeliest = scores.argmax(-1).tolist()
        for row, ids in enumerate(input_ids.tolist()):
            word = self.unwritten.get(tuple(ids))
            if word is None:
                text = self.prefix + self.tokenizer.decode(ids, skip_special_tokens=True)
                missing = [tokens for pattern, tokens in self.words if not pattern.search(text)]
                if not missing:
                    continue
                scores[row, self.eos_token_ids] = -torch.inf
                if likeliest[row] not in self.eos_token_ids and self.length - len(ids) > sum(map(len, missing)):
                    continue
                word = missing[0]
            scores[row] = -torch.inf
            scores[row, word[0]] = 0.0
            if len(word) > 1:
                self.unwritten[(*ids, word[0])] = word[1:]
        return scores
