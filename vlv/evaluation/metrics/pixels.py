"""PSNR and SSIM: how close the pixels of a picture are to those of its original."""

import datasets
import evaluate
import numpy as np
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from vlv.data.rows import open_image

IDENTICAL = 100.0  # dB, in place of infinity
SMALLEST = 11  # pixels of a side, the width of SSIM's window


class Pixels(evaluate.Metric):
    """
    - `psnr`: peak signal-to-noise ratio in dB over all pixels and channels; 100 for identical pictures.
    - `ssim`: structural similarity, -1..1, with the published window of 11 pixels.
    """

    def _info(self):
        return evaluate.MetricInfo(
            description="PSNR and SSIM of pictures.",
            citation="",
            inputs_description="predictions: pictures; references: their originals, of the same size.",
            features=datasets.Features(
                {"predictions": datasets.Image(decode=False), "references": datasets.Image(decode=False)}
            ),
        )

    def _compute(self, predictions, references):
        scores = {"psnr": [], "ssim": []}
        for drawn, original in zip(predictions, references, strict=True):
            drawn, original = _to_tensor(drawn), _to_tensor(original)
            if drawn.shape != original.shape or min(drawn.shape[2:]) < SMALLEST:
                sizes = (f"{image.shape[3]}x{image.shape[2]}" for image in (drawn, original))
                raise ValueError(
                    f"Pixels of pictures of {' and '.join(sizes)} cannot be compared: they must be of one size, at "
                    f"least {SMALLEST}x{SMALLEST}."
                )
            psnr = peak_signal_noise_ratio(drawn, original, data_range=255.0).item()
            scores["psnr"].append(min(psnr, IDENTICAL))
            scores["ssim"].append(structural_similarity_index_measure(drawn, original, data_range=255.0).item())
        return scores


def _to_tensor(image):
    """(1, 3, H, W) float, 0..255."""
    return torch.from_numpy(np.array(open_image(image))).permute(2, 0, 1)[None].float()
