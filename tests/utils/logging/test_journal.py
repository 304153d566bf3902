import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dida_tools.utils.logging.journal import Journal, read_journal

ROOT = Path(__file__).parents[2]
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and limits")


def step(number: int, **values: Any) -> dict[str, Any]:
    return {"event": "step", "step": number, "loss": 1 / number} | values


def epoch(number: int, **values: Any) -> dict[str, Any]:
    return {"event": "epoch", "epoch": number, "step": 10 * number, "seconds": 1.5} | values


EVENTS = [{"event": "start", "time": 1.5}, step(1), step(2, loss=math.nan), epoch(1)]


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
    assert repr(read_journal(path)) == repr(events)
    return events, journal.num_damaged


# ----------------------------------------------------------------------------------------------------------- round trip


VALUES: list[Any] = [
    math.nan,
    math.inf,
    -math.inf,
    -0.0,
    5e-324,
    0.1 + 0.2,
    10**30,
    1,
    1.0,
    True,
    False,
    None,
    "",
    "nan",
    "inf",
]
VALUES += [
    "-inf",
    "ä 日本 🙂",
    "a\nb\r\n\t",
    '"quoted", "crc": "00000000"}',
    "\0",
    "\u2028",
    "\ud800",
    [1, "x", None],
]


@pytest.mark.parametrize("value", VALUES, ids=ascii)
def test_values_are_read_back_exactly(tmp_path: Path, value: Any) -> None:
    events = [{"event": "test", "value": value}, step(1, loss=value), {"event": "end"}]
    write_all(tmp_path / "j", events)
    assert repr(read_journal(tmp_path / "j")) == repr(events)
    assert len((tmp_path / "j").read_bytes().splitlines()) == 3


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    events=st.lists(
        st.dictionaries(
            st.text(max_size=5), st.none() | st.booleans() | st.integers() | st.floats() | st.text()
        ),
        max_size=4,
    )
)
def test_events_are_read_back_exactly(
    tmp_path_factory: pytest.TempPathFactory, events: list[dict[str, Any]]
) -> None:
    path = tmp_path_factory.mktemp("log") / "journal.jsonl"
    write_all(path, events)
    assert repr(read_counted(path)) == repr((events, 0))


def test_numbers_of_numpy_become_plain_ones(tmp_path: Path) -> None:
    write_all(tmp_path / "j", [step(1, loss=np.float64(0.1), f1=np.float64("nan"))])
    assert repr(read_journal(tmp_path / "j")) == repr([step(1, loss=0.1, f1=math.nan)])


def test_each_line_is_json(tmp_path: Path) -> None:
    write_all(tmp_path / "j", EVENTS)
    lines = [json.loads(line) for line in (tmp_path / "j").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", "step", "step", "epoch"]


def test_a_missing_journal_is_empty(tmp_path: Path) -> None:
    assert read_journal(tmp_path / "j") == []
    assert read_counted(tmp_path / "j") == ([], 0)


def test_what_cannot_be_written_changes_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.write(step(1))
    for wrong in (object(), [math.nan], np.ones(2)):
        with pytest.raises((TypeError, ValueError)):
            journal.write(step(2, loss=wrong))
    assert journal.write(step(2)) and journal.contradictions == []
    journal.close()
    assert read_counted(tmp_path / "j") == ([step(1), step(2)], 0)


# ------------------------------------------------------------------------------------------------------- the same again


@pytest.mark.parametrize("make", [step, epoch])
@pytest.mark.parametrize("reopen", [False, True])
def test_the_same_event_is_not_written_twice(tmp_path: Path, make: Any, reopen: bool) -> None:
    journal = Journal(tmp_path / "j")
    assert all(journal.write(make(number, f1=math.nan)) for number in (1, 2, 3))
    if reopen:
        journal.close()
        journal = Journal(tmp_path / "j")
    assert not any(journal.write(make(number, f1=math.nan)) for number in (2, 3))
    assert journal.write(make(4))
    assert journal.contradictions == []
    journal.close()
    events = read_journal(tmp_path / "j")
    assert [event[make.__name__] for event in events] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "first, second",
    [
        ({"loss": 0.5}, {"loss": 0.5000000000000001}),
        ({"loss": 0.0}, {"loss": -0.0}),
        ({"loss": math.nan}, {"loss": 0.5}),
        ({"loss": 0.5}, {}),
        ({"loss": 1}, {"loss": 1.0}),
    ],
)
@pytest.mark.parametrize("reopen", [False, True])
def test_a_contradiction_is_noted_and_both_stay(
    tmp_path: Path, first: dict, second: dict, reopen: bool
) -> None:
    event = {"event": "step", "step": 7}
    journal = Journal(tmp_path / "j")
    journal.write(event | first)
    if reopen:
        journal.close()
        journal = Journal(tmp_path / "j")
    assert journal.write(event | second)
    assert journal.contradictions == ["step 7"]
    journal.close()
    assert repr(read_journal(tmp_path / "j")) == repr([event | first, event | second])


def test_times_are_no_contradiction(tmp_path: Path) -> None:
    write_all(tmp_path / "j", [epoch(1, seconds=1.0, time=5.0)])
    assert write_all(tmp_path / "j", [epoch(1, seconds=9.0, time=6.0)]).contradictions == []


def test_numbers_of_numpy_are_no_contradiction(tmp_path: Path) -> None:
    again = [step(1, loss=np.float64(0.1)), step(2, loss=np.float64("nan"))]
    write_all(tmp_path / "j", again)
    assert write_all(tmp_path / "j", again).contradictions == []


def test_other_events_may_repeat_and_kinds_are_told_apart(tmp_path: Path) -> None:
    events = [
        {"event": "start", "step": 1},
        step(1),
        epoch(1),
        {"event": "start", "step": 1},
        {"note": 1},
        {"note": 1},
    ]
    assert write_all(tmp_path / "j", events).contradictions == []
    assert read_journal(tmp_path / "j") == events


# --------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("kept", [0, 1, 10, -10, -3, -2, -1])
def test_a_line_that_was_cut_off_is_removed_and_writing_goes_on(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "j"
    write_all(path, EVENTS[:3])
    whole = path.read_bytes()
    write_all(path, EVENTS[3:])
    last = path.read_bytes()[len(whole) :]
    path.write_bytes(whole + last[:kept])
    assert repr(read_journal(path)) == repr(EVENTS[:3])
    journal = Journal(path)
    assert path.read_bytes() == whole and journal.num_damaged == (1 if kept else 0)
    assert journal.write(EVENTS[3])
    journal.close()
    assert path.read_bytes() == whole + last
    assert repr(read_counted(path)) == repr((EVENTS, 0))


def test_a_damaged_line_in_the_middle_is_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "j"
    write_all(path, [step(number) for number in range(1, 10)])
    lines = path.read_bytes().splitlines(keepends=True)
    lines[3] = lines[3].replace(b"0.25", b"0.26")
    lines[6] = b"\xff" * 20 + b"\n"
    path.write_bytes(b"".join(lines))
    assert read_counted(path) == ([step(number) for number in (1, 2, 3, 5, 6, 8, 9)], 2)
    write_all(path, [step(4), step(10)])
    assert read_counted(path) == ([step(number) for number in (1, 2, 3, 5, 6, 8, 9, 4, 10)], 2)


def test_every_changed_byte_is_noticed_and_never_a_wrong_value(tmp_path: Path) -> None:
    path = tmp_path / "j"
    write_all(path, EVENTS)
    content = path.read_bytes()
    whole = [repr(event) for event in EVENTS]
    for at, byte in enumerate(content):
        for other in {byte ^ 1, byte ^ 0x20, byte ^ 0x80, 0, 10, 13, ord("0"), ord('"')} - {byte}:
            path.write_bytes(content[:at] + bytes([other]) + content[at + 1 :])
            events, num_damaged = read_counted(path)
            found = [repr(event) for event in events]
            assert (
                num_damaged >= 1 and len(found) >= 2 and found == [event for event in whole if event in found]
            )


def test_every_lost_or_added_byte_is_noticed_and_never_a_wrong_value(tmp_path: Path) -> None:
    path = tmp_path / "j"
    write_all(path, EVENTS)
    content = path.read_bytes()
    whole = [repr(event) for event in EVENTS]
    for at in range(len(content)):
        for text in (content[:at] + content[at + 1 :], content[:at] + b"0" + content[at:]):
            path.write_bytes(text)
            events, num_damaged = read_counted(path)
            found = [repr(event) for event in events]
            assert num_damaged >= 1 and found == [event for event in whole if event in found]


# -------------------------------------------------------------------------------------------------------------- crashes


WRITER = """
import sys
from dida_tools.utils.logging.journal import Journal
journal = Journal(sys.argv[1])
first = int(sys.argv[2])
print("ready", flush=True)
for number in range(first, first + 10**6):
    journal.write({"event": "step", "step": number, "loss": number / 3, "text": "x" * 300})
    if number % 5 == 0:
        journal.write({"event": "epoch", "epoch": number, "loss": float("nan")})
    print(number, flush=True)
"""


@posix
def test_a_killed_writer_loses_no_line_it_acknowledged(tmp_path: Path) -> None:
    path = tmp_path / "j"
    chance = random.Random(0)
    acknowledged: list[int] = []
    for _ in range(20):
        first = acknowledged[-1] + 1 if acknowledged else 1
        command = [sys.executable, "-c", WRITER, str(path), str(first)]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
        time.sleep(chance.random() * 0.01)
        writer.send_signal(signal.SIGKILL)
        acknowledged += [int(line) for line in writer.communicate()[0].split("\n")[:-1]]
        events, num_damaged = read_counted(path)
        steps = {event["step"]: event["loss"] for event in events if event["event"] == "step"}
        assert all(steps[number] == number / 3 for number in acknowledged) and num_damaged <= 1
        assert {event["epoch"] for event in events if event["event"] == "epoch"} >= {
            number for number in acknowledged if number % 5 == 0
        }
        numbers = [event["step"] for event in events if event["event"] == "step"]
        assert numbers == sorted(set(numbers)) and len(numbers) <= len(acknowledged) + 20
    assert len(acknowledged) > 20


FULL = """
import resource, signal, sys
from dida_tools.utils.logging.journal import Journal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
journal = Journal(sys.argv[1])
event = {"event": "step", "loss": 0.5, "text": "x" * 100}
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
number = 0
try:
    while True:
        number += 1
        journal.write(event | {"step": number})
except OSError:
    pass
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert journal.write(event | {"step": number})
journal.write(event | {"step": number + 1})
journal.close()
print(number)
"""


@posix
def test_a_full_disk_leaves_the_journal_whole(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL, str(tmp_path / "j")]
    number = int(subprocess.run(command, capture_output=True, check=True, text=True, cwd=ROOT).stdout)
    events, num_damaged = read_counted(tmp_path / "j")
    assert (
        [event["step"] for event in events] == list(range(1, number + 2)) and num_damaged == 0 and number > 3
    )


def test_what_was_written_is_in_the_file_at_once(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    for number in range(1, 5):
        journal.write(step(number))
        assert read_journal(tmp_path / "j")[-1] == step(number)
    journal.sync()
    journal.close()
