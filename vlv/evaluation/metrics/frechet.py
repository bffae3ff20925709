"""FID and KID: the distance between a set of pictures and their originals, in the features of any vision model."""

import warnings

import datasets
import evaluate
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from vlv.evaluation.embedding import load_embedder

SUBSET_SIZE = 1000  # of KID, as published
SUBSETS = 100


class Frechet(evaluate.Metric):
    """
    - `fid`: Fréchet distance between normal distributions fitted to the features. It falls with the number of
      pictures, so compare only values of equally many pictures.
    - `kid`: unbiased squared maximum mean discrepancy with a cubic kernel: the mean over 100 subsets of 1,000
      pictures, or of all pictures at once if there are at most 1,000. It can be a little below 0.

    Published values usually use Inception's features. Compare only values that were computed with the same model.
    """

    def _info(self):
        return evaluate.MetricInfo(
            description="Fréchet and kernel distance between sets of pictures.",
            citation="",
            inputs_description="predictions: pictures; references: their originals.",
            features=datasets.Features(
                {"predictions": datasets.Image(decode=False), "references": datasets.Image(decode=False)}
            ),
        )

    def _compute(self, predictions, references, model, device="cpu", batch_size=50):
        if len(predictions) < 2:
            raise ValueError("FID and KID compare sets of pictures, and one picture is not enough: give two or more.")
        embedder = load_embedder(model, device, batch_size)
        drawn, originals = embedder.embed_images(predictions), embedder.embed_images(references)

        with warnings.catch_warnings(action="ignore"):  # a warning that it keeps all features in memory
            kid = KernelInceptionDistance(
                feature=_Given(drawn.shape[1]),
                subsets=SUBSETS if len(drawn) > SUBSET_SIZE else 1,
                subset_size=min(SUBSET_SIZE, len(drawn)),
            )
        kid.update(originals, real=True)
        kid.update(drawn, real=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # for KID's subsets
            return {"fid": frechet_distance(originals, drawn), "kid": kid.compute()[0].item()}


def frechet_distance(originals: torch.Tensor, drawn: torch.Tensor) -> float:
    """FID between two sets of features, (N, F) and (M, F)."""
    fid = FrechetInceptionDistance(feature=_Given(drawn.shape[1]))
    fid.update(originals, real=True)
    fid.update(drawn, real=False)
    # Because of rounding, the distance of a set to itself can be a little below zero.
    return max(0.0, fid.compute().item())


class _Given(torch.nn.Identity):
    """Replaces the network of torchmetrics, because the features are already computed."""

    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features
