"""The caption head's token embeddings can be read, replaced and resized, as in the library's own models."""

import pytest
import tiny
import torch

from modeling_vlv import VLVForConditionalGeneration, VLVModel


@pytest.fixture(scope="module")
def pixel_values():
    return tiny.pixels(2)[0]


def untied():
    caption_config = tiny.caption_config()
    caption_config.tie_word_embeddings = False
    return caption_config


@torch.no_grad()
@pytest.mark.parametrize("model_class", [VLVModel, VLVForConditionalGeneration])
@pytest.mark.parametrize("caption_config", [tiny.caption_config, untied], ids=["tied", "untied"])
def test_resized_embeddings_work_and_come_back(model_class, caption_config, pixel_values, tmp_path):
    model = tiny.model(model_class, caption_config=caption_config())
    ids = torch.randint(1, 250, (2, 5))
    before = model(pixel_values, input_ids=ids).logits
    model.resize_token_embeddings(300)
    assert model.get_input_embeddings() is model.caption_head.get_input_embeddings()
    assert len(model.get_input_embeddings().weight) == len(model.get_output_embeddings().weight) == 300
    assert model.config.caption_config.vocab_size == model.caption_head.config.vocab_size == 300
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == model.config.caption_config.tie_word_embeddings

    torch.testing.assert_close(model(pixel_values, input_ids=ids).logits[..., :257], before)
    ids[:, 2] = 299
    output = model(pixel_values, input_ids=ids, labels=ids)
    assert output.logits.shape == (2, 6, 300) and output.loss.isfinite()
    arguments = {"max_new_tokens": 4, "do_sample": False}
    captions = model.generate(pixel_values, input_ids=ids, **arguments)
    model.save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path)
    assert torch.equal(loaded(pixel_values, input_ids=ids).logits, output.logits)
    assert torch.equal(loaded.generate(pixel_values, input_ids=ids, **arguments), captions)

    loaded.resize_token_embeddings(257)
    assert torch.equal(loaded.get_output_embeddings().weight, model.get_output_embeddings().weight[:257])


@torch.no_grad()
def test_output_embeddings_can_be_replaced(pixel_values):
    model = tiny.model(caption_config=untied())
    ids = torch.randint(1, 250, (2, 5))
    states = model(pixel_values, input_ids=ids, output_hidden_states=True).hidden_states[-1][:, -6:]
    head = torch.nn.Linear(40, 257, bias=False)
    model.set_output_embeddings(head)
    assert model.get_output_embeddings() is head is model.caption_head.get_output_embeddings()
    torch.testing.assert_close(model(pixel_values, input_ids=ids).logits, head(states))


@torch.no_grad()
def test_without_a_caption_head_they_are_florences(pixel_values, tmp_path):
    model = tiny.model(caption_config=None)
    language_model, embeds = model.encoder.language_model, model.encode(pixel_values)
    assert model.get_input_embeddings() is language_model.shared and model.get_output_embeddings() is None
    model.resize_token_embeddings(300)
    for embeddings in (
        language_model.shared,
        language_model.encoder.embed_tokens,
        language_model.decoder.embed_tokens,
    ):
        assert len(embeddings.weight) == 300
    assert model.config.encoder_config.text_config.vocab_size == 300
    torch.testing.assert_close(model.encode(pixel_values), embeds)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(VLVModel.from_pretrained(tmp_path).encode(pixel_values), embeds)
