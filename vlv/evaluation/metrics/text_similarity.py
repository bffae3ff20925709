"""Whether a caption means the same as a reference caption, measured with a sentence encoder."""

import datasets
import evaluate
from torch.nn.functional import cosine_similarity

from vlv.evaluation.embedding import load_embedder


class TextSimilarity(evaluate.Metric):
    """`text_similarity`: the cosine, -1..1, between the embeddings of a caption and of its closest reference."""

    def _info(self):
        return evaluate.MetricInfo(
            description="Similarity of sentence embeddings.",
            citation="",
            inputs_description="predictions: one caption per image; references: a list of captions per image.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
            ),
        )

    def _compute(self, predictions, references, model, device="cpu", batch_size=50):
        embedder = load_embedder(model, device, batch_size)
        found = embedder.embed_texts(predictions)
        wanted = embedder.embed_texts([caption for captions in references for caption in captions])
        groups = wanted.split([len(captions) for captions in references])
        return {
            "text_similarity": [
                cosine_similarity(one[None], group).max().item() for one, group in zip(found, groups, strict=True)
            ]
        }
