"""Share of right answers to questions about images, by the rule of the VQA benchmarks."""

import datasets
import evaluate

from vlv.evaluation.vqa import vqa_accuracy


class Answers(evaluate.Metric):
    """`accuracy`: 0..1 for each question; see `vlv.evaluation.vqa`."""

    def _info(self):
        return evaluate.MetricInfo(
            description="VQA accuracy.",
            citation="",
            inputs_description="predictions: one answer per question; references: a list of the right ones.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
            ),
        )

    def _compute(self, predictions, references):
        return {"accuracy": [vqa_accuracy(one, answers) for one, answers in zip(predictions, references, strict=True)]}
