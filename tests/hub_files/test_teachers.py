"""Every family of teachers, on tiny models of diffusers' real classes, against its own pipeline and formulas."""

import subprocess
import sys

import pytest
import teachers
import tiny
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from teachers import every_family

from modeling_vlv import VLVForConditionalGeneration, VLVModel

SIZE = 32  # pixels of a side


@pytest.fixture(scope="module")
def models():
    """A model of each family, made once. A test that changes one makes its own."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = teachers.model(family)
        return made[family]

    return get


def schedule(family):
    """The share of noise (1000,) at each timestep by hand: of the variance where noise is predicted, else sigma."""
    settings = teachers.TEACHERS[family]["scheduler"]
    if "beta_start" in settings:
        start, end = settings["beta_start"], settings["beta_end"]
        if settings["beta_schedule"] == "scaled_linear":
            betas = torch.linspace(start**0.5, end**0.5, 1000, dtype=torch.float64) ** 2
        else:
            betas = torch.linspace(start, end, 1000, dtype=torch.float64)
        return "noise", 1 - (1 - betas).cumprod(0)
    sigmas = torch.arange(1, 1001, dtype=torch.float64) / 1000
    shift = settings.get("flow_shift", settings.get("shift", 1.0))
    return "flow", shift * sigmas / (1 + (shift - 1) * sigmas)


def inputs(model, count=2):
    """Latents and noise (count, C, h/f, w/f), timesteps (count,) and caption embeddings."""
    generator = torch.Generator().manual_seed(3)
    _, channels = model.teacher.channels
    side = SIZE // model.teacher.factor
    latents, noise = torch.randn(2, count, channels, side, side, generator=generator)
    embeds = torch.randn(count, 10, model.config.caption_embeds_width, generator=generator)
    return latents, noise, torch.tensor([120, 873])[:count], embeds


def packed(family, latents):
    """As the pipelines that read sequences hold their latents."""
    if family == "Qwen-Image":
        return F.pixel_unshuffle(latents, 2).flatten(2).mT
    return latents.flatten(2).mT if family == "FLUX.2 klein" else latents


@every_family
def test_prediction_and_gradients_are_the_pipelines(family, models):
    """The denoiser is asked what its own pipeline asks it, and the answer is read the same."""
    model = models(family)
    latents, _, timesteps, embeds = inputs(model)
    embeds.requires_grad_()
    answer = model.denoise(latents, timesteps, model.encode_context(embeds))
    (gradient,) = torch.autograd.grad((answer * latents).sum(), embeds)

    kind, shares = schedule(family)
    times = timesteps if kind == "noise" else (shares[timesteps] * 1000).float()
    arguments = model.teacher.prompt(model._as_prompt(model.encode_context(embeds)), None)
    unguided = {"true_cfg_scale" if family == "Qwen-Image" else "guidance_scale": 0.0 if family == "Z-Image" else 1.0}
    start = packed(family, latents) if family == "Qwen-Image" else latents
    size = {"height": SIZE, "width": SIZE}
    expected = teachers.pipelines_prediction(model, start, times, arguments, **size, **unguided)
    (expected_gradient,) = torch.autograd.grad((expected * packed(family, latents)).sum(), embeds)

    answer = packed(family, answer)
    assert expected.shape == answer.shape and expected.std() > 0.01
    torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-4)  # their times differ in the last bit
    torch.testing.assert_close(
        gradient, expected_gradient, rtol=1e-3, atol=1e-5 * expected_gradient.abs().max().item()
    )
    assert gradient.abs().max() > 0


@every_family
def test_noising_target_and_loss_by_hand(family, models):
    model = models(family)
    latents, noise, timesteps, embeds = inputs(model)
    kind, shares = schedule(family)
    share = shares[timesteps][:, None, None, None]
    x, n = latents.double(), noise.double()
    velocity = teachers.TEACHERS[family]["scheduler"].get("prediction_type") == "v_prediction"
    if kind == "noise":
        noisy = (1 - share).sqrt() * x + share.sqrt() * n
        target = (1 - share).sqrt() * n - share.sqrt() * x if velocity else n
        snr = ((1 - share) / share).flatten()
        weights = snr.clamp(max=5.0) / (snr + 1 if velocity else snr)
    else:
        noisy, target = (1 - share) * x + share * n, n - x
        snr = (((1 - share) / share) ** 2).flatten()
        weights = snr.clamp(max=5.0) * share.flatten() ** 2
    torch.testing.assert_close(model.teacher.add_noise(latents, noise, timesteps), noisy.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.teacher.target(latents, noise, timesteps), target.float(), rtol=1e-4, atol=1e-4)

    context = model.encode_context(embeds)
    with torch.no_grad():
        squares = (model.denoise(noisy.float(), timesteps, context) - target.float()).square().mean((1, 2, 3))
        loss = model(caption_embeds=embeds, latents=latents, noise=noise, timesteps=timesteps).denoising_loss
        torch.testing.assert_close(loss, squares.mean(), rtol=1e-3, atol=0)
        model.config.min_snr_gamma = 5.0
        weighted = model.compute_denoising_loss(latents, context, noise, timesteps)
        model.config.min_snr_gamma = None
    torch.testing.assert_close(weighted, (squares * weights).mean().float(), rtol=1e-3, atol=0)


@every_family
def test_latents_are_the_vaes(family, models):
    """Encoding undoes decoding's scale, as the pipeline itself decodes."""
    model = models(family)
    _, pixels = tiny.pixels(2)
    with torch.no_grad():
        mean, std = model.latent_distribution(pixels)
        assert torch.equal(model.encode_latents(pixels, sample=False), mean)
        torch.manual_seed(5)
        drawn = model.encode_latents(pixels, sample=True)
        if family == "Sana":
            assert torch.equal(drawn, mean) and not std.any()
        else:
            assert std.min() > 0 and not torch.equal(drawn, mean)
        side = SIZE // model.teacher.factor
        assert mean.shape == (2, model.teacher.channels[1], side, side)
        raw = model.teacher.denormalise(model.vae, mean)
        torch.testing.assert_close(model.teacher.normalise(model.vae, raw), mean, rtol=1e-4, atol=1e-4)


@every_family
def test_pictures_are_the_pipelines(family, models):
    """Guided sampling with the family's own scheduler, decoded by the pipeline itself."""
    model = models(family)
    _, _, _, embeds = inputs(model)
    pipeline = model.to_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    own = teachers.TEACHERS[family]["scheduler"]["_class_name"]
    expected_class = "DPMSolverMultistepScheduler" if model.config.text_encoder_config else own
    assert type(pipeline.scheduler).__name__ == expected_class
    call = {"num_inference_steps": 3, "height": SIZE, "width": 2 * SIZE}

    def noise():
        return torch.Generator().manual_seed(1)

    guidance = {"true_cfg_scale": 3.0} if family == "Qwen-Image" else {"guidance_scale": 3.0}
    guidance = {"guidance_scale": 2.0} if family == "Z-Image" else guidance
    expected = pipeline(
        **model.prompt(caption_embeds=embeds), **guidance, **call, generator=noise(), output_type="pt"
    ).images
    pictures = model.reconstruct(
        caption_embeds=embeds, guidance_scale=3.0, **call, generator=noise(), output_type="pt"
    )
    assert pictures.shape == (2, 3, SIZE, 2 * SIZE) and pictures.std() > 0.01
    torch.testing.assert_close(pictures, expected.float(), rtol=0, atol=2e-3)
    unguided = model.reconstruct(
        caption_embeds=embeds, guidance_scale=1.0, **call, generator=noise(), output_type="pt"
    )
    assert (unguided - pictures).abs().max() > 1e-3


@every_family
def test_a_training_step(family):
    """Gradients reach what trains and nothing else; gradient checkpointing and bf16 change no more than rounding."""
    model = teachers.model(family, caption_config=None)
    latents, noise, timesteps, _ = inputs(model)
    pixel_values, _ = tiny.pixels(2)
    model.set_stage("autoencode").train()

    def step():
        model.zero_grad()
        torch.manual_seed(0)  # Florence-2 has dropout
        loss = model(pixel_values=pixel_values, latents=latents, noise=noise, timesteps=timesteps).loss
        loss.backward()
        return loss.detach(), {
            name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None
        }

    loss, gradients = step()
    reached = {name.split(".")[0] for name in gradients}
    assert reached == {"queries", "projection", "encoder"} | (
        {"pooled_projection"} if model.pooled_projection else set()
    )
    assert all("language_model" in name for name in gradients if name.startswith("encoder"))
    assert all(gradients[name].abs().max() > 0 for name in gradients if "projection" in name or name == "queries")

    model.gradient_checkpointing_enable()
    assert model.denoiser.is_gradient_checkpointing
    again, same = step()
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(same["queries"], gradients["queries"], rtol=1e-3, atol=1e-6)
    model.gradient_checkpointing_disable()

    for part in (model.denoiser, model.vae):
        part.to(torch.bfloat16)
    half, _ = step()
    torch.testing.assert_close(half, loss, rtol=0.05, atol=0)
    picture = model.eval().reconstruct(pixel_values, num_inference_steps=2, output_type="pt")
    assert picture.isfinite().all()


@every_family
def test_context_dropout_gives_the_empty_prompt(family):
    model = teachers.model(family, caption_config=None, context_dropout=1.0)
    latents, noise, timesteps, embeds = inputs(model)
    given = {"latents": latents, "noise": noise, "timesteps": timesteps}
    model.set_stage("autoencode").train()
    with torch.no_grad():
        dropped = model(caption_embeds=embeds, **given).loss
        model.eval()
        empty = model.compute_denoising_loss(latents, model.empty_prompt(10, 2), noise, timesteps)
        own = model(caption_embeds=embeds, **given).loss
    torch.testing.assert_close(dropped, empty)
    assert not torch.allclose(own, empty, rtol=1e-4)


FRESH = """
import sys
import torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText
inputs = load_file(sys.argv[1])
for folder in map(Path, sys.argv[2:]):
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    given = {name.split("/")[1]: tensor for name, tensor in inputs.items() if name.startswith(folder.name + "/")}
    with torch.no_grad():
        loss = model(pixel_values=inputs["pixel_values"], **given).denoising_loss
    noise = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": 2, "generator": noise, "output_type": "pt"}
    picture = model.reconstruct(inputs["pixel_values"], **call)
    captioner = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    assert captioner.denoiser is None and captioner.vae is None
    with torch.no_grad():
        embeds = captioner.encode(inputs["pixel_values"])
    ids = captioner.generate(inputs["pixel_values"], max_new_tokens=4, do_sample=False)
    seen = {"loss": loss, "picture": picture.contiguous(), "embeds": embeds, "ids": ids}
    save_file(seen, folder / "seen.safetensors")
"""


@pytest.mark.slow
def test_a_fresh_process_sees_the_same(tmp_path, models):
    """Tables that no checkpoint holds come back: a process that never saw the models gives the same."""
    names = [name for name in teachers.TEACHERS if teachers.available(name)]
    pixel_values, _ = tiny.pixels(2)
    given = {"pixel_values": pixel_values}
    for number, name in enumerate(names):
        model = models(name)
        model.save_pretrained(tmp_path / str(number))
        latents, noise, timesteps, _ = inputs(model)
        each = {"latents": latents, "noise": noise, "timesteps": timesteps}
        given |= {f"{number}/{key}": tensor.contiguous() for key, tensor in each.items()}
    save_file(given, tmp_path / "inputs.safetensors")
    folders = [str(tmp_path / str(number)) for number in range(len(names))]
    result = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path / "inputs.safetensors"), *folders], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "not initialized" not in result.stderr and "UNEXPECTED" not in result.stderr, result.stderr
    for number, name in enumerate(names):
        model, seen = models(name), load_file(tmp_path / str(number) / "seen.safetensors")
        latents, noise, timesteps, _ = inputs(model)
        with torch.no_grad():
            loss = model(pixel_values=pixel_values, latents=latents, noise=noise, timesteps=timesteps).denoising_loss
            assert torch.equal(seen["embeds"], model.encode(pixel_values)), name
        generator = torch.Generator().manual_seed(0)
        picture = model.reconstruct(pixel_values, num_inference_steps=2, generator=generator, output_type="pt")
        assert torch.equal(seen["loss"], loss) and torch.equal(seen["picture"], picture), name
        assert torch.equal(seen["ids"], model.generate(pixel_values, max_new_tokens=4, do_sample=False)), name


@every_family
def test_the_captioner_alone(family, models, tmp_path):
    """It builds and reads neither denoiser nor VAE, nor what stands for the empty prompt."""
    model = models(family)
    model.save_pretrained(tmp_path)
    for loaded, info in (
        VLVForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True),
        VLVModel.from_pretrained(tmp_path, decoder_config=None, output_loading_info=True),
    ):
        assert not any(info.values())
        names = {name.split(".")[0] for name in loaded.state_dict()}
        assert not names & {"unet", "transformer", "vae", "pooled_projection", "empty_prompt_embeds"}
        with pytest.raises(ValueError, match="no diffusion decoder"):
            loaded.reconstruct(tiny.pixels(1)[0])


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
@pytest.mark.parametrize("density", ["uniform", "logit_normal", "mode"])
def test_timestep_density(density, shift, models):
    """Shares of early, middle and late timesteps, against the formulas of the paper (arXiv 2403.03206)."""
    teacher = models("SD 3.5").teacher
    torch.manual_seed(0)
    drawn = teacher.draw_timesteps(200_000, density, shift, torch.device("cpu"))
    assert drawn.dtype == torch.int64 and drawn.min() >= 0 and drawn.max() <= 999
    thirds = torch.histc(drawn.float(), 3, 0, 1000) / len(drawn)
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    if density == "logit_normal":
        times = torch.special.ndtri(u).sigmoid()
    elif density == "mode":
        times = 1 - (1 - u - 1.29 * (torch.cos(torch.pi / 2 * u) ** 2 - 1 + u))
    else:
        times = u
    times = shift * times / (1 + (shift - 1) * times)
    expected = torch.histc(times.float(), 3, 0, 1) / len(times)
    torch.testing.assert_close(thirds, expected, rtol=0, atol=0.01)


@pytest.mark.parametrize(
    "family, settings, sentence",
    [
        ("SD 3.5", {"image_size": 36}, "36x36 pixels, but StableDiffusion3Pipeline draws multiples of 8"),
        ("Sana", {"image_size": 48}, "48x48 pixels, but SanaPipeline draws multiples of 32"),
        ("Lumina2", {"image_size": 40}, "40x40 pixels, but Lumina2Pipeline draws multiples of 16"),
        ("Lumina2", {"num_queries": 512}, "num_queries is 512, but the transformer has positions for .* 511"),
        ("Z-Image", {"num_queries": 300}, "num_queries is 300, but the transformer has positions for .* 224"),
        ("SD 3.5", {"timestep_shift": 0.0}, "timestep_shift is 0.0: give a number above 0"),
        ("SD 3.5", {"timestep_density": "cosine"}, "timestep_density is 'cosine': choose uniform, logit_normal, mode"),
    ],
)
def test_what_a_family_cannot_take(family, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        teachers.config(family, **settings)


def test_teachers_that_contradict_themselves():
    sd3 = teachers.TEACHERS["SD 3.5"] | {"empty_prompt_length": 7}
    for changed, sentence in (
        ({"_class_name": "FluxPipeline"}, "FluxPipeline is not a teacher that VLV knows: it knows StableDiffusion"),
        ({"scheduler": teachers.NOISE}, "DDIMScheduler is not a flow-matching scheduler"),
        ({"vae": teachers.KL}, "latents have 4 channels, but the transformer reads 16"),
    ):
        with pytest.raises(ValueError, match=sentence):
            tiny.config(decoder_config=sd3 | changed, text_encoder_config=None, context_width=48)
    with pytest.raises(ValueError, match="48 wide|20 wide"):
        tiny.config(decoder_config=sd3, text_encoder_config=None, context_width=20)
    with pytest.raises(ValueError, match="context_width is 20, but there is a text encoder, which is 24 wide"):
        tiny.config(context_width=20)
    without = {name: part for name, part in sd3.items() if name != "vae"}
    with pytest.raises(ValueError, match="decoder_config lacks vae: for StableDiffusion3Pipeline it holds"):
        tiny.config(decoder_config=without, text_encoder_config=None, context_width=48)
    flow = tiny.decoder_config() | {"scheduler": teachers.FLOW}
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler"):
        tiny.config(decoder_config=flow)


def test_a_size_a_scheduler_and_words_that_do_not_fit(models):
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    model = models("SD 3.5")
    _, _, _, embeds = inputs(model)
    with pytest.raises(ValueError, match="32x36 pixels.*multiples of 8: choose a height and width such as 32 and 32"):
        model.reconstruct(caption_embeds=embeds, height=32, width=36)
    with pytest.raises(ValueError, match="DDIMScheduler is not a flow-matching scheduler"):
        model.reconstruct(caption_embeds=embeds, scheduler=DDIMScheduler())
    with pytest.raises(ValueError, match="keeps no text encoder and cannot read text='at night'"):
        model.reconstruct(caption_embeds=embeds, text="at night", tokenizer=tiny.decoder_tokenizer())
    model = models("SD 2 (velocity)")
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler; VLV trains with epsilon or v_prediction"):
        model.reconstruct(caption_embeds=inputs(model)[3], scheduler=FlowMatchEulerDiscreteScheduler())
