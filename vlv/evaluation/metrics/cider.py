"""CIDEr: how many of the words and phrases that set an image apart its caption shares with reference captions."""

import datasets
import evaluate
from pycocoevalcap.cider.cider import Cider as CocoCider

from vlv.evaluation.words import spaced


class Cider(evaluate.Metric):
    """
    `cider`: what the COCO tools call so (CIDEr-D, 0..10), by their own arithmetic, on words as
    `vlv.evaluation.words` finds them; the references given are its corpus. A caption without words scores 0.
    """

    def _info(self):
        return evaluate.MetricInfo(
            description="CIDEr of captions.",
            citation="",
            inputs_description="predictions: one caption per image; references: a list of captions per image.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
            ),
        )

    def _compute(self, predictions, references):
        if len(predictions) < 2:
            raise ValueError(
                "CIDEr weighs a word by how few images it is said of, which one image cannot tell: give two or more."
            )
        found = {image: [spaced(caption)] for image, caption in enumerate(predictions)}
        wanted = {image: [spaced(caption) for caption in captions] for image, captions in enumerate(references)}
        return {"cider": CocoCider().compute_score(wanted, found)[1].tolist()}
