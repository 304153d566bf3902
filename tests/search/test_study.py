"""A search: its trials are ordinary runs, and nothing that happens to one of them is the end of the others."""

import errno
import importlib
import io
import json
import os
import pkgutil
import random
import signal
import sys
import time
from pathlib import Path

import optuna
import pytest
import torch
import torch.utils.tensorboard  # before any fork: importing it takes a second
from optuna.trial import TrialState

from dida_tools import training
from dida_tools.config.config import make_global_config
from dida_tools.config.errors import UserError
from dida_tools.config.keys import complete
from dida_tools.config.project import project_of
from dida_tools.search import study as study_module
from dida_tools.search.space import choice, log_uniform, uniform
from dida_tools.training import record as record_module
from dida_tools.training import run as run_module
from dida_tools.training.run import NonFiniteLoss, OutOfMemory, Pruned
from dida_tools.utils.logging import read_log
from dida_tools.utils.logging.journal import read_journal
from dida_tools.utils.logging.runs import read_run_config, run_names
from dida_tools.utils.signals import Preempted

ROUTINES = [
    one.name[:-9] for one in pkgutil.iter_modules(training.__path__) if one.name.endswith("_training")
]
SPACE = {
    "OPTIMIZER_CONFIG.lr": log_uniform(1e-3, 1e-1),
    "OPTIMIZER": choice(torch.optim.AdamW, torch.optim.SGD),
}


@pytest.fixture
def train_with(datasets, global_config, monkeypatch):
    """Real training, by any routine, without what takes most of the time and has no part in the weights."""
    monkeypatch.setattr(run_module, "describe_environment", lambda *_: {})
    monkeypatch.setattr(run_module, "save_picture", lambda *_, **__: None)
    monkeypatch.setattr(run_module, "make_panels", lambda *_, **__: [])

    def make(routine: str = ROUTINES[0]):
        module = importlib.import_module(f"dida_tools.training.{routine}_training")
        return lambda config: module.train(*datasets, config, global_config)

    return make


def rows_of(global_config) -> list[dict]:
    return sorted(read_log(Path(global_config["LOG_DIR"]) / "experiments.csv"), key=lambda row: row["TRIAL"])


def found(search) -> list[tuple]:
    return [(trial.params, trial.state.name, trial.value) for trial in search.trials()]


# -------------------------------------------------------------------------------------------------------- ordinary runs


@pytest.mark.parametrize("routine", ROUTINES)
def test_each_trial_is_a_run_of_its_own_in_every_routine(new_search, train_with, global_config, routine):
    search = new_search(SPACE)
    search.work(train_with(routine), 1)
    rows = rows_of(global_config)
    assert [(row["STUDY"], row["TRIAL"], row["STATUS"]) for row in rows] == [("toy", 0, "finished")]
    for row, trial in zip(rows, search.trials(), strict=True):
        assert row["NAME"] == trial.user_attrs["run"]
        assert row["OPTIMIZER_CONFIG.lr"] == trial.params["OPTIMIZER_CONFIG.lr"]
        assert row["OPTIMIZER"] == trial.params["OPTIMIZER"]
        assert row["validation.f1"] == trial.value
        epochs = read_journal(Path(global_config["LOG_DIR"]) / row["NAME"] / "journal.jsonl")
        validated = {e["epoch"]: e["validation.f1"] for e in epochs if e["event"] == "epoch"}
        assert trial.intermediate_values == validated


@pytest.mark.parametrize("routine", ROUTINES)
def test_a_run_that_is_pruned_says_so_and_can_still_be_trained_to_its_end(
    train_with, tiny_config, global_config, routine
):
    train, log_dir = train_with(routine), Path(global_config["LOG_DIR"])
    expected = train(tiny_config)
    seen = []

    def after_epoch(run) -> bool:  # local: it is in no record
        seen.append(run.history[run.state.epoch]["validation.f1"])
        return run.state.epoch == 1

    with pytest.raises(Pruned):
        train(tiny_config | {"AFTER_EPOCH": after_epoch, "STUDY": "some", "TRIAL": 3})
    name = next(name for name in run_names(log_dir) if name != expected.name)
    row = next(row for row in read_log(log_dir / "experiments.csv") if row["NAME"] == name)
    assert (row["STATUS"], row["EPOCH"], row["RERUNNABLE"], row["TRIAL"]) == ("pruned", 1, "yes", 3)
    assert read_journal(log_dir / name / "journal.jsonl")[-1]["status"] == "pruned"
    assert seen == [expected.history[0]["validation.f1"]]
    config = read_run_config(log_dir / name, project_of("dida_tools"))
    assert "AFTER_EPOCH" not in config
    finished = train(config | {"RESUME": name, "STUDY": None, "TRIAL": None})
    assert finished.digest == expected.digest
    row = next(row for row in read_log(log_dir / "experiments.csv") if row["NAME"] == name)
    assert (row["STATUS"], row["RERUNNABLE"], row["STUDY"]) == ("finished", "yes", None)


def test_a_trial_that_does_not_look_well_is_pruned(new_search, train_with, global_config):
    search = new_search({"OPTIMIZER_CONFIG.lr": choice(1e-2)}, pruning=True, EPOCHS=3)
    for _ in range(5):  # all others were better from the first epoch on
        better = dict.fromkeys((1, 2, 3), 1.5)
        search.study.add_trial(optuna.trial.create_trial(value=1.5, intermediate_values=better))
    search.work(train_with(), 6)
    trial = search.trials()[-1]
    assert (trial.state, list(trial.intermediate_values)) == (TrialState.PRUNED, [1])
    assert [row["STATUS"] for row in rows_of(global_config)] == ["pruned"]
    search = new_search({"OPTIMIZER_CONFIG.lr": choice(1e-2)}, pruning=False, EPOCHS=3)
    search.work(train_with(), 7)
    assert search.trials()[-1].state == TrialState.COMPLETE


def test_a_failed_trial_does_not_end_the_search(new_search, toy_train, capsys):
    def train(config):
        if config["TRIAL"] == 1:
            raise RuntimeError("password=very-secret\nis wrong")
        result = toy_train(config)
        result.state.best = float("nan") if config["TRIAL"] == 2 else result.state.best
        return result

    search = new_search()
    search.work(train, 4)
    assert [trial.state.name for trial in search.trials()] == ["COMPLETE", "FAIL", "FAIL", "COMPLETE"]
    errors = [trial.user_attrs.get("error") for trial in search.trials()]
    assert errors[1] == "RuntimeError: password=[redacted] is wrong"
    assert errors[2] == "f1 was nan in all epochs"
    assert "very-secret" not in capsys.readouterr().out


def failing(toy_train, errors: list):
    """Trains with the toy what does not fail; None: it does not."""

    def train(config):
        error = errors[config["TRIAL"]]
        if error is not None:
            raise error
        return toy_train(config)

    return train


def full_disk() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def caused_by_full_disk() -> Exception:
    error = UserError("a.png: cannot be read")
    error.__cause__ = full_disk()
    return error


@pytest.mark.parametrize(
    "error",
    [full_disk(), caused_by_full_disk(), torch.AcceleratorError("CUDA error: the device is gone")],
    ids=["disk", "cause", "gpu"],
)
def test_what_is_the_fault_of_the_machine_is_not_that_of_the_trial(new_search, toy_train, error):
    search = new_search()
    for _ in range(2):  # nor that of the next one
        with pytest.raises(UserError, match=r"trial 1 cannot be trained on this machine \(.*: mend that"):
            search.work(failing(toy_train, [None, error, None]), 3)
        assert [trial.state.name for trial in search.trials()] == ["COMPLETE", "RUNNING"]
    search.work(toy_train, 3)
    assert [trial.state.name for trial in search.trials()] == ["COMPLETE"] * 3
    for _ in range(5):
        with pytest.raises(UserError, match="trial 3"):
            search.work(failing(toy_train, [None, None, None, error, None]), 5)
    search.work(toy_train, 5)  # it is not tried for ever
    assert [trial.state.name for trial in search.trials()][3:] == ["FAIL", "COMPLETE"]


def test_a_run_that_a_full_disk_has_ended_is_gone_on_with(new_search, train_with, global_config):
    def train(config):
        watch = config["AFTER_EPOCH"]

        def after_epoch(run) -> bool:
            if run.state.epoch == 2:
                raise full_disk()
            return watch(run)

        return train_with()(config | {"AFTER_EPOCH": after_epoch})

    search = new_search(SPACE, EPOCHS=3, CHECKPOINT_SECONDS=0)
    with pytest.raises(UserError, match="No space left"):
        search.work(train, 1)
    assert [(row["STATUS"], row["EPOCH"]) for row in rows_of(global_config)] == [("failed", 2)]
    search.work(train_with(), 1)
    (trial,) = search.trials()
    assert (trial.state, list(trial.intermediate_values)) == (TrialState.COMPLETE, [1, 2, 3])
    assert trial.user_attrs["starts"][1].startswith("last-")
    assert [(row["STATUS"], row["EPOCH"]) for row in rows_of(global_config)] == [("finished", 3)]


def test_a_worker_whose_trials_all_fail_ends_before_they_are_used_up(new_search, toy_train):
    wrong = RuntimeError("the driver is\nwrong")
    search = new_search()
    with pytest.raises(
        UserError, match=r"3 trials in a row .* with RuntimeError: the driver is wrong: mend that"
    ):
        search.work(
            failing(toy_train, [None, wrong, wrong, None, wrong, Pruned(), wrong, wrong, wrong, None]), 10
        )
    states = ["COMPLETE", "FAIL", "FAIL", "COMPLETE", "FAIL", "PRUNED", "FAIL", "FAIL", "FAIL"]
    assert [trial.state.name for trial in search.trials()] == states
    search.work(toy_train, 10)
    assert search.trials()[9].state == TrialState.COMPLETE


@pytest.mark.parametrize(
    "error", [NonFiniteLoss("it is nan"), OutOfMemory("too large"), torch.OutOfMemoryError("too large")]
)
def test_trials_with_bad_values_are_no_reason_to_end(new_search, toy_train, error):
    search = new_search()
    search.work(failing(toy_train, [error] * 5 + [None]), 6)
    assert [trial.state.name for trial in search.trials()] == ["FAIL"] * 5 + ["COMPLETE"]


class FullDisk(io.StringIO):
    """A log file there."""

    def write(self, text: str) -> int:
        raise full_disk()


def test_a_log_that_cannot_be_written_does_not_end_the_search(new_search, toy_train, monkeypatch):
    def train(config):
        if config["TRIAL"] == 0:
            raise RuntimeError("out of luck")
        with monkeypatch.context() as patch:
            patch.setattr(search.storage, "get_trial", lambda *_: 1 / 0)  # what is told meanwhile, too
            return toy_train(config)

    search = new_search()
    monkeypatch.setattr(sys, "stdout", FullDisk())
    search.work(train, 2)
    assert [trial.state.name for trial in search.trials()] == ["FAIL", "COMPLETE"]


@pytest.mark.parametrize(("monitor", "better"), [("max f1", max), ("min f1", min)])
def test_monitor_decides_what_is_best(new_search, toy_train, monitor, better):
    search = new_search(MONITOR=monitor)
    search.work(toy_train, 5)
    values = [trial.value for trial in search.trials()]
    assert search.best_trials()[0].value == better(values)


# ----------------------------------------------------------------------------------------------------------- going on


def test_forty_trials_at_once_are_fifteen_a_restart_and_twenty_five(new_search, toy_train, fork, tmp_path):
    at_once = new_search()
    at_once.work(toy_train, 40)
    file = str(tmp_path / "other.log")
    for number in (15, 40):
        child = fork(lambda number=number: new_search(storage=file).work(toy_train, number))
        assert child.wait() and child.code == 0
        assert len(new_search(storage=file).trials()) == number
    in_parts = new_search(storage=file)
    equal = [one == other for one, other in zip(found(at_once), found(in_parts), strict=True)]
    assert equal == [True] * 40
    assert len({json.dumps(params) for params, *_ in found(at_once)}) == 40  # each is another one
    other_seed = new_search(storage=str(tmp_path / "seed.log"), SEED=1)
    other_seed.work(toy_train, 2)
    assert found(other_seed)[0] != found(at_once)[0]


def test_trials_draw_what_was_not_drawn_before_a_kill_as_if_there_had_been_none(
    new_search, toy_train, tmp_path
):
    expected = new_search()
    expected.work(toy_train, 13)
    search = new_search(storage=str(tmp_path / "other.log"))
    search.work(toy_train, 12)
    suggest = search.space.suggest

    class Killed(BaseException):
        pass

    def draw_one(trial):
        trial.suggest_float("OPTIMIZER_CONFIG.lr", 1e-4, 1e-1, log=True)
        raise Killed

    search.space.suggest = draw_one
    with pytest.raises(Killed):
        search.claim(13)
    search.space.suggest = suggest
    again = new_search(storage=str(tmp_path / "other.log"))
    again.work(toy_train, 13)
    assert found(again) == found(expected)


def test_a_trial_that_somebody_works_on_is_left_to_him(new_search, toy_train, fork, wait_for, tmp_path):
    def hold() -> None:
        claimed = new_search().claim(2)
        (tmp_path / "claimed").touch()
        signal.pause()
        claimed.lock.release()

    child = fork(hold)
    wait_for((tmp_path / "claimed").exists)
    search = new_search()
    search.work(toy_train, 2)
    assert [trial.state.name for trial in search.trials()] == ["RUNNING", "COMPLETE"]
    child.kill()
    search.work(toy_train, 2)
    assert [trial.state.name for trial in search.trials()] == ["COMPLETE", "COMPLETE"]


def test_trials_of_another_folder_are_not_touched(new_search, toy_train, global_config, tmp_path):
    file = str(tmp_path / "shared.log")
    new_search(storage=file).claim(1).lock.release()
    (Path(global_config["LOG_DIR"]) / "search" / "toy" / ".place").write_text("of another machine")
    search = new_search(storage=file)
    search.work(toy_train, 2)
    assert [trial.state.name for trial in search.trials()] == ["RUNNING", "COMPLETE"]


def test_a_trial_whose_process_dies_again_and_again_is_given_up(new_search, toy_train, fork):
    search = new_search()
    for _ in range(5):
        child = fork(lambda: new_search().work(lambda config: os.kill(os.getpid(), signal.SIGKILL), 1))
        assert child.wait() and child.code == -signal.SIGKILL
    search.work(toy_train, 2)
    first, second = search.trials()
    assert (first.state, second.state) == (TrialState.FAIL, TrialState.COMPLETE)
    assert first.user_attrs["error"] == "its process ended 5 times after no checkpoint, 0 epochs"


@pytest.mark.parametrize("moment", ["make_unique_dir", "Journal", "write_record", "write_row"])
def test_a_trial_that_is_killed_while_its_run_begins_is_begun_again(
    new_search, train_with, fork, global_config, monkeypatch, moment
):
    place = record_module.Record if moment == "write_row" else record_module
    original = getattr(place, moment)

    def killed_after(*arguments):
        original(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(place, moment, killed_after)
    child = fork(lambda: new_search(SPACE).work(train_with(), 1))
    assert child.wait() and child.code == -signal.SIGKILL
    monkeypatch.setattr(place, moment, original)
    search = new_search(SPACE)
    search.work(train_with(), 1)
    (trial,) = search.trials()
    assert trial.state == TrialState.COMPLETE, trial.user_attrs
    assert [(row["NAME"], row["STATUS"]) for row in rows_of(global_config)] == [
        (trial.user_attrs["run"], "finished")
    ]


def test_a_signal_ends_after_saving_and_counts_as_no_death(new_search, train_with, toy_train, global_config):
    def train(config):
        watch = config["AFTER_EPOCH"]

        def after_epoch(run) -> bool:
            if run.state.epoch == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return watch(run)

        return train_with()(config | {"AFTER_EPOCH": after_epoch})

    search = new_search(SPACE, EPOCHS=3)
    with pytest.raises(Preempted):
        search.work(train, 2)
    trial = search.trials()[0]
    assert (trial.state, trial.user_attrs["starts"]) == (TrialState.RUNNING, [])
    assert [row["STATUS"] for row in rows_of(global_config)] == ["preempted"]
    search.work(train_with(), 1)
    assert search.trials()[0].state == TrialState.COMPLETE
    rows = rows_of(global_config)
    assert [(row["STATUS"], row["EPOCH"]) for row in rows] == [("finished", 3)]


@pytest.mark.parametrize("moment", ["import", "epoch", "end"])
def test_a_worker_ends_with_its_search_whenever_that_is_killed(
    new_search, toy_train, fork, wait_for, tmp_path, moment
):
    def reach(name: str) -> None:
        if name == moment:
            (tmp_path / "reached").touch()
            wait_for((tmp_path / "killed").exists)

    def train(config):
        watch = config["AFTER_EPOCH"]

        def after_epoch(run) -> bool:
            reach("epoch")
            return watch(run)

        result = toy_train(config | {"AFTER_EPOCH": after_epoch})
        reach("end")
        return result

    def work() -> None:
        try:
            reach("import")
            new_search().work(train, 3)
        except Preempted as error:
            (tmp_path / "told").write_text(str(error))
        finally:
            (tmp_path / "ended").touch()

    def start() -> None:
        os.environ[study_module.SEARCH_PID] = str(os.getpid())  # as Workers does
        if os.fork() == 0:
            work()
            os._exit(0)
        signal.pause()

    parent = fork(start)
    wait_for((tmp_path / "reached").exists)
    parent.kill()
    (tmp_path / "killed").touch()
    wait_for((tmp_path / "ended").exists)
    assert (tmp_path / "told").read_text() == "the search has ended"
    states = {"import": [], "epoch": ["RUNNING"], "end": ["COMPLETE"]}
    assert [trial.state.name for trial in new_search().trials()] == states[moment]


class Storm:
    """Searches whose workers are killed at random moments, and one that nobody disturbs."""

    def __init__(self, new_search, train_with, fork, global_config, tmp_path, monkeypatch) -> None:
        self.new_search, self.train_with, self.fork, self.folders = (
            new_search,
            train_with,
            fork,
            global_config,
        )
        self.tmp_path, self.notes, self.waits = tmp_path, tmp_path / "notes.txt", tmp_path / "waits.txt"
        monkeypatch.setattr(study_module, "_MOST_STARTS", 1000)  # no trial is given up

    def search(self, storage: str | None = None):
        return self.new_search(SPACE, storage=storage, CHECKPOINT_SECONDS=0, EPOCHS=3)

    def work(self, num_trials: int, storage: str | None = None) -> None:
        search = self.search(storage)
        tell, claim = search.study.tell, search.claim

        def timed(num_trials):
            (self.tmp_path / f"works-{os.getpid()}").touch()
            start = time.monotonic()
            claimed = claim(num_trials)
            with open(self.waits, "a") as file:
                file.write(f"{time.monotonic() - start}\n")
            return claimed

        def noting(trial, *arguments, **options):
            told = tell(trial, *arguments, **options)
            with open(self.notes, "a") as file:
                file.write(f"{told.number} {told.value!r}\n")
            return told

        if storage is None:
            search.study.tell, search.claim = noting, timed
        search.work(self.train_with(), num_trials)

    def undisturbed(self, num_trials: int) -> tuple[list, float]:
        """What is found, in a project of its own, and the seconds of a trial."""
        file, start = str(self.tmp_path / "undisturbed.log"), time.monotonic()
        folders = dict(self.folders)
        self.folders.update(make_global_config(self.tmp_path / "undisturbed"))
        child = self.fork(lambda: self.work(num_trials, file))
        self.folders.update(folders)
        assert child.wait(600) and child.code == 0
        self.assert_complete(self.search(file), num_trials)
        return found(self.search(file)), (time.monotonic() - start) / num_trials

    def assert_complete(self, search, num_trials: int) -> None:
        errors = [trial.user_attrs.get("error") for trial in search.trials()]
        assert [trial.state for trial in search.trials()] == [TrialState.COMPLETE] * num_trials, errors

    def rage(self, num_trials: int, num_kills: int, num_workers: int, seconds: float) -> int:
        """Returns how many kills there were, until all trials were done."""
        chance, kills = random.Random(num_kills), 0
        workers = [self.fork(lambda: self.work(num_trials)) for _ in range(num_workers)]
        while any(not worker.wait(0) for worker in workers):
            time.sleep(chance.uniform(0.1, 1.2) * seconds / num_workers)
            alive = [number for number, worker in enumerate(workers) if not worker.wait(0)]
            alive = [number for number in alive if (self.tmp_path / f"works-{workers[number].pid}").exists()]
            if alive and kills < num_kills:
                number = chance.choice(alive)
                workers[number].kill()
                kills += workers[number].code == -signal.SIGKILL
                workers[number] = self.fork(lambda: self.work(num_trials))
        assert [worker.code for worker in workers] == [0] * num_workers, (
            self.tmp_path / "output.txt"
        ).read_text()
        self.assert_complete(self.search(), num_trials)
        stored = {trial.number: trial for trial in self.search().trials()}
        for line in self.notes.read_text().splitlines():
            number, value = line.split()
            assert repr(stored[int(number)].value) == value, f"trial {number} was told and is lost"
        rows = rows_of(self.folders)  # one run a trial, none begun twice
        assert [(row["TRIAL"], row["STATUS"]) for row in rows] == [(n, "finished") for n in range(num_trials)]
        return kills


@pytest.fixture
def new_storm(new_search, train_with, fork, global_config, tmp_path, monkeypatch):
    return lambda: Storm(new_search, train_with, fork, global_config, tmp_path, monkeypatch)


def test_a_worker_that_is_killed_again_and_again_finds_what_it_would_have_found(new_storm):
    storm = new_storm()
    expected, seconds = storm.undisturbed(3)
    kills = storm.rage(num_trials=3, num_kills=5, num_workers=1, seconds=seconds)
    assert kills > 1
    assert found(storm.search()) == expected


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_eighty_kills_lose_nothing_and_hold_nobody_up(new_storm, capsys):
    storm = new_storm()
    _, seconds = storm.undisturbed(2)
    kills = storm.rage(num_trials=40, num_kills=80, num_workers=2, seconds=seconds)
    with capsys.disabled():
        waits = [float(line) for line in storm.waits.read_text().split()]
        again = sum(len(trial.user_attrs["starts"]) - 1 for trial in storm.search().trials())
        print(
            f"\n{kills} kills, 40 trials: 0 lost, {again} continued, {max(waits):.1f} s at most for the next"
        )
    assert kills == 80


# ------------------------------------------------------------------------------------------------ what belongs together


@pytest.mark.parametrize(
    ("space", "changes", "told"),
    [
        ({"OPTIMIZER_CONFIG.lr": log_uniform(1e-4, 1e-1)}, {}, "another the space of MODEL_CONFIG.dropout"),
        (None, {"EPOCHS": 3}, r"EPOCHS \(was 2, is 3\)"),
        (None, {"MONITOR": "min loss"}, "MONITOR"),
        (None, {"DEVICE": "cuda", "CHECKPOINT_SECONDS": 3}, None),
    ],
)
def test_a_study_does_not_go_on_with_what_cannot_be_compared(new_search, toy_train, space, changes, told):
    both = {"OPTIMIZER_CONFIG.lr": log_uniform(1e-4, 1e-1), "MODEL_CONFIG.dropout": uniform(0.0, 0.5)}

    def begin(space, **changes):
        search = new_search(space or both, **changes)
        from dida_tools.config.capture import capture

        search.begin(capture(complete(search.config), project_of("dida_tools")))
        return search

    begin(None).work(toy_train, 1)
    begin(None)
    if told is None:
        begin(space, **changes)
    else:
        with pytest.raises(UserError, match=told) as refused:
            begin(space, **changes)
        assert "--study toy-2" in str(refused.value)


def test_the_best_config_is_saved_and_comes_back_with_its_objects(new_search, toy_train, tiny_config):
    from dida_tools.config.capture import capture

    search = new_search()
    with pytest.raises(UserError, match="no finished trial"):
        search.best_config()
    search.begin(capture(complete(tiny_config), project_of("dida_tools")))
    search.work(toy_train, 6)
    best, config = search.best_trials()[0], search.best_config()
    assert config["OPTIMIZER"].__name__ == best.params["OPTIMIZER"].partition(":")[2]
    assert config["OPTIMIZER"] in (torch.optim.SGD, torch.optim.AdamW)
    assert config["MODEL_CONFIG"]["bulk_ch"] == best.params["MODEL_CONFIG.bulk_ch"]
    assert config["OPTIMIZER_CONFIG"] == {"lr": best.params["OPTIMIZER_CONFIG.lr"]}
    assert (config["SESSION_NAME"], config["STUDY"], config["TRIAL"]) == ("toy-best", "toy", best.number)
    saved = json.loads(search.save_best().read_text())
    assert (saved["trial"], saved["value"], saved["run"]) == (best.number, best.value, best.user_attrs["run"])


def test_a_storage_that_is_lost_meanwhile_is_said(new_search, toy_train, tmp_path):
    file = tmp_path / "study.db"
    search = new_search(storage=f"sqlite:///{file}")
    search.work(toy_train, 1)
    file.write_bytes(b"no database any more" * 1000)
    with pytest.raises(UserError, match=r"the storage cannot be reached .*: what was done is saved"):
        search.trials()


def test_a_name_that_is_none_for_a_folder_is_refused(tiny_config, global_config):
    from dida_tools.search.space import Space
    from dida_tools.search.study import Search

    with pytest.raises(UserError, match="a-b"):
        Search("a/b", Space(SPACE), tiny_config, global_config)
