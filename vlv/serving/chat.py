"""What a request for a chat completion asks for, as OpenAI's interface defines it."""

import secrets
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from vlv.captioning.settings import WISHES, Decoding

# Settings of the interface that would change the answer, and that are not followed here.
UNSUPPORTED = (
    *("stop", "frequency_penalty", "presence_penalty", "logit_bias", "logprobs", "top_logprobs", "response_format"),
    *("tools", "functions", "audio", "prediction", "top_k", "min_p"),
)
MOST_CAPTIONS = 16


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(BaseModel, extra="allow"):
    """The fields that are followed. Others are ignored, except those of `UNSUPPORTED`."""

    messages: Any
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    min_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=MOST_CAPTIONS)
    seed: int | None = None
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    # Fields that OpenAI's interface lacks: those of `Decoding` of the same names.
    style: str | None = None
    words: str | None = None
    trigger_words: str | None = None
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    clean_tags: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def decoding(self, default: Decoding, prefix: str | None) -> Decoding:
        """
        What the captions are to be like: the server's settings, and what the request changes of them. No caption gets
        longer than the server's own. The user's words are not part of it, so that requests with different ones can
        share a batch.

        Raises:
            ValueError: the settings contradict each other.
        """
        asked: dict[str, Any] = {
            "max_new_tokens": self.max_completion_tokens or self.max_tokens,
            "min_new_tokens": self.min_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "num_captions": self.n,
            "repetition_penalty": self.repetition_penalty,
            "prefix": prefix,
            **{name: getattr(self, name) for name in WISHES if name not in ("prompt", "style")},
        }
        asked = {name: value for name, value in asked.items() if value is not None}
        asked["max_new_tokens"] = most = min(
            asked.get("max_new_tokens", default.max_new_tokens), default.max_new_tokens
        )
        temperature = asked.get("temperature", default.temperature)
        num_captions = asked.get("num_captions", default.num_captions)
        num_beams = 1 if temperature > 0 else default.num_beams
        if asked.get("min_new_tokens", 0) > most:
            raise ValueError(f"min_tokens is {self.min_tokens}, but a caption has at most {most} tokens.")
        if temperature == 0 and num_captions > num_beams:
            raise ValueError(f"n is {num_captions}: give a temperature above 0, which draws different captions.")
        if self.style is not None:  # in place of the server's own
            asked |= {"style": self.style, "prompt": None}
        least = min(default.min_new_tokens, most)
        return replace(default, **{"min_new_tokens": least, **asked, "num_beams": num_beams, "seed": 0})

    def draw(self, default: Decoding) -> str:
        """What seeds the draws: the request's own seed or, without one, the server's luck."""
        return secrets.token_hex(8) if self.seed is None else f"{default.seed}/{self.seed}"


def read_request(body: bytes) -> ChatRequest:
    """
    A request's fields, checked.

    Raises:
        ValueError: the body is not JSON, or a field is wrong; the sentence names it.
    """
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        if first["type"] == "json_invalid":
            raise ValueError(
                f"The request's body is not JSON ({first['msg'].removeprefix('Invalid JSON: ')})."
            ) from None
        place = ".".join(map(str, first["loc"])) or "The request's body"
        raise ValueError(f"{place} is wrong: {first['msg']}.") from None
    extra = request.model_extra or {}
    for name in UNSUPPORTED:
        if extra.get(name):
            raise ValueError(f"{name} is not supported by this server: leave it out.")
    return request
