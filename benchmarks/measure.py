"""
What the benchmarks share: models of three sizes, sides that take turns, and the JSON that they write.

`tiny` is the bundled checkpoint. `mid` has 112 million random weights, 224x224 pixels for the encoder and 128x128 for
the decoder. `published` has the paper's size, with Qwen2.5-0.5B and random weights, on a GPU. Random weights end no
caption, so the lengths of captions are drawn once for all sides: log-normal, median 90 tokens, sigma 0.4, at most 300.
"""

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from configuration_vlv import VLVConfig
from modeling_vlv import VLVModel
from processing_vlv import VLVProcessor
from vlv import bundled_checkpoint
from vlv.files import atomic_writer
from vlv.models.loading import read_config
from vlv.models.published import published_config
from vlv.provenance import git_commit

SIZES = ("tiny", "mid", "published")
STAGES = ("stage 1", "stage 2")
REPEATS = 5
PUBLISHED_GIB = 70  # GPU memory for the paper's own settings
LEAST, LONGEST, MEDIAN, SIGMA = 1, 300, 90, 0.4  # of the captions' lengths, in tokens


def at_least_one(text: str) -> int:
    """A whole number of things to measure, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too few: it must be 1 or more")
    return number


def parser(description: str, default_images: int, sides: Collection[str] = ()) -> argparse.ArgumentParser:
    """The arguments of every benchmark. With `sides`, an option chooses among them; the first is always measured."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--size", choices=SIZES, default="tiny")
    made.add_argument("--images", type=at_least_one, default=default_images, help="images of each turn")
    made.add_argument("--output", type=Path, help="JSON file to write")
    if sides:
        made.add_argument(
            "--sides",
            nargs="*",
            choices=sides,
            default=list(sides),
            metavar="SIDE",
            help=f"which of: {'; '.join(sides)}",
        )
    return made


def find_device(size: str) -> torch.device:
    """The device to measure a size on. Ends with one sentence if the machine is too small for it."""
    if size != "published":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SystemExit(f"--size published needs a GPU with {PUBLISHED_GIB} GiB of memory, and there is none here.")
    found = torch.cuda.get_device_properties(0).total_memory / 2**30
    if found < PUBLISHED_GIB:
        raise SystemExit(f"--size published needs a GPU with {PUBLISHED_GIB} GiB of memory; this one has {found:.0f}.")
    return torch.device("cuda", 0)


# ---- sizes -------------------------------------------------------------------------------------------------


def checkpoint(size: str, folder: Path, caption_head: str | None = "0.5B") -> str:
    """
    The folder of a complete model of this size. It is written into `folder`, unless the model is bundled. The
    published size has a `caption_head` of "0.5B", "1.5B" or "3B", or none, as after stage 1.
    """
    bundled = str(bundled_checkpoint("vlv-tiny"))
    if size == "tiny":
        return bundled
    processor = VLVProcessor.from_pretrained(bundled)
    if size == "mid":
        config, side, processor.decoder_image_size = mid_config(read_config(bundled)), 224, 128
    else:
        # The bundled prompt ids replace those of tokenizers that are not installed; they are in its vocabulary.
        config, side, processor.decoder_image_size = published_config(caption_head or "0.5B"), 768, 384
    if caption_head is None:
        config.caption_config = None
    torch.manual_seed(0)
    with find_device(size):
        model = VLVModel(config)
    model.generation_config = model.generation_config.from_pretrained(bundled)
    model.save_pretrained(folder)
    processor.image_height = processor.image_width = side
    processor.save_pretrained(folder)
    return str(folder)


def mid_config(tiny: VLVConfig) -> VLVConfig:
    """The bundled checkpoint's parts and tokenizers, widened to about 110 million parameters."""
    config = tiny.to_dict()
    config["encoder_config"]["vision_config"] |= {
        **{"depths": [1, 1, 3, 1], "patch_size": [7, 3, 3, 3], "patch_stride": [4, 2, 2, 2]},
        **{"patch_padding": [3, 1, 1, 1], "patch_prenorm": [False, True, True, True]},
        **{"embed_dim": [64, 128, 256, 512], "num_heads": [2, 4, 8, 16], "num_groups": [2, 4, 8, 16]},
        **{"window_size": 7, "projection_dim": 512, "max_position_embeddings": 50},
    }
    bart = {"layers": 3, "ffn_dim": 2048, "attention_heads": 8}
    bart = {f"{half}_{name}": value for half in ("encoder", "decoder") for name, value in bart.items()}
    config["encoder_config"]["text_config"] |= {"d_model": 512, "max_position_embeddings": 1024, **bart}
    config["text_encoder_config"] |= {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4}
    config["text_encoder_config"] |= {"num_attention_heads": 8, "max_position_embeddings": 77}
    config["decoder_config"]["unet"] |= {"block_out_channels": [64, 128, 256], "attention_head_dim": 4}
    config["decoder_config"]["unet"] |= {"cross_attention_dim": 512, "sample_size": 16, "norm_num_groups": 32}
    config["decoder_config"]["vae"] |= {
        **{"block_out_channels": [32, 64, 128, 128], "norm_num_groups": 32, "sample_size": 128},
        **{"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4},
    }
    config["caption_config"] |= {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8}
    config["caption_config"] |= {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
    config["caption_config"] |= {"vocab_size": 32_000, "max_position_embeddings": 1024, "layer_types": None}
    empty = tiny.empty_prompt_ids + [tiny.empty_prompt_ids[-1]] * (77 - len(tiny.empty_prompt_ids))
    return VLVConfig.from_dict(config | {"num_queries": 77, "empty_prompt_ids": empty, "image_size": None})


def draw_lengths(count: int) -> list[int]:
    """Lengths of captions, in tokens."""
    draw = random.Random(0)
    return [min(LONGEST, max(LEAST, round(MEDIAN * draw.lognormvariate(0, SIGMA)))) for _ in range(count)]


# ---- sides -------------------------------------------------------------------------------------------------


def seconds_of(work: Callable[[], Any]) -> float:
    """The time of the work in seconds."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def take_turns(sides: Mapping[str, Callable[[], float]], repeats: int = REPEATS) -> dict[str, list[float]]:
    """
    Runs the sides one after the other, in rounds, so that other work on the machine affects all sides equally.

    Args:
        sides: by name, a function that runs a side and returns its seconds per image.
        repeats: rounds that are measured.

    Returns:
        By name, the seconds per image of each round. The first round is a warm-up and is left out.
    """
    rounds = [{name: side() for name, side in sides.items()} for _ in range(repeats + 1)]
    return {name: [measured[name] for measured in rounds[1:]] for name in sides}


def compare(seconds: Mapping[str, list[float]], baseline: str) -> dict[str, dict[str, Any]]:
    """By side: the measurements, their median as images per second, and its ratio to the baseline's median."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        name: {
            "seconds_per_image": values,
            "images_per_second": 1 / medians[name],
            "ratio": medians[baseline] / medians[name],
        }
        for name, values in seconds.items()
    }


def profile(work: Callable[[], Any], rows: int = 8) -> list[dict[str, Any]]:
    """The operators that take most of the work's time, without the operators that they call."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        work()
    events = profiler.key_averages()
    times = {
        event.key: (event.self_device_time_total if len(activities) > 1 else event.self_cpu_time_total, event.count)
        for event in events
    }
    total = sum(time for time, _ in times.values())
    longest = sorted(times.items(), key=lambda item: -item[1][0])[:rows]
    return [{"operator": name, "share": time / total, "calls": count} for name, (time, count) in longest]


# ---- the record --------------------------------------------------------------------------------------------


def write(file: Path | None, name: str, size: str, sides: Mapping[str, Mapping[str, Any]], **facts: Any) -> None:
    """Prints a line for each side, and writes the record of the measurement to `file`, if given."""
    for side, found in sides.items():
        print(f"{side:64} {1 / found['images_per_second']:9.4f} s/image {found['ratio']:7.2f} x")
    write_record(file, {"benchmark": name, "size": size, **facts, "sides": sides})


def write_record(file: Path | None, record: Mapping[str, Any]) -> None:
    """Writes the measurements, the machine and the versions to `file`, if given."""
    if file is None:
        return
    device = find_device(record["size"])
    about = {
        "machine": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "versions": {package: version(package) for package in ("torch", "transformers", "diffusers")},
        "commit": git_commit(),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_writer(file) as output:
        output.write(json.dumps({**record, **about}, indent=1) + "\n")


def processor_name() -> str:
    """The name of the machine's processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
