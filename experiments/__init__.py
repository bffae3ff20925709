"""Experiments on the paper's questions at a small scale.

    python -m experiments [NAME ...]      measure (existing files in docs/results are kept)
    python -m experiments.report          redraw docs/results.md's tables and plots from the JSON

An experiment of `MEASURED` measures the bundled checkpoint. It is a module with `run(model, processor, num) -> rows`
and `plot(rows, figure)`, and writes one JSON of rows. A row is a flat dict of settings and of measurements; a
measurement is a `vlv.evaluation.results.Measurement` as a dict. The other experiments train models and compare them:
see experiments/trained.py.
"""

MEASURED = (
    *("sampling", "spatial", "composition", "words", "lengths", "judge", "best_of"),
    *("search", "styles", "questions"),
)
