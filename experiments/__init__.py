"""The paper's questions, asked of vlv-tiny: one module an experiment, one JSON of rows each in docs/results.

    python -m experiments [NAME ...]      measure (what is already in docs/results is left as it is)
    python -m experiments.report          draw docs/results.md's tables and plots anew from the JSON

An experiment is a module with `run(model, processor, num) -> rows` and `plot(rows, figure)`. A row is a flat dict of
settings and of measurements, each of these a `vlv.evaluation.results.Measurement` as a dict.
"""

EXPERIMENTS = ("sampling", "spatial", "composition")
