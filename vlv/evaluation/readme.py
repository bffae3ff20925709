"""The tables of results in README.md and in docs: `python -m vlv.evaluation.readme` rewrites them."""

import json
import re
from pathlib import Path
from typing import Any

from vlv import BUNDLED, bundled_checkpoint

# The rows that readers want to see first: the scores of the model, then ceilings and floors.
ROWS = (
    ("captions exactly right", "captions/test/exact"),
    ("captions: objects right", "captions/test/objects_right"),
    ("captions that end by themselves", "captions/test/ended"),
    ("captions of mirrored scenes exactly right", "captions/mirrored/exact"),
    ("captions of never-seen combinations: objects right", "captions/novel/objects_right"),
    ("captions of an artist never seen: names right", "captions/artist/name_right"),
    ("captions of an artist never seen: objects right", "captions/artist/objects_right"),
    ("**reconstructions: objects right**", "reconstruction/test/objects_right"),
    ("reconstructions: backgrounds right", "reconstruction/test/background_right"),
    ("reconstructions of never-seen combinations: objects right", "reconstruction/novel/objects_right"),
    ("reconstructions of an artist never seen: names right", "reconstruction/artist/name_right"),
    ("ceiling: teacher driven by the true captions, objects right", "teacher from true captions/test/objects_right"),
    ("ceiling: VAE alone, objects right", "VAE alone/test/objects_right"),
    ("ceiling: the reader on the drawings themselves, objects right", "reader on drawings/test/objects_right"),
    ("floor: another image's context, objects right", "another image's context/test/objects_right"),
    ("floor: empty context, objects right", "empty context/test/objects_right"),
)
ROOT = Path(__file__).parents[2]
PAGES = {"README.md": BUNDLED, "docs/vlv-tiny.md": "vlv-tiny"}  # and the checkpoint whose results it shows
BLOCK = re.compile(r"(<!-- results[^>]*-->\n).*?(<!-- /results -->)", re.DOTALL)


def table(results: dict[str, Any]) -> str:
    """The contents of a results.json as a Markdown table. Missing rows are left out."""
    lines = ["| on scenes that were never trained on | share | ± standard error | n |", "| --- | ---: | ---: | ---: |"]
    for title, name in ROWS:
        if name in results["metrics"]:
            metric = results["metrics"][name]
            lines.append(f"| {title} | {metric['value']:.4f} | {metric['standard_error']:.4f} | {metric['n']:,} |")
    return "\n".join(lines) + "\n"


def fill(text: str, results: dict[str, Any]) -> str:
    """The document with the table of `results` between its markers `<!-- results -->` and `<!-- /results -->`."""
    return BLOCK.sub(lambda match: match[1] + table(results) + match[2], text)


def main() -> None:
    for name, checkpoint in PAGES.items():
        results = json.loads(Path(bundled_checkpoint(checkpoint), "results.json").read_text(encoding="utf-8"))
        page = ROOT / name
        page.write_text(fill(page.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()
