"""The wording of captions, independent of the pictures."""

import datasets
import evaluate

from vlv.evaluation.words import ngrams, words


class Wording(evaluate.Metric):
    """
    - `length`: number of words of a caption.
    - `repetition`: share of a caption's sequences of four words that occur earlier in it; 0 if it has fewer words.
    - `distinct_1`, `distinct_2`: number of different words, and of different pairs of words, divided by the number of
      all in the whole set; 0 if there are none.
    - `ended`: whether the caption ended by itself, and was not cut at the longest length allowed.
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
