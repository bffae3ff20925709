"""Writes the rows of a run: to its journal during the run and to its output at the end, or to the terminal."""

from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from vlv.captioning.journal import Row, json_line
from vlv.captioning.outputs.base import Output, captions_of
from vlv.files import read_json_lines


class Printer:
    """Prints each caption after its image's name and a tab."""

    def __init__(self):
        self.done: set[str] = set()
        self._captioned, self._failures = 0, []

    def add(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if "error" in row:
                self._failures.append(row)
                continue
            self._captioned += 1
            for text in captions_of(row):
                tqdm.write(f"{row['file_name']}\t{text}")

    def finish(self) -> tuple[int, list[Row]]:
        return self._captioned, self._failures


class Sink:
    """
    Takes the rows of a run and writes the output from them at the end.

    Args:
        output: the output to write.
        settings: the options that the captions depend on. A run is resumed, and a finished output is extended, only
            with the same settings.
        resume: continue an interrupted run, or add to a finished output.
        overwrite: replace a finished output.

    Raises:
        ValueError, OSError: when this run may not write the output, or it is damaged. Nothing has been changed.
    """

    def __init__(self, output: Output, settings: Row, resume: bool, overwrite: bool = False):
        self.output, self.journal, self.failures = output, output.journal, output.failures
        self._settings = settings
        header = self.journal.header()
        if header is None:
            self._check_finished(resume, overwrite)
            header = Row(settings=settings | output.options, keeps=resume or not overwrite)
        else:
            self._check_interrupted(header["settings"], resume)
        self._header = header
        self._kept = output.names() if header["keeps"] else set()
        self.done = self._kept | self.journal.names()

    def add(self, rows: Sequence[Row]) -> None:
        self.journal.append(rows, self._header)

    def finish(self) -> tuple[int, list[Row]]:
        """Write the output atomically. Returns how many images were captioned, and the rows of those left out."""
        self.journal.check()
        captioned, failures = self.journal.settle()
        left_out = []
        if captioned:
            left_out = self.output.publish(self.journal.rows(captioned.values()), self._kept - captioned.keys())
            with self.journal.replacing(self.output.settings) as file:
                file.write(json_line(self._settings))
        failures += left_out
        if failures:
            with self.journal.replacing(self.failures) as file:
                file.writelines(json_line({name: row[name] for name in ("file_name", "error")}) for row in failures)
        else:
            self.failures.unlink(missing_ok=True)
        self.journal.remove()
        return len(captioned) - len(left_out), failures

    def _check_finished(self, resume: bool, overwrite: bool) -> None:
        if not resume:
            if not overwrite:
                self.output.check_new()
        elif self.output.settings.exists() and self.output.exists:
            for _, _, before in read_json_lines(self.output.settings):
                if different := _different(before, self._settings):
                    raise ValueError(
                        f"{self.output} was made with {different}: --resume adds to it with the same settings "
                        "only. Replace it with --overwrite, or choose another --output."
                    )

    def _check_interrupted(self, before: Row, resume: bool) -> None:
        if not resume:
            raise ValueError(
                f"An earlier run was interrupted: continue it with --resume, or delete {self.journal.folder}."
            )
        if different := _different(before, self._settings | self.output.options):
            raise ValueError(
                f"The interrupted run had {different}: --resume continues it with the same settings only. "
                f"To start again, delete {self.journal.folder}."
            )


def _different(before: dict[str, Any], settings: dict[str, Any]) -> str:
    """The options of an earlier run that differ from those of this run."""
    different = [
        name
        for name, value in settings.items()
        # An earlier version may not have known the option.
        if before.get(name) != value and (name in before or value not in (None, False))
    ]
    return ", ".join(f"--{name} {before.get(name)}" for name in different)
