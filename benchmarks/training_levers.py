"""
Each speed setting of training alone: the time of a step without it, divided by the time of a step with it.

    python benchmarks/training_levers.py [--size tiny|mid|published] [--images 8] [--levers LEVER ...] [--output FILE]

Each lever is a pair of runs of `vlv train` that differ only in this setting. They take turns of a few steps. A ratio
above 1 is faster. The lengths of captions in tokens are drawn (see measure.py). On a GPU, the memory of both runs is
measured too.
"""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import measure
from steps import PADDED, Side, common_settings, make_data
from transformers.utils import is_liger_kernel_available

from processing_vlv import VLVProcessor

STAGE_1, STAGE_2 = "autoencode", "caption"
STEPS = 4  # of a turn
BATCHES = 40  # of data; the last one is for evaluation


@dataclass
class Lever:
    """The settings of the runs with and without a lever, and the settings that both share."""

    stage: str
    on: dict[str, Any] = field(default_factory=dict)
    off: dict[str, Any] = field(default_factory=dict)
    both: dict[str, Any] = field(default_factory=dict)


LEVERS = {
    "`cache_latents`": Lever(STAGE_1, {"cache_latents": True}, {"cache_latents": False}),
    "`cache_features`": Lever(STAGE_1, {"cache_features": True}, {"cache_features": False}),
    "both caches": Lever(
        STAGE_1,
        {"cache_latents": True, "cache_features": True},
        {"cache_latents": False, "cache_features": False},
    ),
    "`cache_features`, stage 2": Lever(STAGE_2, {"cache_features": True}, {"cache_features": False}),
    "captions padded to the longest of the batch, not to 300 tokens": Lever(STAGE_2, off={PADDED: True}),
    "`group_by_length`, stage 2": Lever(
        STAGE_2,
        {"train_sampling_strategy": "group_by_length"},
        {"train_sampling_strategy": "random"},
        {"max_steps": BATCHES - 1},  # a whole epoch, because its batches have different lengths
    ),
    "`bf16`, stage 1": Lever(STAGE_1, {"bf16": True}, {"bf16": False}),
    "`bf16`, stage 2": Lever(STAGE_2, {"bf16": True}, {"bf16": False}),
    "`sdpa`, not `eager`, stage 2": Lever(STAGE_2, {"attn_implementation": "sdpa"}, {"attn_implementation": "eager"}),
    # These three take time to save memory.
    "gradient checkpointing of the UNet": Lever(STAGE_1, {"gradient_checkpointing_parts": ["unet"]}),
    "gradient checkpointing of the encoder": Lever(STAGE_1, {"gradient_checkpointing_parts": ["encoder"]}),
    "gradient checkpointing of the caption head": Lever(STAGE_2, {"gradient_checkpointing_parts": ["caption_head"]}),
    "`torch_compile`, once compiled": Lever(STAGE_1, {"torch_compile": True}, {"torch_compile": False}),
    "`adamw_torch_fused`, not `adamw_torch`, stage 2": Lever(
        STAGE_2, {"optim": "adamw_torch_fused"}, {"optim": "adamw_torch"}
    ),
}
if is_liger_kernel_available():
    LEVERS["Liger kernels"] = Lever(STAGE_2, {"use_liger_kernel": True}, {"use_liger_kernel": False})


def pull(lever: Lever, common: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The measurements of both runs of a lever (see `measure.compare`)."""
    pair = {
        name: Side(lever.stage, common | lever.both | settings, folder / name)
        for name, settings in (("without", lever.off), ("with", lever.on))
    }
    found = measure.compare(measure.take_turns(pair), "without")
    print(f"{found['with']['ratio']:7.2f} x", flush=True)
    return {name: {**found[name], "peak_bytes": side.watch.peak_bytes} for name, side in pair.items()}


def main() -> None:
    parser = measure.parser(__doc__, default_images=8)
    parser.add_argument(
        "--levers", nargs="*", default=list(LEVERS), choices=LEVERS, metavar="LEVER", help="which ones"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = measure.checkpoint(arguments.size, folder / "model")
        words = VLVProcessor.from_pretrained(model)
        dataset = make_data(folder / "scenes", BATCHES * arguments.images, words)
        common = common_settings(model, dataset, arguments.images, STEPS)
        record = {"benchmark": "training_levers", "size": arguments.size, "images_per_step": arguments.images}
        record["levers"] = found = {}
        for number, name in enumerate(arguments.levers):
            print(f"{name:64}", end=" ", flush=True)
            found[name] = pull(LEVERS[name], common, folder / str(number))
            measure.write_record(arguments.output, record)


if __name__ == "__main__":
    main()
