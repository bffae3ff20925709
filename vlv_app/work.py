"""Computations that a visitor can stop."""

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue
from threading import Event
from typing import Any, TypeVar

import torch
from transformers import StoppingCriteria

Result = TypeVar("Result")
Report = Callable[[Any], None]


class Stopped(Exception):
    """Nobody waits for the result of this computation any more."""


def watch(function: Callable[[Report], Result]) -> Generator[Any, None, Result]:
    """
    Run `function(report)` in a thread, and yield what it reports, the newest only where it reports faster than this
    is read. The result is the generator's return value.

    Closing the generator stops the function: its next `report` raises [`Stopped`]. Gradio closes the generator of a
    request that is cancelled or whose visitor has left, at the next value that it yields.
    """
    stop, news, done = Event(), SimpleQueue(), object()

    def report(item: Any) -> None:
        if stop.is_set():
            raise Stopped
        news.put(item)

    pool = ThreadPoolExecutor(1)
    try:
        future = pool.submit(function, report)
        future.add_done_callback(lambda _: news.put(done))  # also when the function has failed: the loop must end
        while (item := _newest(news, done)) is not done:
            yield item
        return future.result()
    finally:
        stop.set()
        pool.shutdown(wait=False)  # the server's event loop closes generators, and must not wait for a thread


def _newest(news: SimpleQueue, done: object) -> Any:
    """The next item; where several wait, the last of them. Nothing is passed over for `done`."""
    item = news.get()
    while item is not done:
        try:
            following = news.get_nowait()
        except Empty:
            break
        if following is done:
            news.put(done)
            break
        item = following
    return item


class ReportTokens(StoppingCriteria):
    """Reports the token ids (B, T) after each token of `generate`. It ends nothing by itself."""

    def __init__(self, report: Callable[[torch.LongTensor], None]):
        self.report = report

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        self.report(input_ids)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
