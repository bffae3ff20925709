"""CLIPScore: how well a caption fits its image, without any reference caption."""

import datasets
import evaluate
from torch.nn.functional import cosine_similarity

from vlv.evaluation.embedding import load_embedder


class ClipScore(evaluate.Metric):
    """
    `clip_score`: 100 times the cosine of a caption's and its image's CLIP features, or 0 if it is negative. This is
    the scale of torchmetrics; the original CLIPScore is 2.5 times the cosine. CLIP reads only the first 77 tokens.
    """

    def _info(self):
        return evaluate.MetricInfo(
            description="CLIPScore of captions.",
            citation="",
            inputs_description="predictions: one caption per image; references: the images.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Image(decode=False)}
            ),
        )

    def _compute(self, predictions, references, model, device="cpu", batch_size=50):
        embedder = load_embedder(model, device, batch_size)
        cosine = cosine_similarity(embedder.embed_texts(predictions), embedder.embed_images(references))
        return {"clip_score": (100 * cosine.clamp(min=0)).tolist()}
