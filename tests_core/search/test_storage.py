"""The journal file of trials: nobody waits for a killed worker, and what it has half written is removed."""

import signal
import sys

import optuna
import pytest
from dida_core.errors import UserError
from dida_core.search.storage import KernelLock, open_storage

from tests.helpers import wait_until


def new_study(file, name="study") -> optuna.Study:
    return optuna.create_study(storage=open_storage(str(file)), study_name=name, load_if_exists=True)


def test_a_killed_holder_of_the_lock_holds_nobody_up(tmp_path, fork):
    file = tmp_path / "journal.log"
    new_study(file)

    def hold() -> None:
        lock = KernelLock(file)
        lock.acquire()
        (tmp_path / "held").touch()
        signal.pause()
        lock.release()

    def take() -> None:
        KernelLock(file).acquire()
        (tmp_path / "taken").touch()

    holder = fork(hold)
    wait_until((tmp_path / "held").exists)
    other = fork(take)
    assert not other.wait(0.5) and not (tmp_path / "taken").exists()  # one at a time
    holder.kill()
    assert other.wait() and (tmp_path / "taken").exists()


def test_a_line_that_was_cut_off_by_a_kill_is_removed_and_the_next_one_is_intact(tmp_path):
    file = tmp_path / "journal.log"
    study = new_study(file)
    study.add_trial(optuna.trial.create_trial(value=1.0))
    intact = file.read_bytes()
    study.add_trial(optuna.trial.create_trial(value=2.0))
    last = file.read_bytes()[len(intact) :]
    for end in (1, 20, -1):  # of the second trial, only the beginning is written
        file.write_bytes(intact + last[:end])
        assert [trial.value for trial in new_study(file).trials] == [1.0]
        new_study(file).add_trial(optuna.trial.create_trial(value=3.0))
        assert [trial.value for trial in new_study(file).trials] == [1.0, 3.0]


def test_processes_that_write_at_once_lose_nothing(tmp_path, fork):
    file = tmp_path / "journal.log"
    new_study(file)

    def add(worker: int) -> None:
        study = new_study(file)
        for number in range(10):
            study.add_trial(optuna.trial.create_trial(value=float(100 * worker + number)))

    children = [fork(lambda worker=worker: add(worker)) for worker in range(3)]
    assert all(child.wait() and child.code == 0 for child in children)
    values = sorted(trial.value for trial in new_study(file).trials)
    assert values == [100 * worker + number for worker in range(3) for number in range(10)]


def test_what_cannot_be_opened_is_reported_without_the_password(monkeypatch):
    with pytest.raises(UserError) as refused:
        open_storage("postgresql+nothing://me:very-secret@localhost/name")
    assert "--storage" in str(refused.value) and "very-secret" not in str(refused.value)
    monkeypatch.setitem(sys.modules, "psycopg", None)  # as missing as can be
    with pytest.raises(UserError, match=r"needs psycopg, .* not installed: pip install 'psycopg\[binary\]'"):
        open_storage("postgresql://me@localhost/name")
