"""The names of the scores, what each needs of a model, and which of two captions is better. It imports no torch."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from configuration_vlv import VLVConfig
    from processing_vlv import VLVProcessor

SCORES = ("explained", "likelihood", "round_trip")
CHOICES = ("explained", "likelihood", "both")
NUM_DRAWS = 1


def missing_parts(config: "VLVConfig", processor: "VLVProcessor", source: str) -> dict[str, str]:
    """For each score that a checkpoint cannot give: the sentence that says which part it lacks."""
    missing = {}
    if config.caption_config is None:
        missing["likelihood"] = f"{source} has no caption head"
    reason = None
    if config.decoder_config is None:
        reason = f"{source} has no diffusion decoder"
    elif config.text_encoder_config is None:
        pipeline = config.decoder_config.get("_class_name", "its decoder")
        reason = f"{source} keeps no text encoder: its decoder, {pipeline}, reads caption embeddings alone"
    elif processor.decoder_tokenizer is None:
        reason = f"{source} lacks the tokenizer of its text encoder (folder decoder_tokenizer)"
    if reason is not None:
        missing |= dict.fromkeys(("explained", "round_trip"), reason)
    return missing


def value_of(scores: Mapping[str, float | Sequence[float]], by: str) -> float:
    """
    What captions are ordered by; larger is better. `both` is the mean of `explained` and of the probability of a token
    (a geometric mean), exp(likelihood): two numbers that are at most 1. Of several captions, it is the mean.
    """
    if by != "both":
        return _mean(scores[by])
    likelihoods = scores["likelihood"]
    likelihoods = [likelihoods] if isinstance(likelihoods, float | int) else likelihoods
    return (_mean(scores["explained"]) + _mean([math.exp(value) for value in likelihoods])) / 2


def _mean(values):
    return float(values) if isinstance(values, float | int) else sum(values) / len(values)
