"""Captions as the decoder's text encoder reads them: in windows, where they are long."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from modeling_vlv import VLVModel

STOPS = (",", ".", ";", ":", "!", "?")


def split(ids: Sequence[int], ends: Sequence[bool], room: int) -> list[list[int]]:
    """
    Token ids in windows of at most `room`. A window ends behind the last punctuation mark in it if there is one.

    Args:
        ends: whether each token ends in a punctuation mark.
    """
    windows, start = [], 0
    while len(ids) - start > room:
        marks = (place for place in range(start + room, start, -1) if ends[place - 1])
        end = next(marks, start + room)
        windows.append(list(ids[start:end]))
        start = end
    return [*windows, list(ids[start:])]


def window_ids(tokenizer: PreTrainedTokenizerBase, caption: str, positions: int) -> list[list[int]]:
    """The token ids of a caption's windows, each as long as the text encoder: begin, caption, end, padding."""
    begin, end = _around(tokenizer)
    ids = tokenizer(caption, add_special_tokens=False, verbose=False).input_ids  # verbose warns of long texts
    room = positions - len(begin) - len(end)
    ends = [token.endswith(STOPS) for token in map(tokenizer.decode, ids)] if len(ids) > room else []
    windows = [[*begin, *window, *end] for window in split(ids, ends, room)]
    return [window + [tokenizer.pad_token_id] * (positions - len(window)) for window in windows]


@torch.no_grad()
def read_captions(model: VLVModel, tokenizer: PreTrainedTokenizerBase, captions: Sequence[str]) -> list[torch.Tensor]:
    """
    The contexts of captions, (windows * L, E) each, where L is the text encoder's number of positions. The text
    encoder reads each window of a long caption by itself, and the denoiser attends to all of them.

    It attends to a repeated window as to one, because the weights of equal embeddings add up. So the empty caption has
    the same loss at any number of windows.
    """
    positions = model.config.text_encoder_config.max_position_embeddings
    ids = [window_ids(tokenizer, caption, positions) for caption in captions]
    flat = torch.tensor([window for windows in ids for window in windows])
    contexts = model.text_encoder(input_ids=flat.to(next(model.text_encoder.parameters()).device))
    return [part.flatten(0, 1) for part in contexts.split(list(map(len, ids)))]


def _around(tokenizer):
    """The special tokens before and behind a text."""
    inside = tokenizer("a", add_special_tokens=False).input_ids
    ids = tokenizer("a").input_ids
    start = next(place for place in range(len(ids)) if ids[place : place + len(inside)] == inside)
    return ids[:start], ids[start + len(inside) :]
