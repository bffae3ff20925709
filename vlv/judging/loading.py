"""Loads the judge: of a checkpoint only the parts that its scores need."""

from collections.abc import Sequence

import torch

from processing_vlv import VLVProcessor
from vlv import find_bundled
from vlv.evaluation.embedding import load_embedder
from vlv.judging.judge import Judge
from vlv.judging.scores import NUM_DRAWS, missing_parts
from vlv.models.loading import find_device, load_autoencoder, load_captioner, read_config


def load_judge(
    source: str | None,
    names: Sequence[str],
    device: str = "auto",
    dtype: str = "auto",
    feature_extractor: str | None = None,
    num_draws: int = NUM_DRAWS,
    seed: int = 0,
    batch_size: int | None = None,
    captions: bool = False,
) -> Judge:
    """
    A [`Judge`] of a checkpoint.

    Args:
        source: folder or Hub id; `None` is the bundled checkpoint.
        names: of the scores.
        feature_extractor: folder or id of a vision model, for `round_trip`.
        captions: the model also writes captions.

    Raises:
        OSError, ValueError: when there is no such model, or when it is damaged.
    """
    captions = captions or "likelihood" in names
    if set(names) == {"likelihood"}:
        model, processor = load_captioner(source, device, dtype)
    else:
        parts = {} if dtype == "auto" else {"dtype": getattr(torch, dtype)}
        if not captions:
            parts["caption_config"] = None
        model, processor = load_autoencoder(source, device, **parts)
    embedder = None if feature_extractor is None else load_embedder(feature_extractor, str(find_device(device)))
    return Judge(model, processor, names, num_draws, seed, embedder, batch_size)


def scores_missing(source: str | None) -> dict[str, str]:
    """For each score that a checkpoint cannot give: the sentence that says which part it lacks."""
    source = find_bundled(source)
    return missing_parts(read_config(source), VLVProcessor.from_pretrained(source), source)


def check_scores(source: str | None, names: Sequence[str]) -> None:
    """Raises ValueError where a checkpoint cannot give one of the scores."""
    missing = scores_missing(source)
    for name in names:
        if name in missing:
            raise ValueError(f"{missing[name]}, so it cannot compute {name}: take another score or another --model.")
