"""README promises no more than what was measured."""

import json
from pathlib import Path

from paths import ROOT

import vlv
from vlv.evaluation.readme import BLOCK, ROWS, fill

README = ROOT / "README.md"


def test_readme_quotes_the_bundled_results():
    results = json.loads(Path(vlv.tiny_checkpoint(), "results.json").read_text())
    text = README.read_text()
    assert BLOCK.search(text)
    assert {name for _, name in ROWS} <= results["metrics"].keys()
    assert fill(text, results) == text, "run `python -m vlv.evaluation.readme`"
