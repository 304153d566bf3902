"""The workers on one machine, and what people read."""

import io
import os
import signal
import sys
import time
from types import SimpleNamespace

import optuna
import pytest

from dida_tools.config.errors import UserError
from dida_tools.search.pictures import find_importance, save_pictures
from dida_tools.search.workers import Board, Workers, duration, watch
from dida_tools.utils.signals import Preempted

WAITS = (
    "signal.signal(signal.SIGTERM, lambda *_: (print('asked', flush=True), sys.exit(75)))\n"
    "print('ready', flush=True)\ntime.sleep(100)"
)


def command(code: str) -> list[str]:
    return [sys.executable, "-c", f"import os, pathlib, signal, sys, time\n{code}"]


def run_out(workers: Workers) -> None:
    workers.start()
    while workers.look(0):
        time.sleep(0.02)


def test_each_worker_gets_its_number_its_threads_its_search_and_a_log(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    code = "print(sys.argv[1], os.environ['OMP_NUM_THREADS'], os.environ['SEARCH_PID'])"
    workers = Workers(command(code), 3, tmp_path)
    run_out(workers)
    told = [workers.log(worker).read_text().split() for worker in range(3)]
    assert told == [[str(worker), "4", str(os.getpid())] for worker in range(3)]


def test_a_killed_worker_is_started_again(tmp_path):
    code = f"mark = pathlib.Path({str(tmp_path / 'mark')!r})\nif not mark.exists():\n    mark.touch()\n"
    workers = Workers(command(f"{code}    os.kill(os.getpid(), signal.SIGKILL)\nprint('done')"), 1, tmp_path)
    run_out(workers)
    assert workers.log(0).read_text() == "done\n"


@pytest.mark.parametrize(
    "code", ["raise OSError('the disk is full')", "os.kill(os.getpid(), signal.SIGKILL)"]
)
def test_a_worker_that_fails_or_dies_for_ever_is_told_with_its_last_words(tmp_path, code):
    workers = Workers(command(code), 1, tmp_path)
    with pytest.raises(UserError, match="the disk is full" if "disk" in code else "exit code -9"):
        run_out(workers)


def test_workers_are_asked_to_end_once(tmp_path, wait_for):
    workers = Workers(command(WAITS), 2, tmp_path)
    workers.start()
    for worker in range(2):
        wait_for(lambda worker=worker: "ready" in workers.log(worker).read_text())
    workers.stop()
    workers.wait()
    assert not workers.look(0)
    assert [workers.log(worker).read_text() for worker in range(2)] == ["ready\nasked\n"] * 2


@pytest.mark.parametrize("trouble", ["start", "signal", "storage"])
def test_no_worker_is_left_by_what_goes_wrong_while_they_are_started(
    new_search, tmp_path, wait_for, monkeypatch, trouble
):
    search, workers = new_search(), Workers(command(WAITS), 2, tmp_path)
    log, trials = workers.log, search.trials

    def log_of(worker: int):
        if worker == 1:
            wait_for(lambda: "ready" in log(0).read_text())
            if trouble == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
            if trouble == "storage":
                monkeypatch.setattr(search, "trials", lambda *_: 1 / 0)
        return tmp_path if worker == 1 and trouble == "start" else log(worker)

    monkeypatch.setattr(workers, "log", log_of)
    error = {"start": IsADirectoryError, "signal": Preempted, "storage": ZeroDivisionError}[trouble]
    with pytest.raises(error):
        watch(search, workers, 2)
    assert log(0).read_text() == "ready\nasked\n"
    assert trials() == []


def test_no_worker_is_started_where_the_storage_cannot_be_reached(tmp_path):
    def trials(*_):
        raise UserError("the storage cannot be reached")

    workers = Workers(command(WAITS), 1, tmp_path)
    with pytest.raises(UserError, match="cannot be reached"):
        watch(SimpleNamespace(trials=trials, name="toy"), workers, 1)
    assert not workers.log(0).exists()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_board_says_what_each_trial_reached_and_how_the_search_stands(new_search, toy_train):
    search = new_search()
    search.begin({"version": 1, "config": {"DATE": None}})
    search.work(toy_train, 1)
    board = Board(search, 6, terminal := Terminal())
    assert "has 1 trials already" in terminal.getvalue()

    def train(config):
        if config["TRIAL"] == 2:
            raise RuntimeError("out of luck")
        return toy_train(config)

    search.work(train, 4)
    search.claim(5)
    done = board.update()
    lines = terminal.getvalue().replace("\r", "\n").splitlines()
    values = {trial.number: trial.value for trial in search.trials()}
    assert any(line.startswith(f"trial   1: f1 {values[1]:.4f}  lr=") for line in lines)
    assert any("trial   2: failed: RuntimeError: out of luck" in line for line in lines)
    best = search.best_trials()[0]
    assert lines[-1].startswith(
        f"4 of 6 trials, 1 running, best f1 {best.value:.4f} (trial {best.number}), about "
    )
    assert board.update() == done
    search.study.tell(4, 1.0)
    assert board.update() > done
    told = [
        line for line in terminal.getvalue().replace("\r", "\n").splitlines() if line.startswith("trial   4")
    ]
    assert len(told) == 1 and told[0].rstrip().endswith("best so far")


@pytest.mark.parametrize(("seconds", "text"), [(3.2, "3 s"), (62, "1 min 2 s"), (7380, "2 h 3 min")])
def test_times_are_for_people(seconds, text):
    assert duration(seconds) == text


def test_pictures_are_drawn_and_tell_what_matters(new_search, toy_train):
    search = new_search()
    assert save_pictures(search) == []
    search.work(toy_train, 12)
    search.study.add_trial(
        optuna.trial.create_trial(
            state=optuna.trial.TrialState.PRUNED,
            value=0.1,
            params=search.trials()[0].params,
            distributions=search.trials()[0].distributions,
        )
    )
    files = save_pictures(search)
    assert [file.name for file in files] == ["history.png", "slices.png", "importance.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    importance = find_importance(search)
    assert set(importance) == set(search.space.text())
    assert list(importance)[-1] != "OPTIMIZER_CONFIG.lr"  # the toy's value follows from it above all
