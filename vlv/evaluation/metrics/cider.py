"""CIDEr: how many words and phrases a caption shares with reference captions. Those of few images count more."""

import datasets
import evaluate
from pycocoevalcap.cider.cider import Cider as CocoCider

from vlv.evaluation.words import spaced


class Cider(evaluate.Metric):
    """
    `cider`: CIDEr-D of the COCO tools (0..10), computed by their own code on the words of `vlv.evaluation.words`. The
    given references are its corpus. A caption without words scores 0.
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
                "CIDEr weighs a word by how few images it describes, which one image cannot show: give two or more."
            )
        found = {image: [spaced(caption)] for image, caption in enumerate(predictions)}
        wanted = {image: [spaced(caption) for caption in captions] for image, captions in enumerate(references)}
        return {"cider": CocoCider().compute_score(wanted, found)[1].tolist()}
