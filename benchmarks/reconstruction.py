"""
Rebuilding images: the paper's settings compared with this package's defaults.

    python benchmarks/reconstruction.py [--size tiny|mid|published] [--images 16] [--sides SIDE ...] [--output FILE]

`paper` takes 50 steps of DDPM at guidance 2.0, with eager attention. Each lever is `paper` with one change. `like for
like` is the paper's sampling with this package's attention; it must draw equal images. `as shipped` is the default.
`as shipped, without guidance` needs half of the UNet's work. All sides sample in batches, with both contexts of an
image at once, from the same noise and in the same precision: float32 on a CPU, bfloat16 on a GPU.

The images of `tiny` are scenes, and the objects that are right are counted (docs/results.md has more solvers and FID).
"""

import tempfile
from pathlib import Path

import measure
import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from modeling_vlv import VLVModel
from processing_vlv import VLVProcessor
from vlv.scenes import compare, sample_picture
from vlv.scenes.reader import scene_reader

PAPER = {"eager": True, "ddpm": True, "guidance_scale": 2.0}
MODES = {
    "paper": PAPER,
    "paper, attention as by default": {**PAPER, "eager": False},
    "paper, solver and steps as by default": {**PAPER, "ddpm": False},
    "paper, without guidance": {**PAPER, "guidance_scale": 1.0},
    "like for like": {**PAPER, "eager": False},
    "as shipped": {"eager": False, "ddpm": False, "guidance_scale": 2.0},
    "as shipped, without guidance": {"eager": False, "ddpm": False, "guidance_scale": 1.0},
}


class Side:
    def __init__(self, mode: dict, model: VLVModel, pixel_values: torch.Tensor):
        self.mode, self.model, self.pixel_values = mode, model, pixel_values

    def __call__(self) -> float:
        self.model.unet.set_attn_processor(AttnProcessor() if self.mode["eager"] else AttnProcessor2_0())
        return measure.seconds_of(self.work) / len(self.pixel_values)

    def work(self) -> None:
        sampling = {"guidance_scale": self.mode["guidance_scale"]}
        if self.mode["ddpm"]:
            scheduler = DDPMScheduler.from_config(self.model.config.decoder_config["scheduler"])
            sampling |= {"scheduler": scheduler, "num_inference_steps": 50}
        generator = [torch.Generator().manual_seed(number) for number in range(len(self.pixel_values))]
        self.images = self.model.reconstruct(self.pixel_values, generator=generator, **sampling)


def difference(images, others) -> float:
    """The mean absolute difference between the pixels of two lists of images, in 0..255."""
    return float(np.mean([np.abs(np.subtract(a, b, dtype=float)).mean() for a, b in zip(images, others, strict=True)]))


def main() -> None:
    arguments = measure.parser(__doc__, default_images=16, sides=MODES).parse_args()
    device = measure.find_device(arguments.size)
    pictures, truths = zip(*(sample_picture("test", index) for index in range(arguments.images)), strict=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = measure.checkpoint(arguments.size, Path(temporary))
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = VLVModel.from_pretrained(folder, caption_config=None, dtype=dtype).to(device).eval()
        pixel_values = VLVProcessor.from_pretrained(folder)(images=list(pictures))["pixel_values"].to(device)
    sides = {name: Side(MODES[name], model, pixel_values) for name in dict.fromkeys(["paper", *arguments.sides])}
    found = measure.compare(measure.take_turns(sides), "paper")
    for name, side in sides.items():
        found[name]["difference_to_papers"] = difference(side.images, sides["paper"].images)
        if arguments.size == "tiny":
            counts = [
                compare(read, truth) for read, truth in zip(scene_reader().read(side.images), truths, strict=True)
            ]
            right, objects = (sum(count[key] for count in counts) for key in ("objects_right", "objects"))
            found[name]["objects_right"] = right / objects
    profile = measure.profile(sides.get("as shipped", sides["paper"]).work)
    measure.write(
        arguments.output,
        "reconstruction",
        arguments.size,
        found,
        images=arguments.images,
        dtype=str(dtype).removeprefix("torch."),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        profile=profile,
    )


if __name__ == "__main__":
    main()
