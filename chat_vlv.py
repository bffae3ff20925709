"""
Conversations in the form of chat models: `[{"role": "user", "content": [{"type": "image", ...}, ...]}]`.

A VLV reads the one image of a conversation. The user's last words are the prompt, where the checkpoint takes prompts
(see `prompts_vlv.py`), and a last message of the assistant begins the caption. System messages, earlier questions and
earlier answers are ignored.
"""

from collections.abc import Mapping, Sequence
from typing import Any

ROLES = ("system", "developer", "user", "assistant")
# Where the image of a part is found, by what other chat models call it.
IMAGE_KEYS = ("image", "url", "path", "base64", "image_url")
# In Jinja, so that whatever renders conversations itself finds it in the processor: the beginning of the caption.
CHAT_TEMPLATE = """\
{%- if messages and messages[-1]['role'] == 'assistant' -%}
    {%- if messages[-1]['content'] is string -%}
        {{- messages[-1]['content'] -}}
    {%- else -%}
        {%- for part in messages[-1]['content'] if part['type'] == 'text' -%}
            {{- part['text'] -}}
        {%- endfor -%}
    {%- endif -%}
{%- endif -%}
"""
# Before it, the prompt: the text of the user's last message that has some, and a line break.
PROMPT_CHAT_TEMPLATE = (
    """\
{%- set asked = namespace(words='') -%}
{%- for message in messages if message['role'] == 'user' -%}
    {%- set said = namespace(words='') -%}
    {%- if message['content'] is string -%}
        {%- set said.words = message['content'] -%}
    {%- else -%}
        {%- for part in message['content'] if part['type'] == 'text' -%}
            {%- set said.words = said.words + ' ' + part['text'] -%}
        {%- endfor -%}
    {%- endif -%}
    {%- if said.words | trim -%}
        {%- set asked.words = said.words | trim -%}
    {%- endif -%}
{%- endfor -%}
{%- if asked.words -%}
    {{- asked.words + '\n' -}}
{%- endif -%}
"""
    + CHAT_TEMPLATE
)


def choose_template(given: str | None, takes_prompts: bool) -> str:
    """A checkpoint's chat template: the `given` one, unless it is none or one of the two above."""
    if given and given not in (CHAT_TEMPLATE, PROMPT_CHAT_TEMPLATE):
        return given
    return PROMPT_CHAT_TEMPLATE if takes_prompts else CHAT_TEMPLATE


def is_conversation(value: Any) -> bool:
    """Whether it is a list of messages."""
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(isinstance(it, Mapping) and "role" in it for it in value)
    )


def find_image(conversation: Sequence[Mapping[str, Any]]) -> Any:
    """
    The image of a conversation, as `load_image` takes it. Nothing is read or fetched.

    Raises:
        ValueError: a message or a part is malformed, or there is not exactly one image; the sentence says which.
    """
    if not is_conversation(conversation):
        raise ValueError("A conversation is a list of messages, each with a role and its content.")
    images = []
    for message in conversation:
        role, content = message["role"], message.get("content")
        if role not in ROLES:
            raise ValueError(f"There is no role {role!r}: a message is of {', '.join(ROLES[:-1])} or {ROLES[-1]}.")
        if isinstance(content, str):
            continue
        if not isinstance(content, (list, tuple)):
            raise ValueError(f"The content of a message of {role!r} is a text or a list of parts, not {content!r}.")
        found = [image for part in content for image in _images(part)]
        if found and role != "user":
            raise ValueError(f"An image is in a message of {role!r}: put it into one of 'user'.")
        images += found
    if len(images) != 1:
        raise ValueError(
            f"This conversation has {len(images) or 'no'} image{'s' * (len(images) != 1)}: a VLV reads exactly one. "
            'Give it as {"type": "image", "url": ...} in a message of \'user\'.'
        )
    return images[0]


def find_words(conversation: Sequence[Mapping[str, Any]]) -> str:
    """The prompt of a conversation: the text of the user's last message that has some; "" for none."""
    for message in reversed(conversation):
        if message["role"] == "user":
            content = message.get("content")
            parts = [content] if isinstance(content, str) else [part.get("text") for part in content or ()]
            if words := " ".join(part for part in parts if isinstance(part, str)).strip():
                return words
    return ""


def _images(part):
    """The image of a part of a message's content, in a list; none of a text."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return []
    if kind not in ("image", "image_url"):
        known = '{"type": "image", "url": ...} and {"type": "text", "text": ...}'
        raise ValueError(f"A part of a message has the type {kind!r}: this model knows {known}.")
    image = next((part[key] for key in IMAGE_KEYS if part.get(key) is not None), None)
    if isinstance(image, Mapping) and "url" in image:  # {"image_url": {"url": ...}}, as OpenAI's clients send it
        image = image["url"]
    if image is None:
        raise ValueError(f"An image has none of {', '.join(IMAGE_KEYS)}: say where it is.")
    return [image]


__all__ = ["CHAT_TEMPLATE", "PROMPT_CHAT_TEMPLATE", "choose_template", "find_image", "find_words", "is_conversation"]
