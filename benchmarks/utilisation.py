"""
The speed of the recipes for the published parts on a GPU, and how much of the GPU they use.

    python benchmarks/utilisation.py [SIDE ...] [--size tiny|published] [--folder DIR] [--peak 989] [--price 2.5]
        [--output FILE]

A side is a recipe of `vlv train`, with its own batch size unless the side says otherwise, on one GPU. It takes a few
steps, of which the first ones are not timed. The weights are random, the images are scenes scaled up, and the lengths
of captions are drawn (see measure.py). flops.py counts the operations of a sample for the same settings. Utilisation
is operations a second as a share of --peak, in TFLOP/s: 989 is an H100's in bf16. Hours and dollars are those of the
paper's 102.4 million denoising samples in stage 1 and 6.4 million captions in stage 2. Sides that are in the output
already stay there, so sides can be measured one by one.
"""

import argparse
import gc
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import flops
import measure
import torch
import yaml
from steps import PADDED, Stopwatch, common_settings, make_data, pad_to_max_length

from processing_vlv import VLVProcessor
from vlv.models.loading import read_config
from vlv.training.recipe import find_recipe, read_recipe, read_recipe_file
from vlv.training.trainer import StageTrainer

# For each side: the recipe, and what is set besides.
COMPILED = {"torch_compile": True}
SIDES: dict[str, tuple[str, dict[str, Any]]] = {
    "paper, stage 1, 16 images": ("paper-stage1", {"per_device_train_batch_size": 16}),
    "paper, stage 1, 16 images, bf16": ("paper-stage1", {"per_device_train_batch_size": 16, "bf16": True}),
    "ours, stage 1": ("stage1", {}),
    "ours, stage 1, compiled": ("stage1", COMPILED),
    "paper, stage 2": ("paper-stage2", {PADDED: True}),
    "ours, stage 2": ("stage2", {}),
    "ours, stage 2, compiled": ("stage2", COMPILED),
}
# The model, which holds random parts, replaces these. Images of one size need no crop.
REPLACED = ("encoder", "decoder", "caption_head", "image_size", "crop")
WARM_UP, STEPS = 3, 8
UNITS = {"autoencode": flops.STAGE_1_SAMPLES, "caption": flops.STAGE_2_CAPTIONS}


class Watch(Stopwatch):
    """The time of the steps after the warm-up, and the peak memory of all steps. One more step is profiled."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == WARM_UP:
            self.began = self.now()
        if state.global_step == WARM_UP + STEPS:
            self.seconds_per_step = (self.now() - self.began) / STEPS
            self.profiler = torch.profiler.profile()
            self.profiler.start()

    def on_train_end(self, args, state, control, **kwargs):
        self.now()  # waits for the GPU
        self.profiler.stop()
        self.peak_bytes = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None


class Trainer(StageTrainer):
    """Notes how long the captions of each timed batch are, with their padding."""

    tokens: list[int]

    def training_step(self, model, inputs, *rest):
        if "input_ids" in inputs and WARM_UP <= self.state.global_step < WARM_UP + STEPS:
            self.tokens.append(inputs["input_ids"].shape[1])
        return super().training_step(model, inputs, *rest)


def run(settings: dict[str, Any], folder: Path) -> tuple[Any, Trainer, Watch]:
    """Trains a recipe of these settings for a few steps."""
    folder.mkdir()
    file = folder / "recipe.yaml"
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    padded = plain.pop(PADDED, False)
    file.write_text(yaml.safe_dump(plain), encoding="utf-8")
    stage_class, stage_settings, args = read_recipe([str(file), "--output_dir", str(folder / "output")])
    stage = stage_class(stage_settings, args)
    stage.prepare()
    if padded:
        pad_to_max_length(stage)
    trainer, watch = Trainer(stage, args), Watch(args.device)
    trainer.tokens = []
    trainer.add_callback(watch)
    trainer.train()
    return stage, trainer, watch


def operations(stage: Any, trainer: Trainer, config: Any) -> float:
    """Operations for a denoising sample or a caption."""
    size, images = stage.processor.image_height, trainer.args.per_device_train_batch_size
    if stage.settings.stage == "autoencode":
        muon = images * trainer.args.gradient_accumulation_steps if stage.settings.muon_learning_rate else None
        how = flops.Stage1(
            size,
            stage.settings.noise_draws,
            checkpointing=bool(stage.settings.gradient_checkpointing_parts),
            muon_batch=muon,
        )
        return flops.per_unit(how, flops.stage_1(config, how))
    tokens = round(statistics.mean(trainer.tokens))
    trains_encoder = "language_model" in stage.settings.train_parts
    return sum(flops.stage_2(config, flops.Stage2(size, tokens, trains_encoder)).values())


def kernels(profiler: torch.profiler.profile) -> dict[str, Any]:
    """The kernels that take most of a step's time, and those that compute attention."""
    events = profiler.key_averages()
    on_gpu = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    total = sum(event.self_device_time_total for event in on_gpu) or 1
    shares = {event.key: event.self_device_time_total / total for event in on_gpu}
    longest = sorted(shares, key=lambda name: -shares[name])[:10]
    attention = [name for name in shares if any(word in name for word in ("flash", "fmha", "attention"))]
    return {
        "kernels": {name: shares[name] for name in longest},
        "attention": {name: shares[name] for name in attention},
    }


def start(stage: str, size: str, models: Path) -> str:
    """The folder of the model that a stage starts from: stage 1 has no caption head yet."""
    folder = models / stage
    if (folder / "config.json").is_file():
        return str(folder)
    return measure.checkpoint(size, folder, None if stage == "autoencode" else "3B")


def measured(side: str, models: Path, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    recipe, changes = SIDES[side]
    written = read_recipe_file(find_recipe(recipe)) | changes
    model = start(written["stage"], arguments.size, models)
    words = VLVProcessor.from_pretrained(model)
    batch = written["per_device_train_batch_size"]
    images, steps = batch * written.get("gradient_accumulation_steps", 1), WARM_UP + STEPS + 1
    dataset = make_data(folder / "scenes", steps * images + batch, words)
    settings = {name: value for name, value in written.items() if name not in REPLACED}
    settings |= common_settings(model, dataset, batch, steps)
    settings["cache_features"] = False  # each image of the whole training is new
    if written["stage"] == "autoencode":
        settings["cache_latents"] = False
    if "encoder_image_size" in written:  # half of Florence-2's own size, as the recipe has it
        settings["encoder_image_size"] = words.image_height // 2
    stage, trainer, watch = run(settings, folder / "run")
    samples = images * written.get("noise_draws", 1)
    each, speed = operations(stage, trainer, read_config(model)), samples / watch.seconds_per_step
    hours = UNITS[written["stage"]] / speed / 3600
    return {
        "recipe": recipe,
        "changes": changes,
        "samples_of_a_step": samples,
        "samples_per_second": speed,
        "operations_of_a_sample": each,
        "utilisation": each * speed / (arguments.peak * 1e12),
        "hours": hours,
        "dollars": hours * arguments.price,
        "peak_device_bytes": watch.peak_bytes,
        **({"tokens": statistics.mean(trainer.tokens)} if trainer.tokens else {}),
        **kernels(watch.profiler),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sides", nargs="*", metavar="SIDE", help=f"of: {'; '.join(SIDES)} (default: all)")
    parser.add_argument("--size", choices=("tiny", "published"), default="published")
    parser.add_argument("--folder", type=Path, help="folder to keep the models in, or an earlier one to use")
    parser.add_argument("--peak", type=float, default=989, help="TFLOP/s of the GPU")
    parser.add_argument("--price", type=float, default=2.5, help="dollars for an hour of the GPU")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    if unknown := set(arguments.sides) - set(SIDES):
        parser.error(f"there is no side {unknown.pop()!r}, but {'; '.join(SIDES)}")
    measure.find_device(arguments.size)
    found: dict[str, Any] = {}
    if arguments.output is not None and arguments.output.is_file():
        found = json.loads(arguments.output.read_text(encoding="utf-8"))["sides"]
    with tempfile.TemporaryDirectory() as temporary:
        models = arguments.folder or Path(temporary) / "models"
        for number, side in enumerate(arguments.sides or SIDES):
            folder = Path(temporary) / str(number)
            folder.mkdir()
            found[side] = one = measured(side, models, arguments, folder)
            print(
                f"{side:32} {one['samples_per_second']:8.2f} samples/s {one['utilisation']:6.1%} "
                f"{(one['peak_device_bytes'] or 0) / 2**30:6.1f} GiB {one['dollars']:8.0f} $",
                flush=True,
            )
            record = {"benchmark": "utilisation", "size": arguments.size, "peak": arguments.peak, "sides": found}
            measure.write_record(arguments.output, record | {"price": arguments.price})
            gc.collect()  # frees what Trainer's reference cycles hold
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
