"""
Records losses, gradients and pictures of tiny Stable Diffusion 1 and 2 teachers, for `test_decoders_before.py`.

`before.safetensors` was recorded with the code that knew no other family:

    python tests/data/teachers/record.py
"""

import sys
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler
from safetensors.torch import save_file

TESTS = Path(__file__).parents[2]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import tiny  # noqa: E402

RECORDED = Path(__file__).parent / "before.safetensors"
SETTINGS = {
    "plain": {},
    "l1": {"denoising_loss": "l1"},
    "min-snr": {"min_snr_gamma": 5.0},
    "dropout": {"context_dropout": 0.5},
    "bypassed": {"bypass_text_encoder": True},
    "mean latents": {"sample_latents": False},
}


def losses(model, **settings):
    """Loss and gradients of one step whose noise, timesteps and latents come from a seed."""
    model.config.update(
        {name: value for each in SETTINGS.values() for name, value in DEFAULTS.items() if name in each}
    )
    model.config.update(settings)
    model.set_stage("autoencode").train()
    model.zero_grad()
    pixel_values, decoder_pixel_values = tiny.pixels(3)
    torch.manual_seed(7)
    loss = model(pixel_values=pixel_values, decoder_pixel_values=decoder_pixel_values).loss
    loss.backward()
    model.eval()
    return {"loss": loss.detach(), "queries": model.queries.grad, "projection": model.projection[0].weight.grad}


DEFAULTS = {
    "denoising_loss": "mse",
    "min_snr_gamma": None,
    "context_dropout": 0.0,
    "bypass_text_encoder": False,
    "sample_latents": True,
}


def pictures(model):
    """Pictures by every kind of sampling, two images each."""
    pixel_values, _ = tiny.pixels(2)
    scheduler = model.config.decoder_config["scheduler"]
    solvers = {
        "default": None,
        "DDPM": DDPMScheduler.from_config(scheduler),
        "DDIM": DDIMScheduler.from_config(scheduler),
        "UniPC": UniPCMultistepScheduler.from_config(scheduler),
        "Euler": EulerDiscreteScheduler.from_config(scheduler),
    }
    seen = []

    def change(model, step, timestep, tensors):
        seen.append(tensors["latents"].mean())
        return {"latents": tensors["latents"] * 0.9}

    calls = {name: {"scheduler": solver, "num_inference_steps": 3} for name, solver in solvers.items()}
    calls |= {
        "unguided": {"guidance_scale": 1.0, "num_inference_steps": 3},
        "not square": {"height": 16, "width": 48, "num_inference_steps": 2},
        "callback": {"callback_on_step_end": change, "num_inference_steps": 3},
    }
    drawn = {}
    for name, arguments in calls.items():
        noise = torch.Generator().manual_seed(0)
        drawn[name] = model.reconstruct(pixel_values, generator=noise, output_type="pt", **arguments)
    noise = [torch.Generator().manual_seed(number) for number in range(2)]
    drawn["a generator each"] = model.reconstruct(
        pixel_values, generator=noise, num_inference_steps=2, output_type="pt"
    )
    return drawn | {"callback latents": torch.stack(seen)}


def record():
    """Everything, by name."""
    found = {}
    for prediction in ("epsilon", "v_prediction"):
        for dtype in (torch.float32, torch.bfloat16):
            model = tiny.model(prediction_type=prediction, caption_config=None).to(dtype)
            kind = f"{prediction}/{str(dtype).removeprefix('torch.')}"
            found |= {f"{kind}/{name}": picture for name, picture in pictures(model).items()}
            if dtype == torch.float32:
                for name, settings in SETTINGS.items():
                    found |= {f"{kind}/{name}/{what}": value for what, value in losses(model, **settings).items()}
    return {name: tensor.contiguous() for name, tensor in found.items()}


def surroundings():
    """What decides the last bits."""
    return {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "processor": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
    }


if __name__ == "__main__":
    save_file(record(), RECORDED, metadata=surroundings())
