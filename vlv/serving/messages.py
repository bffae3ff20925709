"""Chat messages in OpenAI's format: the one image that a conversation shows, and the caption that it begins."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

ROLES = ("system", "developer", "user", "assistant")
PARTS = ("text", "image_url")


class Conversation(NamedTuple):
    image: str  # its URL
    prefix: str | None  # the beginning of the caption, where the last message is the assistant's


def read_conversation(messages: Any) -> Conversation:
    """
    The image of a conversation, and the beginning of its caption. The model follows no instructions: what users and
    systems say is ignored, and so are earlier answers.

    Args:
        messages: `[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": ...}}, ...]}, ...]`.

    Raises:
        ValueError: they are not chat messages, or there is not exactly one image. The sentence names the message.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError("messages must be a list that holds a user message with an image.")
    images: list[str] = []
    texts: list[str] = []
    for number, message in enumerate(messages):
        place = f"messages[{number}]"
        if not isinstance(message, Mapping):
            raise ValueError(f"{place} must be an object with role and content.")
        role = message.get("role")
        if role not in ROLES:
            raise ValueError(f"{place}.role is {_short(role)}: choose {_either(ROLES)}.")
        shown, texts = _read_content(message.get("content"), f"{place}.content")
        if shown and role != "user":
            raise ValueError(f"{place} is the {role}'s and shows an image: images belong in a user message.")
        images += shown
    if len(images) != 1:
        found = f"{len(images)} images" if images else "no image"
        raise ValueError(f"The conversation shows {found}: give exactly one, as a part of type image_url.")
    prefix = "".join(texts) if messages[-1]["role"] == "assistant" else ""
    return Conversation(images[0], prefix or None)


def _read_content(content, place):
    """The URLs and the texts of one message's content."""
    if content is None or isinstance(content, str):
        return [], [content or ""]
    if not isinstance(content, Sequence):
        raise ValueError(f"{place} must be a text or a list of parts.")
    images, texts = [], []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in PARTS:
            raise ValueError(f"{place}[{number}].type is {_short(kind)}: choose {_either(PARTS)}.")
        value = part.get(kind)
        if kind == "image_url":
            value = value.get("url") if isinstance(value, Mapping) else None
        if not isinstance(value, str):
            field = "image_url.url" if kind == "image_url" else "text"
            raise ValueError(f"{place}[{number}].{field} must be a string.")
        (images if kind == "image_url" else texts).append(value)
    return images, texts


def _short(value):
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def _either(names):
    return f"{', '.join(names[:-1])} or {names[-1]}"
