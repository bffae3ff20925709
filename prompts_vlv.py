"""
Prompts: what the caption of an image is asked to be, such as "Describe it briefly." or "What is at the top left?".

The caption head reads `image prefix, prompt, caption`. A prompt ends with a newline, so that it cannot be mistaken for
the beginning of the caption, which follows it. A checkpoint takes prompts if stage 2 trained it with some; its
processor records that, and the prompts that have a name, its styles.
"""

from collections.abc import Mapping, Sequence
from typing import Any

PROMPT_END = "\n"
WORDS = "{words}"  # in a style, where the wished number of words stands, such as 20-40


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


def one_for_each(prompt: str | Sequence[str | None] | None, count: int, of: str) -> list[str]:
    """
    The prompts of `count` captions: one text is for all of them.

    Raises:
        ValueError: a list of prompts has another length, or one is not a text. `of` says what there are `count` of.
    """
    if prompt is None or isinstance(prompt, str):
        return [as_prompt(prompt)] * count
    prompts = [as_prompt(value) for value in prompt]
    if len(prompts) != count:
        raise ValueError(
            f"There are {count} {of}, but {len(prompts)} prompts: give one for all, or one for each (None for none)."
        )
    return prompts


class PromptsMixin:
    """The part of the processor that knows the prompts of its checkpoint."""

    takes_prompts: bool
    styles: dict[str, str]
    tokenizer: Any

    def check_prompt(self, prompt: str | None) -> None:
        """Raises ValueError when there is a prompt and the checkpoint takes none."""
        if prompt and not self.takes_prompts:
            raise ValueError(
                f"This checkpoint takes no prompts, and was given {prompt[:60]!r}: leave it out, or take a model that "
                "was trained with prompts."
            )

    def find_prompt(self, prompt: str | None = None, style: str | None = None, words: str | None = None) -> str:
        """
        The prompt that these wishes mean together; "" for none.

        Args:
            prompt: a prompt in words; or
            style: the name of one, among `styles`.
            words: a number of words such as `20-40`. It is part of the prompt where the style holds `{words}`, or
                where there is neither prompt nor style and one of the styles holds it.

        Raises:
            ValueError: the checkpoint takes no prompts, there is no such style, or the wishes contradict each other.
        """
        prompt = as_prompt(prompt)
        if style and not self.takes_prompts:
            raise ValueError(
                f"This checkpoint takes no prompts and has no styles, and was given the style {style!r}: leave it out,"
                " or take a model that was trained with prompts."
            )
        if prompt and style:
            raise ValueError(f"Both the prompt {prompt[:60]!r} and the style {style!r} are given: choose one.")
        if style:
            if style not in self.styles:
                known = f"its styles are {', '.join(self.styles)}" if self.styles else "it has none"
                raise ValueError(f"There is no style {style!r} in this checkpoint: {known}.")
            prompt = self.styles[style]
            if WORDS in prompt and not words:
                raise ValueError(f"The style {style!r} asks for a number of words: give it, such as 20-40.")
        elif words and not prompt:
            prompt = next((text for text in self.styles.values() if WORDS in text), "")
        self.check_prompt(prompt)
        return prompt.replace(WORDS, words) if words and WORDS in prompt else prompt

    def wishes_words(self, prompt: str | None = None, style: str | None = None) -> bool:
        """Whether a wished number of words is part of the prompt (see `find_prompt`)."""
        named = self.styles.get(style) if style else None
        texts = [named or ""] if style else [] if as_prompt(prompt) else self.styles.values()
        return any(WORDS in text for text in texts)

    def prompt_ids(self, prompt: str | None) -> list[int]:
        """The token ids of a prompt, with the newline that ends it; none without a prompt."""
        prompt = as_prompt(prompt)
        return self.tokenizer(prompt + PROMPT_END, add_special_tokens=False).input_ids if prompt else []


__all__ = ["PROMPT_END", "WORDS", "PromptsMixin", "as_prompt", "check_styles", "one_for_each"]
