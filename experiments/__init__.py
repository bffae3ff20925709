"""The paper's questions, asked at tiny scale.

    python -m experiments [NAME ...]      measure (what is already in docs/results is left as it is)
    python -m experiments.report          redraw docs/results.md's tables and plots from the JSON

An experiment of `MEASURED` asks the bundled checkpoint. It is a module with `run(model, processor, num) -> rows` and
`plot(rows, figure)`, and leaves one JSON of rows. A row is a flat dict of settings and of measurements, each of these
a `vlv.evaluation.results.Measurement` as a dict. The others train models to compare: experiments/trained.py.
"""

MEASURED = ("sampling", "spatial", "composition")
