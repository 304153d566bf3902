"""A search: its trials are ordinary runs, and what happens to one of them is not the end of the others."""

import errno
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
import torch
import torch.utils.tensorboard  # before any fork: importing it takes a second
from dida_core.config.capture import capture
from dida_core.config.keys import complete
from dida_core.config.project import project_of
from dida_core.errors import UserError
from dida_core.runs import record as record_module
from dida_core.runs.failures import NonFiniteLoss, OutOfMemory, Pruned
from dida_core.runs.lookup import read_run_config, run_names
from dida_core.search import workers as workers_module
from dida_core.search.space import Space, choice, log_uniform, uniform
from dida_core.search.study import Search
from dida_core.search.workers import Worker, run_workers
from dida_core.training.signals import Preempted
from optuna.trial import TrialState

from tests.helpers import (
    FIRST,
    PACKAGE,
    ROUTINES,
    events_of,
    global_config_of,
    load_routine,
    rows_of,
    wait_until,
)

SPACE = {
    "OPTIMIZER_CONFIG.lr": log_uniform(1e-3, 1e-1),
    "OPTIMIZER": choice(torch.optim.AdamW, torch.optim.SGD),
}


@pytest.fixture
def train_with(datasets, global_config, quick):
    """Real training, by any routine, without what takes most of the time and has no part in the weights."""
    return lambda routine="pytorch": (
        lambda config: load_routine(routine).train(*datasets, config, global_config)
    )


def found(search) -> list[tuple]:
    return [(trial.params, trial.state.name, trial.value) for trial in search.trials()]


def states(search) -> str:
    """The states of the trials by their first letters, such as "CFR"."""
    return "".join(trial.state.name[0] for trial in search.trials())


# ----------------------------------------------------------------------------------------- ordinary runs


SLOW = pytest.mark.slow
EACH_ROUTINE = pytest.mark.parametrize(
    "routine", [pytest.param(one, marks=() if one == FIRST else SLOW) for one in ROUTINES]
)


@EACH_ROUTINE
def test_each_trial_is_a_run_of_its_own_in_every_routine(
    new_search, work, train_with, global_config, routine
):
    search = new_search(SPACE)
    work(search, train_with(routine), 1)
    [row], [trial] = rows_of(global_config), search.trials()
    assert (row["STUDY"], row["TRIAL"], row["STATUS"]) == ("toy", 0, "finished")
    assert row["NAME"] == trial.user_attrs["run"] and row["validation.f1"] == trial.value
    for key in SPACE:
        assert row[key] == trial.params[key]
    epochs = events_of(Path(global_config["LOG_DIR"]) / row["NAME"], "epoch")
    assert trial.intermediate_values == {event["epoch"]: event["validation.f1"] for event in epochs}


@EACH_ROUTINE
def test_a_pruned_run_says_so_and_can_still_be_trained_to_its_end(
    train_with, tiny_config, global_config, routine
):
    train, log_dir, seen = train_with(routine), Path(global_config["LOG_DIR"]), []
    expected = train(tiny_config)

    def after_epoch(run) -> bool:  # local: it is in no record
        seen.append(run.history[run.state.epoch]["validation.f1"])
        return run.state.epoch == 1

    def row(*keys: str) -> list:
        return next([row[key] for key in keys] for row in rows_of(global_config) if row["NAME"] == name)

    with pytest.raises(Pruned):
        train(tiny_config | {"AFTER_EPOCH": after_epoch, "STUDY": "some", "TRIAL": 3})
    name = next(name for name in run_names(log_dir) if name != expected.name)
    assert row("STATUS", "EPOCH", "RERUNNABLE", "TRIAL") == ["pruned", 1, "yes", 3]
    assert events_of(log_dir / name)[-1]["status"] == "pruned"
    assert seen == [expected.history[0]["validation.f1"]]
    config = read_run_config(log_dir / name, project_of(PACKAGE))
    assert "AFTER_EPOCH" not in config
    finished = train(config | {"RESUME": name, "STUDY": None, "TRIAL": None})
    assert finished.digest == expected.digest
    assert row("STATUS", "RERUNNABLE", "STUDY") == ["finished", "yes", None]


def test_an_unpromising_trial_is_pruned(new_search, work, train_with, global_config):
    for pruning, state in ((True, TrialState.PRUNED), (False, TrialState.COMPLETE)):
        search = new_search({"OPTIMIZER_CONFIG.lr": choice(1e-2)}, pruning=pruning, EPOCHS=3)
        for _ in range(5):  # all others were better from the first epoch on
            better = dict.fromkeys((1, 2, 3), 1.5)
            search.study.add_trial(optuna.trial.create_trial(value=1.5, intermediate_values=better))
        work(search, train_with(), len(search.trials()) + 1)
        trial = search.trials()[-1]
        assert (trial.state, list(trial.intermediate_values)) == (state, [1] if pruning else [1, 2, 3])
    assert [row["STATUS"] for row in rows_of(global_config)] == ["pruned", "finished"]


# ---------------------------------------------------------------------------------------------- failures


def failing(toy_train, errors: list):
    """Trains with the toy what does not fail; None: it does not. Numbers are results."""

    def train(config):
        error = errors[config["TRIAL"]]
        if isinstance(error, BaseException):
            raise error
        result = toy_train(config)
        result.state.best = result.state.best if error is None else error
        return result

    return train


def full_disk() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def caused_by_full_disk() -> Exception:
    error = UserError("a.png: cannot be read")
    error.__cause__ = full_disk()
    return error


def test_a_failed_trial_does_not_end_the_search(new_search, work, toy_train, capsys):
    search = new_search()
    bad_values = [NonFiniteLoss("it is nan"), OutOfMemory("too large"), torch.OutOfMemoryError("too large")]
    secret = RuntimeError("password=very-secret\nis wrong")
    work(search, failing(toy_train, [None, secret, float("nan"), None, *bad_values, None]), 8)
    assert states(search) == "CFFCFFFC"
    errors = [trial.user_attrs.get("error") for trial in search.trials()]
    assert errors[1] == "RuntimeError: password=[redacted] is wrong"
    assert errors[2] == "f1 was nan in all epochs"
    lines = capsys.readouterr().out.splitlines()
    value = search.trials()[0].value
    assert lines[0].startswith(f"trial   0: f1 {value:.4f}  lr=") and len(lines) == 8
    assert lines[1].startswith("trial   1: failed: RuntimeError: password=[redacted] is wrong")


@pytest.mark.parametrize(
    "error",
    [full_disk(), caused_by_full_disk(), torch.AcceleratorError("CUDA error: the device is gone")],
    ids=["disk", "cause", "gpu"],
)
def test_a_fault_of_the_machine_is_not_that_of_the_trial(new_search, work, toy_train, error):
    search = new_search()
    for _ in range(2):  # nor that of the next one
        with pytest.raises(UserError, match=r"Cannot train trial 1 on this machine \(.*: fix that"):
            work(search, failing(toy_train, [None, error, None]), 3)
        assert states(search) == "CR"
    work(search, toy_train, 3)
    assert states(search) == "CCC"
    for _ in range(5):
        with pytest.raises(UserError, match="trial 3"):
            work(search, failing(toy_train, [None, None, None, error, None]), 5)
    work(search, toy_train, 5)  # it is not tried for ever
    assert states(search) == "CCCFC"


def after_epoch_of(config, epoch: int, act) -> dict:
    """The config, with something that happens after an epoch."""
    watch = config["AFTER_EPOCH"]

    def after_epoch(run) -> bool:
        if run.state.epoch == epoch:
            act()
        return watch(run)

    return config | {"AFTER_EPOCH": after_epoch}


def raise_full_disk() -> None:
    raise full_disk()


@pytest.mark.parametrize(
    ("act", "raised", "status", "starts"),
    [
        pytest.param(raise_full_disk, UserError, "failed", 1, marks=SLOW),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), Preempted, "preempted", 0),  # that is no death
    ],
    ids=["disk", "signal"],
)
def test_an_ended_run_is_resumed(new_search, work, train_with, global_config, act, raised, status, starts):
    search = new_search(SPACE, EPOCHS=3, CHECKPOINT_SECONDS=0)
    with pytest.raises(raised):
        work(search, lambda config: train_with()(after_epoch_of(config, 2, act)), 1)
    assert [(row["STATUS"], row["EPOCH"]) for row in rows_of(global_config)] == [(status, 2)]
    assert len(search.trials()[0].user_attrs["starts"]) == starts
    work(search, train_with(), 1)
    (trial,) = search.trials()
    assert (trial.state, list(trial.intermediate_values)) == (TrialState.COMPLETE, [1, 2, 3])
    assert trial.user_attrs["starts"][-1].startswith("last-")
    assert [(row["STATUS"], row["EPOCH"]) for row in rows_of(global_config)] == [("finished", 3)]


def test_a_worker_whose_trials_all_fail_ends_before_they_are_used_up(new_search, work, toy_train):
    wrong, search = RuntimeError("the driver is\nwrong"), new_search()
    errors = [None, wrong, wrong, None, wrong, Pruned(), wrong, wrong, wrong, None]
    with pytest.raises(UserError, match=r"3 trials in a row .* with RuntimeError: the driver is wrong: fix"):
        work(search, failing(toy_train, errors), 10)
    assert states(search) == "CFFCFPFFF"
    work(search, toy_train, 10)
    assert search.trials()[9].state == TrialState.COMPLETE


def test_an_output_that_cannot_be_written_does_not_end_the_search(new_search, work, toy_train, monkeypatch):
    search = new_search()

    def train(config):
        if config["TRIAL"] == 0:
            raise RuntimeError("out of luck")
        with monkeypatch.context() as patch:
            patch.setattr(search.storage, "get_trial", lambda *_: 1 / 0)  # what is reported meanwhile, too
            return toy_train(config)

    output = SimpleNamespace(write=lambda _: raise_full_disk(), flush=lambda: None)
    monkeypatch.setattr(sys, "stdout", output)
    work(search, train, 2)
    assert states(search) == "FC"


# ---------------------------------------------------------------------------------------------- resuming


def test_fourteen_trials_at_once_are_six_a_restart_and_eight(new_search, work, toy_train, fork, tmp_path):
    at_once, file = new_search(MONITOR="min f1"), str(tmp_path / "other.log")
    work(at_once, toy_train, 14)
    for number in (6, 14):
        child = fork(
            lambda number=number: work(new_search(storage=file, MONITOR="min f1"), toy_train, number)
        )
        assert child.wait() and child.code == 0
        assert len(new_search(storage=file).trials()) == number
    assert found(at_once) == found(new_search(storage=file))
    assert len({json.dumps(params) for params, *_ in found(at_once)}) == 14  # each is another one
    assert at_once.best_trials()[0].value == min(trial.value for trial in at_once.trials())
    other_seed = new_search(storage=str(tmp_path / "seed.log"), SEED=1)
    work(other_seed, toy_train, 2)
    assert found(other_seed)[0] != found(at_once)[0]


def test_trials_draw_what_was_not_drawn_before_a_kill_as_if_there_had_been_none(
    new_search, work, toy_train, tmp_path, monkeypatch
):
    expected, file = new_search(), str(tmp_path / "other.log")
    work(expected, toy_train, 12)
    work(new_search(storage=file), toy_train, 11)

    def draw_one(_space, trial):
        trial.suggest_float("OPTIMIZER_CONFIG.lr", 1e-4, 1e-1, log=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Space, "suggest", draw_one)
        Worker(new_search(storage=file)).claim(12)
    again = new_search(storage=file)
    work(again, toy_train, 12)
    assert found(again) == found(expected)


def test_a_trial_that_somebody_else_works_on_is_left_to_him(
    new_search, work, toy_train, fork, global_config, tmp_path
):
    def hold() -> None:
        claimed = Worker(new_search()).claim(2)
        (tmp_path / "claimed").touch()
        signal.pause()
        claimed[1].release()

    child = fork(hold)
    wait_until((tmp_path / "claimed").exists)
    search = new_search()
    work(search, toy_train, 2)
    assert states(search) == "RC"
    child.kill()
    work(search, toy_train, 2)
    assert states(search) == "CC"

    shared = new_search(storage=str(tmp_path / "shared.log"))
    Worker(shared).claim(1)[1].release()
    (shared.folder / ".place").write_text("of another machine")
    work(shared, toy_train, 2)
    assert states(shared) == "RC"


def test_a_trial_whose_process_dies_again_and_again_is_given_up(new_search, work, toy_train, fork):
    search = new_search()
    for _ in range(5):
        child = fork(lambda: work(new_search(), lambda config: os.kill(os.getpid(), signal.SIGKILL), 1))
        assert child.wait() and child.code == -signal.SIGKILL
    work(search, toy_train, 2)
    assert states(search) == "FC"
    error = search.trials()[0].user_attrs["error"]
    assert error == "its process ended 5 times after no checkpoint, 0 epochs"


def test_a_trial_that_is_killed_while_its_run_begins_is_begun_again(
    new_search, work, train_with, fork, global_config, monkeypatch
):
    original = record_module.Journal

    def killed_after(*arguments):
        original(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(record_module, "Journal", killed_after)
        child = fork(lambda: work(new_search(SPACE), train_with(), 1))
    assert child.wait() and child.code == -signal.SIGKILL
    search = new_search(SPACE)
    work(search, train_with(), 1)
    (trial,) = search.trials()
    assert trial.state == TrialState.COMPLETE, trial.user_attrs
    rows = [(row["NAME"], row["STATUS"]) for row in rows_of(global_config)]
    assert rows == [(trial.user_attrs["run"], "finished")]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("numbers", [(3, 5, 1), (20, 40, 2)])
def test_killed_workers_find_what_they_would_have_found(
    numbers, new_search, work, train_with, fork, global_config, tmp_path, monkeypatch
):
    num_trials, num_kills, num_workers = numbers
    monkeypatch.setattr(workers_module, "_MOST_STARTS", 1000)  # no trial is given up
    train, folders, chance = train_with(), dict(global_config), random.Random(num_kills)
    options = {"CHECKPOINT_SECONDS": 0, "EPOCHS": 3}
    global_config.update(global_config_of(tmp_path / "undisturbed"))
    undisturbed = new_search(SPACE, **options)
    work(undisturbed, train, 2)  # the first one imports
    start = time.monotonic()
    work(undisturbed, train, 3)
    seconds = time.monotonic() - start
    global_config.update(folders)

    def working() -> None:
        (tmp_path / f"works-{os.getpid()}").touch()
        work(new_search(SPACE, **options), train, num_trials)

    kills, workers = 0, [fork(working) for _ in range(num_workers)]
    while any(not worker.wait(0) for worker in workers):
        time.sleep(chance.uniform(0.1, 1.2) * seconds / num_workers)
        alive = [one for one in workers if not one.wait(0) and (tmp_path / f"works-{one.pid}").exists()]
        if alive and kills < num_kills:
            killed = chance.choice(alive)
            killed.kill()
            kills += killed.code == -signal.SIGKILL
            workers[workers.index(killed)] = fork(working)
    assert kills > num_kills // 4
    assert [worker.code for worker in workers] == [0] * num_workers, workers[0].said()
    search = new_search(SPACE, **options)
    assert states(search) == "C" * num_trials
    assert num_workers > 1 or found(search) == found(undisturbed)
    rows = sorted((row["TRIAL"], row["STATUS"], row["validation.f1"]) for row in rows_of(global_config))
    # One run a trial, none begun twice, and what was told is not lost.
    assert rows == [(trial.number, "finished", trial.value) for trial in search.trials()]


# --------------------------------------------------------------------------------------- several workers

WAITS = (
    "import os, signal, sys, time\n"
    "signal.signal(signal.SIGTERM, lambda *_: (print('asked', flush=True), sys.exit(75)))\n"
    "print('ready', os.environ['OMP_NUM_THREADS'], os.environ['SEARCH_PID'], flush=True)\ntime.sleep(100)"
)


@pytest.mark.parametrize("trouble", ["signal", "storage"])
def test_workers_get_their_share_and_none_is_left(new_search, monkeypatch, trouble):
    search = new_search()
    logs = [search.folder / f"worker-{worker}.log" for worker in range(2)]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)

    def report() -> None:
        if all(log.exists() and "ready" in log.read_text() for log in logs):
            if trouble == "storage":
                raise UserError("the storage cannot be reached")
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(search, "report", report)
    with pytest.raises(Preempted if trouble == "signal" else UserError):
        run_workers([sys.executable, "-c", WAITS], 2, search)
    assert [log.read_text() for log in logs] == [f"ready 4 {os.getpid()}\nasked\n"] * 2


@pytest.mark.parametrize(
    ("code", "told"),
    [("raise OSError('the disk is full')", "disk is full"), ("__import__('os').abort()", "-6")],
)
def test_a_worker_that_has_failed_is_reported_with_its_last_words(new_search, code, told):
    with pytest.raises(UserError, match=rf"ended with .*{told}.*worker-0\.log"):
        run_workers([sys.executable, "-c", code], 1, new_search())


def test_a_worker_ends_with_its_search_when_that_is_killed(new_search, toy_train, fork, tmp_path):
    def train(config):
        def wait() -> None:
            (tmp_path / "reached").touch()
            wait_until((tmp_path / "killed").exists)

        return toy_train(after_epoch_of(config, 1, wait))

    def start() -> None:
        os.environ[workers_module.SEARCH_PID] = str(os.getpid())  # as run_workers does
        if os.fork() == 0:
            try:
                Worker(new_search()).work(train, 3)
            except Preempted as error:
                (tmp_path / "ended.tmp").write_text(str(error))
                (tmp_path / "ended.tmp").rename(tmp_path / "ended")
            os._exit(0)
        signal.pause()

    parent = fork(start)
    wait_until((tmp_path / "reached").exists)
    parent.kill()
    (tmp_path / "killed").touch()
    wait_until((tmp_path / "ended").exists)
    assert (tmp_path / "ended").read_text() == "the search has ended"
    assert states(new_search()) == "R"


# --------------------------------------------------------------------------------- what belongs together


def test_a_study_does_not_continue_with_what_cannot_be_compared(new_search, work, toy_train):
    rate, dropout = log_uniform(1e-4, 1e-1), uniform(0.0, 0.5)

    def begin(space=None, **changes):
        space = space or {"OPTIMIZER_CONFIG.lr": rate, "MODEL_CONFIG.dropout": dropout}
        search = new_search(space, **{"OPTIMIZER": torch.optim.SGD} | changes)
        search.begin(capture(complete(search.config), search.project))
        return search

    work(begin(), toy_train, 1)
    begin(DEVICE="cuda", CHECKPOINT_SECONDS=3)
    for space, changes, told in [
        ({"OPTIMIZER_CONFIG.lr": rate}, {}, "another space of MODEL_CONFIG.dropout"),
        (None, {"EPOCHS": 3}, r"EPOCHS \(was 2, is 3\)"),
        (None, {"MONITOR": "min loss"}, "MONITOR"),
    ]:
        with pytest.raises(UserError, match=rf"{told}.*--study toy-2"):
            begin(space, **changes)


def test_the_best_config_is_saved_with_pictures_and_comes_back_with_its_objects(
    new_search, work, toy_train, global_config, capsys
):
    search = new_search()
    with pytest.raises(UserError, match="no finished trial"):
        search.best_config()
    with pytest.raises(UserError, match="a-b"):
        Search("a/b", search.space, search.config, global_config, search.project)
    search.begin(capture(complete(search.config), search.project))
    work(search, toy_train, 1)
    assert [file.stem for file in search.save_best()] == ["best_config", "history", "slices"]
    assert (
        "importance.png is left out: it takes 4 finished trials of different results, not 1."
        in capsys.readouterr().out
    )
    work(search, toy_train, 4)
    best, config = search.best_trials()[0], search.best_config()
    assert config["OPTIMIZER"] in (torch.optim.SGD, torch.optim.AdamW)
    assert config["OPTIMIZER"].__name__ == best.params["OPTIMIZER"].partition(":")[2]
    assert config["MODEL_CONFIG"]["bulk_ch"] == best.params["MODEL_CONFIG.bulk_ch"]
    assert config["OPTIMIZER_CONFIG"] == {"lr": best.params["OPTIMIZER_CONFIG.lr"]}
    assert (config["SESSION_NAME"], config["STUDY"], config["TRIAL"]) == ("toy-best", "toy", best.number)
    files = search.save_best()
    saved = json.loads(files[0].read_text())
    assert (saved["trial"], saved["value"], saved["run"]) == (best.number, best.value, best.user_attrs["run"])
    names = ["best_config.json", "history.png", "slices.png", "importance.png"]
    assert [file.name for file in files] == names
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files[1:])


def test_a_storage_that_is_lost_meanwhile_is_reported(new_search, work, toy_train, tmp_path):
    file = tmp_path / "study.db"
    search = new_search(storage=f"sqlite:///{file}")
    work(search, toy_train, 1)
    file.write_bytes(b"no database any more" * 1000)
    with pytest.raises(UserError, match=r"Cannot reach the storage \(.*the same command resumes"):
        search.trials()
