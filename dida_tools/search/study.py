"""
Contains a search: which trial comes next, its training as an ordinary run, and what became of it.

A trial belongs to the worker that holds its lock. The kernel ends the lock with the process, so a trial that is still
running in the storage, but not locked, was killed: whoever looks for work next goes on with it, from its checkpoint.
"""

import contextlib
import hashlib
import json
import math
import os
import uuid
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from filelock import FileLock, Timeout
from optuna.trial import FrozenTrial, TrialState

from ..config.capture import capture, restore
from ..config.errors import UserError
from ..config.keys import complete
from ..config.project import project_of
from ..config.tree import difference
from ..training.checkpoint import checkpoint_files
from ..training.modules import is_out_of_memory
from ..training.run import NonFiniteLoss, OutOfMemory, Pruned, Result, Run
from ..utils.files import safe_name, write_atomic
from ..utils.locks import locked
from ..utils.logging.runs import remove_unbegun, run_names
from ..utils.name import date_now
from ..utils.redact import Redactor
from ..utils.signals import Preempted, raise_if_stop_requested, stop_on_signals
from .space import Space, with_values
from .storage import open_storage

SEARCH_PID = "SEARCH_PID"  # in the environment of a worker: the process that has started it
_MOST_STARTS = 5  # of a trial, without a checkpoint in between
_MOST_FAILURES = 3  # of trials in a row, in one process
# What may differ between the workers of a search, or from one day to the next.
_FREE_TO_CHANGE = (
    *("DATE", "DEVICE", "LOGFILE", "NOTIFY", "__COMMENT", "CHECKPOINT_SECONDS", "STUDY", "TRIAL"),
    *("DATA_LOADER_CONFIG.num_workers", "DATA_LOADER_CONFIG.pin_memory"),
)

Train = Callable[[dict[str, Any]], Result]


class Sampler(optuna.samplers.BaseSampler):
    """TPE whose draws follow from seed, trial, name and the trials before alone: the same after a restart."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> Any:
        """What is drawn together."""
        return self._fresh(trial, "").infer_relative_search_space(study, trial)

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: Any) -> dict[str, Any]:
        """Draws what belongs together."""
        return self._fresh(trial, "").sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, *arguments: Any
    ) -> Any:
        """Draws one value."""
        return self._fresh(trial, param_name).sample_independent(study, trial, param_name, *arguments)

    def _fresh(self, trial: FrozenTrial, name: str) -> optuna.samplers.BaseSampler:
        digest = hashlib.sha256(f"{self._seed} {trial.number} {name}".encode()).digest()
        return optuna.samplers.TPESampler(seed=int.from_bytes(digest[:4]))  # <- your sampler here


@dataclass
class Claimed:
    """A trial that this process works on."""

    trial: optuna.Trial
    date: str
    values: dict[str, Any]
    lock: FileLock


class Search:
    """A study, and the folder LOG_DIR/search/NAME that its locks and results lie in."""

    def __init__(
        self,
        name: str,
        space: Space,
        config: dict[str, Any],
        global_config: dict[str, str],
        storage: str | None = None,
        pruning: bool = True,
    ) -> None:
        """
        Opens a study, or makes it.

        :param config: what is searched around; its MONITOR is the objective, its SEED that of the draws
        :param storage: a journal file or URL; None: a journal file in the folder
        :raises UserError: if the storage cannot be opened, or the name is none for a folder
        """
        if safe_name(name) != name:
            raise UserError(f"--study {name}: it names a folder, such as {safe_name(name)}.")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        self.name, self.space, self.config, self.pruning = name, space, complete(config), pruning
        self.log_dir, self.weight_dir = (Path(global_config[key]) for key in ("LOG_DIR", "WEIGHT_DIR"))
        self.folder = self.log_dir / "search" / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.storage_place = storage or str(self.folder / "journal.log")
        self.storage = open_storage(self.storage_place)
        direction, self.goal = self.config["MONITOR"].split()
        # Not before a fifth of the epochs: a schedule that warms up makes early results say little.
        pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=self.config["EPOCHS"] // 5)
        self.study = optuna.create_study(  # <- your pruner here
            storage=self.storage,
            study_name=name,
            direction="maximize" if direction == "max" else "minimize",
            sampler=Sampler(self.config["SEED"]),
            pruner=pruner,
            load_if_exists=True,
        )
        self._study_id = self.storage.get_study_id_from_name(name)

    def begin(self, record: dict[str, Any]) -> None:
        """
        Enters what is searched, or compares it with what the study has searched before.

        :param record: the captured config of the first values
        :raises UserError: if it is another search
        """
        now = {"version": record["version"], "config": record["config"]}
        known = self.study.user_attrs
        if "config" not in known:
            self.study.set_user_attr("space", self.space.text())
            self.study.set_user_attr("config", now)
            return
        changed = [f"the space of {key}" for key in {**known["space"], **self.space.text()}]
        changed = [
            text for text in changed if known["space"].get(text[13:]) != self.space.text().get(text[13:])
        ]
        for key, (before, after) in difference(known["config"], now).items():
            if not changed and not key.startswith(_FREE_TO_CHANGE):
                changed.append(f"{key} (was {before}, is {after})")
        if changed:
            raise UserError(
                f"the study {self.name} has searched with another {', '.join(changed)}: its trials cannot be compared "
                f"with new ones. Take another name, such as --study {self.name}-2, or the same values."
            )

    # -------------------------------------------------------------------------------------------------------- a worker

    def work(self, train: Train, num_trials: int) -> None:
        """
        Trains, until the study has this many trials and none is left behind by a process that was killed.

        :param train: does a run; its config is the only argument
        :raises Preempted: if a signal has asked to end, or if the search has ended; the trial will be continued
        :raises UserError: if this machine cannot train it, or if one after the other fails
        """
        failures = 0
        with stop_on_signals():
            while (claimed := self.claim(num_trials)) is not None:
                try:
                    reason = self._train(claimed, train)
                finally:
                    claimed.lock.release()
                raise_if_stop_requested()
                failures = failures + 1 if reason is not None else 0
                if failures >= _MOST_FAILURES:
                    raise UserError(
                        f"{failures} trials in a row have failed, the last with {reason}: mend that, then give the "
                        "same command."
                    )

    def claim(self, num_trials: int) -> Claimed | None:
        """
        The next trial: one that was killed, else a new one, else None. Nobody waits for longer than that takes.

        :raises Preempted: if the search that has started this process has ended
        """
        _raise_if_search_ended()
        with locked(self.folder / ".claim.lock"):
            place = self._place()
            for frozen in self.trials(TrialState.RUNNING):
                # Trials of other folders, on other machines, have their checkpoints and locks there.
                lock = self._try_lock(frozen.number) if frozen.user_attrs.get("place") == place else None
                if lock is not None and (claimed := self._take(frozen.number, lock)) is not None:
                    return claimed
            if len(self.trials()) >= num_trials:
                return None
            attributes = {"place": place, "date": date_now(), "starts": []}
            template = optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs=attributes)
            trial_id = self.storage.create_new_trial(self._study_id, template)
            number = self.storage.get_trial_number_from_id(trial_id)
            lock = self._try_lock(number)
            assert lock is not None  # nobody else can have seen it
            return self._take(number, lock)

    def _take(self, number: int, lock: FileLock) -> Claimed | None:
        """Takes note of the start of a trial; None for one whose process has died too often."""
        trial_id = self.storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
        frozen = self.storage.get_trial(trial_id)
        date, starts = frozen.user_attrs["date"], frozen.user_attrs["starts"]
        files = checkpoint_files(self.weight_dir / self._run_name(date, number))
        progress = f"{files[0].name if files else 'no checkpoint'}, {len(frozen.intermediate_values)} epochs"
        if starts.count(progress) >= _MOST_STARTS:
            self.storage.set_trial_user_attr(
                trial_id, "error", f"its process ended {_MOST_STARTS} times after {progress}"
            )
            self.study.tell(number, state=TrialState.FAIL)
            lock.release()
            return None
        self.storage.set_trial_user_attr(trial_id, "starts", [*starts, progress])
        self.storage.set_trial_user_attr(trial_id, "run", self._run_name(date, number))
        trial = optuna.Trial(self.study, trial_id)
        return Claimed(trial, date, self.space.suggest(trial), lock)

    def _train(self, claimed: Claimed, train: Train) -> str | None:
        """
        Trains a trial as a run of its own, or goes on with it. What fails by its values is the end of the trial alone.

        :return: why it failed, where others may fail for that, too
        :raises UserError: if the machine is at fault; the trial stays as it is, for another try
        """
        trial, number = claimed.trial, claimed.trial.number
        name = self._run_name(claimed.date, number)
        remove_unbegun(self.log_dir / name)  # nobody else has this trial
        config = with_values(self.config, claimed.values) | {
            "DATE": claimed.date,
            "SESSION_NAME": f"{self.name}-{number}",
            "STUDY": self.name,
            "TRIAL": number,
            "RESUME": name if name in run_names(self.log_dir) else None,
            "AFTER_EPOCH": self._watch(trial),
        }
        try:
            value = train(config).state.best
        except Pruned:
            self.study.tell(trial, state=TrialState.PRUNED)
        except (Preempted, KeyboardInterrupt):
            trial.set_user_attr("starts", trial.user_attrs["starts"][:-1])  # no death
            raise
        except Exception as error:  # whatever a trial raises, the next one may do well
            reason = Redactor(config=config).text(f"{type(error).__name__}: {error}")
            reason = " ".join(reason.split())[:500].rstrip(".")
            if _is_of_machine(error):
                raise UserError(
                    f"trial {number} cannot be trained on this machine ({reason}): mend that, then give the same "
                    "command, which goes on with it."
                ) from error
            self._fail(trial, reason)
            return None if _is_of_values(error) else reason
        else:
            if value is None or not math.isfinite(value):
                self._fail(trial, f"{self.goal} was {value} in all epochs")
            else:
                self.study.tell(trial, value)
        return None

    def _fail(self, trial: optuna.Trial, reason: str) -> None:
        _say(f"Trial {trial.number} failed: {reason}")
        trial.set_user_attr("error", reason)
        self.study.tell(trial, state=TrialState.FAIL)

    def _watch(self, trial: optuna.Trial) -> Callable[[Run], bool]:
        def after_epoch(run: Run) -> bool:
            _raise_if_search_ended()
            try:
                known = self.storage.get_trial(trial._trial_id).intermediate_values
                for epoch, event in sorted(run.history.items()):  # with those from before an interruption
                    if epoch not in known and f"validation.{run.monitored}" in event:
                        trial.report(event[f"validation.{run.monitored}"], epoch)
                is_last = run.state.stopped or run.state.epoch >= run.config["EPOCHS"]
                return self.pruning and not is_last and trial.should_prune()
            except (
                Exception
            ) as error:  # each database has errors of its own; the next epoch reports this one, too
                reason = Redactor().text(f"{type(error).__name__}: {error}")[:300]
                _say(f"Trial {trial.number}: the storage cannot be reached ({reason}); training goes on.")
                return False

        return after_epoch

    def _run_name(self, date: str, number: int) -> str:
        return f"{safe_name(date)}_{safe_name(f'{self.name}-{number}')}"

    def _try_lock(self, number: int) -> FileLock | None:
        lock = FileLock(self.folder / f".trial-{number}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            return None
        return lock

    def _place(self) -> str:
        """What tells this folder from those of other machines; the same for all that share it. Under the claim lock."""
        file = self.folder / ".place"
        if not file.is_file():
            text = uuid.uuid4().hex
            write_atomic(file, lambda stream: stream.write(text.encode()))
        return file.read_text()

    # --------------------------------------------------------------------------------------------------------- results

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """
        The trials in these states, or all; to be read only.

        :raises UserError: if the storage cannot be reached
        """
        try:
            return self.study.get_trials(deepcopy=False, states=states or None)
        except Exception as error:  # each database has errors of its own
            reason = " ".join(Redactor().text(f"{type(error).__name__}: {error}").split())[:300]
            raise UserError(
                f"the storage cannot be reached ({reason}): what was done is saved there; the same command goes on."
            ) from error

    def best_trials(self) -> list[FrozenTrial]:
        """The trials that were trained to their end, the best first."""
        sign = -1 if self.study.direction == optuna.study.StudyDirection.MAXIMIZE else 1
        return sorted(self.trials(TrialState.COMPLETE), key=lambda trial: sign * (trial.value or 0.0))

    def best_record(self) -> dict[str, Any]:
        """
        The captured config of the best trial, with "study", "trial", "value" and "run".

        :raises UserError: if there is none
        """
        best = self.best_trials()
        if not best or "config" not in self.study.user_attrs:
            raise UserError(f"the study {self.name} has no finished trial yet: {self.storage_place}")
        known = self.study.user_attrs
        if known["space"] != self.space.text():
            raise UserError(f"the study {self.name} had another search space: {json.dumps(known['space'])}.")
        values = capture(self.space.values(best[0].params), project_of(__name__))["config"]
        about = {"STUDY": self.name, "TRIAL": best[0].number, "DATE": None}
        config = with_values(known["config"]["config"], values) | about
        result = {"study": self.name, "trial": best[0].number, "value": best[0].value}
        return result | {"run": best[0].user_attrs["run"]} | known["config"] | {"config": config}

    def best_config(self) -> dict[str, Any]:
        """
        The config of the best trial, to be trained on its own.

        :raises UserError: if there is none, or if it cannot be restored
        """
        record = self.best_record()
        return restore(record, project_of(__name__)) | {"SESSION_NAME": f"{self.name}-best", "RESUME": "auto"}

    def save_best(self) -> Path:
        """Writes the best config, and returns where."""
        file, text = self.folder / "best_config.json", json.dumps(self.best_record(), indent=2)
        write_atomic(file, lambda stream: stream.write(text.encode()))
        return file


def _is_of_machine(error: Exception) -> bool:
    """Whether the next trial would fail as well: a full disk, a folder that is gone, a GPU that is lost."""
    if isinstance(error, torch.AcceleratorError):  # this process cannot use the GPU any more
        return "out of memory" not in str(error)
    return isinstance(error, OSError) or isinstance(error.__cause__, OSError)


def _is_of_values(error: Exception) -> bool:
    """Whether a trial fails by what it has tried: a rate too high, a model too large. The next one may do well."""
    return isinstance(error, NonFiniteLoss | OutOfMemory) or is_out_of_memory(error)


def _raise_if_search_ended() -> None:
    """A worker whose search was killed would train on for nobody; it has no terminal, and no signal reaches it."""
    if os.environ.get(SEARCH_PID, str(os.getppid())) != str(os.getppid()):
        raise Preempted("the search has ended")


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # of a full disk, where a log file is; nothing depends on it
        print(text, flush=True)
