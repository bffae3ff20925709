"""Losses on the progress bar, and samples of the model's output as files and in TensorBoard."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL.Image import Image
from transformers import ProgressCallback
from transformers.integrations import TensorBoardCallback

Samples = Image | str  # a sheet of pictures, or a table in Markdown


class LossBar(ProgressCallback):
    """Trainer's progress bar, with the last losses beside it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs=logs, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_postfix({name: f"{logs[name]:.4g}" for name in logs if name.endswith("loss")})

    def close(self) -> None:
        """Ends the bars after an error, so that its message starts on a new line."""
        for bar in (self.training_bar, self.prediction_bar):
            if bar is not None:
                bar.close()


def write_samples(samples: Samples, folder: Path, step: int, callbacks: Sequence = ()) -> None:
    """Writes `folder`/step-`step`.png or .md. TensorBoard gets the same, if it is among Trainer's callbacks."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step}"
    writers = [callback.tb_writer for callback in callbacks if isinstance(callback, TensorBoardCallback)]
    if isinstance(samples, str):
        path.with_suffix(".md").write_text(samples, encoding="utf-8")
        for writer in filter(None, writers):
            writer.add_text("samples", samples, step)
    else:
        samples.save(path.with_suffix(".png"))
        for writer in filter(None, writers):
            writer.add_image("samples", np.asarray(samples), step, dataformats="HWC")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; each cell on one line."""
    lines = [header, ["---"] * len(header), *rows]
    cells = [[" ".join(cell.split()).replace("|", r"\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)
