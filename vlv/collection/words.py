"""Changes of many captions at once."""

from collections.abc import Callable

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
    Put words around each caption, unless they are there already.

    Args:
        before, behind: put at the beginning and at the end, with a space.
        triggers: words with commas between them; those that the caption lacks come first, with commas.

    Raises:
        ValueError: there is nothing to add.
    """
    before, behind = before.strip(), behind.strip()
    words = [word.strip() for word in triggers.split(",") if word.strip()]
    if not (before or behind or words):
        raise ValueError("There is nothing to add: write words to put before or behind, or trigger words.")

    def change(text: str) -> str:
        if before and not text.startswith(before):
            text = f"{before} {text}"
        if behind and not text.endswith(behind):
            text = f"{text} {behind}" if behind[0].isalnum() else f"{text}{behind}"
        present = {part.strip() for part in text.split(",")}
        return ", ".join([*(word for word in words if word not in present), text])

    return change
