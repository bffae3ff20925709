"""BLEU and ROUGE-L: how many sequences of words a caption shares with reference captions."""

import datasets
import evaluate
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.rouge.rouge import Rouge

from vlv.evaluation.words import spaced


class Overlap(evaluate.Metric):
    """
    Computed by the COCO tools' own code on the words of `vlv.evaluation.words`.

    - `bleu_1` to `bleu_4`: of the whole set, with the length of the closest reference.
    - `rouge_l`: of each caption.

    A caption without words scores 0.
    """

    def _info(self):
        return evaluate.MetricInfo(
            description="BLEU-1 to BLEU-4 and ROUGE-L of captions.",
            citation="",
            inputs_description="predictions: one caption per image; references: a list of captions per image.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
            ),
        )

    def _compute(self, predictions, references):
        found = {image: [spaced(caption)] for image, caption in enumerate(predictions)}
        wanted = {image: [spaced(caption) for caption in captions] for image, captions in enumerate(references)}
        bleu, _ = Bleu(4).compute_score(wanted, found, verbose=0)
        scores = {f"bleu_{n}": score for n, score in enumerate(bleu, start=1)}
        return scores | {"rouge_l": Rouge().compute_score(wanted, found)[1].tolist()}
