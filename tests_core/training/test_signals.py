"""The first signal sets a flag, the second one ends the process; afterwards everything is as it was."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from dida_core.training import signals
from dida_core.training.signals import (
    Preempted,
    ignore_signals,
    install_handlers,
    raise_if_stop_requested,
    stop_on_signals,
    stop_requested,
)

from tests.helpers import CRASHED, Child

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")


def send(name: str) -> None:
    os.kill(os.getpid(), getattr(signal, name))


def handlers() -> list:
    return [signal.getsignal(getattr(signal, name)) for name in NAMES]


def exit_code(function: Callable[[], object], folder: Path) -> int | None:
    """Run a function in a process of its own. Return its exit code; after a signal, its number negated."""
    child = Child(lambda: int(function() or 0), folder / "log")
    assert child.wait(), "the process has not ended"
    return child.code


@pytest.fixture(autouse=True)
def _handlers_of_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    before = handlers()
    yield
    assert handlers() == before
    assert not stop_requested()


def custom(*_: object) -> None:
    """A handler of the user's own."""


@pytest.mark.parametrize("name", NAMES)
def test_a_signal_sets_a_flag_and_reports_it_once(name, capfd):
    raise_if_stop_requested()
    for _ in range(2):  # each time begins without a flag
        with stop_on_signals():
            raise_if_stop_requested()
            assert not stop_requested()
            send(name)
            assert stop_requested()
            with pytest.raises(Preempted, match=f"{name} was received"):
                raise_if_stop_requested()
        raise_if_stop_requested()
        said = capfd.readouterr().err
        assert said.count(name) == 1
        assert "saving what is done" in said and "A second signal ends it at once." in said


def test_nobody_who_catches_exceptions_catches_it():
    assert issubclass(Preempted, BaseException)
    assert not issubclass(Preempted, Exception | KeyboardInterrupt | SystemExit)


def test_of_several_processes_the_first_one_reports_it(monkeypatch, capfd):
    monkeypatch.setenv("RANK", "1")
    with stop_on_signals():
        send("SIGTERM")
        assert stop_requested()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("before", [custom, signal.SIG_IGN, signal.SIG_DFL, signal.default_int_handler])
@pytest.mark.parametrize("error", [None, ValueError, Preempted])
def test_the_handlers_of_before_come_back(before, error):
    originals = handlers()
    try:
        for name in NAMES:
            signal.signal(getattr(signal, name), before)
        with contextlib.suppress(ValueError, Preempted), stop_on_signals():
            assert before not in handlers()
            send("SIGTERM")
            if error is not None:
                raise error
        assert handlers() == [before] * len(NAMES) and not stop_requested()
    finally:
        for name, handler in zip(NAMES, originals, strict=True):
            signal.signal(getattr(signal, name), handler)


def test_one_within_another_keeps_the_flag_and_the_handlers_which_can_be_set_again():
    with stop_on_signals():
        mine = handlers()
        with stop_on_signals():
            send("SIGTERM")
        assert stop_requested() and handlers() == mine
        signal.signal(signal.SIGTERM, custom)  # as a library does
        install_handlers()
        assert handlers() == mine


def test_in_another_thread_nothing_is_changed_and_the_flag_is_seen():
    before, seen = handlers(), list[object]()

    def run() -> None:
        install_handlers()
        with stop_on_signals():
            seen.extend([handlers(), stop_requested()])

    def in_thread() -> None:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    in_thread()
    with stop_on_signals():
        send("SIGUSR1")
        mine = handlers()
        in_thread()
    assert seen == [before, False, mine, True]


@pytest.mark.parametrize("first", NAMES)
def test_a_second_interrupt_is_a_keyboard_interrupt(first):
    with pytest.raises(KeyboardInterrupt), stop_on_signals():
        send(first)
        send("SIGINT")


@pytest.mark.parametrize(("first", "second"), [("SIGINT", "SIGTERM"), ("SIGTERM", "SIGUSR1")])
def test_a_second_signal_ends_the_process(first, second, tmp_path):
    def run() -> None:
        with stop_on_signals():
            send(first)
            send(second)
            time.sleep(20)

    assert exit_code(run, tmp_path) == -getattr(signal, second)


@pytest.mark.parametrize("last", ["SIGINT", "SIGTERM"])
def test_under_torchrun_a_repetition_within_seconds_is_the_same_request(monkeypatch, tmp_path, last):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")

    def run() -> None:
        now = [1000.0]
        monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
        with stop_on_signals():
            for name, seconds in (("SIGINT", 0.0), ("SIGINT", 0.5), ("SIGTERM", 2.0), ("SIGINT", 4.9)):
                now[0] = 1000.0 + seconds
                send(name)
                assert stop_requested()
            now[0] = 1005.1
            send(last)
            time.sleep(20)

    assert exit_code(run, tmp_path) == (CRASHED if last == "SIGINT" else -signal.SIGTERM)
    said = (tmp_path / "log").read_text()
    assert said.count("saving what is done") == 1 and ("KeyboardInterrupt" in said) == (last == "SIGINT")


def test_a_process_that_ignores_signals_lives_on(tmp_path):
    def run() -> int:
        with stop_on_signals():
            ignore_signals()
            for name in NAMES * 2:
                send(name)
            return 1 if stop_requested() else 7

    assert exit_code(run, tmp_path) == 7
