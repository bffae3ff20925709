"""How captions are worded, whatever the pictures show."""

import datasets
import evaluate

from vlv.evaluation.words import ngrams, words


class Wording(evaluate.Metric):
    """
    - `length`: words of a caption.
    - `repetition`: share of a caption's runs of four words that it has said before; 0 when it has fewer words.
    - `distinct_1`, `distinct_2`: different words, and pairs of them, over all there are in the whole set; 0 when
      there are none.
    - `ended`: whether the caption came to its end, and was not cut at the longest length allowed.
    """

    def _info(self):
        return evaluate.MetricInfo(
            description="Length, repetition, variety and completeness of captions.",
            citation="",
            inputs_description="predictions: one caption per image; ended: whether its last token ended it.",
            features=datasets.Features({"predictions": datasets.Value("string"), "ended": datasets.Value("bool")}),
        )

    def _compute(self, predictions, ended):
        captions = [words(caption) for caption in predictions]
        scores = {
            "length": [float(len(caption)) for caption in captions],
            "repetition": [1 - _distinct(ngrams(caption, 4), default=1.0) for caption in captions],
            "ended": [float(flag) for flag in ended],
        }
        for n in (1, 2):
            scores[f"distinct_{n}"] = _distinct([ngram for caption in captions for ngram in ngrams(caption, n)])
        return scores


def _distinct(items, default=0.0):
    return len(set(items)) / len(items) if items else default
