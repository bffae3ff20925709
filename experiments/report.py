"""Redraws the tables and plots of docs/results.md from docs/results: `python -m experiments.report`."""

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import MEASURED
from experiments.trained import Experiment, Plan

DOCS = Path(__file__).resolve().parents[1] / "docs"
# The scores of the trained runs, by the name of their column.
SCORES = {
    "captions exact": "captions/test/exact",
    "captioned right": "captions/test/objects_right",
    "rebuilt right": "reconstruction/test/objects_right",
}
MISSING = "–"


def table(rows: list[dict]) -> str:
    """Rows as Markdown. Measurements are shown as value ± standard error, or as value (lowest to highest)."""
    lines = [f"| {' | '.join(rows[0])} |", f"| {' | '.join('---' for _ in rows[0])} |"]
    return "\n".join([*lines, *(f"| {' | '.join(map(_cell, row.values()))} |" for row in rows)]) + "\n"


def _cell(value):
    if value is None:
        return MISSING
    if isinstance(value, dict) and "lowest" in value:
        return f"{value['value']:.3f} ({value['lowest']:.3f} to {value['highest']:.3f})"
    if isinstance(value, dict):
        return f"{value['value']:.3f} ± {value['standard_error']:.3f}"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def gather(experiment: Experiment, folder: Path, columns: Mapping[str, str] = SCORES) -> list[dict[str, Any]]:
    """One row for each row of the experiment: the scores of its runs whose JSON is in `folder`, by column."""
    rows = []
    for row in experiment.rows:
        files = [folder / f"{run.name}.json" for run in row.runs]
        records = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
        parameters = records[0]["parameters"] if records else None
        scores = {
            column: spread([record["scores"].get(name) for record in records]) for column, name in columns.items()
        }
        rows.append({**row.settings, "parameters": parameters, "seeds": f"{len(records)} of {len(files)}", **scores})
    return rows


def spread(scores: list[dict | None]) -> dict[str, float] | None:
    """The mean over the seeds, with the lowest and the highest. With one seed, the measurement and its error."""
    scores = [score for score in scores if score is not None]
    if len(scores) < 2:
        return scores[0] if scores else None
    values = [score["value"] for score in scores]
    return {"value": float(np.mean(values)), "lowest": min(values), "highest": max(values)}


def plot(experiment: Experiment, rows: list[dict[str, Any]], figure: Figure) -> None:
    """One panel for each score, over the experiment's `x`. Each value of its other setting is a line."""
    panels = [name for name in SCORES if any(row[name] is not None for row in rows)]
    others = [column for column in experiment.rows[0].settings if column != experiment.x]
    lines: dict[str, list[dict]] = {}
    for row in rows:
        lines.setdefault(", ".join(str(row[column]) for column in others), []).append(row)
    for axes, score in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True):
        for label, found in lines.items():
            _line(axes, experiment.x, [row for row in found if row[score] is not None], score, label)
        axes.set(xlabel=experiment.x, title=score, ylim=(0, 1))
        if experiment.log:
            axes.set_xscale("log")
        if isinstance(rows[0][experiment.x], str):
            axes.tick_params(axis="x", rotation=20)
    if others:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize="small")


def _line(axes: Axes, x: str, rows: list[dict], score: str, label: str) -> None:
    scores = [row[score] for row in rows]
    below = [it["value"] - it["lowest"] if "lowest" in it else it["standard_error"] for it in scores]
    above = [it["highest"] - it["value"] if "highest" in it else it["standard_error"] for it in scores]
    between = "none" if any(isinstance(row[x], str) for row in rows) else "solid"  # no line between words
    values = [it["value"] for it in scores]
    axes.errorbar(
        [row[x] for row in rows], values, [below, above], marker="o", capsize=3, label=label, linestyle=between
    )


def fill(text: str, name: str, contents: str) -> str:
    """The document with `contents` between its markers `<!-- name -->` and `<!-- /name -->`."""
    block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not block.search(text):
        raise ValueError(f"docs/results.md has no place for {name}: write <!-- {name} --> and <!-- /{name} --> there.")
    return block.sub(lambda match: match[1] + contents + match[2], text)


def progress(plan: Plan, folder: Path) -> str:
    """How many of the planned runs are finished."""
    runs = plan.runs()
    done = sum((folder / f"{run.name}.json").exists() for run in runs)
    return f"{done} of the {len(runs)} planned runs are finished.\n"


def main(docs: Path = DOCS, plan: Plan | None = None) -> None:
    plan, results, page = plan or Plan(), docs / "results", docs / "results.md"
    text = fill(page.read_text(encoding="utf-8"), "progress", progress(plan, results))

    def show(name: str, rows: list[dict[str, Any]], draw: Callable[[list[dict], Figure], None]) -> str:
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        draw(rows, figure)
        figure.savefig(results / f"{name}.png", dpi=110)
        return fill(text, name, f"![{name}](results/{name}.png)\n\n{table(rows)}")

    for name in MEASURED:
        rows = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))["rows"]
        text = show(name, rows, import_module(f"experiments.{name}").plot)
    for experiment in plan.experiments():
        rows = gather(experiment, results)
        if all(row["parameters"] is None for row in rows):
            text = fill(text, experiment.name, "No run is finished yet.\n")
        else:
            text = show(experiment.name, rows, partial(plot, experiment))
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
