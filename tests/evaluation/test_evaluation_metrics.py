"""Every metric of `vlv evaluate`, compared with numbers that are computed by hand or in another way."""

import math
from itertools import product
from pathlib import Path

import evaluate
import judges
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from transformers import AutoModel, AutoTokenizer

import vlv.evaluation.metrics
from vlv.evaluation.embedding import Embedder
from vlv.evaluation.metrics import compute
from vlv.evaluation.vqa import normalise, vqa_accuracy
from vlv.evaluation.words import words


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return judges.save_all(tmp_path_factory.mktemp("judges"))


@pytest.fixture(scope="module")
def pictures():
    """Two sets of six pictures, of the size that the models read."""
    return tiny.images(6, seed=1, size=(32, 32)), tiny.images(6, seed=2, size=(32, 32))


@pytest.mark.parametrize(
    "file", sorted(Path(vlv.evaluation.metrics.__file__).parent.glob("[!_]*.py")), ids=lambda file: file.stem
)
def test_evaluate_loads_each_metric_offline(file):
    metric = evaluate.load(str(file))
    assert isinstance(metric, evaluate.Metric)
    assert metric.name == file.stem


# ---- captions ----------------------------------------------------------------------------------------------


def test_words():
    assert words("A red T-shirt, don't ask: 3 balls!") == ["a", "red", "t-shirt", "don't", "ask", "3", "balls"]
    assert words("?!") == []


def test_cider_by_hand():
    """
    There are two images, so a word of one image has the weight log 2, and a word of both has the weight 0. The n-grams
    of each length are compared by their cosine. The score is ten times the mean over the four lengths, multiplied by
    exp(-(difference of lengths)² / 72).
    """
    scores = compute("cider", predictions=["A cat.", "a bird"], references=[["a cat"], ["a dog"]])["cider"]
    assert scores == pytest.approx([10 * (1 + 1) / 4, 0])  # "cat" and "a cat" agree, there are no longer n-grams
    scores = compute("cider", predictions=["a cat sat", ""], references=[["a cat"], ["a dog"]])["cider"]
    # One of "cat" and "sat" agrees, and one of "a cat" and "cat sat". There is one pair too many.
    assert scores == pytest.approx([10 * (2 / math.sqrt(2)) / 4 * math.exp(-1 / 72), 0])


def test_bleu_and_rouge_by_hand():
    scores = compute("overlap", predictions=["The cat sat on the mat"], references=[["the cat is on the mat", "x"]])
    assert scores["bleu_1"] == pytest.approx(5 / 6)
    assert scores["bleu_2"] == pytest.approx((5 / 6 * 3 / 5) ** (1 / 2))
    assert scores["bleu_3"] == pytest.approx((5 / 6 * 3 / 5 * 1 / 4) ** (1 / 3))
    assert scores["bleu_4"] == pytest.approx(0, abs=1e-3)
    assert scores["rouge_l"] == pytest.approx([5 / 6])  # "the cat on the mat" of six words on either side
    short = compute("overlap", predictions=["the cat"], references=[["the cat sat down"]])
    assert short["bleu_1"] == pytest.approx(math.exp(1 - 4 / 2))
    precision, recall = 1, 1 / 2
    assert short["rouge_l"] == pytest.approx([2.44 * precision * recall / (recall + 1.44 * precision)])


def test_empty_captions_score_nothing():
    scores = compute("overlap", predictions=["", "!"], references=[["a cat"], ["a dog"]])
    assert scores["rouge_l"] == [0, 0]
    assert [scores[f"bleu_{n}"] for n in (1, 2, 3, 4)] == pytest.approx([0] * 4)


def test_wording_by_hand():
    scores = compute(
        "wording", predictions=["red red red red red red", "Blue sky, blue sea", ""], ended=[True, False, True]
    )
    assert scores["length"] == [6, 4, 0]
    assert scores["repetition"] == pytest.approx([2 / 3, 0, 0])  # two of its three sequences of four words are repeats
    assert scores["distinct_1"] == pytest.approx(4 / 10)  # red, blue, sky, sea
    assert scores["distinct_2"] == pytest.approx(4 / 8)  # red red, blue sky, sky blue, blue sea
    assert scores["ended"] == [1, 0, 1]


def test_clip_score_is_the_cosine_that_clip_itself_computes(models, pictures):
    captions = ["a cat", "dogs", "", "red", "a sky", "x y"]
    scores = compute(
        "clip_score", predictions=captions, references=pictures[0], model=str(models / "clip"), batch_size=4
    )["clip_score"]
    clip, tokenizer = (kind.from_pretrained(models / "clip") for kind in (AutoModel, AutoTokenizer))
    with torch.inference_mode():
        for caption, image, score in zip(captions, pictures[0], scores, strict=True):
            output = clip(**tokenizer(caption, return_tensors="pt"), pixel_values=judges.pixel_values([image]))
            cosine = output.logits_per_image.item() / clip.logit_scale.exp().item()
            assert score == pytest.approx(max(0, 100 * cosine), abs=1e-3)
    assert any(scores)


def test_text_similarity_is_to_the_nearest_reference(models):
    source = str(models / "sentences")
    references = [["a cat"], ["a dog on a mat", "birds"]]
    scores = compute("text_similarity", predictions=["a cat", "bird"], references=references, model=source)
    bert, tokenizer = AutoModel.from_pretrained(source), AutoTokenizer.from_pretrained(source)

    def embed(text):
        with torch.inference_mode():
            return bert(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0).numpy()

    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    nearest = max(cosine(embed("bird"), embed(reference)) for reference in references[1])
    assert scores["text_similarity"] == pytest.approx([1, nearest], abs=1e-5)


# ---- pictures ----------------------------------------------------------------------------------------------


def test_psnr_and_ssim_by_hand():
    black, grey = (Image.new("RGB", (16, 12), (level,) * 3) for level in (0, 10))
    scores = compute("pixels", predictions=[grey, grey], references=[black, grey])
    assert scores["psnr"] == pytest.approx([10 * math.log10(255**2 / 10**2), 100])
    # Without variance, only the means remain.
    constant = (0.01 * 255) ** 2
    assert scores["ssim"] == pytest.approx([constant / (10**2 + constant), 1], abs=1e-5)


@pytest.mark.parametrize("sizes", [((16, 12), (12, 16)), ((10, 20), (10, 20))])
def test_pixels_that_cannot_be_compared(sizes):
    with pytest.raises(ValueError, match="must be of one size, at least 11x11"):
        compute("pixels", predictions=[Image.new("RGB", sizes[0])], references=[Image.new("RGB", sizes[1])])


def test_features_are_the_pooled_output(models, pictures):
    features = Embedder(str(models / "features"), batch_size=4).embed_images(pictures[0])
    with torch.inference_mode():
        expected = AutoModel.from_pretrained(models / "features")(judges.pixel_values(pictures[0])).pooler_output
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-4)


def test_a_pooler_that_was_not_trained_is_not_used(models, pictures, tmp_path):
    backbone = AutoModel.from_pretrained(models / "features", add_pooling_layer=False)
    backbone.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_bytes((models / "features/preprocessor_config.json").read_bytes())
    with torch.inference_mode():
        expected = backbone(judges.pixel_values(pictures[0])).last_hidden_state.mean(1)
    features = Embedder(str(tmp_path)).embed_images(pictures[0])
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-4)


def test_fid_and_kid_by_their_formulas(models, pictures):
    source = str(models / "features")
    scores = compute("frechet", predictions=pictures[0], references=pictures[1], model=source)
    drawn, originals = (Embedder(source).embed_images(images).double().numpy() for images in pictures)

    def root(matrix):
        values, vectors = np.linalg.eigh(matrix)
        return vectors * np.sqrt(values.clip(min=0)) @ vectors.T

    covariances = np.cov(drawn, rowvar=False), np.cov(originals, rowvar=False)
    half = root(covariances[0])
    distance = ((drawn.mean(0) - originals.mean(0)) ** 2).sum()
    fid = distance + np.trace(covariances[0] + covariances[1] - 2 * root(half @ covariances[1] @ half))
    assert scores["fid"] == pytest.approx(fid, rel=1e-3)

    def kernel(a, b):
        return (a @ b / len(a) + 1) ** 3

    def mean(left, right, pairs):
        return np.mean([kernel(left[i], right[j]) for i, j in pairs])

    every = list(product(range(6), repeat=2))
    others = [(i, j) for i, j in every if i != j]
    kid = mean(drawn, drawn, others) + mean(originals, originals, others) - 2 * mean(drawn, originals, every)
    assert scores["kid"] == pytest.approx(kid, rel=1e-3)
    assert compute("frechet", predictions=pictures[0], references=pictures[0], model=source)["fid"] == pytest.approx(
        0, abs=1e-6
    )


@pytest.mark.parametrize("name", ["clip", "features"])
def test_image_similarity(models, pictures, name):
    source = str(models / name)
    scores = compute("image_similarity", predictions=pictures[0], references=pictures[1], model=source)["similarity"]
    model, pixels = AutoModel.from_pretrained(source), [judges.pixel_values(images) for images in pictures]
    with torch.inference_mode():
        if name == "clip":
            ids = torch.zeros(1, 1, dtype=torch.long)  # the whole model also needs a text
            vectors = [model(input_ids=ids, pixel_values=values).image_embeds for values in pixels]
        else:
            vectors = [model(values).pooler_output for values in pixels]
    expected = [float(a @ b / a.norm() / b.norm()) for a, b in zip(*vectors, strict=True)]
    assert scores == pytest.approx(expected, abs=1e-5)


def test_fid_and_kid_need_two_pictures(models, pictures):
    with pytest.raises(ValueError, match="one picture is not enough: give two"):
        compute("frechet", predictions=pictures[0][:1], references=pictures[1][:1], model=str(models / "features"))
    with pytest.raises(ValueError, match="give two or more"):
        compute("cider", predictions=["a cat"], references=[["a cat"]])


# ---- answers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The Cat.", "cat"),
        ("two", "2"),
        ("1,000 people", "1000 people"),
        ("3.5 m", "3.5 m"),
        ("dont know", "don't know"),
        ("red/blue", "red blue"),
        ("none", "0"),
        ("a", ""),
    ],
)
def test_answers_are_compared_as_the_benchmarks_do(answer, normal):
    assert normalise(answer) == normal


def test_vqa_accuracy_leaves_each_annotator_out():
    annotators = ["red"] * 2 + ["dark red"] * 5 + ["pink"] * 3
    for answer in ("red", "Dark red.", "pink", "blue"):
        rounds = []
        for number in range(10):
            others = annotators[:number] + annotators[number + 1 :]
            rounds.append(min(1, sum(other == answer.lower().rstrip(".") for other in others) / 3))
        assert vqa_accuracy(answer, annotators) == pytest.approx(np.mean(rounds))
    assert vqa_accuracy("A cat", ["cat"]) == 1
    assert vqa_accuracy("dog", ["cat"]) == 0
    scores = compute("answers", predictions=["cat", "dog"], references=[["a cat"], ["cat"]])
    assert scores == {"accuracy": [1, 0]}
