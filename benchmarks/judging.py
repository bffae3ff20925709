"""
What a score costs, beside a greedy caption of the same image.

    python benchmarks/judging.py [--images 256] [--output FILE]

On the CPU, in one process with one thread. The images have been read; a side starts from their pixels, so that a
caption pays for its embeddings too. A side has one caption for each image, or eight, whose image is read once for all
of them. Time is that of the processor: other programs on the machine do not count.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from time import process_time

import measure
import torch

from vlv.captioning.captioner import Captioner
from vlv.captioning.settings import Decoding
from vlv.judging.judge import Judge
from vlv.models.loading import load_autoencoder
from vlv.scenes import sample_picture

BATCH = 64
TURNS = 3
BOTH = ("explained", "likelihood")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=measure.at_least_one, default=256)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = load_autoencoder("vlv-tiny", "cpu")
    pictures = [sample_picture("test", index) for index in range(arguments.images)]
    contents = [Judge(model, processor, BOTH).read(image) for image, _ in pictures]
    texts = [scene.caption for _, scene in pictures]
    pixels, names = [content["pixel_values"] for content in contents], list(map(str, range(len(texts))))
    captioner = Captioner(model, processor, Decoding(), BATCH)

    def greedy() -> int:
        return len(captioner(names, pixels))

    def judging(scores: tuple[str, ...], draws: int, each: int) -> Callable[[], int]:
        judge = Judge(model, processor, scores, draws, batch_size=BATCH)
        captions = [[texts[(number + offset) % len(texts)] for offset in range(each)] for number in range(len(texts))]
        return lambda: sum(map(len, judge(contents, captions)))

    sides = {"a greedy caption": greedy}
    for each in (1, 8):
        for scores, draws in ((("explained",), 1), (("explained",), 2), (("likelihood",), 1), (BOTH, 1), (BOTH, 2)):
            words = " and ".join(scores) + (f", {draws} draws" if "explained" in scores else "")
            sides[f"{words}, {each} captions per image"] = judging(scores, draws, each)
    spent: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(TURNS + 1):
        for name, side in sides.items():
            start = process_time()
            count = side()
            if turn:  # the first one warms up
                spent[name].append(1000 * (process_time() - start) / count)
    medians = {name: statistics.median(times) for name, times in spent.items()}
    rows = {
        name: {"milliseconds": round(value, 2), "of a greedy caption": round(value / medians["a greedy caption"], 2)}
        for name, value in medians.items()
    }
    for name, row in rows.items():
        print(f"{name}: {row['milliseconds']} ms, {row['of a greedy caption']} of a greedy caption")
    record = {"benchmark": "judging", "size": "tiny", "images": arguments.images, "batch": BATCH, "sides": rows}
    measure.write_record(arguments.output, record)


if __name__ == "__main__":
    main()
