"""Computations that can be stopped."""

import time
from threading import Event, Thread

import pytest

from vlv_app.work import Stopped, watch


def drain(generator):
    items = []
    while True:
        try:
            items.append(next(generator))
        except StopIteration as ended:
            return items, ended.value


def test_it_yields_what_is_reported_and_returns_the_result():
    def work(report):
        report("first")
        time.sleep(0.2)  # longer than the interval, so that nothing is passed over
        report("last")
        return "result"

    assert drain(watch(work)) == (["first", "last"], "result")


def test_fast_reports_are_passed_over_for_newer_ones():
    def work(report):
        for number in range(10_000):
            report(number)

    items, _ = drain(watch(work))
    assert items[0] == 0 and items == sorted(items) and len(items) < 1000


def test_an_error_ends_the_generator():
    def work(report):
        report("started")
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        drain(watch(work))


def test_closing_stops_the_work_at_its_next_report():
    stopped, going = Event(), Event()

    def work(report):
        try:
            while True:
                report("step")
                going.wait(0.01)
        except Stopped:
            stopped.set()
            raise

    generator = watch(work)
    assert next(generator) == "step"
    generator.close()
    assert stopped.wait(60)


def test_a_generator_that_nobody_holds_stops_too():
    """Gradio drops the generator of a request that is cancelled before its first value."""
    stopped = Event()

    def work(report):
        try:
            while True:
                report("step")
        except Stopped:
            stopped.set()
            raise

    def start():
        next(watch(work))

    thread = Thread(target=start)
    thread.start()
    thread.join()
    assert stopped.wait(60)
