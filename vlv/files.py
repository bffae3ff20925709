"""Writes files and folders atomically, and checks and reads those that the user names."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from filelock import FileLock, Timeout
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError

# The files of a model's weights. Those of an earlier model must not stay beside a new one.
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json")
# The errors of a disk without room: it is full, a quota is reached, or a file is too large.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def looks_like_path(name: str) -> bool:
    """Whether `name` means a path and cannot be a Hub id, which is `name` or `owner/name`."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return True
    return name.startswith(".") or os.path.exists(name) or os.path.isdir(os.path.dirname(name))


@contextmanager
def atomic_writer(path: str | os.PathLike) -> Iterator[TextIO]:
    """
    A text file that appears under its name when the block ends. If the block raises, nothing has changed.

    Raises:
        OSError: before the block, if the file cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file to write to.")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            yield file
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """
    A new folder to fill. It appears under its name when the block ends. If the block raises, nothing has changed.

    Raises:
        OSError: before the block, if a file or a folder with files already has that name.
    """
    path = Path(path).resolve()
    unfinished = path.with_name(f".{path.name}.unfinished")
    with locked(path, beside=True):
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise FileExistsError(f"{path} already exists and is not overwritten; name a new folder.")
        shutil.rmtree(unfinished, ignore_errors=True)  # a killed run may have left it
        unfinished.mkdir()
        try:
            yield unfinished
            unfinished.replace(path)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def replaced_together(folder: str | os.PathLike) -> Iterator[Path]:
    """
    A folder to fill with a model. When the block ends, its entries replace those of the same names in `folder`. If the
    block raises, nothing has changed.
    """
    folder = Path(folder)
    unfinished = folder / f".unfinished.{os.getpid()}"
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        new = {entry.name for entry in unfinished.iterdir()}
        old = {entry.name for pattern in WEIGHT_FILES for entry in folder.glob(pattern)} - new
        for name in [*old, *new]:
            if (folder / name).is_dir():
                shutil.rmtree(folder / name)
            elif name in old:
                (folder / name).unlink()
        for name in new:
            (unfinished / name).replace(folder / name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def locked(output: str | os.PathLike, beside: bool = False) -> Iterator[None]:
    """
    Keep every other run out of `output`, a file or a folder, until the block ends. The lock file is in the folder, or
    beside the file. A lock file that a killed run left locks nothing.

    Args:
        beside: the lock file of a folder is beside it too, because the folder is made or replaced as a whole.

    Raises:
        OSError: before the block, if another run holds the lock, or if nothing can be written there.
    """
    output = Path(output).resolve()
    file = output / ".lock" if output.is_dir() and not beside else output.with_name(f".{output.name}.lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise OSError(f"Another run is writing to {output}: wait until it ends, or name another output.") from None
    try:
        yield
    finally:
        file.unlink(missing_ok=True)  # before the release, because afterwards the file may belong to another run
        lock.release()


@contextmanager
def writing_to(folder: str | os.PathLike) -> Iterator[None]:
    """Turns what libraries raise when the disk is full into one OSError that says so, and names the folder."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # PyTorch and safetensors have their own errors for it.
        is_full = error.errno in NO_ROOM if isinstance(error, OSError) else "PytorchStreamWriter" in str(error)
        if not is_full and not isinstance(error, SafetensorError):
            if isinstance(error, OSError) and error.errno == errno.EIO and error.filename is None:
                error.filename = str(folder)  # the system names no file where it fails to write to an open one
            raise
        free = shutil.disk_usage(folder).free
        raise OSError(
            f"{folder} cannot be written to; its disk has {free / 1e9:.2f} GB free: {error}."
            " Files that were saved before are complete."
        ) from error


def check_source(name: str | None, option: str | None = None) -> None:
    """
    Refuse a path that does not exist, before a library takes it for a Hub id and asks the Hub for it several times.

    Args:
        name: the path or Hub id of a model or a dataset; `None` is allowed.
        option: the option of the command that it was given with.

    Raises:
        FileNotFoundError: when it is a path and does not exist.
    """
    if name is None or not looks_like_path(name) or os.path.exists(name):
        return
    given = f", which --{option} names" if option else ""
    folder, _ = os.path.split(name)
    could_be_an_id = name.count("/") == 1 and folder not in ("", ".", "..", "~")
    why = f" It is not taken for an id on the Hub, as there is a folder {folder}." if could_be_an_id else ""
    raise FileNotFoundError(f"There is no file or folder {name}{given}.{why}")


def read_json_lines(path: str | os.PathLike) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
    """
    The lines of a JSON Lines file: number, bytes and object of each line.

    Raises:
        ValueError: at a line that is not an object; the sentence names the file and the line.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield number, line, _json_object(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None


def _json_object(line: bytes) -> dict[str, Any]:
    if line.startswith(b"\xef\xbb\xbf"):
        raise ValueError("the file begins with a byte order mark (BOM); save it as UTF-8 without one.")
    if not line.strip():
        raise ValueError("the line is empty; delete it.")
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError:
        raise ValueError("the line is not UTF-8 text; save the file as UTF-8.") from None
    except ValueError as error:
        raise ValueError(f"the line is not valid JSON ({error}); correct it or delete it.") from None
    if not isinstance(value, dict):
        raise ValueError("the line is not a JSON object; correct it or delete it.")
    return value
