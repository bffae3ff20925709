"""The model's results, compared with the libraries' own classes and with formulas that are written by hand."""

import copy

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from transformers import CLIPTextModel

QUERIES, POSITIONS = 10, tiny.POSITIONS


@pytest.fixture(scope="module")
def decoder_pixel_values():
    return tiny.pixels(3)[1]


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def stage1_model(request):
    return tiny.model(prediction_type=request.param, sample_latents=False)


# ---- the encoder -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_queries_are_read_as_word_embeddings(tiny_model, pixel_values):
    """With word embeddings as queries, Florence-2's own class gives the same up to the projection."""
    model = copy.deepcopy(tiny_model)
    words = torch.arange(40, 40 + QUERIES)
    model.queries.data = model.encoder.language_model.shared.weight[words].clone()
    image_tokens = [model.config.encoder_config.image_token_id] * (4 * 4 + 1)
    florence = model.encoder(
        input_ids=torch.tensor([image_tokens + model.config.prompt_ids]).expand(3, -1),
        pixel_values=pixel_values,
        decoder_input_ids=words.expand(3, -1),
    )
    torch.testing.assert_close(model.encode(pixel_values), model.projection(florence.last_hidden_state))


@torch.no_grad()
def test_queries_are_causal(tiny_model, pixel_values):
    model = copy.deepcopy(tiny_model)
    before = model.encode(pixel_values)
    model.queries[6] += torch.randn(32)
    after = model.encode(pixel_values)
    assert before.shape == (3, QUERIES, 24)
    torch.testing.assert_close(after[:, :6], before[:, :6])
    assert ((after - before)[:, 6:].abs().amax(-1) > 1e-3).all()


@torch.no_grad()
def test_every_picture_is_encoded_independently(tiny_model, pixel_values):
    together = tiny_model.encode(pixel_values)
    one_by_one = torch.cat([tiny_model.encode(pixels[None]) for pixels in pixel_values])
    torch.testing.assert_close(together, one_by_one)
    assert (together[0] - together[1]).abs().max() > 0.1  # different pictures give different embeddings


@torch.no_grad()
def test_cached_image_features_and_caption_embeds_replace_pixels(tiny_model, pixel_values, captions):
    features = tiny_model.get_image_features(pixel_values)
    caption_embeds = tiny_model.encode(pixel_values)
    assert features.shape == (3, 4 * 4 + 1, 32)
    expected = tiny_model(pixel_values, **captions)
    for output in (
        tiny_model(image_features=features, **captions),
        tiny_model(caption_embeds=caption_embeds, **captions),
    ):
        assert torch.equal(output.caption_embeds, caption_embeds)
        assert torch.equal(output.context, expected.context)
        assert torch.equal(output.loss, expected.loss)


# ---- the text encoder --------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("length", [POSITIONS, QUERIES, 3])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_context_of_word_embeddings_is_clips_own_of_the_words_bitwise(tiny_model, length, attention):
    config = copy.deepcopy(tiny_model.config.text_encoder_config)
    config._attn_implementation = attention
    clip = CLIPTextModel(config).eval()
    getattr(clip, "text_model", clip).load_state_dict(tiny_model.text_encoder.state_dict())
    model = copy.deepcopy(tiny_model)
    model.text_encoder.config._attn_implementation = attention
    model.set_attn_implementation(attention)
    ids = torch.randint(0, config.vocab_size, (2, length))

    expected = clip(input_ids=ids).last_hidden_state
    assert torch.equal(model.encode_context(clip.get_input_embeddings()(ids)), expected)
    assert torch.equal(model.text_encoder(input_ids=ids), expected)


@torch.no_grad()
def test_empty_context_is_the_empty_prompts(tiny_model):
    clip = CLIPTextModel(tiny_model.config.text_encoder_config).eval()
    getattr(clip, "text_model", clip).load_state_dict(tiny_model.text_encoder.state_dict())
    ids = tiny.decoder_tokenizer()("", padding="max_length", return_tensors="pt").input_ids
    expected = clip(input_ids=ids).last_hidden_state[:, :QUERIES]  # causal: later tokens change nothing
    torch.testing.assert_close(tiny_model.empty_context(), expected)


# ---- stage 1: the denoising loss ---------------------------------------------------------------------------


def signal_and_noise(scheduler_config, timesteps):
    """sqrt(alpha_bar) and sqrt(1 - alpha_bar) at each timestep, from the definition, in double precision."""
    start, end = scheduler_config["beta_start"], scheduler_config["beta_end"]
    betas = np.linspace(start**0.5, end**0.5, scheduler_config["num_train_timesteps"]) ** 2
    signal = np.sqrt(np.cumprod(1 - betas))
    if scheduler_config["rescale_betas_zero_snr"]:  # arXiv 2305.08891, algorithm 1
        signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    signal = torch.tensor(signal, dtype=torch.float32)[timesteps, None, None, None]
    return signal, (1 - signal**2).sqrt()


def denoising_by_hand(model, pixel_values, latents, noise, timesteps):
    """The UNet's prediction and its target."""
    scheduler_config = model.config.decoder_config["scheduler"]
    signal, sigma = signal_and_noise(scheduler_config, timesteps)
    context = model.encode_context(model.encode(pixel_values))
    prediction = model.unet(signal * latents + sigma * noise, timesteps, encoder_hidden_states=context).sample
    is_velocity = scheduler_config["prediction_type"] == "v_prediction"
    return prediction, signal * noise - sigma * latents if is_velocity else noise


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mse", "l1"])
def test_denoising_loss_by_hand(stage1_model, pixel_values, decoder_pixel_values, kind):
    model = copy.deepcopy(stage1_model)
    model.config.denoising_loss = kind
    latents = (
        model.vae.encode(decoder_pixel_values).latent_dist.mean * model.config.decoder_config["vae"]["scaling_factor"]
    )
    noise = torch.randn_like(latents)
    timesteps = torch.tensor([0, 431, 999])  # the last one is pure noise under zero terminal SNR
    prediction, target = denoising_by_hand(model, pixel_values, latents, noise, timesteps)
    error = prediction - target
    expected = error.square().mean() if kind == "mse" else error.abs().mean()

    output = model(pixel_values, decoder_pixel_values=decoder_pixel_values, noise=noise, timesteps=timesteps)
    torch.testing.assert_close(output.denoising_loss, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(output.loss, output.denoising_loss)
    cached = model(pixel_values, latents=latents, noise=noise, timesteps=timesteps)
    torch.testing.assert_close(cached.loss, output.loss)
    assert cached.caption_loss is None and cached.logits is None


@torch.no_grad()
def test_min_snr_weighs_the_loss_of_each_image(stage1_model, pixel_values):
    model, gamma = copy.deepcopy(stage1_model), 5.0
    model.config.min_snr_gamma = gamma
    latents, noise = torch.randn(2, 3, 4, 8, 8)
    timesteps = torch.tensor([3, 431, 999])
    prediction, target = denoising_by_hand(model, pixel_values, latents, noise, timesteps)
    signal, sigma = signal_and_noise(model.config.decoder_config["scheduler"], timesteps)
    snr = (signal / sigma).square().flatten()
    is_velocity = model.teacher.schedule.config.prediction_type == "v_prediction"
    weights = snr.clamp(max=gamma) / (snr + 1 if is_velocity else snr)  # arXiv 2303.09556, section 3.4
    expected = ((prediction - target).square().mean(dim=(1, 2, 3)) * weights).mean()
    assert snr[0] > gamma > snr[1]

    output = model(pixel_values, latents=latents, noise=noise, timesteps=timesteps)
    torch.testing.assert_close(output.loss, expected, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_noise_timesteps_and_latents_are_drawn_each_time_and_repeat_under_a_seed(
    tiny_model, pixel_values, decoder_pixel_values
):
    def loss(seed):
        torch.manual_seed(seed)
        return tiny_model(pixel_values, decoder_pixel_values=decoder_pixel_values).loss

    assert torch.equal(loss(1), loss(1))
    assert not torch.equal(loss(1), loss(2))


@torch.no_grad()
def test_timesteps_are_drawn_over_the_whole_schedule(tiny_model, pixel_values, monkeypatch):
    drawn = []
    original = tiny_model.unet.forward

    def record(sample, timesteps, **kwargs):
        drawn.append(timesteps)
        return original(sample, timesteps, **kwargs)

    monkeypatch.setattr(tiny_model.unet, "forward", record)
    context, latents = torch.randn(500, QUERIES, 24), torch.randn(500, 4, 8, 8)
    tiny_model.compute_denoising_loss(latents, context)
    (timesteps,) = drawn
    assert timesteps.min() >= 0 and timesteps.max() <= 999
    deciles = torch.histc(timesteps.float(), bins=10, min=0, max=1000)
    assert (deciles > 25).all()  # 50 each are expected; fewer than 25 happens once in 10,000 draws


@torch.no_grad()
def test_latents_are_the_vaes_shifted_and_scaled(decoder_pixel_values):
    parts = tiny.decoder_config()
    parts["vae"]["shift_factor"] = 0.3
    model = tiny.model(decoder_config=parts)
    posterior = model.vae.encode(decoder_pixel_values).latent_dist
    latents = model.encode_latents(decoder_pixel_values, sample=False)
    torch.testing.assert_close(latents, (posterior.mean - 0.3) * 0.7)
    torch.testing.assert_close(model.decode_latents(latents), model.vae.decode(posterior.mean).sample)

    torch.manual_seed(1)
    sampled = model.encode_latents(decoder_pixel_values)
    torch.manual_seed(1)
    torch.testing.assert_close(sampled, (posterior.mean + posterior.std * torch.randn(3, 4, 8, 8) - 0.3) * 0.7)


@torch.no_grad()
def test_context_dropout_puts_the_empty_prompt_in_place_of_contexts_and_only_in_training(pixel_values):
    model = tiny.model(context_dropout=1.0)
    latents, noise = torch.randn(2, 3, 4, 8, 8)
    timesteps = torch.tensor([10, 500, 900])
    empty = model.empty_context().expand(3, -1, -1)
    with_empty = model.compute_denoising_loss(latents, empty, noise, timesteps)
    in_eval = model(pixel_values, latents=latents, noise=noise, timesteps=timesteps).loss
    in_training = model.train()(pixel_values, latents=latents, noise=noise, timesteps=timesteps).loss
    torch.testing.assert_close(in_training, with_empty)
    assert (in_eval - with_empty).abs() > 1e-4


@torch.no_grad()
def test_noise_draws_are_several_noise_levels_for_each_image_that_is_encoded_once(pixel_values):
    model = tiny.model(noise_draws=3).set_stage("frozen")
    latents, encoded = torch.randn(3, 4, 8, 8), []
    model.text_encoder.register_forward_hook(lambda module, inputs, output: encoded.append(len(output)))
    torch.manual_seed(5)
    loss = model.train()(pixel_values, latents=latents).loss
    assert encoded == [3]

    torch.manual_seed(5)
    noise, timesteps = torch.randn(9, 4, 8, 8), torch.randint(1000, (9,))
    context = model.encode_context(model.encode(pixel_values))
    # The draws of an image follow each other: every third one is the next image's.
    each = [model.compute_denoising_loss(latents, context, noise[k::3], timesteps[k::3]) for k in range(3)]
    torch.testing.assert_close(loss, torch.stack(each).mean())

    torch.manual_seed(5)
    in_eval = model.eval()(pixel_values, latents=latents).loss
    torch.manual_seed(5)
    noise, timesteps = torch.randn(3, 4, 8, 8), torch.randint(1000, (3,))
    torch.testing.assert_close(in_eval, model.compute_denoising_loss(latents, context, noise, timesteps))


@pytest.mark.parametrize("draws", [0, -1, 1.5])
def test_noise_draws_are_at_least_one(draws):
    with pytest.raises(ValueError, match=rf"noise_draws is {draws}: draw at least 1 noise level for each image\."):
        tiny.config(noise_draws=draws)


# ---- stage 2: the caption loss -----------------------------------------------------------------------------


def llm_by_hand(model, pixel_values, captions):
    """The LLM's own output and loss for prefix and caption, which are given as embeddings."""
    prefix = model.prefix_projection(model.encode_context(model.encode(pixel_values)))
    words = model.caption_head.get_input_embeddings()(captions["input_ids"])
    return model.caption_head(
        inputs_embeds=torch.cat([prefix, words], dim=1),
        attention_mask=F.pad(captions["attention_mask"], (QUERIES, 0), value=1),
        labels=F.pad(captions["labels"], (QUERIES, 0), value=-100),
    )


@torch.no_grad()
def test_caption_loss_is_the_llms_own(tiny_model, pixel_values, captions):
    output = tiny_model(pixel_values, **captions)
    expected = llm_by_hand(tiny_model, pixel_values, captions)
    torch.testing.assert_close(output.caption_loss, expected.loss)
    torch.testing.assert_close(output.logits, expected.logits[:, QUERIES - 1 :])
    assert torch.equal(output.loss, output.caption_loss) and output.denoising_loss is None


@torch.no_grad()
def test_logits_predict_the_token_of_their_own_index(tiny_model, pixel_values, captions):
    """Compares the loss with a cross-entropy by hand, over all caption tokens and the end-of-text token."""
    output = tiny_model(pixel_values, **captions)
    lengths = captions["attention_mask"].sum(1)
    assert output.logits.shape == (3, captions["input_ids"].shape[1] + 1, tiny_model.config.caption_config.vocab_size)
    losses = [
        -output.logits[row].log_softmax(-1)[position, captions["input_ids"][row, position]]
        for row in range(3)
        for position in range(lengths[row])
    ]
    assert all(captions["input_ids"][row, length - 1] == 0 for row, length in enumerate(lengths))  # <|endoftext|>
    torch.testing.assert_close(output.loss, torch.stack(losses).mean())


@torch.no_grad()
def test_padding_changes_nothing(tiny_model, pixel_values, captions):
    together = tiny_model(pixel_values, **captions)
    lengths = captions["attention_mask"].sum(1)
    for row, length in enumerate(lengths):
        alone = tiny_model(
            pixel_values[row : row + 1], **{name: ids[row : row + 1, :length] for name, ids in captions.items()}
        )
        torch.testing.assert_close(together.logits[row, :length], alone.logits[0, :length], rtol=1e-4, atol=1e-4)
    garbage = captions["input_ids"].where(captions["attention_mask"] == 1, torch.tensor(99))
    other = tiny_model(pixel_values, **{**captions, "input_ids": garbage})
    torch.testing.assert_close(other.loss, together.loss)


@torch.no_grad()
def test_num_items_in_batch_divides_the_sum_as_trainer_needs_it(tiny_model, pixel_values, captions):
    """The losses of two micro-batches, with the count of both, add up to the loss of the whole batch."""
    whole = tiny_model(pixel_values, **captions).loss
    count = captions["attention_mask"].sum()
    parts = [
        tiny_model(pixel_values[rows], **{name: ids[rows] for name, ids in captions.items()}, num_items_in_batch=count)
        for rows in (slice(0, 1), slice(1, 3))
    ]
    torch.testing.assert_close(parts[0].loss + parts[1].loss, whole)


@torch.no_grad()
def test_both_losses_at_once_are_summed(tiny_model, pixel_values, captions):
    latents, noise = torch.randn(2, 3, 4, 8, 8)
    stage1 = {"latents": latents, "noise": noise, "timesteps": torch.tensor([10, 500, 900])}
    both = tiny_model(pixel_values, **stage1, **captions)
    torch.testing.assert_close(both.loss, both.denoising_loss + both.caption_loss)
    torch.testing.assert_close(both.denoising_loss, tiny_model(pixel_values, **stage1).loss)
    torch.testing.assert_close(both.caption_loss, tiny_model(pixel_values, **captions).loss)


@torch.no_grad()
def test_the_inputs_decide_what_is_computed(tiny_model, pixel_values, captions):
    output = tiny_model(pixel_values)
    assert output.keys() == {"caption_embeds", "context"}
    output = tiny_model(pixel_values, input_ids=captions["input_ids"])
    assert output.keys() == {"caption_embeds", "context", "logits"}
    assert isinstance(tiny_model(pixel_values, return_dict=False), tuple)
    assert tiny_model(pixel_values, return_dict=None).keys() == {"caption_embeds", "context"}


@torch.no_grad()
def test_labels_also_serve_as_input_ids(tiny_model, pixel_values, captions):
    output = tiny_model(pixel_values, labels=captions["labels"])
    expected = tiny_model(pixel_values, **captions)
    assert torch.equal(output.loss, expected.loss)
    lengths = captions["attention_mask"].sum(1)
    for row, length in enumerate(lengths):
        assert torch.equal(output.logits[row, : length + 1], expected.logits[row, : length + 1])


@torch.no_grad()
def test_hidden_states_and_attentions_are_the_caption_heads(tiny_repo, tiny_model, pixel_values, captions):
    model = type(tiny_model).from_pretrained(tiny_repo, attn_implementation="eager")
    output = model(pixel_values, **captions, output_hidden_states=True, output_attentions=True)
    prefix = model.prefix_projection(output.context)
    expected = model.caption_head(
        inputs_embeds=torch.cat([prefix, model.get_input_embeddings()(captions["input_ids"])], dim=1),
        attention_mask=F.pad(captions["attention_mask"], (QUERIES, 0), value=1),
        output_hidden_states=True,
        output_attentions=True,
    )
    layers = model.config.caption_config.num_hidden_layers
    assert len(output.hidden_states) == layers + 1 and len(output.attentions) == layers
    for name in ("hidden_states", "attentions"):
        for actual, state in zip(output[name], expected[name], strict=True):
            torch.testing.assert_close(actual, state)
    model.config.output_hidden_states = True
    assert torch.equal(model(pixel_values, **captions).hidden_states[-1], output.hidden_states[-1])
    assert model(pixel_values, **captions, output_hidden_states=False).hidden_states is None


# ---- precision ---------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_takes_float32_inputs(
    tiny_repo, tiny_model, dtype, pixel_values, decoder_pixel_values, captions
):
    model = type(tiny_model).from_pretrained(tiny_repo, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    inputs = {
        "decoder_pixel_values": decoder_pixel_values,
        "noise": torch.randn(3, 4, 8, 8),
        "timesteps": torch.tensor([10, 500, 900]),
        **captions,
    }
    tiny_model.config.sample_latents = model.config.sample_latents = False
    half, full = model(pixel_values, **inputs), tiny_model(pixel_values, **inputs)
    tiny_model.config.sample_latents = True
    torch.testing.assert_close(half.denoising_loss.float(), full.denoising_loss, rtol=0.05, atol=0.05)
    torch.testing.assert_close(half.caption_loss.float(), full.caption_loss, rtol=0.05, atol=0.1)
    assert half.context.dtype == dtype
    assert model.generate(pixel_values=pixel_values, max_new_tokens=3, do_sample=False).shape == (3, 3)
    pictures = model.reconstruct(pixel_values=pixel_values, num_inference_steps=2, output_type="pt")
    assert pictures.shape == (3, 3, 32, 32) and pictures.dtype == torch.float32 and pictures.isfinite().all()


@torch.no_grad()
def test_parts_of_different_precision_work_together(tiny_model, pixel_values, decoder_pixel_values, captions):
    """Parts that train are in float32 and frozen parts in half precision. Each part casts its inputs."""
    model = copy.deepcopy(tiny_model)
    for part in (model.encoder.vision_tower, model.text_encoder, model.unet, model.vae):
        part.to(torch.bfloat16)
    output = model(pixel_values, decoder_pixel_values=decoder_pixel_values, **captions)
    assert output.loss.isfinite()
    model.caption_head.to(torch.bfloat16)
    assert model.generate(pixel_values=pixel_values, max_new_tokens=3, do_sample=False).shape == (3, 3)
