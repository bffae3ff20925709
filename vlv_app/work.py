"""Computations that a visitor can stop."""

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue
from threading import Event
from time import monotonic
from typing import Any, TypeVar

import torch
from transformers import StoppingCriteria

INTERVAL = 0.05  # seconds between two values, each of which costs the server and the browser some work

Result = TypeVar("Result")
Report = Callable[[Any], None]


class Stopped(Exception):
    """Nobody waits for the result of this computation any more."""


def watch(function: Callable[[Report], Result]) -> Generator[Any, None, Result]:
    """
    Run `function(report)` in a thread, and yield what it reports; where it reports more often than anybody reads, the
    newest only. The result is the generator's return value.

    Closing the generator stops the function: its next `report` raises [`Stopped`]. Gradio closes the generator of a
    request that is cancelled or whose visitor has left, at the next value that it yields.
    """
    stop, done = Event(), object()
    news: SimpleQueue[Any] = SimpleQueue()

    def report(item: Any) -> None:
        if stop.is_set():
            raise Stopped
        news.put(item)

    pool = ThreadPoolExecutor(1)
    try:
        future = pool.submit(function, report)
        future.add_done_callback(lambda _: news.put(done))  # also when the function has failed: the loop must end
        item = news.get()
        while item is not done:
            yield item
            item = _newest(news, done)
        return future.result()
    finally:
        stop.set()
        pool.shutdown(wait=False)  # the server's event loop closes generators, and must not wait for a thread


def _newest(news: SimpleQueue, done: object) -> Any:
    """The last item that comes within the interval, or later the first; `done` at once."""
    end, item = monotonic() + INTERVAL, None
    while item is not done:
        try:
            item = news.get(timeout=max(0.001, end - monotonic()))
        except Empty:
            break
        if monotonic() >= end:
            break
    return news.get() if item is None else item


def each_as(computation: Generator[Any, None, Result], form: Callable[[Any], Any]) -> Generator[Any, None, Result]:
    """Passes on what a computation yields, in another form. Its result stays the generator's return value."""
    while True:
        try:
            item = next(computation)
        except StopIteration as ended:
            return ended.value
        yield form(item)


class ReportTokens(StoppingCriteria):
    """Reports the token ids (B, T) after each token of `generate`. It ends nothing by itself."""

    def __init__(self, report: Callable[[torch.LongTensor], None]):
        self.report = report

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        self.report(input_ids)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
