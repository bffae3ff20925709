"""
A training step of either stage: the paper's settings compared with this package's defaults.

    python benchmarks/training.py STAGE [--size tiny|mid|published] [--images 8] [--output FILE]

STAGE is autoencode (stage 1) or caption (stage 2). All sides are runs of `vlv train` that differ only in its settings,
except for the padding of captions to 300 tokens, for which there is no setting. A turn is a few steps, from reading
their images until the weights have changed. What is computed once per image before training is not part of a turn. It
is timed separately, as `making the caches`.

Stage 1: `paper` uses float32, eager attention, gradient checkpointing of the UNet, and no caches. `as shipped` is the
default, with the same loss; on a GPU it uses bf16, and `like for like` does not. Stage 2: `paper` uses bf16, eager
attention and captions padded to 300 tokens, and also trains Florence's language model. A CPU without bf16 instructions
is many times slower with bf16, so on a CPU all other sides use float32 and are compared with `paper in float32`. `like
for like` trains the paper's parts, `as shipped` the default parts.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any

import measure
import torch
from steps import PADDED, Side, common_settings, make_data

from processing_vlv import VLVProcessor
from vlv.training.vlv_stage import process

STEPS = 2  # of a turn

PAPERS_PARTS = ["prefix_projection", "caption_head", "language_model"]
PAPER = {
    "autoencode": {
        "attn_implementation": "eager",
        "gradient_checkpointing_parts": ["unet"],
        "cache_latents": False,
        "cache_features": False,
        "optim": "adamw_torch",
    },
    "caption": {
        "attn_implementation": "eager",
        "cache_features": False,
        PADDED: True,
        "optim": "adamw_torch",
        "train_parts": PAPERS_PARTS,
    },
}


def make_sides(stage: str, on_gpu: bool) -> tuple[str, dict[str, dict[str, Any]]]:
    """The baseline, and the settings of each side."""
    paper = PAPER[stage]
    levers = {
        f"paper, {name} as by default": {key: value for key, value in paper.items() if key != name} for name in paper
    }
    if stage == "autoencode":
        sides = {"paper": paper, **levers}
        if on_gpu:
            sides |= {"paper, bf16": {**paper, "bf16": True}, "like for like": {}}
        return "paper", {**sides, "as shipped": {"bf16": on_gpu}}
    bf16 = {"bf16": True}
    like = {"train_parts": PAPERS_PARTS}
    if on_gpu:
        sides = {"paper": paper, **levers, "like for like": like, "as shipped": {}}
        return "paper", {name: {**settings, **bf16} for name, settings in sides.items()}
    single = "paper in float32"
    sides = {single: paper} | {name.replace("paper,", f"{single},"): settings for name, settings in levers.items()}
    return single, {**sides, "like for like": like, "as shipped": {}, "paper": {**paper, **bf16}}


def making_the_caches(side: Side) -> float:
    """Seconds per image: to read it and to compute its caches."""
    stage, names = side.stage, list(side.stage.train_dataset.cached[0][0]) if side.stage.train_dataset.cached else []
    images = stage.sample_rows(side.trainer.args.per_device_train_batch_size)[1]
    seen = stage.image_inputs

    def work():
        inputs = [process(image, stage.processor, seen) for image in images]
        batch = {name: torch.stack([it[name] for it in inputs]).to(stage.args.device) for name in seen}
        stage.compute(batch, names)

    return measure.seconds_of(work) / len(images)


def main() -> None:
    parser = measure.parser(__doc__, default_images=8)
    parser.add_argument("stage", choices=PAPER)
    parser.add_argument("--sides", nargs="*", metavar="SIDE", help="sides to measure, besides the baseline")
    arguments = parser.parse_args()
    device = measure.find_device(arguments.size)
    baseline, settings = make_sides(arguments.stage, device.type == "cuda")
    wanted = settings if arguments.sides is None else [baseline, *arguments.sides]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = measure.checkpoint(arguments.size, folder / "model")
        words = None if arguments.size == "tiny" else VLVProcessor.from_pretrained(model)
        dataset = make_data(folder / "scenes", (STEPS + 1) * arguments.images, words)
        common = common_settings(model, dataset, arguments.images, STEPS)
        sides = {
            name: Side(arguments.stage, common | settings[name], folder / str(number))
            for number, name in enumerate(wanted)
        }
        seconds = measure.take_turns({**sides, "making the caches": lambda: making_the_caches(sides["as shipped"])})
        profile = measure.profile(sides["as shipped"])
    caches = statistics.median(seconds.pop("making the caches"))
    measure.write(
        arguments.output,
        "stage 1" if arguments.stage == "autoencode" else "stage 2",
        arguments.size,
        measure.compare(seconds, baseline),
        images_per_step=arguments.images,
        baseline=baseline,
        cache_seconds_per_image=caches,
        settings={name: settings[name] for name in wanted},
        parameters=sum(parameter.numel() for parameter in sides["as shipped"].stage.model.parameters()),
        profile=profile,
    )


if __name__ == "__main__":
    main()
