"""The attention implementations give the same results, and causal attention is causal in each of them."""

import pytest
import tiny
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


@torch.no_grad()
def test_sdpa_and_eager_attention_agree(tiny_repo, tiny_model, pixel_values, captions):
    noised = {
        "latents": torch.randn(3, 4, 8, 8),
        "noise": torch.randn(3, 4, 8, 8),
        "timesteps": torch.tensor([1, 5, 9]),
    }
    outputs = {}
    for attention in ("sdpa", "eager"):
        model = type(tiny_model).from_pretrained(tiny_repo, attn_implementation=attention)
        configs = [model.encoder.language_model.config, model.text_encoder.config, model.caption_head.config]
        assert [config._attn_implementation for config in configs] == [attention] * 3
        outputs[attention] = model(pixel_values, **noised, **captions)
    for name in ("caption_embeds", "context", "logits", "denoising_loss", "caption_loss"):
        torch.testing.assert_close(outputs["sdpa"][name], outputs["eager"][name], rtol=1e-4, atol=1e-4)


def ignores_is_causal(module, query, key, value, attention_mask, **kwargs):
    """An implementation that a user may register: SDPA that reads only the mask and ignores is_causal."""
    return sdpa_attention_forward(module, query, key, value, attention_mask, **{**kwargs, "is_causal": False})


@torch.no_grad()
def test_an_implementation_that_does_not_read_is_causal_gets_a_mask(tiny_model):
    embeds = torch.randn(3, 10, 24)
    expected = tiny_model.encode_context(embeds)
    AttentionInterface.register("ignores_is_causal", ignores_is_causal)
    model = tiny.model()
    model.text_encoder.config._attn_implementation = "ignores_is_causal"
    torch.testing.assert_close(model.encode_context(embeds), expected)
    torch.testing.assert_close(model.empty_context(), tiny_model.empty_context())


@pytest.mark.slow  # compiles kernels
@torch.no_grad()
def test_flex_attention_agrees_with_sdpa(tiny_repo, tiny_model, pixel_values, captions):
    model = type(tiny_model).from_pretrained(tiny_repo, attn_implementation="flex_attention")
    assert model.text_encoder.config._attn_implementation == "flex_attention"
    output, expected = model(pixel_values, **captions), tiny_model(pixel_values, **captions)
    for name in ("caption_embeds", "context", "logits", "loss"):
        torch.testing.assert_close(output[name], expected[name], rtol=1e-4, atol=1e-4)
