"""
What refilling a batch could win: images that take the places of captions that have ended (continuous batching).

    python benchmarks/refill.py [--size mid] [--images 640] [--output FILE]

The default engine writes a batch to its end. A caption that has ended leaves it and costs nothing more, so the last
captions are written with few rows, and each step still reads all weights. Measured are the seconds of a step by the
number of rows, and those of everything before the first step. From these and the lengths of the captions (see
measure.py) follow the time of the default engine, and the least time with a batch that is full at every step to the
end. A real refill needs more than that: captions of one batch then begin at different steps, so their caches are
padded and masked, and the images that come in are read a few at a time.
"""

import statistics
import tempfile
from pathlib import Path

import measure
import torch
from transformers import DynamicCache

from vlv.captioning.batches import LARGEST_BATCH
from vlv.models.loading import load_captioner

BATCH = LARGEST_BATCH["cpu"]
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
STEPS = 3  # timed at once


@torch.no_grad()
def seconds_by_rows(model, processor, device) -> tuple[dict[int, float], float]:
    """Seconds of a step by the number of rows, and seconds for each image before the first step of a full batch."""
    config = model.config
    length = config.num_queries + measure.MEDIAN

    def cache_of(rows):
        cache = DynamicCache(config=config.caption_config)
        width = config.caption_config.hidden_size
        inputs = torch.randn(rows, length, width, device=device)
        model.caption_head(inputs_embeds=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    caches = {rows: cache_of(rows) for rows in ROWS}

    def steps(rows):
        cache, token = caches[rows], torch.zeros(rows, 1, dtype=torch.long, device=device)
        for _ in range(STEPS):
            model.caption_head(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache.crop(-1)

    def begin():
        pixel_values = torch.randn(BATCH, 3, processor.image_height, processor.image_width, device=device)
        model.generate(pixel_values=pixel_values, max_new_tokens=1, do_sample=False)

    sides = {rows: lambda rows=rows: measure.seconds_of(lambda: steps(rows)) / STEPS for rows in ROWS}
    sides["before"] = lambda: measure.seconds_of(begin) / BATCH
    found = {name: statistics.median(seconds) for name, seconds in measure.take_turns(sides).items()}
    before = found.pop("before")
    return found, before


def between(costs: dict[int, float], rows: int) -> float:
    """Seconds of a step, between the numbers of rows that were measured."""
    for low, high in zip(ROWS, ROWS[1:], strict=False):
        if rows <= high:
            share = (rows - low) / (high - low)
            return costs[low] + share * (costs[high] - costs[low])
    raise ValueError(f"{rows} rows are more than {ROWS[-1]}.")


def seconds_of_engines(lengths: list[int], size: int, cost) -> tuple[float, float]:
    """Seconds of all steps today, and with a batch that is refilled as soon as a caption ends."""
    batches = [lengths[start : start + size] for start in range(0, len(lengths), size)]
    today = sum(cost(sum(length > step for length in batch)) for batch in batches for step in range(max(batch)))
    waiting, left, refilled = list(lengths), [], 0.0
    while waiting or left:
        while waiting and len(left) < size:
            left.append(waiting.pop(0))
        refilled += cost(len(left))
        left = [length - 1 for length in left if length > 1]
    return today, refilled


def main() -> None:
    arguments = measure.parser(__doc__, default_images=640).parse_args()
    device = measure.find_device(arguments.size)
    with tempfile.TemporaryDirectory() as temporary:
        folder = measure.checkpoint(arguments.size, Path(temporary) / "model")
        costs, before = seconds_by_rows(*load_captioner(folder, str(device)), device)
    lengths = measure.draw_lengths(arguments.images)

    def steps(size):
        return seconds_of_engines(lengths, size, lambda rows: between(costs, rows))

    today, refilled = steps(BATCH)
    larger, _ = steps(ROWS[-1])
    flat_today, flat_refilled = seconds_of_engines(lengths, BATCH, lambda rows: 1.0)
    begun = before * len(lengths)
    found = {
        "slots_written": sum(lengths) / (flat_today * BATCH),  # of those of a batch that keeps its rows to the end
        "step_seconds": costs,
        "before_seconds_per_image": before,
        "ratios": {
            "refilled, at most": {"steps": today / refilled, "in_all": (today + begun) / (refilled + begun)},
            f"batches of {ROWS[-1]}": {"steps": today / larger, "in_all": (today + begun) / (larger + begun)},
            "refilled, at most, if the rows of a step cost nothing": {"steps": flat_today / flat_refilled},
        },
    }
    for name, value in found.items():
        print(f"{name}: {value}")
    measure.write_record(
        arguments.output,
        {
            "benchmark": "refill",
            "size": arguments.size,
            "images": arguments.images,
            "batch_size": BATCH,
            "refill": found,
        },
    )


if __name__ == "__main__":
    main()
