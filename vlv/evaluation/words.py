"""Captions as words, for all metrics that count words."""

import re

# Letters, digits and the signs that join them inside a word: "don't", "t-shirt".
WORD = re.compile(r"\w+(?:['’-]\w+)*")


def words(caption: str) -> list[str]:
    """
    The caption's words in lower case, without punctuation.

    The COCO tools use the Penn Treebank tokenizer, which needs Java. This simple rule replaces it. Scores differ only
    through the few words that the Penn Treebank tokenizer splits ("don't" to "do n't"). Text in a script without
    spaces is one word.
    """
    return WORD.findall(caption.lower())


def ngrams(sequence: list[str], n: int) -> list[tuple[str, ...]]:
    """All sequences of `n` neighbouring words, in order; none if there are fewer words."""
    return list(zip(*(sequence[start:] for start in range(n)), strict=False))


def spaced(caption: str) -> str:
    """The caption's words, separated by spaces, as the COCO tools read them."""
    return " ".join(words(caption))
