"""What all outputs of `vlv caption` have in common."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

from vlv.captioning.journal import Journal, Row


class Output(ABC):
    """
    The output of a run. Its other files (journal, failures, settings) are beside `path` and are named after it.

    Args:
        path: the file; if the captions are in many files, a name for all of them.
        several: each image has a list of captions.
    """

    options: Row = {}  # must be the same when a run is resumed, as the settings of the captions

    def __init__(self, path: Path, several: bool):
        self.path, self.several = path, several
        self.journal = Journal(path.with_name(f".{path.name}.partial"))
        self.settings = path.with_name(f".{path.name}.settings")  # of the run that made it
        self.failures = path.with_name(f"{path.name}.failures.jsonl")

    def __str__(self) -> str:
        return str(self.path)

    @property
    @abstractmethod
    def exists(self) -> bool:
        """Whether there is output of an earlier run."""

    @abstractmethod
    def check_new(self) -> None:
        """Raises OSError if a run without --resume and --overwrite would replace something."""

    @abstractmethod
    def names(self) -> set[str]:
        """The images that have a caption in the output of an earlier run; raises ValueError if it is damaged."""

    @abstractmethod
    def publish(self, rows: Iterable[Row], kept: set[str]) -> list[Row]:
        """
        Write the captions atomically. Returns the rows that this format could not write.

        Args:
            kept: the images of an earlier run whose captions are kept.
        """


class CaptionFile(Output):
    """One file with a row for each image: `file_name` and `text`."""

    def __init__(self, path: Path, several: bool = False):
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder; name a file to write to.")
        if path.parent.exists() and not path.parent.is_dir():
            raise NotADirectoryError(f"{path} cannot be written: {path.parent} is not a folder.")
        # A link stays a link: the file that it points to is written, in its own folder.
        super().__init__(path.resolve() if path.is_symlink() else path, several)
        if self.path.name.endswith(".failures.jsonl"):
            raise ValueError(f"{path} is a name for a list of failures; choose another --output.")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.failures.exists()  # raises OSError now if that name is too long for the file system

    @property
    def exists(self) -> bool:
        return self.path.exists() and self.path.stat().st_size > 0

    def check_new(self) -> None:
        if self.exists:
            raise FileExistsError(
                f"{self.path} already exists: add to it with --resume, or replace it with --overwrite."
            )

    def check_text(self, is_list: bool, where: str) -> None:
        """Raises ValueError if `text` is not of the kind that this run adds."""
        if is_list != self.several:
            has, adds = ("a list of captions", "one") if is_list else ("one caption", "a list")
            raise ValueError(
                f"{where}: text is {has} and this run would add {adds} for each image: --resume needs the same "
                "--num_captions. Replace the file with --overwrite, or choose another --output."
            )


def captions_of(row: Row) -> list[str]:
    """The captions of a row, each on one line."""
    texts = row["text"] if isinstance(row["text"], list) else [row["text"]]
    return [" ".join(text.split()) for text in texts]
