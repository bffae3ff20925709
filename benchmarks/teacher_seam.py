"""
Stable Diffusion behind the seam of teachers: its loss and its sampling, compared with both written out.

    python benchmarks/teacher_seam.py [--size tiny|mid] [--images 4] [--output FILE]

`written out` is the code from before there was more than one family: a loop over the UNet, and the loss of noise or
velocity. `as shipped` is `VLVModel`. Both sides of a pair give the same result, which is checked. The time is this
process's own on the processor, so that other work on the machine counts for little.
"""

import statistics
import tempfile
import time
from pathlib import Path

import measure
import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler
from diffusers.utils.torch_utils import randn_tensor

from modeling_vlv import VLVModel

REPEATS = 9
STEPS = 8


def written_out_loss(model, image_features, latents, noise, timesteps):
    context = model.encode_context(model.encode(image_features=image_features))
    schedule = model.teacher.schedule
    noisy = schedule.add_noise(latents, noise, timesteps)
    prediction = model.unet(noisy, timesteps, encoder_hidden_states=context).sample
    return F.mse_loss(prediction, schedule.get_velocity(latents, noise, timesteps))


def shipped_loss(model, image_features, latents, noise, timesteps):
    return model(image_features=image_features, latents=latents, noise=noise, timesteps=timesteps).loss


def step(loss, model, inputs):
    """A training step without the optimizer, which is the same on both sides."""
    model.zero_grad()
    torch.manual_seed(0)  # of dropout
    value = loss(model, *inputs)
    value.backward()
    return torch.cat([value.detach()[None], model.queries.grad.flatten()])


@torch.no_grad()
def written_out_sampling(model, embeds, generators):
    context = model.encode_context(embeds)
    context = torch.cat([model.empty_context(context.shape[1]).expand_as(context), context])
    scheduler = DPMSolverMultistepScheduler.from_config(model.config.decoder_config["scheduler"])
    scheduler.set_timesteps(STEPS)
    size = model.teacher.image_size // model.teacher.factor
    latents = randn_tensor((len(embeds), model.unet.config.in_channels, size, size), generator=generators)
    latents = latents * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        noisy = scheduler.scale_model_input(torch.cat([latents, latents]), timestep)
        without, along = model.unet(noisy, timestep, encoder_hidden_states=context).sample.chunk(2)
        latents = scheduler.step(without + 2.0 * (along - without), timestep, latents).prev_sample
    return (model.vae.decode(latents / model.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)


def shipped_sampling(model, embeds, generators):
    return model.reconstruct(caption_embeds=embeds, generator=generators, num_inference_steps=STEPS, output_type="pt")


def ratio(first, second):
    """Median times of two callables that take turns, in seconds of this process, and the first by the second."""
    times = ([], [])
    results = [first(), second()]
    if not torch.equal(*results):
        raise SystemExit("The two sides do not give the same.")
    for turn in range(REPEATS):
        for side in (0, 1) if turn % 2 else (1, 0):
            start = time.process_time()
            (first, second)[side]()
            times[side].append(time.process_time() - start)
    written, shipped = map(statistics.median, times)
    return {"written_out_seconds": written, "as_shipped_seconds": shipped, "ratio": written / shipped}


def main() -> None:
    arguments = measure.parser(__doc__, default_images=4).parse_args()
    count = arguments.images
    with tempfile.TemporaryDirectory() as temporary:
        folder = measure.checkpoint(arguments.size, Path(temporary))
        model = VLVModel.from_pretrained(folder, caption_config=None, dtype=torch.float32)
    size = model.teacher.image_size // model.teacher.factor
    torch.manual_seed(1)
    vision = model.config.encoder_config.vision_config
    features = torch.randn(count, 50, vision.projection_dim)
    latents, noise = torch.randn(2, count, model.unet.config.in_channels, size, size)
    inputs = (features, latents, noise, torch.randint(1000, (count,)))
    model.set_stage("autoencode").train()
    found = {"stage 1 step": ratio(*(lambda f=f: step(f, model, inputs) for f in (written_out_loss, shipped_loss)))}
    embeds = model.eval().encode(image_features=features).detach()

    def sample(function):
        return function(model, embeds, [torch.Generator().manual_seed(number) for number in range(count)])

    found["reconstruct"] = ratio(*(lambda f=f: sample(f) for f in (written_out_sampling, shipped_sampling)))
    for name, measured in found.items():
        print(
            f"{name}: written out {measured['written_out_seconds']:.3f} s, as shipped "
            f"{measured['as_shipped_seconds']:.3f} s, ratio {measured['ratio']:.3f}"
        )
    record = {"benchmark": "teacher_seam", "size": arguments.size, "images": count, "steps": STEPS, "sides": found}
    measure.write_record(arguments.output, record)


if __name__ == "__main__":
    main()
