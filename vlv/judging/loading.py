"""Loads the judge: of a checkpoint only the parts that its scores need."""

from collections.abc import Sequence

import torch

from vlv.evaluation.embedding import load_embedder
from vlv.judging.judge import Judge
from vlv.judging.scores import NUM_DRAWS
from vlv.models.loading import find_device, load_autoencoder, load_captioner


def load_judge(
    source: str | None,
    names: Sequence[str],
    device: str = "auto",
    dtype: str = "auto",
    feature_extractor: str | None = None,
    num_draws: int = NUM_DRAWS,
    seed: int = 0,
    batch_size: int | None = None,
) -> Judge:
    """
    A [`Judge`] of a checkpoint.

    Args:
        source: folder or Hub id; `None` is the bundled checkpoint.
        names: of the scores.
        feature_extractor: folder or id of a vision model, for `round_trip`.

    Raises:
        OSError, ValueError: when there is no such model, or when it is damaged.
    """
    if set(names) == {"likelihood"}:
        model, processor = load_captioner(source, device, dtype)
    else:
        parts = {} if dtype == "auto" else {"dtype": getattr(torch, dtype)}
        if "likelihood" not in names:
            parts["caption_config"] = None
        model, processor = load_autoencoder(source, device, **parts)
    embedder = None if feature_extractor is None else load_embedder(feature_extractor, str(find_device(device)))
    return Judge(model, processor, names, num_draws, seed, embedder, batch_size)
