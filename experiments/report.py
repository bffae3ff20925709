"""Draws the tables and plots of docs/results.md anew from docs/results/*.json: `python -m experiments.report`."""

import json
import re
from importlib import import_module
from pathlib import Path

from matplotlib.figure import Figure

from experiments import MEASURED

DOCS = Path(__file__).resolve().parents[1] / "docs"


def table(rows: list[dict]) -> str:
    """Rows as Markdown: settings as they are, measurements as value ± standard error."""
    lines = [f"| {' | '.join(rows[0])} |", f"| {' | '.join('---' for _ in rows[0])} |"]
    return "\n".join([*lines, *(f"| {' | '.join(map(_cell, row.values()))} |" for row in rows)]) + "\n"


def _cell(value):
    if isinstance(value, dict):
        return f"{value['value']:.3f} ± {value['standard_error']:.3f}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def fill(text: str, name: str, contents: str) -> str:
    """The document with `contents` between its markers `<!-- name -->` and `<!-- /name -->`."""
    block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not block.search(text):
        raise ValueError(f"docs/results.md has no place for {name}: write <!-- {name} --> and <!-- /{name} --> there.")
    return block.sub(lambda match: match[1] + contents + match[2], text)


def main() -> None:
    page = DOCS / "results.md"
    text = page.read_text(encoding="utf-8")
    for name in MEASURED:
        file = DOCS / "results" / f"{name}.json"
        if not file.exists():
            continue
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        import_module(f"experiments.{name}").plot(rows, figure)
        figure.savefig(file.with_suffix(".png"), dpi=110)
        text = fill(text, name, f"![{name}](results/{name}.png)\n\n{table(rows)}")
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
