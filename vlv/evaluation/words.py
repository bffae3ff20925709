"""Captions as words, for every metric that counts them."""

import re

# Letters, digits and what joins them inside a word: "don't", "t-shirt".
WORD = re.compile(r"\w+(?:['’-]\w+)*")


def words(caption: str) -> list[str]:
    """
    The caption's words in lower case, without punctuation.

    This plain rule stands in for the Penn Treebank tokenizer of the COCO tools, which needs Java; scores differ from
    theirs in the few words that it splits ("don't" to "do n't"). It knows no word borders where a script writes none.
    """
    return WORD.findall(caption.lower())


def ngrams(sequence: list[str], n: int) -> list[tuple[str, ...]]:
    """All runs of `n` neighbouring words, in order; none when there are fewer words."""
    return list(zip(*(sequence[start:] for start in range(n)), strict=False))


def spaced(caption: str) -> str:
    """The caption's words with a space between each two: as the COCO tools read it."""
    return " ".join(words(caption))
