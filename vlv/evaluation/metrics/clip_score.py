"""CLIPScore: how well a caption fits its image, without any reference caption."""

import datasets
import evaluate
from torch.nn.functional import cosine_similarity

from vlv.evaluation.embedding import load_embedder


class ClipScore(evaluate.Metric):
    """
    `clip_score`: 100 times the cosine of a caption's and its image's CLIP features, 0 where it is negative. That is
    torchmetrics' scale; the original CLIPScore is 2.5 times the cosine. CLIP reads no more than its 77 tokens.
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
