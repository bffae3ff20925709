"""A choice of length: the leading queries of a model, alone."""

import pytest
import tiny
import torch

QUERIES = 10


@torch.no_grad()
def test_leading_queries_give_the_leading_caption_embeds(tiny_model, pixel_values):
    whole = tiny_model.encode(pixel_values)
    context = tiny_model.encode_context(whole)
    for number in (1, 4, QUERIES):
        some = tiny_model.encode(pixel_values, num_queries=number)
        assert some.shape == (3, number, whole.shape[2])
        torch.testing.assert_close(some, whole[:, :number])
        torch.testing.assert_close(tiny_model.encode_context(some), context[:, :number])


def test_captions_and_pictures_of_leading_queries_are_those_of_their_embeddings(tiny_model, pixel_values):
    """Given as images and a number, or as embeddings that the caller cut: the same."""
    embeds = tiny_model.encode(pixel_values)
    ids = tiny_model.generate(pixel_values, num_queries=3, max_new_tokens=6)
    assert ids.equal(tiny_model.generate(caption_embeds=embeds[:, :3], max_new_tokens=6))
    assert ids.equal(tiny_model.generate(caption_embeds=embeds, num_queries=3, max_new_tokens=6))
    assert not ids.equal(tiny_model.generate(pixel_values, max_new_tokens=6))
    sampling = {"num_inference_steps": 2, "output_type": "pt"}

    def rebuilt(**inputs):
        return tiny_model.reconstruct(**inputs, **sampling, generator=torch.Generator().manual_seed(0))

    picture = rebuilt(pixel_values=pixel_values, num_queries=3)
    torch.testing.assert_close(picture, rebuilt(caption_embeds=embeds[:, :3]))
    assert (picture - rebuilt(pixel_values=pixel_values)).abs().max() > 1e-3
    assert tiny_model.prompt(pixel_values, num_queries=3)["prompt_embeds"].shape[1] == 3


@pytest.mark.parametrize("number", [0, -1, QUERIES + 1, 2.5, True, "3"])
def test_a_number_of_queries_that_there_is_not(tiny_model, pixel_values, number):
    sentence = rf"num_queries is {number!r}, but this checkpoint has 10 queries: choose between 1 and 10\."
    for use in (tiny_model.encode, tiny_model.generate, tiny_model.reconstruct):
        with pytest.raises(ValueError, match=sentence):
            use(pixel_values, num_queries=number)
    with pytest.raises(ValueError, match=rf"num_queries is {number!r}, but there are 4 caption_embeds for each image"):
        tiny_model.generate(caption_embeds=torch.zeros(1, 4, 24), num_queries=number)


def test_nested_queries_train_any_leading_number_and_evaluate_all(pixel_values):
    model = tiny.model(nested_queries=True).set_stage("frozen").train()
    lengths = {model(pixel_values).context.shape[1] for _ in range(60)}
    assert QUERIES in lengths and min(lengths) < 4 and len(lengths) > 4
    cached = model.encode(pixel_values)
    assert len({model(caption_embeds=cached).context.shape[1] for _ in range(20)}) > 1
    assert model.eval()(pixel_values).context.shape[1] == QUERIES
    model.config.nested_queries = False
    assert model.train()(pixel_values).context.shape[1] == QUERIES


def test_nested_queries_learn_only_as_far_as_they_are_read(pixel_values, monkeypatch):
    model = tiny.model(nested_queries=True).set_stage("autoencode").train()
    monkeypatch.setattr(model, "_draw_num_queries", lambda: 4)
    model(pixel_values, latents=torch.randn(3, 4, 8, 8)).loss.backward()
    gradient = model.queries.grad.abs().sum(1)
    assert (gradient[:4] > 0).all() and not gradient[4:].any()
