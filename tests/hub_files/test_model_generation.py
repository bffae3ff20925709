"""Captions and reconstructions, with all their arguments."""

import copy
from threading import Thread

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from modeling_vlv import VLVForConditionalGeneration

NEW = 10
GREEDY = {"max_new_tokens": NEW, "do_sample": False}


@pytest.fixture(scope="module")
def pixel_values():
    return tiny.pixels(3)[0]


@pytest.fixture(scope="module")
def greedy(tiny_model, pixel_values):
    """The greedy captions of the three pictures (3, NEW), to compare with."""
    ids = tiny_model.generate(pixel_values=pixel_values, **GREEDY)
    assert ids.shape == (3, NEW)
    assert len({tuple(row.tolist()) for row in ids}) == 3  # each picture gets a different caption
    return ids


# ---- captions ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_greedy_is_the_argmax_of_forwards_logits_token_by_token(tiny_model, pixel_values, greedy):
    ids = torch.empty(3, 0, dtype=torch.long)
    for _ in range(NEW):
        logits = tiny_model(pixel_values, input_ids=ids).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(ids, greedy)


def test_caption_embeds_replace_pixels(tiny_model, pixel_values, greedy):
    caption_embeds = tiny_model.encode(pixel_values)
    assert torch.equal(tiny_model.generate(caption_embeds=caption_embeds, **GREEDY), greedy)


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_batch_composition_changes_nothing(tiny_model, pixel_values, greedy, arguments):
    """The captions reach the end-of-text token at different lengths."""
    arguments = {**GREEDY, **arguments, "eos_token_id": int(greedy[0, 3]), "pad_token_id": 0}
    together = tiny_model.generate(pixel_values=pixel_values, **arguments)
    reversed_ = tiny_model.generate(pixel_values=pixel_values.flip(0), **arguments).flip(0)
    alone = [tiny_model.generate(pixel_values=pixels[None], **arguments)[0] for pixels in pixel_values]
    for row, ids in enumerate(alone):
        for batch in (together, reversed_):
            assert torch.equal(batch[row, : len(ids)], ids)
            assert (batch[row, len(ids) :] == 0).all()


def test_beams_score_at_least_as_well_as_greedy(tiny_model, pixel_values, greedy):
    @torch.no_grad()
    def log_likelihood(ids):
        logits = tiny_model(pixel_values, input_ids=ids).logits[:, :-1]
        return logits.log_softmax(-1).gather(-1, ids[..., None]).sum(dim=(1, 2))

    beams = tiny_model.generate(pixel_values=pixel_values, num_beams=5, min_new_tokens=NEW, **GREEDY)
    assert (log_likelihood(beams) >= log_likelihood(greedy) - 1e-4).all()
    assert (log_likelihood(beams) > log_likelihood(greedy) + 1e-4).any()


def test_several_captions_of_each_picture_come_one_picture_after_the_other(tiny_model, pixel_values):
    arguments = {"num_beams": 4, **GREEDY}
    best = tiny_model.generate(pixel_values=pixel_values, **arguments)
    three = tiny_model.generate(pixel_values=pixel_values, num_return_sequences=3, **arguments)
    assert three.shape == (9, NEW)
    assert torch.equal(three[::3], best)
    assert len({tuple(row.tolist()) for row in three[:3]}) == 3


def test_sampling_repeats_under_a_seed(tiny_model, pixel_values, greedy):
    def sample(seed):
        torch.manual_seed(seed)
        return tiny_model.generate(pixel_values=pixel_values, do_sample=True, temperature=2.0, max_new_tokens=NEW)

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))
    torch.manual_seed(0)
    assert torch.equal(
        tiny_model.generate(pixel_values=pixel_values, do_sample=True, top_k=1, max_new_tokens=NEW), greedy
    )


def test_a_seed_draws_each_image_apart_from_its_batch(tiny_model, pixel_values, greedy):
    def sample(pixel_values, seed, **settings):
        settings = {"do_sample": True, "temperature": 2.0, "max_new_tokens": NEW, **settings}
        return tiny_model.generate(pixel_values=pixel_values, seed=seed, **settings)

    def pairs(ids):
        return [ids[start : start + 2].tolist() for start in range(0, len(ids), 2)]

    together = pairs(sample(pixel_values, 5, num_return_sequences=2))
    assert all(first != second for first, second in together)
    assert pairs(sample(pixel_values.flip(0), 5, num_return_sequences=2)) == together[::-1]
    assert pairs(sample(pixel_values[1:2], 5, num_return_sequences=2)) == together[1:2]
    assert pairs(sample(pixel_values, [5, 6, 5], num_return_sequences=2))[::2] == together[::2]
    assert all(one != other for one, other in zip(pairs(sample(pixel_values, 6)), together, strict=False))
    assert torch.equal(sample(pixel_values, 5, top_k=1), greedy)  # the other settings of sampling apply
    assert torch.equal(sample(pixel_values, 5, do_sample=False), greedy)


def test_a_seed_draws_with_the_probabilities_of_the_model(tiny_model, pixel_values):
    draws, settings = 4000, {"do_sample": True, "temperature": 0.7, "top_k": 5, "max_new_tokens": 1}
    ids = tiny_model.generate(pixel_values=pixel_values[:1], seed=0, num_return_sequences=draws, **settings)
    top = tiny_model(pixel_values[:1], input_ids=ids[:1]).logits[0, 0].topk(5)
    expected = (top.values / 0.7).softmax(-1)
    found = torch.stack([(ids == token).float().mean() for token in top.indices])
    assert found.sum() == 1
    assert (found - expected).abs().max() < 4 * (0.25 / draws) ** 0.5


@pytest.mark.parametrize(
    ("seed", "num_beams", "sentence"),
    [([1, 2], 1, "There are 2 seeds for 3 images: give one seed, or one for each."), (1, 2, "num_beams is 2")],
)
def test_a_wrong_seed_is_one_sentence(tiny_model, pixel_values, seed, num_beams, sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny_model.generate(pixel_values=pixel_values, seed=seed, num_beams=num_beams, do_sample=True)


def test_a_streamer_gets_the_caption_piece_by_piece(tiny_model, tiny_processor, pixel_values, greedy):
    streamer = TextIteratorStreamer(tiny_processor.tokenizer, timeout=60, skip_special_tokens=True)
    arguments = {"pixel_values": pixel_values[:1], "streamer": streamer, **GREEDY}
    thread = Thread(target=tiny_model.generate, kwargs=arguments)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tiny_processor.tokenizer.decode(greedy[0], skip_special_tokens=True)


class Only(LogitsProcessor):
    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.token] = 0
        return forced


class AfterTokens(StoppingCriteria):
    def __init__(self, count):
        self.count = count

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.count)


def test_logits_processors_and_stopping_criteria_are_obeyed(tiny_model, tiny_processor, pixel_values, greedy):
    forced = tiny_model.generate(pixel_values=pixel_values, logits_processor=LogitsProcessorList([Only(70)]), **GREEDY)
    assert (forced == 70).all()
    criteria = StoppingCriteriaList([AfterTokens(4)])
    stopped = tiny_model.generate(pixel_values=pixel_values, stopping_criteria=criteria, **GREEDY)
    assert torch.equal(stopped, greedy[:, :4])
    letter = tiny_processor.tokenizer.decode(greedy[0, 2:3])
    at_letter = tiny_model.generate(
        pixel_values=pixel_values[:1], stop_strings=[letter], tokenizer=tiny_processor.tokenizer, **GREEDY
    )
    first = greedy[0].tolist().index(greedy[0, 2]) + 1
    assert torch.equal(at_letter[0], greedy[0, :first])


def test_generation_ends_at_the_end_of_text_token(tiny_model, pixel_values, greedy):
    eos = int(greedy[1, 5])
    ids = tiny_model.generate(pixel_values=pixel_values[1:2], eos_token_id=eos, pad_token_id=0, **GREEDY)[0]
    assert torch.equal(ids, greedy[1, : greedy[1].tolist().index(eos) + 1])


def test_the_models_generation_config_is_the_default_and_arguments_come_first(tiny_model, pixel_values, greedy):
    model = copy.deepcopy(tiny_model)
    model.generation_config.update(max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(pixel_values=pixel_values), greedy[:, :4])
    assert torch.equal(model.generate(pixel_values=pixel_values, max_new_tokens=6), greedy[:, :6])
    assert model.generation_config.max_new_tokens == 4  # nothing sticks
    given = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=0, pad_token_id=0)
    assert torch.equal(model.generate(pixel_values=pixel_values, generation_config=given), greedy[:, :5])
    assert given.max_new_tokens == 5


def test_a_generation_config_is_completed_from_the_checkpoint(tiny_model, pixel_values, greedy):
    model = copy.deepcopy(tiny_model)
    model.generation_config.update(max_new_tokens=6, eos_token_id=int(greedy[0, 3]), pad_token_id=0, num_beams=1)
    expected = model.generate(pixel_values, do_sample=False)
    assert expected.shape[1] <= 6
    assert torch.equal(model.generate(pixel_values, generation_config=GenerationConfig(do_sample=False)), expected)
    beams = GenerationConfig(num_beams=3)
    assert torch.equal(
        model.generate(pixel_values, generation_config=beams), model.generate(pixel_values, num_beams=3)
    )
    assert beams.max_new_tokens is None  # the caller's config is not changed


def test_a_beginning_is_continued_and_only_new_tokens_are_returned(tiny_model, pixel_values, greedy):
    for length in (1, 4):
        ids = tiny_model.generate(
            pixel_values=pixel_values, input_ids=greedy[:, :length], max_new_tokens=NEW - length, do_sample=False
        )
        assert torch.equal(ids, greedy[:, length:])
    none = torch.empty(3, 0, dtype=torch.long)
    assert torch.equal(tiny_model.generate(pixel_values=pixel_values, input_ids=none, **GREEDY), greedy)


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_beginnings_of_different_lengths_in_one_batch(tiny_model, tiny_processor, pixel_values, arguments):
    beginnings = ["a", "two small dogs and", ""]
    texts = tiny_processor(text=beginnings)
    assert texts["attention_mask"].sum(1).tolist() == [1, 18, 0]
    together = tiny_model.generate(pixel_values=pixel_values, **texts, **GREEDY, **arguments)
    for row, beginning in enumerate(beginnings):
        alone = tiny_model.generate(
            pixel_values=pixel_values[row : row + 1], **tiny_processor(text=beginning), **GREEDY, **arguments
        )
        assert torch.equal(together[row, : alone.shape[1]], alone[0])


def test_beginnings_may_be_padded_on_either_side(tiny_model, tiny_processor, pixel_values):
    on_the_left = tiny_processor(text=["a", "two", ""])
    on_the_right = {name: torch.stack([ids[0].roll(-2), ids[1], ids[2]]) for name, ids in on_the_left.items()}
    assert on_the_right["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1], [0, 0, 0]]
    expected = tiny_model.generate(pixel_values=pixel_values, **on_the_left, **GREEDY)
    assert torch.equal(tiny_model.generate(pixel_values=pixel_values, **on_the_right, **GREEDY), expected)


def test_generate_returns_details_when_asked(tiny_model, pixel_values, greedy):
    output = tiny_model.generate(pixel_values=pixel_values, output_scores=True, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(output.sequences, greedy)
    assert len(output.scores) == NEW and output.scores[0].shape == (3, 257)


def test_generate_needs_exactly_one_input(tiny_model, pixel_values):
    with pytest.raises(ValueError, match="either pixel_values or caption_embeds"):
        tiny_model.generate(max_new_tokens=3)
    with pytest.raises(ValueError, match="either pixel_values or caption_embeds"):
        tiny_model.generate(pixel_values=pixel_values, caption_embeds=torch.randn(3, 10, 24), max_new_tokens=3)


def test_a_checkpoint_without_a_caption_head_says_so(pixel_values):
    model = tiny.model(caption_config=None)
    with pytest.raises(ValueError, match="no caption head and cannot caption"):
        model.generate(pixel_values=pixel_values)
    with pytest.raises(ValueError, match="no caption head"):
        model(pixel_values, input_ids=torch.ones(3, 2, dtype=torch.long))
    assert model.encode(pixel_values).shape == (3, 10, 24)  # the rest works
    assert len(model.reconstruct(pixel_values=pixel_values, num_inference_steps=1)) == 3


# ---- reconstructions ---------------------------------------------------------------------------------------


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def two_ddim_steps_by_hand(model, context, noise, guidance_scale, timesteps):
    """Deterministic DDIM (arXiv 2010.02502, equation 12) in latent space, from the schedule's definition."""
    scheduler = model.config.decoder_config["scheduler"]
    betas = (
        torch.linspace(scheduler["beta_start"] ** 0.5, scheduler["beta_end"] ** 0.5, 1000, dtype=torch.float64) ** 2
    )
    signal = (1 - betas).cumprod(0).sqrt()
    if scheduler["rescale_betas_zero_snr"]:
        signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    last = 1.0 if scheduler["set_alpha_to_one"] else float(signal[0])
    signals = [float(signal[timestep]) for timestep in timesteps] + [last]
    empty = model.empty_context().expand_as(context)
    latents = noise
    for timestep, now, then in zip(timesteps, signals[:-1], signals[1:], strict=True):
        conditional = model.unet(latents, timestep, encoder_hidden_states=context).sample
        unconditional = model.unet(latents, timestep, encoder_hidden_states=empty).sample
        prediction = unconditional + guidance_scale * (conditional - unconditional)
        sigma, next_sigma = (1 - now**2) ** 0.5, (1 - then**2) ** 0.5
        if scheduler["prediction_type"] == "v_prediction":
            clean, noise = now * latents - sigma * prediction, now * prediction + sigma * latents
        else:
            clean, noise = (latents - sigma * prediction) / now, prediction
        latents = then * clean + next_sigma * noise
    return (model.vae.decode(latents / 0.7).sample / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
@pytest.mark.parametrize(("prediction_type", "timesteps"), [("v_prediction", [999, 499]), ("epsilon", [501, 1])])
def test_sampling_by_hand(prediction_type, timesteps, pixel_values):
    model = tiny.model(prediction_type=prediction_type)
    context = model.encode_context(model.encode(pixel_values))
    noise = torch.randn(3, 4, 8, 8, generator=generator())
    expected = two_ddim_steps_by_hand(model, context, noise, 2.5, timesteps)
    scheduler = DDIMScheduler.from_config(model.config.decoder_config["scheduler"])
    actual = sample(model, pixel_values, guidance_scale=2.5, scheduler=scheduler)
    assert expected.std() > 0.01
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def sample(model, pixel_values, seeds=0, **arguments):
    generators = generator(seeds) if isinstance(seeds, int) else [generator(seed) for seed in seeds]
    arguments = {"num_inference_steps": 2, "output_type": "pt", **arguments}
    return model.reconstruct(pixel_values=pixel_values, generator=generators, **arguments)


def test_a_generator_makes_reconstructions_repeatable(tiny_model, pixel_values):
    first = sample(tiny_model, pixel_values, seeds=1)
    assert first.shape == (3, 3, 32, 32) and first.min() >= 0 and first.max() <= 1
    assert torch.equal(first, sample(tiny_model, pixel_values, seeds=1))
    assert not torch.equal(first, sample(tiny_model, pixel_values, seeds=2))


def test_one_generator_per_picture_makes_them_independent_of_the_batch(tiny_model, pixel_values):
    together = sample(tiny_model, pixel_values, seeds=[5, 6, 7])
    for row, seed in enumerate([5, 6, 7]):
        alone = sample(tiny_model, pixel_values[row : row + 1], seeds=[seed])
        torch.testing.assert_close(alone[0], together[row], rtol=1e-3, atol=1e-4)


def test_reconstructions_depend_on_the_picture(tiny_model, pixel_values):
    pictures = sample(tiny_model, pixel_values, seeds=[5, 5, 5])  # from the same noise
    assert (pictures[0] - pictures[1]).abs().max() > 0.01


def test_reconstruct_takes_caption_embeds(tiny_model, pixel_values):
    caption_embeds = tiny_model.encode(pixel_values)
    assert torch.equal(sample(tiny_model, None, caption_embeds=caption_embeds), sample(tiny_model, pixel_values))


def test_without_guidance_the_unet_does_half_of_the_work(tiny_model, pixel_values, monkeypatch):
    sizes = []
    original = tiny_model.unet.forward

    def record(latents, timestep, **kwargs):
        sizes.append(len(latents))
        return original(latents, timestep, **kwargs)

    monkeypatch.setattr(tiny_model.unet, "forward", record)
    unguided = sample(tiny_model, pixel_values, guidance_scale=1.0)
    barely_guided = sample(tiny_model, pixel_values, guidance_scale=1.0 + 1e-6)
    assert sizes == [3, 3, 6, 6]
    torch.testing.assert_close(unguided, barely_guided, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, EulerDiscreteScheduler])
def test_another_scheduler_can_sample(tiny_model, pixel_values, scheduler_class):
    scheduler = scheduler_class.from_config(tiny_model.teacher.schedule.config)
    other = sample(tiny_model, pixel_values, scheduler=scheduler, num_inference_steps=3, guidance_scale=1.0)
    assert other.shape == (3, 3, 32, 32) and other.isfinite().all()
    again = sample(tiny_model, pixel_values, scheduler=scheduler, num_inference_steps=3, guidance_scale=1.0)
    assert torch.equal(other, again)  # a scheduler can be used again
    assert not torch.equal(other, sample(tiny_model, pixel_values, num_inference_steps=3, guidance_scale=1.0))


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])
@pytest.mark.slow
def test_few_steps_of_the_default_solver_come_closer_than_those_of_ddim(prediction_type, pixel_values):
    model = tiny.model(prediction_type=prediction_type)
    schedule = model.config.decoder_config["scheduler"]
    end = sample(model, pixel_values, num_inference_steps=200, scheduler=DDIMScheduler.from_config(schedule))
    default, explicit, ddim = (
        sample(model, pixel_values, num_inference_steps=10, **scheduler)
        for scheduler in (
            {},
            {"scheduler": DPMSolverMultistepScheduler.from_config(schedule)},
            {"scheduler": DDIMScheduler.from_config(schedule)},
        )
    )
    assert torch.equal(default, explicit)
    assert (default - end).square().mean() < (ddim - end).square().mean()


def test_output_types_and_sizes(tiny_model, pixel_values):
    pictures = tiny_model.reconstruct(pixel_values=pixel_values, num_inference_steps=2, generator=generator())
    tensor = sample(tiny_model, pixel_values)
    assert [picture.size for picture in pictures] == [(32, 32)] * 3 and pictures[0].mode == "RGB"
    array = sample(tiny_model, pixel_values, output_type="np")
    torch.testing.assert_close(torch.from_numpy(array).permute(0, 3, 1, 2), tensor)
    assert sample(tiny_model, pixel_values, height=48, width=16).shape == (3, 3, 48, 16)
    larger = tiny.model(image_size=64)
    assert sample(larger, pixel_values).shape == (3, 3, 64, 64)


def test_a_callback_sees_every_step_and_may_change_the_latents(tiny_model, pixel_values):
    seen = []

    def watch(model, step, timestep, state):
        seen.append((step, int(timestep), tuple(state["latents"].shape)))
        return {}

    plain = sample(tiny_model, pixel_values)
    assert torch.equal(sample(tiny_model, pixel_values, callback_on_step_end=watch), plain)
    assert seen == [(0, 999, (3, 4, 8, 8)), (1, 499, (3, 4, 8, 8))]
    blank = sample(
        tiny_model,
        pixel_values,
        callback_on_step_end=lambda model, step, timestep, state: {"latents": torch.zeros_like(state["latents"])},
    )
    assert torch.equal(blank[0], blank[1])


def test_reconstruct_needs_exactly_one_input_and_a_decoder(tiny_model, pixel_values):
    with pytest.raises(ValueError, match="either pixel_values or caption_embeds"):
        tiny_model.reconstruct()
    captioner = tiny.model(VLVForConditionalGeneration)
    with pytest.raises(ValueError, match="no diffusion decoder and cannot reconstruct.*AutoModel"):
        captioner.reconstruct(pixel_values=pixel_values)
    with pytest.raises(ValueError, match="no diffusion decoder and cannot compute the denoising loss"):
        captioner(pixel_values, latents=torch.randn(3, 4, 8, 8))
    with pytest.raises(ValueError, match="no diffusion decoder and cannot encode latents"):
        captioner(pixel_values, decoder_pixel_values=torch.zeros(3, 3, 32, 32))


def test_neither_captioning_nor_reconstructing_leaves_gradients_or_changes_the_mode(tiny_model, pixel_values):
    assert not tiny_model.generate(pixel_values=pixel_values, max_new_tokens=1).requires_grad
    assert not sample(tiny_model, pixel_values).requires_grad
    model = copy.deepcopy(tiny_model).set_stage("caption").train()
    model.generate(pixel_values=pixel_values, max_new_tokens=1)
    assert model.training and model.caption_head.training
