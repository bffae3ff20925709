"""
Reads pictures in separate processes, so that a damaged picture does not stop the others.

A decoder may crash, hang or ask for much memory. In a forked process this ends that process alone: the picture is
reported and the process is replaced. Everything travels through pipes as plain bytes. Shared memory and sockets would
fail where /dev/shm is small or TMPDIR is long, and need a file descriptor for each picture.

No existing pool does this. `concurrent.futures` gives up the whole pool when a process dies. torch's DataLoader
does too, and it passes tensors through shared memory. pebble replaces processes, but they share locks that need
/dev/shm, and none of them lets large pictures wait for each other.
"""

import ctypes
import gc
import io
import os
import pickle
import signal
import stat
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar

import torch
from PIL import Image

from vlv.plain import dump

SECONDS_PER_PICTURE = 60
# Readers that share a budget decode this many pixels at the same time, and a larger picture alone. A pixel takes up to
# 12 bytes while it is decoded and converted.
PIXELS_AT_ONCE = 100_000_000
# Smaller pictures are not counted, because asking for each of them would take time.
SMALL_PICTURE = 2_000_000
PR_SET_PDEATHSIG = 1  # Linux: the signal that a process gets when the thread ends that forked it

Key = TypeVar("Key")


class Read(NamedTuple):
    """The result of reading a picture, or the sentence that says why it could not be read."""

    key: Any
    result: Any
    error: str | None


class Budget:
    """An amount that threads share: a thread takes a part of it, and waits while others hold too much."""

    def __init__(self, total: int):
        self._total = self._free = total
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, amount: int) -> Iterator[None]:
        """Takes the amount, or all of the budget if the amount is larger."""
        amount = min(amount, self._total)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= amount)
            self._free -= amount
        try:
            yield
        finally:
            with self._changed:
                self._free += amount
                self._changed.notify_all()


class Reader:
    """
    Calls `read(source)` in a forked process. The process is started at the first call and replaced when it has died.

    A reader also works in a forked copy of this process: the copy starts its own process. If the system has no fork,
    `read` is called directly.

    Args:
        read: a source -> a result. The result is pickled, with tensors as plain arrays.
        budget: pixels that several readers may decode at the same time.
        seconds: how long one picture may take.
    """

    def __init__(self, read: Callable[[Any], Any], budget: Budget | None = None, seconds: float = SECONDS_PER_PICTURE):
        self._read, self._seconds = read, seconds
        self._budget = budget or Budget(PIXELS_AT_ONCE)
        self._process: _Process | None = None
        self._closed = False
        self._changing = threading.Lock()

    def __call__(self, source: Any) -> Any:
        """
        The result of `read`.

        Raises:
            ValueError: when it raised an error, crashed, or took too long; the sentence names the picture.
        """
        if not hasattr(os, "fork"):
            succeeded, answer = _attempt(self._read, source)
        else:
            succeeded, answer = self._ask(source)
        if not succeeded:
            raise ValueError(answer)
        return answer

    def start(self) -> None:
        """Start the process now, not at the first call."""
        if hasattr(os, "fork"):
            self._running()

    def kill(self) -> None:
        """End the process at once and for good. A thread that waits for it gets a ValueError."""
        with self._changing:
            self._closed = True
            if self._process is not None and self._process.is_own:
                self._process.kill()

    def close(self) -> None:
        """End the process when no thread waits for it."""
        self.kill()
        self._bury()

    def __reduce__(self):
        return Reader, (self._read, None, self._seconds)  # for spawned processes

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _ask(self, source):
        try:
            try:
                self._running().send(source)
            except BrokenPipeError:  # it died while it was idle
                self._bury()
                self._running().send(source)
            answer = self._process.receive()
            if isinstance(answer, int):  # a number of pixels: the process waits for permission to decode them
                with self._budget.hold(answer):
                    self._process.send(None)
                    answer = self._process.receive()
            return answer
        except (EOFError, OSError, pickle.UnpicklingError):
            return False, f"{_name(source)}: {self._cause_of_death(self._bury())}"
        except BaseException:
            self._bury()  # or its answer would be taken for that of the next picture
            raise

    def _running(self):
        with self._changing:
            if self._closed:
                raise EOFError
            if self._process is None or not self._process.is_own:
                self._process = _Process(self._read, self._seconds)
            return self._process

    def _bury(self):
        with self._changing:
            process, self._process = self._process, None
            return process.reap() if process is not None and process.is_own else 0

    def _cause_of_death(self, status):
        number = -os.waitstatus_to_exitcode(status)
        if number == signal.SIGALRM:
            return f"reading it took more than {self._seconds:g} seconds."
        if number == signal.SIGKILL:
            return "the process that read it was killed, perhaps because memory ran out."
        how = signal.Signals(number).name if number in iter(signal.Signals) else f"exit status {-number}"
        return f"the process that read it crashed ({how}). The file is damaged, or its decoder is faulty."


class Readers:
    """
    Several [`Reader`]s that share a budget of pixels. As many threads may call it at once; each gets one that is idle.

    Args:
        read: as for [`Reader`].
        number: of processes. They are started at once, while no other thread can hold a lock that they would wait for.
    """

    def __init__(self, read: Callable[[Any], Any], number: int):
        budget = Budget(PIXELS_AT_ONCE)
        self._readers = [Reader(read, budget) for _ in range(number)]
        self._idle: SimpleQueue[Reader] = SimpleQueue()
        for reader in self._readers:
            reader.start()
            self._idle.put(reader)

    def __call__(self, source: Any) -> Any:
        """What `read` returns; raises ValueError as [`Reader`] does."""
        reader = self._idle.get()
        try:
            return reader(source)
        finally:
            self._idle.put(reader)

    def kill(self) -> None:
        """End the processes, whatever they are doing. A thread that waits for one gets a ValueError."""
        for reader in self._readers:
            reader.kill()

    def close(self) -> None:
        """End the processes when no thread waits for them."""
        for reader in self._readers:
            reader.close()


def read_ahead(
    items: Iterable[tuple[Key, Any]], read: Callable[[Any], Any], num_workers: int, number: int
) -> Iterator[Read]:
    """
    Reads the sources of (key, source) pairs, in their order, in several processes.

    Args:
        read: a source -> a result (see [`Reader`]).
        num_workers: processes; with 0, this process reads, and a crash ends the run.
        number: how many pictures are read ahead.
    """
    if num_workers == 0 or not hasattr(os, "fork"):
        for key, source in items:
            yield _reading(key, *_attempt(read, source))
        return
    readers = Readers(read, num_workers)

    def read_one(key, source):
        try:
            return Read(key, readers(source), None)
        except ValueError as error:
            return Read(key, None, str(error))

    # One thread for each process, which only waits for it.
    threads = ThreadPoolExecutor(num_workers, "reader")
    try:
        waiting = deque()
        for key, source in items:
            waiting.append(threads.submit(read_one, key, source))
            if len(waiting) >= max(number, num_workers):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        readers.kill()
        threads.shutdown()
        readers.close()


# No process may be forked while both ends of another process's pipes are open. It would keep them open, and the death
# of the other process would not be noticed.
_forking = threading.Lock()


class _Process:
    """The forked process, as its parent sees it."""

    def __init__(self, read: Callable[[Any], Any], seconds: float):
        self._owner = os.getpid()
        with _forking:
            requests, mine = os.pipe()
            theirs, answers = os.pipe()
            self._pid = os.fork()
            if self._pid == 0:
                try:
                    os.close(mine)
                    os.close(theirs)
                    _serve(read, seconds, open(requests, "rb"), open(answers, "wb"))  # noqa: SIM115
                finally:
                    os._exit(1)  # the parent's exit code must not run here
            os.close(requests)
            os.close(answers)
        self._requests, self._answers = open(mine, "wb"), open(theirs, "rb")  # noqa: SIM115

    @property
    def is_own(self) -> bool:
        """Whether this process started it, and not a process that this one was forked from."""
        return self._owner == os.getpid()

    def send(self, value: Any) -> None:
        _send(value, self._requests)

    def receive(self) -> Any:
        return pickle.load(self._answers)

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)

    def reap(self) -> int:
        """End the process, if it has not ended, and return its exit status."""
        self.kill()
        for file in (self._requests, self._answers):
            with suppress(OSError):
                file.close()
        return os.waitpid(self._pid, 0)[1]


def _serve(
    read: Callable[[Any], Any], seconds: float, requests: io.BufferedReader, answers: io.BufferedWriter
) -> None:
    """The main loop of a forked process, which ends when its parent does."""
    if sys.platform == "linux":  # on other systems, a hanging process outlives a killed parent until its time is up
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    _close_sockets()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    gc.freeze()  # a collection would copy the memory that is shared with the parent
    torch.set_num_threads(1)
    with suppress(EOFError, BrokenPipeError):
        while True:
            source = pickle.load(requests)
            # The system ends this process when it takes too long. No decoder can prevent that, and the parent is not
            # needed for it.
            signal.setitimer(signal.ITIMER_REAL, seconds)
            pixels = _count_pixels(source)
            if pixels > SMALL_PICTURE:
                signal.setitimer(signal.ITIMER_REAL, 0)
                _send(pixels, answers)
                pickle.load(requests)
                signal.setitimer(signal.ITIMER_REAL, seconds)
            answer = _attempt(read, source)
            signal.setitimer(signal.ITIMER_REAL, 0)
            _send(answer, answers)


def _close_sockets() -> None:
    """A connection of the parent's would stay open when the parent closes it, as long as this process held it too."""
    for name in os.listdir("/dev/fd"):
        with suppress(OSError):  # the folder itself was open while it was listed
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                os.close(int(name))


def _send(value, file):
    dump(value, file)
    file.flush()


def _attempt(read, source):
    """Whether it succeeded, and the result or the reason."""
    try:
        return True, read(source)
    except MemoryError:
        return False, f"{_name(source)}: there is not enough memory to read it."
    except Exception as error:  # a damaged file can raise any error, and the other pictures must still be read
        return False, " ".join(str(error).split()) or f"{_name(source)}: {type(error).__name__}"


def _reading(key, succeeded, answer):
    return Read(key, answer, None) if succeeded else Read(key, None, answer)


def _count_pixels(source: Any) -> int:
    """The pixels of a picture, from its header; 0 if they are unknown."""
    if isinstance(source, dict):
        source = source.get("bytes") or source.get("path")
    if isinstance(source, (bytes, bytearray)):
        source = io.BytesIO(source)
    if not isinstance(source, (str, os.PathLike, io.BytesIO)):
        return 0
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(source) as image:
            return image.width * image.height
    except Exception:  # reading the picture reports what is wrong
        return 0


def _name(source: Any) -> str:
    """The name of a picture in messages: its path, with bytes that are not UTF-8 escaped. Long names are cut."""
    if isinstance(source, dict):
        source = source.get("path")
    if not isinstance(source, (str, os.PathLike)):
        return "image"
    name = os.fspath(source).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return name if len(name) <= 500 else f"{name[:80]}…{name[-80:]}"
