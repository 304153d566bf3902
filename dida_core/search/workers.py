"""
Workers: which trial comes next, and its training as an ordinary run.

A trial belongs to the worker that holds its lock. The kernel releases the lock with the process, so a trial
that is running in the storage, but not locked, was killed: whoever looks for work next resumes it from its
checkpoint.
"""

import contextlib
import math
import os
import subprocess
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import optuna
import torch
from filelock import FileLock, Timeout
from optuna.trial import TrialState

from ..errors import UserError
from ..report.console import say
from ..report.listener import Result, RunView
from ..runs.failures import NonFiniteLoss, OutOfMemory, Pruned
from ..runs.lookup import remove_unbegun, run_names
from ..runs.redaction import Redactor
from ..storage.checkpoint import checkpoint_files
from ..storage.files import relative_path, write_atomic
from ..storage.locks import locked
from ..training.modules import is_out_of_memory
from ..training.signals import EXIT_CODE, Preempted, raise_if_stop_requested, stop_on_signals
from .space import with_values
from .study import Search, one_line

SEARCH_PID = "SEARCH_PID"  # in the environment of a worker: the process that has started it
_MOST_STARTS = 5  # of a trial, without a checkpoint in between
_MOST_FAILURES = 3  # of trials in a row, in one process

Train = Callable[[dict[str, Any]], Result]


class Worker:
    """Trains the trials of a search, one after the other."""

    def __init__(self, search: Search) -> None:
        self._search, self._study, self._storage = search, search.study, search.storage
        self._study_id = search.storage.get_study_id_from_name(search.name)
        self._naming: Any = search.project.module(".utils.name")

    def work(self, train: Train, num_trials: int) -> None:
        """
        Train, until the study has this many trials and none is left behind by a process that was killed.

        :param train: trains a run; its config is the only argument
        :raises Preempted: if a signal has asked to end, or the search has ended; the trial will be resumed
        :raises UserError: if this machine cannot train it, or if one after the other fails
        """
        failures = 0
        with stop_on_signals():
            while (claimed := self.claim(num_trials)) is not None:
                trial, lock = claimed
                try:
                    reason = self._train(trial, train)
                finally:
                    lock.release()
                self._search.report()
                raise_if_stop_requested()
                failures = failures + 1 if reason else 0
                if failures >= _MOST_FAILURES:
                    text = f"{failures} trials in a row have failed, the last with {reason}"
                    raise UserError(f"{text}: fix that, then give the same command.")

    def claim(self, num_trials: int) -> tuple[optuna.Trial, FileLock] | None:
        """
        Return the next trial and its lock: one that was killed, else a new one, else None.

        :raises Preempted: if the search that has started this process has ended
        """
        _raise_if_search_ended()
        with locked(self._search.folder / ".claim.lock"):
            folder_id = self._folder_id()
            for frozen in self._search.trials(TrialState.RUNNING):
                # Trials of other folders, on other machines, have their checkpoints and locks there.
                if frozen.user_attrs.get("place") != folder_id:
                    continue
                if (lock := self._try_lock(frozen.number)) is not None:
                    if (trial := self._start(frozen.number)) is not None:
                        return trial, lock
                    lock.release()
            if len(self._search.trials()) >= num_trials:
                return None
            attributes = {"place": folder_id, "date": self._naming.date_now(), "starts": []}
            template = optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs=attributes)
            trial_id = self._storage.create_new_trial(self._study_id, template)
            number = self._storage.get_trial_number_from_id(trial_id)
            lock, trial = self._try_lock(number), self._start(number)
            assert lock is not None and trial is not None  # nobody else can have seen it
            return trial, lock

    def _start(self, number: int) -> optuna.Trial | None:
        """Record the start of a trial, and draw what it tries; None if its process has died too often."""
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
        frozen, trial = self._storage.get_trial(trial_id), optuna.Trial(self._study, trial_id)
        starts, named = frozen.user_attrs["starts"], {"DATE": frozen.user_attrs["date"]}
        named["SESSION_NAME"] = f"{self._search.name}-{number}"
        name = self._naming.run_name(self._search.config | named)
        files = checkpoint_files(self._search.weight_dir / name)
        progress = f"{files[0].name if files else 'no checkpoint'}, {len(frozen.intermediate_values)} epochs"
        if starts.count(progress) >= _MOST_STARTS:
            self._fail(trial, f"its process ended {_MOST_STARTS} times after {progress}")
            return None
        trial.set_user_attr("starts", [*starts, progress])
        trial.set_user_attr("run", name)
        self._search.space.suggest(trial)
        return trial

    def _train(self, trial: optuna.Trial, train: Train) -> str | None:
        """
        Train a trial as a run of its own, or resume it.

        :return: why it failed, if others may fail for that, too
        :raises UserError: if the machine is at fault; the trial stays as it is, for another try
        """
        search, number, name = self._search, trial.number, trial.user_attrs["run"]
        remove_unbegun(search.log_dir / name)  # nobody else has this trial
        values, left_out = search.space.values(trial.params), search.space.left_out(trial.params)
        config = with_values(search.config, values, left_out) | {
            "DATE": trial.user_attrs["date"],
            "SESSION_NAME": f"{search.name}-{number}",
            "STUDY": search.name,
            "TRIAL": number,
            "RESUME": name if name in run_names(search.log_dir) else None,
            "AFTER_EPOCH": lambda run: self._after_epoch(trial, run),
        }
        try:
            value = train(config).state.best
        except Pruned:
            self._study.tell(trial, state=TrialState.PRUNED)
            return None
        except (Preempted, KeyboardInterrupt):
            trial.set_user_attr("starts", trial.user_attrs["starts"][:-1])  # no death
            raise
        except Exception as error:  # whatever a trial raises, the next one may do well
            reason = one_line(error, Redactor(config=config)).rstrip(".")
            if _is_of_machine(error):
                text = f"Cannot train trial {number} on this machine ({reason})"
                raise UserError(f"{text}: fix that, then give the same command, which resumes it.") from error
            self._fail(trial, reason)
            # A learning rate too high, a model too large: the next trial may do well.
            is_of_values = isinstance(error, NonFiniteLoss | OutOfMemory) or is_out_of_memory(error)
            return None if is_of_values else reason
        if value is None or not math.isfinite(value):
            self._fail(trial, f"{search.goal} was {value} in all epochs")
        else:
            self._study.tell(trial, value)
        return None

    def _fail(self, trial: optuna.Trial, reason: str) -> None:
        trial.set_user_attr("error", reason)
        self._study.tell(trial, state=TrialState.FAIL)

    def _after_epoch(self, trial: optuna.Trial, run: RunView) -> bool:
        """Report the run's epochs to the storage, and return whether to prune it."""
        _raise_if_search_ended()
        try:
            known = self._storage.get_trial(trial._trial_id).intermediate_values
            for epoch, event in sorted(run.history.items()):  # with those from before an interruption
                if epoch not in known and f"validation.{run.monitored}" in event:
                    trial.report(event[f"validation.{run.monitored}"], epoch)
            is_last = run.state.stopped or run.state.epoch >= run.config["EPOCHS"]
            return self._search.pruning and not is_last and trial.should_prune()
        except Exception as error:  # each database has its own; the next epoch reports this one, too
            reason = one_line(error, Redactor())
            say(f"Trial {trial.number}: cannot reach the storage ({reason}). Training continues.")
            return False

    def _try_lock(self, number: int) -> FileLock | None:
        lock = FileLock(self._search.folder / f".trial-{number}.lock", timeout=0)
        with contextlib.suppress(Timeout):
            lock.acquire()
        return lock if lock.is_locked else None

    def _folder_id(self) -> str:
        """Return what tells this folder from those of other machines. Under the claim lock."""
        file = self._search.folder / ".place"
        if not file.is_file():
            text = uuid.uuid4().hex
            write_atomic(file, lambda stream: stream.write(text.encode()))
        return file.read_text()


def run_workers(command: Sequence[str], number: int, search: Search) -> None:
    """
    Start processes that each train one trial at a time, and wait for them; none is left, whatever goes wrong.

    Each gets its share of this machine's threads and GPUs, and prints to worker-N.log.

    :raises Preempted: if a signal has asked to end, when they have saved
    :raises UserError: if one has failed, with its last words
    """
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    environment = os.environ | {SEARCH_PID: str(os.getpid())}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // number)))
    logs = [search.folder / f"worker-{worker}.log" for worker in range(number)]
    processes: list[subprocess.Popen] = []
    with stop_on_signals(), contextlib.ExitStack() as waits, contextlib.ExitStack() as ends:
        for worker, log in enumerate(logs):
            environment["CUDA_VISIBLE_DEVICES"] = gpus.split(",")[worker % len(gpus.split(","))]
            # In a group of their own: Ctrl-C reaches the search alone, which passes it on, once.
            options: dict[str, Any] = {"env": environment, "process_group": 0, "stdin": subprocess.DEVNULL}
            with open(log, "ab") as output:
                process = subprocess.Popen(command, stdout=output, stderr=output, **options)
            waits.callback(process.wait)
            ends.callback(process.terminate)  # all are asked to save and end, before any is waited for
            processes.append(process)
        while any(process.poll() is None for process in processes):
            raise_if_stop_requested()
            search.report()
            time.sleep(0.5)
        search.report()
    for process, log in zip(processes, logs, strict=True):
        if process.returncode not in (0, EXIT_CODE):
            last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
            code, more = process.returncode, f"more in {relative_path(log)}"
            raise UserError(f"a worker has ended with exit code {code}: {last} ({more})")


def _is_of_machine(error: Exception) -> bool:
    """Tell whether all trials would fail: a full disk, a folder that is gone, a GPU that is lost."""
    if isinstance(error, torch.AcceleratorError):  # this process cannot use the GPU any more
        return "out of memory" not in str(error)
    return isinstance(error, OSError) or isinstance(error.__cause__, OSError)


def _raise_if_search_ended() -> None:
    # A worker whose search was killed would train on for nobody: no signal reaches it.
    if os.environ.get(SEARCH_PID, str(os.getppid())) != str(os.getppid()):
        raise Preempted("the search has ended")
