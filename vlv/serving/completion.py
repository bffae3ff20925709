"""The objects of an answer, as OpenAI's interface defines them."""

import secrets
import time
from collections.abc import Sequence
from typing import Any

from vlv.captioning.captioner import Caption


class Completion:
    """The objects of one answer, whole or in chunks."""

    def __init__(self, model: str, num_prompt_tokens: int, max_new_tokens: int, warning: str | None = None):
        self.about = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        if warning is not None:  # a field of our own, which OpenAI's clients pass over
            self.about["warning"] = warning
        self.num_prompt_tokens, self.max_new_tokens = num_prompt_tokens, max_new_tokens

    def whole(self, captions: Sequence[Caption], contents: Sequence[str]) -> dict[str, Any]:
        choices = [
            {
                "index": number,
                "message": {"role": "assistant", "content": content},
                "logprobs": None,
                "finish_reason": self._reason(caption),
            }
            for number, (caption, content) in enumerate(zip(captions, contents, strict=True))
        ]
        return {"object": "chat.completion", **self.about, "choices": choices, "usage": self.usage(captions)}

    def usage(self, captions: Sequence[Caption]) -> dict[str, int]:
        written = sum(caption.num_tokens for caption in captions)
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": written,
            "total_tokens": self.num_prompt_tokens + written,
        }

    def first_chunk(self, number: int) -> dict[str, Any]:
        return self._chunk([self._choice(number, {"role": "assistant", "content": ""})])

    def text_chunk(self, number: int, text: str) -> dict[str, Any]:
        return self._chunk([self._choice(number, {"content": text})])

    def last_chunk(self, number: int, caption: Caption) -> dict[str, Any]:
        return self._chunk([self._choice(number, {}, self._reason(caption))])

    def usage_chunk(self, captions: Sequence[Caption]) -> dict[str, Any]:
        return self._chunk([]) | {"usage": self.usage(captions)}

    def _chunk(self, choices):
        return {"object": "chat.completion.chunk", **self.about, "choices": choices}

    def _choice(self, number, delta, reason=None):
        return {"index": number, "delta": delta, "logprobs": None, "finish_reason": reason}

    def _reason(self, caption):
        cut = not caption.ended and caption.num_tokens >= self.max_new_tokens
        return "length" if cut else "stop"


def error_body(sentence: str, status: int) -> dict[str, Any]:
    """As OpenAI's clients expect an error."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": sentence, "type": kind, "param": None, "code": status}}
