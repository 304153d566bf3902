"""The journal: what is written is read back, damage is noticed, a kill loses no acknowledged line."""

import contextlib
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dida_core.storage.journal import Journal, read_journal

from tests.helpers import Child


def step(number: int, **values: Any) -> dict[str, Any]:
    return {"event": "step", "step": number, "loss": 1 / number} | values


def epoch(number: int, **values: Any) -> dict[str, Any]:
    return {"event": "epoch", "epoch": number, "step": 10 * number, "seconds": 1.5} | values


EVENTS = [{"event": "start", "time": 1.5}, step(1), step(2, loss=math.nan), epoch(1)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


def write_all(path: Path, events: list[dict[str, Any]]) -> Journal:
    journal = Journal(path)
    for event in events:
        journal.write(event)
    journal.close()
    return journal


def read_counted(path: Path) -> tuple[list[dict[str, Any]], int]:
    events = read_journal(path)
    journal = Journal(path)
    journal.close()
    assert repr(read_journal(path)) == repr(events) == repr(journal.events)
    return events, journal.num_damaged


# fmt: off
VALUES: list[Any] = [math.nan, math.inf, -math.inf, -0.0, 5e-324, 0.1 + 0.2, 10**30, 1, 1.0, True, False]
VALUES += [None, "", "nan", "-inf", "ä 日本 🙂", "a\nb\r\n\t", '"quoted", "crc": "00000000"}', "\0", "\u2028"]
VALUES += ["\ud800", [1, "x", None]]
# fmt: on


def test_values_are_read_back_exactly(path: Path) -> None:
    events = [one for value in VALUES for one in ({"event": "test", "value": value}, {"loss": value})]
    write_all(path, events)
    assert repr(read_journal(path)) == repr(events)
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert [list(line)[:-1] for line in lines] == [list(event) for event in events]


def test_what_cannot_be_written_changes_nothing(path: Path) -> None:
    journal = Journal(path)
    journal.write(step(1))
    for wrong in (object(), [math.nan], np.ones(2)):
        with pytest.raises((TypeError, ValueError)):
            journal.write(step(2, loss=wrong))
    assert journal.write(step(2)) and journal.contradictions == []
    journal.close()
    assert read_counted(path) == ([step(1), step(2)], 0)


def test_steps_can_be_left_out_but_for_the_last_line(path: Path) -> None:
    assert read_journal(path) == read_journal(path, without="step") == []  # it is missing
    write_all(path, [{"event": "start"}, step(1), step(2), epoch(1), step(3), step(4)])
    assert read_journal(path, without="step") == [{"event": "start"}, epoch(1), step(4)]
    write_all(path, [{"event": "end"}])
    assert read_journal(path, without="step") == [{"event": "start"}, epoch(1), {"event": "end"}]


@pytest.mark.parametrize("reopen", [False, True])
def test_the_same_event_is_not_written_twice(path: Path, reopen: bool) -> None:
    journal = Journal(path)
    events = [make(number, f1=math.nan, time=1.0) for number in (1, 2) for make in (step, epoch)]
    others = [{"event": "start", "step": 1}, {"note": 1}] * 2  # such may repeat
    assert all(journal.write(event) for event in [*events, *others])
    if reopen:
        journal.close()
        journal = Journal(path)
    again = [event | {"time": 2.0, "f1": np.float64("nan")} for event in events]
    again = [event | ({"seconds": 9} if "seconds" in event else {}) for event in again]
    assert not any(journal.write(event) for event in again)
    assert journal.write(step(3)) and journal.contradictions == []
    journal.close()
    assert repr(read_journal(path)) == repr([*events, *others, step(3)])


@pytest.mark.parametrize("reopen", [False, True])
def test_a_contradiction_is_noted_and_both_stay(path: Path, reopen: bool) -> None:
    pairs = [(0.5, 0.5000000000000001), (0.0, -0.0), (math.nan, 0.5), (0.5, None), (1, 1.0)]
    before, after = ([step(n, loss=pair[i]) for n, pair in enumerate(pairs, start=1)] for i in (0, 1))
    journal = Journal(path)
    assert all(journal.write(event) for event in before)
    if reopen:
        journal.close()
        journal = Journal(path)
    assert all(journal.write(event) for event in after)
    assert journal.contradictions == [f"step {number}" for number in range(1, 6)]
    journal.close()
    assert repr(read_journal(path)) == repr(before + after)


def test_a_line_that_was_cut_off_is_removed_and_writing_continues(path: Path) -> None:
    write_all(path, EVENTS[:3])
    intact = path.read_bytes()
    write_all(path, EVENTS[3:])
    last = path.read_bytes()[len(intact) :]
    for kept in range(len(last)):
        path.write_bytes(intact + last[:kept])
        assert repr(read_journal(path)) == repr(EVENTS[:3])
        journal = Journal(path)
        assert path.read_bytes() == intact and journal.num_damaged == (1 if kept else 0)
        assert journal.write(EVENTS[3])
        journal.close()
        assert path.read_bytes() == intact + last


def test_every_changed_lost_or_added_byte_is_noticed(path: Path) -> None:
    write_all(path, EVENTS)
    content, whole = path.read_bytes(), [repr(event) for event in EVENTS]
    for at, byte in enumerate(content):
        others = {byte ^ (1 << at % 8), (0, 10, 13, ord("0"), ord('"'))[at % 5]} - {byte}
        for new in [*(bytes([other]) for other in others), (b"", bytes([ord("0"), byte]))[at % 2]]:
            path.write_bytes(content[:at] + new + content[at + 1 :])
            found = [repr(event) for event in read_journal(path)]
            assert found == [event for event in whole if event in found] and 2 <= len(found) < len(whole)
    lines = content.splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"\xff" * 20 + b"\n", lines[1].replace(b"1.0", b"1.1"), *lines[2:]]))
    assert repr(read_counted(path)) == repr(([EVENTS[0], *EVENTS[2:]], 2))
    write_all(path, [step(1)])  # the lost one, again
    assert repr(read_counted(path)) == repr(([EVENTS[0], *EVENTS[2:], step(1)], 2))


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX limits")
def test_a_full_disk_leaves_the_journal_intact(path: Path, tmp_path: Path) -> None:
    def work() -> int:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        journal, number, limits = Journal(path), 0, resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with contextlib.suppress(OSError):
            while True:
                number += 1
                journal.write(step(number, text="x" * 100))
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert journal.write(step(number, text="x" * 100)) and journal.write(step(number + 1))
        journal.close()
        return number

    child = Child(work, tmp_path / "output")
    assert child.wait() and 3 < child.code < 10, child.said()
    events, num_damaged = read_counted(path)
    assert [event["step"] for event in events] == list(range(1, child.code + 2)) and num_damaged == 0
