"""
What people ask of captions: a prompt, a length in words, tags without duplicates, trigger words, and a fixed beginning
and ending. `vlv caption`, the app and the endpoints share it.

Importing this module does not import torch.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

try:
    from .prompts_vlv import as_prompt, asks_for_words, check_taken, find_prompt, takes_prompts
except ImportError:
    from prompts_vlv import as_prompt, asks_for_words, check_taken, find_prompt, takes_prompts

RANGE = re.compile(r"(\d+)-(\d+)")
# A full stop inside a number or an abbreviation is not followed by a space.
SENTENCE_END = re.compile(r"[.!?]+[\"')\]]*(?=\s|$)|[。！？]")


def parse_words(words: str) -> tuple[int, int]:
    """A range of words such as `20-40` -> its ends. Raises ValueError for any other text."""
    found = RANGE.fullmatch(words.strip()) if isinstance(words, str) else None
    least, most = map(int, found.groups()) if found else (0, 0)
    if not 1 <= least <= most:
        raise ValueError(f"words is {words!r}: give the least and the most words of a caption, such as 20-40.")
    return least, most


@dataclass(frozen=True)
class Wording:
    """
    Args:
        words: the range of words that the model may not know about, such as `20-40`; `None` for any.
        trigger_words: words with commas between them. Those that a caption lacks come first.
        caption_prefix, caption_suffix: texts at the beginning and at the end of each caption. The model does not read
            them, unlike the beginning that it continues.
        clean_tags: captions are tags with commas between them: each is kept once, in order.

    Raises:
        ValueError: `words` is not a range.
    """

    words: str | None = None
    trigger_words: str | None = None
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    clean_tags: bool = False

    def __post_init__(self):
        if self.words is not None:
            parse_words(self.words)

    @property
    def word_range(self) -> tuple[int, int] | None:
        """The least and the most words."""
        return None if self.words is None else parse_words(self.words)

    @property
    def changes_nothing(self) -> bool:
        """Whether captions stay as they are written, so that they can be read while they are."""
        return self == Wording()

    def finish(self, text: str) -> str:
        """A whole caption as it was wished."""
        if self.word_range is not None:
            text = cut_to_words(text, self.word_range[1])
        if self.clean_tags:
            text = clean_tags(text)
        return add_words(text, self.caption_prefix or "", self.caption_suffix or "", self.trigger_words or "")


class Wishes:
    """
    The prompt and the wording of each caption. An image may have a prompt of its own, in place of the common one.

    Args:
        processor: it says whether the checkpoint takes prompts, and which styles it has.
        prompt, style, words: as in `prompts_vlv.find_prompt`. A model whose prompt asks for a number of words is not
            also forced to it.
        wording: the other arguments of [`Wording`].

    Raises:
        ValueError: the checkpoint takes no prompts, there is no such style, or the wishes contradict each other.
    """

    def __init__(
        self,
        processor: Any,
        prompt: str | None = None,
        style: str | None = None,
        words: str | None = None,
        **wording: Any,
    ):
        self._forced = Wording(words, **wording)
        self.processor = processor
        self.taken = takes_prompts(processor)
        self.prompt = find_prompt(processor, prompt, style, words)
        asked = asks_for_words(processor, prompt, style)
        self._wording = Wording(None, **wording) if asked else self._forced

    def prompt_for(self, own: str | None = None) -> str:
        """The prompt of an image, which may have its own."""
        return as_prompt(own) or self.prompt

    def wording_for(self, own: str | None = None) -> Wording:
        """What is done to the words of an image's captions. Its own prompt does not ask for a number of words."""
        return self._forced if as_prompt(own) else self._wording

    def check(self, prompt: str | None) -> None:
        """Raises ValueError where there is a prompt that is not text, or the checkpoint takes none."""
        check_taken(self.processor, as_prompt(prompt))

    def limits(
        self, own: Sequence[str | None], text_of: Callable[[list[int]], str], eos_token_ids: Sequence[int]
    ) -> list[Any]:
        """
        The logits processors of `generate` that hold captions to a number of words, if any are.

        Args:
            own: the own prompt of each image of the batch.
            text_of, eos_token_ids: as in `stopping_vlv.WordRange`.
        """
        held = [self.wording_for(prompt).words is not None for prompt in own]
        if not any(held):
            return []
        try:
            from .stopping_vlv import WordRange
        except ImportError:
            from stopping_vlv import WordRange
        return [WordRange(self._forced.word_range, text_of, eos_token_ids, held)]


def cut_to_words(text: str, most: int) -> str:
    """
    The longest beginning of a text that ends with a sentence and has at most so many words. A first sentence that is
    longer is cut after the last word.
    """
    if len(text.split()) <= most:
        return text
    ends = [match.end() for match in SENTENCE_END.finditer(text) if len(text[: match.end()].split()) <= most]
    return text[: ends[-1]] if ends else " ".join(text.split()[:most]).rstrip(",;:")


def clean_tags(text: str) -> str:
    """Tags with commas or line breaks between them, each once, in order. Upper and lower case are the same tag."""
    tags = (" ".join(tag.split()) for tag in re.split(r"[,\n]", text.strip().removesuffix(".")))
    kept: dict[str, str] = {}
    for tag in filter(None, tags):
        kept.setdefault(tag.casefold(), tag)
    return ", ".join(kept.values())


def add_words(text: str, before: str = "", behind: str = "", triggers: str = "") -> str:
    """
    A caption with words around it, unless they are there already.

    Args:
        before, behind: put at the beginning and at the end, with a space.
        triggers: words with commas between them; those that the caption lacks come first, with commas.
    """
    before, behind = before.strip(), behind.strip()
    words = [word.strip() for word in triggers.split(",") if word.strip()]
    if before and not text.startswith(before):
        text = f"{before} {text}"
    if behind and not text.endswith(behind):
        text = f"{text} {behind}" if behind[0].isalnum() else f"{text}{behind}"
    present = {part.strip() for part in text.split(",")}
    return ", ".join([*(word for word in words if word not in present), *filter(None, [text])])


__all__ = ["Wishes", "Wording", "add_words", "clean_tags", "cut_to_words", "parse_words"]
