"""Short trainings for the tests."""

import json

from vlv.commands import train

FAST = {
    "max_steps": 4,
    "save_steps": 2,
    "per_device_train_batch_size": 4,
    "eval_size": 8,
    "logging_steps": 1,
    "warmup_steps": 1,
}


def arguments(recipe, output_dir, **settings):
    """The command line of a short run, without `vlv train`. A list gives several values; None gives no value."""
    argv = [str(recipe)]
    for name, value in {"output_dir": output_dir, **FAST, **settings}.items():
        if value is not None:
            argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return argv


def run(recipe, output_dir, **settings):
    """Runs a short training and returns its training.json."""
    train.main(arguments(recipe, output_dir, **settings))
    return json.loads((output_dir / "training.json").read_text())


def losses(record):
    return {row["step"]: row["loss"] for row in record["log"] if "loss" in row}
