"""Changes of many captions at once."""

from collections.abc import Callable
from functools import partial

from wording_vlv import add_words

Change = Callable[[str], str]


def replacing(find: str, by: str) -> Change:
    """
    Put a text in the place of another, which is found as it is written, in upper and lower case.

    Raises:
        ValueError: there is nothing to find.
    """
    if not find:
        raise ValueError("Find is empty: write the text to replace.")
    return lambda text: text.replace(find, by)


def adding(before: str = "", behind: str = "", triggers: str = "") -> Change:
    """
    Put words around each caption, as `wording_vlv.add_words` does.

    Raises:
        ValueError: there is nothing to add.
    """
    if not any(words.strip(" ,") for words in (before, behind, triggers)):
        raise ValueError("There is nothing to add: write words to put before or behind, or trigger words.")
    return partial(add_words, before=before, behind=behind, triggers=triggers)
