"""Reading ahead and writing behind: order, bounds, errors, and an end that leaves no thread at work."""

from __future__ import annotations

import threading
import time

import pytest

from mmi_engine.ahead import Writer, ahead


def test_results_come_in_order_and_not_too_many_ahead():
    begun: list[int] = []
    seen: list[int] = []

    def slow(number: int) -> int:
        begun.append(number)
        time.sleep(0.002 * (number % 3))
        return number

    for number in ahead(slow, range(40), 5, lambda number: 0, 1):
        seen.append(number)
        assert len(begun) <= len(seen) + 5
    assert seen == list(range(40))


def test_heavy_results_stop_the_reading_until_they_are_taken():
    begun: list[int] = []

    def note(number: int) -> int:
        begun.append(number)
        return number

    reading = ahead(note, range(40), 30, lambda number: 10, 25)
    for taken, _ in enumerate(reading, 1):
        time.sleep(0.002)
        assert len(begun) <= taken + 5  # three results of weight 10, and what the two threads hold


def test_an_error_comes_where_its_item_was_and_an_early_end_drops_the_rest():
    def odd(number: int) -> int:
        if number == 3:
            raise ValueError("three")
        return number

    seen = []
    with pytest.raises(ValueError, match="three") as caught:
        for number in ahead(odd, range(9), 4, lambda number: 0, 1):
            seen.append(number)
    assert seen == [0, 1, 2]
    del caught  # its traceback holds the first iterator
    before = set(threading.enumerate())
    reading = ahead(odd, range(4, 9), 4, lambda number: 9, 1)
    next(reading)
    reading.close()
    assert set(threading.enumerate()) <= before


def test_a_writer_keeps_order_reports_the_first_error_and_does_nothing_after_it():
    done: list[int] = []
    writer = Writer(3)
    for number in range(20):
        writer.do(lambda number=number: done.append(number))
    writer.finish()
    assert done == list(range(20))

    def fail() -> None:
        raise OSError("disk full")

    writer, done = Writer(3), []
    writer.do(fail)
    with pytest.raises(OSError, match="disk full"):
        for number in range(100):
            writer.do(lambda number=number: done.append(number))
            time.sleep(0.001)
    with pytest.raises(OSError, match="disk full"):
        writer.finish()
    writer.abandon()
    assert done == []


def test_a_writer_holds_on_to_no_more_than_its_bytes():
    """The giver waits while what is queued weighs too much; what is too heavy by itself is done all the same."""
    gate, done = threading.Event(), []
    writer = Writer(100, most=25)

    def action(number: int) -> None:
        gate.wait(10)
        done.append(number)

    def give() -> None:
        for number in range(9):
            writer.do(lambda number=number: action(number), 99 if number == 8 else 10)
            given.append(number)

    given: list[int] = []
    giver = threading.Thread(target=give)
    giver.start()
    deadline = time.monotonic() + 10
    while len(given) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    assert given == [0, 1, 2]  # two of them weigh 20, the third goes beyond, the fourth has to wait
    gate.set()
    giver.join(10)
    writer.finish()
    assert done == list(range(9))


def test_abandoning_drops_what_waits_and_finishes_what_runs():
    begun, gate, done = threading.Event(), threading.Event(), []
    writer = Writer(9)
    writer.do(lambda: (begun.set(), gate.wait(10), done.append("running")))
    assert begun.wait(10)  # an action that has not begun would rightly be dropped
    for _ in range(5):
        writer.do(lambda: done.append("waiting"))
    threading.Timer(0.05, gate.set).start()
    writer.abandon()
    assert done == ["running"]
