"""The numbers in README are the measured ones."""

import json
from pathlib import Path

import pytest
from paths import ROOT

import vlv
from vlv.evaluation.readme import BLOCK, PAGES, ROWS, fill
from vlv.models.info import count_parts
from vlv.models.published import published_config

README = ROOT / "README.md"


@pytest.mark.parametrize("page", PAGES)
def test_pages_quote_the_bundled_results(page):
    results = json.loads(Path(vlv.bundled_checkpoint(PAGES[page]), "results.json").read_text())
    text = (ROOT / page).read_text()
    assert BLOCK.search(text)
    assert {name for _, name in ROWS if "artist" not in name} <= results["metrics"].keys()
    assert fill(text, results) == text, "run `python -m vlv.evaluation.readme`"


def test_readme_states_the_published_captioners_sizes():
    text = README.read_text()
    for size in ("3B", "0.5B"):
        parts = [part for part in count_parts(published_config(size)) if part.name not in ("unet", "vae")]
        sizes = [sum(part.bytes[dtype] for part in parts) / 1e9 for dtype in parts[0].bytes]
        (row,) = (line for line in text.splitlines() if line.startswith("|") and line.count(f"Qwen2.5-{size} |"))
        assert [cell.strip() for cell in row.split("|")[2:4]] == [f"{number:.1f} GB" for number in sizes]


def test_readme_states_what_captioning_took():
    record = json.loads((ROOT / "benchmarks" / "results" / "published_size-float32.json").read_text())
    (caption,) = (phase for phase in record["phases"] if phase["phase"] == "caption")
    text = " ".join(README.read_text().split())
    assert f"took {caption['host_gib']:.1f} GiB at its peak" in text
    assert f"took {caption['seconds']:.0f} seconds" in text
