"""
Prompts: what the caption of an image is asked to be, such as "Describe it briefly." or "What is at the top left?".

The caption head reads `image prefix, prompt, caption`. A prompt ends with a newline, so that it cannot be mistaken for
the beginning of the caption, which follows it. A checkpoint takes prompts if stage 2 trained it with some; its
processor records that as `takes_prompts`, and the prompts that have a name as `styles`.

This module does not import torch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

PROMPT_END = "\n"
WORDS = "{words}"  # in a style, where the wished number of words stands, such as 20-40
TAKES_NONE = "This checkpoint takes no prompts"
WORDS_IGNORED = f"{TAKES_NONE}: the user's words are ignored, and the image is captioned."


def check_styles(styles: Any, source: str = "styles") -> dict[str, str]:
    """
    Styles that are a mapping of names to prompts.

    Args:
        source: the file or argument that an error names.

    Raises:
        ValueError: it is another thing.
    """
    if styles is None:
        return {}
    if not isinstance(styles, Mapping):
        raise ValueError(
            f"{source} holds a {type(styles).__name__}: it must be a mapping of names to prompts, such as "
            '{"short": "Describe it briefly."}.'
        )
    for name, prompt in styles.items():
        if not isinstance(name, str) or not isinstance(prompt, str) or not name.strip() or not prompt.strip():
            raise ValueError(f"{source} gives the style {name!r} the prompt {prompt!r}: both must be texts.")
    return dict(styles)


def as_prompt(value: Any) -> str:
    """A prompt without the space around it; "" for none. Raises ValueError when it is not a text."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"The prompt {value!r} is not text: give each prompt as text.")
    return value.strip()


def takes_prompts(processor: Any) -> bool:
    """Whether the checkpoint of a processor was trained with prompts. Code on the Hub may know of none."""
    return getattr(processor, "takes_prompts", False)


def check_taken(processor: Any, given: str, what: str = "prompt") -> None:
    """Raises ValueError when something is `given` that only checkpoints with prompts take, and this is not one."""
    if given and not takes_prompts(processor):
        raise ValueError(
            f"{TAKES_NONE}, and the {what} {given[:60]!r} is given: leave it out, or take a model that was trained "
            "with prompts."
        )


def find_prompt(processor: Any, prompt: str | None = None, style: str | None = None, words: str | None = None) -> str:
    """
    The prompt that these wishes mean together; "" for none.

    Args:
        prompt: a prompt in words; or
        style: the name of one, among the processor's `styles`.
        words: a number of words such as `20-40`. It is part of the prompt where the style holds `{words}`, or where
            there is neither prompt nor style and one of the styles holds it.

    Raises:
        ValueError: the checkpoint takes no prompts, there is no such style, or the wishes contradict each other.
    """
    prompt = as_prompt(prompt)
    check_taken(processor, prompt)
    check_taken(processor, style or "", "style")
    styles = getattr(processor, "styles", {})
    if prompt and style:
        raise ValueError(f"Both the prompt {prompt[:60]!r} and the style {style!r} are given: choose one.")
    if style:
        if style not in styles:
            known = f"its styles are {', '.join(styles)}" if styles else "it has none"
            raise ValueError(f"There is no style {style!r} in this checkpoint: {known}.")
        prompt = styles[style]
        if WORDS in prompt and not words:
            raise ValueError(f"The style {style!r} asks for a number of words: give words, too, such as 20-40.")
    elif words and not prompt:
        prompt = next((text for text in styles.values() if WORDS in text), "")
    return prompt.replace(WORDS, words) if words else prompt


def asks_for_words(processor: Any, prompt: str | None, style: str | None) -> bool:
    """Whether a wished number of words becomes part of the prompt that `find_prompt` returns."""
    styles = getattr(processor, "styles", {})
    if style:
        return WORDS in styles.get(style, "")
    return WORDS in prompt if prompt else any(WORDS in text for text in styles.values())


def prompts_of(
    processor: Any,
    prompt: str | Sequence[str | None] | None,
    style: str | None,
    words: str | None,
    count: int,
    of: str,
) -> list[str]:
    """
    The prompts of `count` captions, "" for none. One text is for all of them. `style` and `words` are as in
    `find_prompt`.

    Raises:
        ValueError: those of `find_prompt`; or a list of prompts is not as long as what there are `count` of, called
            `of`; or one of them is not a text.
    """
    if style or words or prompt is None or isinstance(prompt, str):
        if prompt is not None and not isinstance(prompt, str):
            raise ValueError("A list of prompts is given beside a style or words: choose one.")
        if words and not asks_for_words(processor, prompt, style):
            raise ValueError(f"No prompt of this checkpoint asks for a number of words, and words is {words!r}.")
        return [find_prompt(processor, prompt, style, words)] * count
    prompts = [as_prompt(value) for value in prompt]
    if len(prompts) != count:
        raise ValueError(
            f"There are {count} {of}, but {len(prompts)} prompts: give one for all, or one for each (None for none)."
        )
    check_taken(processor, next(filter(None, prompts), ""))
    return prompts


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """The token ids of a prompt, with the newline that ends it; none without a prompt."""
    return tokenizer(prompt + PROMPT_END, add_special_tokens=False).input_ids if prompt else []


__all__ = [
    *(
        "PROMPT_END",
        "WORDS",
        "WORDS_IGNORED",
        "as_prompt",
        "asks_for_words",
        "check_styles",
        "check_taken",
        "find_prompt",
    ),
    *("prompt_ids", "prompts_of", "takes_prompts"),
]
