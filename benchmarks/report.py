"""
Redraws the tables of docs/speed.md, training.md, serving.md and convert.md from the JSON in benchmarks/results.

    python -m benchmarks.report
"""

import json
import math
import re
from collections import Counter
from pathlib import Path

from experiments.report import fill

ROOT = Path(__file__).resolve().parents[1]
PAGES = tuple(ROOT / "docs" / f"{name}.md" for name in ("speed", "training", "serving", "convert"))
RESULTS = ROOT / "benchmarks" / "results"
# The column and the format of each number beside the speed, if a side has it.
EXTRA = {
    "batch_size": ("batch", "{}"),
    "captions_right": ("captions right", "{:.3f}"),
    "captions_as_papers": ("captions as the paper's", "{:.3f}"),
    "objects_right": ("objects right", "{:.3f}"),
    "difference_to_papers": ("difference to the paper's images, of 255", "{:.2f}"),
    "tokens": ("tokens an image", "{:.0f}"),
    "most_tokens": ("at most", "{}"),
    "sentences_true": ("sentences true of the scene", "{:.3f}"),
    "beginnings_of_papers": ("beginnings of the paper's", "{:.3f}"),
    "p50_seconds": ("half of the answers within, s", "{:.2f}"),
    "p95_seconds": ("95% within, s", "{:.2f}"),
    "answers_equal": ("answers equal to the engine's", "{:.3f}"),
    "parameters": ("parameters", "{:,}"),
    "peak_bytes": ("peak memory, MiB", "{:.0f}"),
    "peak_device_bytes": ("peak GPU memory, MiB", "{:.0f}"),
}


def as_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def shown(name: str, value: float) -> str:
    return EXTRA[name][1].format(value / 2**20 if name.endswith("bytes") else value)


def sides(record: dict) -> str:
    """The sides of a benchmark, and the operators that take the time of the default."""
    found = record["sides"]
    extra = [name for name in EXTRA if any(name in side for side in found.values())]
    if record["size"] != "tiny":  # captions of random weights have no meaning
        extra = [name for name in extra if not name.startswith("captions")]
    speed = "seconds" if record["benchmark"] == "loading" else "images/s"
    rows = []
    for name, side in found.items():
        value = 1 / side["images_per_second"] if speed == "seconds" else side["images_per_second"]
        rows.append(
            [
                name,
                f"{value:.2f}",
                f"{side['ratio']:.2f}",
                *(shown(it, side[it]) if it in side else "" for it in extra),
            ]
        )
    text = f"{record['machine']['device']}, {record['machine']['threads']} threads; commit {record['commit'][:7]}\n\n"
    text += as_table(["side", speed, "ratio", *(EXTRA[name][0] for name in extra)], rows)
    if "cache_seconds_per_image" in record:
        text += f"\nMaking the caches takes {record['cache_seconds_per_image']:.3f} s per image, once.\n"
    if "profile" in record:
        operators = ", ".join(f"`{row['operator']}` {row['share']:.0%}" for row in record["profile"][:6])
        text += f"\nTime of *as shipped* by operator: {operators}.\n"
    return text


def growing(record: dict) -> str:
    parts = []
    for name, rows in record["growing"].items():
        label = {"images": "images", "batch_size": "batch", "length": "tokens per caption"}[name]
        cells = [
            [str(row[name]), f"{row['images_per_second']:.1f}", f"{row['peak_bytes'] / 2**20:.0f}"] for row in rows
        ]
        parts.append(as_table([label, "images/s", "peak memory, MiB"], cells))
    return "\n".join(parts)


def levers(record: dict) -> str:
    """The effect of each setting on the time of a training step, and on memory, if that was measured."""
    rows, pair = [], ("without", "with")
    memory = any(lever[side]["peak_bytes"] for lever in record["levers"].values() for side in pair)
    for name, lever in record["levers"].items():
        steps = [f"{record['images_per_step'] / lever[side]['images_per_second']:.2f}" for side in pair]
        peaks = [shown("peak_bytes", lever[side]["peak_bytes"]) for side in pair] if memory else []
        rows.append([name, *steps, f"{lever['with']['ratio']:.2f}", *peaks])
    header = ["setting", "seconds per step, without", "seconds per step, with", "ratio"]
    return as_table([*header, *(["MiB without", "MiB with"] if memory else [])], rows)


def operations(record: dict) -> str:
    """Operations, and bytes, by part: a column for each part that any way of doing something has."""
    units = {"stage 1": "denoising sample", "stage 2": "caption"}
    tables = []
    for work, ways in record["operations"].items():
        parts = list(dict.fromkeys(name for way in ways for name in way["parts"]))
        scale, unit = (1e9, "GB") if work == "traffic" else (1e12, "TFLOP")
        costed = work in units
        header = [f"{work}, {unit}", *parts, f"for each {units[work]}" if costed else "in all"]
        rows = []
        for way in ways:
            cells = [f"{way['parts'][name] / scale:.3f}" if name in way["parts"] else "" for name in parts]
            total = way["each"] if costed else sum(way["parts"].values())
            cost = [f"{way['hours']:,.0f}", f"{way['dollars']:,.0f}"] if costed else []
            rows.append([way["way"], *cells, f"{total / scale:.3f}", *cost])
        tables.append(as_table([*header, *(["hours", "dollars"] if costed else [])], rows))
    return "\n".join(tables)


def refilling(record: dict) -> str:
    """What a refilled and a larger batch could win, and the step times that this follows from."""
    found, rows = record["refill"], []
    for name, ratios in found["ratios"].items():
        rows.append([name, f"{ratios['steps']:.2f}", f"{ratios['in_all']:.2f}" if "in_all" in ratios else ""])
    text = f"{record['machine']['device']}, {record['machine']['threads']} threads; commit {record['commit'][:7]}\n\n"
    text += as_table([f"against batches of {record['batch_size']}", "steps", "in all"], rows)
    steps = found["step_seconds"].items()
    return (
        text
        + "\n"
        + as_table(["rows", *map(str, dict(steps))], [["ms a step", *(f"{1000 * it:.0f}" for _, it in steps)]])
    )


def speed_run(record: dict) -> str:
    """The long runs; what one thing is worth, in short runs; and what is right with fewer queries."""
    runs = by_name(record["speedrun"])
    queries = {name: found for name, found in runs.items() if name.endswith("queries")}
    long = {name: found for name, found in runs.items() if "wrong" in found[0] and name not in queries}
    teacher = record["teacher"]["objects_right"]
    parts = [
        long_runs(long, by_name(record.get("stopped", []))),
        f"The teacher itself, given the true captions of these scenes, draws {teacher['value']:.3f} of the "
        f"{teacher['n']:,} objects right.\n",
        more_wrong(long),
        short_runs({name: found for name, found in runs.items() if name not in long | queries}),
        fewer_queries(queries),
    ]
    return "\n".join(filter(None, parts))


def by_name(runs: list[dict]) -> dict[str, list[dict]]:
    """Runs of the same name, which differ in their seeds."""
    names: dict[str, list[dict]] = {}
    for one in runs:
        names.setdefault(one["run"], []).append(one)
    return names


def over_seeds(values: list[float | None], form: str = "{:.3f}") -> str:
    """The mean of a number over seeds, its least and its greatest."""
    if None in values:
        return "not reached"
    mean = form.format(sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean} ({form.format(min(values))} to {form.format(max(values))})"


def in_units(found: list[dict], name: str, unit: float = 1) -> list[float | None]:
    return [one[name] and one[name] / unit for one in found]


def right(found: list[dict], queries: str | None = None) -> str:
    """Objects right at the end, with so many queries or with all."""
    shares = [one["objects_right"] for one in found]
    return over_seeds([share[queries or list(share)[-1]]["value"] for share in shares])


def long_runs(runs: dict[str, list[dict]], stopped: dict[str, list[dict]]) -> str:
    """Runs to the end, and those that were stopped after they had reached 0.90 or had learned nothing."""
    header = ["run", "seeds", "samples", "steps to 0.90", "TFLOP to 0.90", "at the published size, PFLOP"]
    header += ["objects right at the end", "scenes wrong", "different captions among them"]
    rows = []
    for name in dict.fromkeys([*runs, *stopped]):
        ended = runs.get(name, [])
        found = [*ended, *stopped.get(name, [])]
        rows.append(
            [
                name,
                str(len(found)) if len(ended) == len(found) else f"{len(found)}, {len(ended) or 'none'} to the end",
                f"{found[0]['steps'] * found[0]['samples_of_a_step']:,}",
                over_seeds(in_units(found, "steps_to_target"), "{:.0f}"),
                over_seeds(in_units(found, "operations_to_target", 1e12), "{:.1f}"),
                over_seeds(in_units(found, "published_operations_to_target", 1e15), "{:.0f}"),
                right(ended) if ended else "",
                over_seeds([len(one["wrong"]) for one in ended], "{:.0f}") if ended else "",
                over_seeds([len(set(one["wrong"])) for one in ended], "{:.0f}") if ended else "",
            ]
        )
    return as_table(header, rows)


def more_wrong(runs: dict[str, list[dict]]) -> str:
    """How many more scenes are wrong with our recipe than with the paper's, of those that were measured at the end."""
    papers = [name for name in runs if name.startswith("paper")]
    rows = [
        [f"`{name}`", *(difference(found, runs[paper]) for paper in papers)]
        for name, found in runs.items()
        if name not in papers
    ]
    return as_table(["scenes wrong, more than with", *(f"`{paper}`" for paper in papers)], rows)


def difference(ours: list[dict], theirs: list[dict]) -> str:
    """
    How many more scenes are wrong on average over seeds. A caption returns in many scenes, and these are wrong
    together, so the standard error is over captions.
    """
    by_caption: Counter[str] = Counter()
    for found, sign in ((ours, 1), (theirs, -1)):
        for one in found:
            for caption in one["wrong"]:
                by_caption[caption] += sign / len(found)
    return f"{sum(by_caption.values()):.1f} ± {math.sqrt(sum(number**2 for number in by_caption.values())):.1f}"


def short_runs(runs: dict[str, list[dict]]) -> str:
    header = ["run", "seeds", "samples", "GFLOP a sample", "at the published size, TFLOP", "objects right"]
    rows = [
        [
            name,
            str(len(found)),
            f"{found[0]['steps'] * found[0]['samples_of_a_step']:,}",
            f"{found[0]['operations_of_a_sample'] / 1e9:.3f}",
            f"{found[0]['published_operations_of_a_sample'] / 1e12:.3f}",
            right(found),
        ]
        for name, found in runs.items()
    ]
    return as_table(header, rows) if rows else ""


def fewer_queries(runs: dict[str, list[dict]]) -> str:
    """Objects right of a model with nested queries, beside models that are trained for each number."""
    if "nested queries" not in runs:
        return ""
    nested = runs["nested queries"]
    numbers = [number for number in nested[0]["objects_right"] if f"{number} queries" in runs]
    rows = [[number, right(nested, number), right(runs[f"{number} queries"])] for number in numbers]
    return as_table(["queries", "nested queries", "trained for this number"], rows)


def table(record: dict) -> str:
    """The tables of a record."""
    kinds = {
        "growing": growing,
        "levers": levers,
        "operations": operations,
        "refill": refilling,
        "speedrun": speed_run,
    }
    return next((draw for kind, draw in kinds.items() if kind in record), sides)(record)


def filled(page: str) -> str:
    """The page with its tables redrawn."""
    for name in re.findall(r"<!-- ([\w-]+) -->", page):
        if (file := RESULTS / f"{name}.json").is_file():
            record = json.loads(file.read_text(encoding="utf-8"))
            page = fill(page, name, table(record))
    return page


def main() -> None:
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
