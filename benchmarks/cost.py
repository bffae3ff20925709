"""
The cost of the paper's training at the measured speeds.

    python benchmarks/cost.py --price DOLLARS_PER_GPU_HOUR [--size published] [--results benchmarks/results]

Stage 1 reads 200,000 batches of 512 images, stage 2 up to 100,000 batches of 64 captions (--stage-2-steps). The
command reads the JSON that training.py wrote for a size. It prints the hours of one device and the dollars for each
side, and compares them with the paper's 1,000 dollars.
"""

import argparse
import json
from pathlib import Path

import measure

PAPERS_DOLLARS = 1000
STAGE_1_IMAGES, STAGE_2_BATCH = 200_000 * 512, 64
SIDES = ("paper", "paper in float32", "like for like", "as shipped")


def hours(images: int, images_per_second: float) -> float:
    return images / images_per_second / 3600


def table(records: dict[str, dict], work: dict[str, int], price: float) -> str:
    """
    Markdown: a row for each side of each stage.

    Args:
        records: the JSON of training.py, by stage.
        work: the number of images of each stage.
        price: dollars for an hour of the device.
    """
    lines = ["| | side | images/s | hours | dollars | of the paper's 1,000 |", "| --- | --- | --- | --- | --- | --- |"]
    for stage, record in records.items():
        for side in SIDES:
            if (found := record["sides"].get(side)) is None:
                continue
            took = hours(work[stage], found["images_per_second"])
            dollars = took * price
            lines.append(
                f"| {stage} | {side} | {found['images_per_second']:.2f} | {took:,.0f} | {dollars:,.0f} "
                f"| {dollars / PAPERS_DOLLARS:.2f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--price", type=float, required=True, help="dollars for an hour of one device")
    parser.add_argument("--size", choices=measure.SIZES, default="published")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"))
    parser.add_argument("--stage-2-steps", type=int, default=100_000)
    arguments = parser.parse_args()
    files = {stage: arguments.results / f"{stage.replace(' ', '-')}-{arguments.size}.json" for stage in measure.STAGES}
    if missing := [str(file) for file in files.values() if not file.is_file()]:
        raise SystemExit(
            f"There is no {', no '.join(missing)}: measure with training.py --size {arguments.size} first."
        )
    records = {stage: json.loads(file.read_text(encoding="utf-8")) for stage, file in files.items()}
    work = {"stage 1": STAGE_1_IMAGES, "stage 2": arguments.stage_2_steps * STAGE_2_BATCH}
    device = records["stage 1"]["machine"]["device"]
    print(f"{arguments.size}, measured on {device}, at {arguments.price:g} dollars an hour\n")
    print(table(records, work, arguments.price))
    needed = sum(work.values()) / (PAPERS_DOLLARS / arguments.price * 3600)
    print(f"Both stages for 1,000 dollars need {needed:.1f} images/s on such a device, on average.")


if __name__ == "__main__":
    main()
