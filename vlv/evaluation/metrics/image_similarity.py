"""Whether two pictures show the same, measured with the features of any vision model."""

import datasets
import evaluate
from torch.nn.functional import cosine_similarity

from vlv.evaluation.embedding import load_embedder


class ImageSimilarity(evaluate.Metric):
    """`similarity`: the cosine, -1..1, between the features of a picture and of its original."""

    def _info(self):
        return evaluate.MetricInfo(
            description="Cosine between the features of pictures.",
            citation="",
            inputs_description="predictions: pictures; references: their originals.",
            features=datasets.Features(
                {"predictions": datasets.Image(decode=False), "references": datasets.Image(decode=False)}
            ),
        )

    def _compute(self, predictions, references, model, device="cpu", batch_size=50):
        embedder = load_embedder(model, device, batch_size)
        cosine = cosine_similarity(embedder.embed_images(predictions), embedder.embed_images(references))
        return {"similarity": cosine.tolist()}
