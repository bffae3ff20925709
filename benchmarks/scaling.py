"""
Time and memory of captioning as the work grows. Memory is the most that all its processes held at once.

    python benchmarks/scaling.py [--images 100 1000 10000] [--output FILE]

Each row is a separate run with the bundled checkpoint: `vlv caption` with more and more drawn scenes, then the
captioner alone with growing batches and with growing captions (of forced lengths, on random pixels).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import measure
import psutil
import torch

from vlv.captioning.settings import Decoding
from vlv.models.loading import load_captioner
from vlv.scenes import write_scenes

BATCHES, LENGTHS = (1, 2, 4, 8, 16, 32, 64), (25, 50, 100, 200, 300)
IMAGES = 64  # in each row with growing batches or captions


def memory_of(process: psutil.Process) -> int:
    """Bytes that a process and its children hold. Shared memory is counted once."""
    total = 0
    for one in (process, *process.children(recursive=True)):
        try:
            total += one.memory_full_info().pss
        except psutil.NoSuchProcess:
            continue
    return total


def watch(command: list[str]) -> tuple[float, int, str]:
    """Runs a command. Returns its seconds, the most memory that it held, and its output."""
    start = time.perf_counter()
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    peak, done, process = 0, threading.Event(), psutil.Process(running.pid)

    def look():
        nonlocal peak
        while not done.wait(0.25):
            try:
                peak = max(peak, memory_of(process))
            except psutil.NoSuchProcess:
                return

    watcher = threading.Thread(target=look)
    watcher.start()
    output, _ = running.communicate()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    if running.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return seconds, peak, output


def growing_images(counts: list[int]) -> list[dict]:
    """`vlv caption` with the first scenes of a folder, from its start to its end."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        scenes = write_scenes(folder / "scenes", max(counts), seed=0, split="test")
        names = [json.loads(line)["file_name"] for line in (scenes / "metadata.jsonl").read_text().splitlines()]
        for count in counts:
            images, output = folder / f"{count}.txt", folder / f"{count}.jsonl"
            images.write_text("".join(f"{scenes / name}\n" for name in names[:count]))
            command = [sys.executable, "-m", "vlv", "caption", str(images), "--output", str(output)]
            seconds, peak, _ = watch(command)
            written = len(output.read_text().splitlines())
            rows.append(
                {"images": written, "seconds": seconds, "images_per_second": written / seconds, "peak_bytes": peak}
            )
            print(rows[-1], flush=True)
    return rows


def caption(batch_size: int, length: int) -> None:
    """One run of the captioner alone, printed as a row. The first batch is a warm-up."""
    from captioning import CaptionerOfLengths  # imported here, because the other rows do not need it

    names = [str(number) for number in range(IMAGES)]
    model, processor = load_captioner("vlv-tiny")
    captioner = CaptionerOfLengths(model, processor, Decoding(), batch_size, lengths=dict.fromkeys(names, length))
    size = (3, processor.image_height, processor.image_width)
    pixel_values = list(torch.rand(IMAGES, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    captioner(names[:batch_size], pixel_values[:batch_size])
    seconds = measure.seconds_of(lambda: captioner(names, pixel_values))
    print(json.dumps({"batch_size": batch_size, "length": length, "images_per_second": IMAGES / seconds}))


def growing(settings: list[tuple[int, int]]) -> list[dict]:
    rows = []
    for batch_size, length in settings:
        _, peak, output = watch([sys.executable, __file__, "--caption", str(batch_size), str(length)])
        rows.append({**json.loads(output.splitlines()[-1]), "peak_bytes": peak})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=measure.at_least_one, nargs="*", default=[100, 1000, 10_000])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--caption", type=int, nargs=2, metavar=("BATCH", "LENGTH"), help="(of a row) what to caption")
    arguments = parser.parse_args()
    if arguments.caption:
        caption(*arguments.caption)
        return
    found = {}
    parts = {
        "batch_size": lambda: growing([(batch_size, 100) for batch_size in BATCHES]),
        "length": lambda: growing([(16, length) for length in LENGTHS]),
        "images": lambda: growing_images(arguments.images),
    }
    for name, part in parts.items():
        found[name] = part()
        measure.write_record(arguments.output, {"benchmark": "scaling", "size": "tiny", "growing": found})


if __name__ == "__main__":
    main()
