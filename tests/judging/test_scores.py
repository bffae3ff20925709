"""The scores of captions, compared with the losses that the model itself computes."""

import math

import pytest
import teachers
import tiny
import torch

from vlv import bundled_checkpoint
from vlv.evaluation.pictures import embed_captions
from vlv.judging.judge import Draws, Judge, denoising_losses, explained, likelihood
from vlv.judging.loading import load_judge, scores_missing
from vlv.judging.scores import missing_parts, value_of
from vlv.judging.windows import read_captions, split, window_ids
from vlv.models.loading import load_autoencoder
from vlv.scenes import sample_picture

CAPTIONS = [["a cat", "two dogs"], ["sky"], ["a cat"]]
FLAT = [caption for captions in CAPTIONS for caption in captions]
OWNERS = torch.tensor([0, 0, 1, 2])


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture(scope="module")
def contents(model):
    read = Judge(model, tiny.processor(), ["explained"]).read
    return [read(image) for image in tiny.images(3)]


@torch.no_grad()
def test_explained_is_the_share_of_the_models_own_loss_that_a_caption_removes(model, contents):
    pixels = torch.stack([content["decoder_pixel_values"] for content in contents])
    latents = model.encode_latents(pixels, sample=False)
    draws = Draws.of(model, latents.shape[1:], 2, 7, latents.device)
    tokenizer = tiny.processor().decoder_tokenizer
    (empty,) = read_captions(model, tokenizer, [""])
    found = explained(model, latents, read_captions(model, tokenizer, FLAT), empty, OWNERS, draws)

    def loss(owner, caption):
        context = model.encode_context(embed_captions(model, tiny.processor(), [caption]))
        one = latents[owner : owner + 1]
        losses = [
            model.compute_denoising_loss(one, context, noise[None], timestep[None])
            for timestep, noise in zip(*draws, strict=True)
        ]
        return torch.stack(losses).mean()

    for value, owner, caption in zip(found, OWNERS.tolist(), FLAT, strict=True):
        assert value == pytest.approx(float(1 - loss(owner, caption) / loss(owner, "")), abs=2e-5)


@torch.no_grad()
def test_likelihood_is_the_caption_loss_of_each_caption(model, contents):
    pixel_values = torch.stack([content["pixel_values"] for content in contents])
    found = likelihood(model, tiny.processor(), model.encode(pixel_values), FLAT, OWNERS, batch_size=3)
    for value, owner, caption in zip(found, OWNERS.tolist(), FLAT, strict=True):
        labels = tiny.processor()(text=caption, return_labels=True)["labels"]
        loss = model(pixel_values=pixel_values[owner : owner + 1], labels=labels).caption_loss
        assert value == pytest.approx(-float(loss), abs=1e-4)


@torch.no_grad()
def test_likelihood_of_a_caption_after_its_prompt(model, contents):
    processor = tiny.processor()
    processor.learn_prompts({})
    pixel_values, prompts = torch.stack([content["pixel_values"] for content in contents]), ["why?", "", "In short."]
    found = likelihood(model, processor, model.encode(pixel_values), FLAT, OWNERS, 3, prompts)
    for value, owner, caption in zip(found, OWNERS.tolist(), FLAT, strict=True):
        tokens = processor(text=caption, prompt=prompts[owner], return_labels=True)
        loss = model(pixel_values=pixel_values[owner : owner + 1], **tokens).caption_loss
        assert value == pytest.approx(-float(loss), abs=1e-4)
    scores = Judge(model, processor, ["likelihood"])(contents, CAPTIONS, prompts)
    assert [each["likelihood"] for of in scores for each in of] == pytest.approx(found.tolist(), abs=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_scores_do_not_depend_on_the_batch(model, contents, batch_size):
    names = ["explained", "likelihood"]
    whole = Judge(model, tiny.processor(), names, num_draws=2, batch_size=8)(contents, CAPTIONS)
    parts = Judge(model, tiny.processor(), names, num_draws=2, batch_size=batch_size)(contents, CAPTIONS)
    assert [len(scores) for scores in whole] == [2, 1, 1]
    for one, other in zip(sum(whole, []), sum(parts, []), strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_an_empty_caption_explains_nothing_and_has_a_likelihood(model, contents):
    ((scores,),) = Judge(model, tiny.processor(), ["explained", "likelihood"])(contents[:1], [[""]])
    assert scores["explained"] == pytest.approx(0, abs=1e-5)
    assert -math.inf < scores["likelihood"] < 0


def test_half_precision_gives_finite_scores(contents):
    judge = Judge(tiny.model().to(torch.bfloat16), tiny.processor(), ["explained", "likelihood"])
    exact = Judge(tiny.model(), tiny.processor(), ["explained", "likelihood"])
    for one, other in zip(sum(judge(contents, CAPTIONS), []), sum(exact(contents, CAPTIONS), []), strict=True):
        assert one == pytest.approx(other, abs=0.1)


# ---- long captions -----------------------------------------------------------------------------------------


def test_windows_end_behind_punctuation_if_there_is_any():
    ends = [token in (3, 7) for token in range(12)]
    assert split(range(12), ends, 5) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert split(range(5), ends, 5) == [[0, 1, 2, 3, 4]]
    assert split(range(12), [False] * 12, 5) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]


def test_a_short_caption_is_one_window_as_the_tokenizer_itself_pads_it():
    tokenizer = load_autoencoder("vlv-tiny")[1].decoder_tokenizer
    for caption in ("", "a large red circle at the top left on a mint background"):
        padded = tokenizer(caption, padding="max_length", max_length=24).input_ids
        assert window_ids(tokenizer, caption, 24) == [padded]
    three = (
        "a large red circle at the top left, a small blue cross at the top right and a red square on a mint background"
    )
    first, second = window_ids(tokenizer, three, 24)
    assert tokenizer.decode(first, skip_special_tokens=True) == "a large red circle at the top left,"
    assert tokenizer.decode(second, skip_special_tokens=True).strip() == three[36:]


def test_a_repeated_window_says_what_one_says():
    model, processor = load_autoencoder("vlv-tiny")
    image, scene = sample_picture("train", 0)
    pixels = processor(images=image, return_decoder_pixel_values=True)["decoder_pixel_values"]
    latents = model.encode_latents(pixels, sample=False)
    draws = Draws.of(model, latents.shape[1:], 2, 0, latents.device)
    (context,) = read_captions(model, processor.decoder_tokenizer, [scene.caption])
    once, twice = (denoising_losses(model, latents, context.repeat(times, 1)[None], draws) for times in (1, 2))
    torch.testing.assert_close(once, twice, rtol=1e-4, atol=1e-6)


def test_a_caption_longer_than_the_caption_head_has_scores(model, contents):
    caption = "a cat, " * 100
    positions = model.config.caption_config.max_position_embeddings
    assert len(tiny.caption_tokenizer()(caption).input_ids) > positions
    ((scores,),) = Judge(model, tiny.processor(), ["explained", "likelihood"])(contents[:1], [[caption]])
    assert all(map(math.isfinite, scores.values()))


# ---- what they are worth -----------------------------------------------------------------------------------


def test_true_captions_of_scenes_score_above_those_of_other_scenes():
    judge = load_judge("vlv-tiny", ["explained", "likelihood"])
    images, scenes = zip(*(sample_picture("validation", index) for index in range(12)), strict=True)
    captions = [[scene.caption, scenes[number - 1].caption] for number, scene in enumerate(scenes)]
    scores = judge([judge.read(image) for image in images], captions)
    for name in ("explained", "likelihood", "both"):
        assert all(value_of(true, name) > value_of(other, name) for true, other in scores)


def test_both_is_the_mean_of_two_numbers_that_are_at_most_1():
    assert value_of({"explained": 0.5, "likelihood": math.log(0.25)}, "both") == pytest.approx(0.375)
    assert value_of({"explained": [1.0, 0.0], "likelihood": [0.0, math.log(0.5)]}, "both") == pytest.approx(0.625)
    assert value_of({"explained": [1.0, 0.0], "likelihood": [0.0, -1.0]}, "explained") == 0.5


def test_what_a_checkpoint_lacks_is_named(tiny_config):
    processor = tiny.processor()
    assert missing_parts(tiny_config, processor, "m") == {}
    captioner = tiny.config(decoder_config=None)
    assert missing_parts(captioner, processor, "m")["explained"] == "m has no diffusion decoder"
    assert "likelihood" not in missing_parts(captioner, processor, "m")
    assert missing_parts(tiny.config(caption_config=None), processor, "m") == {"likelihood": "m has no caption head"}
    sana = teachers.config("Sana")
    assert "SanaPipeline, reads caption embeddings alone" in missing_parts(sana, processor, "m")["explained"]
    processor = type(processor).from_pretrained(bundled_checkpoint("vlv-tiny"))
    processor._part_tokenizers.pop("decoder_tokenizer")
    assert "tokenizer" in missing_parts(tiny_config, processor, "m")["round_trip"]


def test_a_bundled_checkpoint_is_found_by_its_name():
    assert scores_missing("vlv-tiny") == {}
    assert set(scores_missing("vlv-tiny-prompts")) >= {"explained", "round_trip"}  # it has no decoder
