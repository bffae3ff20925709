"""Stable Diffusion 1 and 2 give the same as before other families existed, and the same as a sampling loop by hand."""

import sys

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.utils.torch_utils import randn_tensor
from paths import FIXTURES
from safetensors.torch import load_file

sys.path.append(str(FIXTURES / "teachers"))
import record  # noqa: E402


@pytest.mark.slow
def test_recorded_results_are_unchanged():
    """Up to rounding, which differs between processors and between releases of the libraries."""
    recorded, found = load_file(record.RECORDED), record.record()
    assert found.keys() == recorded.keys()
    for name, expected in recorded.items():
        tolerance = 0.05 if "bfloat16" in name else 1e-4
        torch.testing.assert_close(found[name], expected, rtol=tolerance, atol=tolerance, msg=name)


def sample(model, pixel_values, scheduler, steps, scale, generator, height, width):
    """Classifier-free-guided sampling, written by hand."""
    context = model.encode_context(model.encode(pixel_values)).to(model.unet.dtype)
    empty = model.empty_context(context.shape[1]).to(context).expand_as(context)
    scheduler.set_timesteps(steps)
    shape = (len(context), 4, height // 4, width // 4)
    latents = randn_tensor(shape, generator=generator, dtype=context.dtype) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        noisy = scheduler.scale_model_input(latents, timestep)
        if scale > 1:
            both = model.unet(torch.cat([noisy, noisy]), timestep, torch.cat([empty, context])).sample
            without, along = both.chunk(2)
            prediction = without + scale * (along - without)
        else:
            prediction = model.unet(noisy, timestep, context).sample
        step = {"generator": generator} if isinstance(scheduler, DDPMScheduler) else {}
        latents = scheduler.step(prediction, timestep, latents, **step).prev_sample
    return (model.vae.decode(latents / model.vae.config.scaling_factor).sample.float() / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_pipeline_is_the_loop(prediction, dtype):
    model = tiny.model(prediction_type=prediction, caption_config=None).to(dtype)
    pixel_values, _ = tiny.pixels(2)
    settings = model.config.decoder_config["scheduler"]
    for solver, scale, size in (
        (DPMSolverMultistepScheduler, 2.0, (32, 32)),
        (DDIMScheduler, 1.0, (16, 48)),
        (DDPMScheduler, 3.0, (32, 32)),
    ):
        for each in (False, True):

            def noise(each=each):
                several = [torch.Generator().manual_seed(number) for number in range(2)]
                return several if each else several[0]

            expected = sample(model, pixel_values, solver.from_config(settings), 3, scale, noise(), *size)
            drawn = model.reconstruct(
                pixel_values,
                scheduler=None if solver is DPMSolverMultistepScheduler else solver.from_config(settings),
                num_inference_steps=3,
                guidance_scale=scale,
                generator=noise(),
                height=size[0],
                width=size[1],
                output_type="pt",
            )
            assert torch.equal(drawn, expected), (solver, scale, each)


def test_old_configs_name_no_pipeline(tiny_model):
    """Without a name, the pipeline is Stable Diffusion's."""
    assert "_class_name" not in tiny_model.config.decoder_config
    assert tiny_model.teacher.pipeline == "StableDiffusionPipeline"
