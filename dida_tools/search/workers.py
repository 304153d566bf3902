"""Contains the workers of a search on this machine, and what people read while they train."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch
from optuna.trial import FrozenTrial, TrialState

from ..config.errors import UserError
from ..utils.files import relative_path
from ..utils.signals import Preempted, stop_on_signals, stop_requested
from .study import SEARCH_PID, Search

_DONE = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
_SECONDS_BETWEEN_LOOKS = 0.5
_MOST_DEATHS = 10  # a worker, with nothing done in between


class Workers:
    """Processes that each train one trial at a time, with their share of this machine's threads and GPUs."""

    def __init__(self, command: Sequence[str], number: int, folder: Path) -> None:
        """
        :param command: what a worker runs; its number is added
        :param folder: gets what they print
        """
        self._command, self._folder, self._number = list(command), folder, number
        self._processes: dict[int, subprocess.Popen] = {}
        self._is_stopping, self._deaths, self._progress = False, 0, 0

    def start(self) -> None:
        """
        Starts them. Ctrl-C does not reach them: whoever starts them stops them, see watch.

        :raises OSError: if one cannot be started; those before it are
        """
        for worker in range(self._number):
            self._start(worker)

    def _start(self, worker: int) -> None:
        environment, gpus = dict(os.environ), torch.cuda.device_count()
        if os.name == "posix":  # elsewhere the interpreter may have a launcher in between
            environment[SEARCH_PID] = str(os.getpid())
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self._number)))
        if gpus > 1:
            known = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
            names = known if len(known) == gpus else [str(gpu) for gpu in range(gpus)]
            environment["CUDA_VISIBLE_DEVICES"] = names[worker % gpus]
        with open(self.log(worker), "ab") as log:
            # A group of their own: Ctrl-C reaches the search alone, which passes it on, once.
            self._processes[worker] = subprocess.Popen(  # pylint: disable=consider-using-with
                [*self._command, str(worker)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                process_group=0 if os.name == "posix" else None,
            )

    def log(self, worker: int) -> Path:
        """What a worker has printed."""
        return self._folder / f"worker-{worker}.log"

    def look(self, progress: int) -> bool:
        """
        Starts again what was killed, by the system for want of memory or by hand.

        :param progress: any number that grows with what is done
        :return: whether one is left
        :raises UserError: if a worker has failed, or if they die again and again
        """
        if progress > self._progress:
            self._progress, self._deaths = progress, 0
        for worker, process in list(self._processes.items()):
            code = process.poll()
            if code is None:
                continue
            del self._processes[worker]
            if self._is_stopping or code in (0, 75):
                continue
            self._deaths += 1
            if code > 0 or self._deaths > _MOST_DEATHS * self._number:
                lines = self.log(worker).read_text(errors="replace").strip().splitlines()
                last = lines[-1] if lines else f"exit code {code}"
                raise UserError(
                    f"worker {worker} has ended: {last} (more in {relative_path(self.log(worker))})"
                )
            self._start(worker)
        return bool(self._processes)

    def stop(self) -> None:
        """Has them save and end; a second time at once."""
        self._is_stopping = True
        for process in self._processes.values():
            process.send_signal(signal.SIGTERM)

    def wait(self) -> None:
        """Waits for their end."""
        for process in self._processes.values():
            process.wait()


def watch(search: Search, workers: Workers, num_trials: int) -> None:
    """
    Starts the workers, and shows the search until all have ended; whatever goes wrong here, none is left.

    :raises Preempted: if a signal has asked to end, when the workers have saved
    :raises KeyboardInterrupt: if Ctrl-C was pressed twice
    """
    board = Board(search, num_trials)
    with stop_on_signals():
        is_stopping = False
        try:
            workers.start()
            while workers.look(board.update()):
                if stop_requested() and not is_stopping:
                    is_stopping = True
                    workers.stop()
                time.sleep(_SECONDS_BETWEEN_LOOKS)
        except BaseException:
            workers.stop()
            workers.wait()
            raise
        finally:
            board.update()
            board.close()
        if is_stopping:
            raise Preempted("a signal was received")


class Board:
    """A line for each trial that ends; in a terminal, a last one that says how the search stands."""

    def __init__(self, search: Search, num_trials: int, stream: IO[str] | None = None) -> None:
        self._search, self._num_trials, self._stream = search, num_trials, stream or sys.stdout
        self._told = {trial.number for trial in search.trials(*_DONE)}
        self._width = 0
        if self._told:
            self._say(f"The study {search.name} has {len(self._told)} trials already.")

    def update(self) -> int:
        """Looks into the storage, and returns how much is done: trials and epochs."""
        trials = self._search.trials()
        done = [trial for trial in trials if trial.state in _DONE]
        best = self._search.best_trials()[:1]
        for trial in done:
            if trial.number not in self._told:
                self._told.add(trial.number)
                self._say(self._line(trial, best))
                if best and best[0].number == trial.number:
                    self._search.save_best()
        if self._stream.isatty():
            status = self._status(trials, done, best)
            self._stream.write(f"\r{status:<{self._width}}")
            self._stream.flush()
            self._width = len(status)
        return 1000 * len(done) + sum(len(trial.intermediate_values) for trial in trials)

    def close(self) -> None:
        """Removes the last line."""
        self._say("", end="")

    def _line(self, trial: FrozenTrial, best: list[FrozenTrial]) -> str:
        found = describe(trial, self._search.goal)
        mark = "  best so far" if best and best[0].number == trial.number else ""
        return f"trial {trial.number:>3}: {found}  {values_of(trial)}  {duration(_seconds(trial))}{mark}"

    def _status(self, trials: list[FrozenTrial], done: list[FrozenTrial], best: list[FrozenTrial]) -> str:
        running = sum(trial.state == TrialState.RUNNING for trial in trials)
        parts = [f"{len(done)} of {self._num_trials} trials, {running} running"]
        parts += [f"best {self._search.goal} {trial.value:.4f} (trial {trial.number})" for trial in best]
        if done:
            median = sorted(map(_seconds, done))[len(done) // 2]
            parts.append(f"about {duration((self._num_trials - len(done)) * median / max(1, running))} left")
        return ", ".join(parts)

    def _say(self, text: str, end: str = "\n") -> None:
        if self._stream.isatty():
            self._stream.write(f"\r{'':<{self._width}}\r")
        print(text, end=end, file=self._stream, flush=True)


def describe(trial: FrozenTrial, goal: str) -> str:
    """What became of a trial."""
    if trial.state == TrialState.COMPLETE:
        return f"{goal} {trial.value:.4f}"
    if trial.state == TrialState.PRUNED:
        return f"pruned after epoch {trial.last_step}"
    return f"failed: {trial.user_attrs.get('error', 'no reason is known')}"


def values_of(trial: FrozenTrial) -> str:
    """What a trial has tried, by the last parts of the names."""
    texts = {
        key: f"{value:.3g}" if isinstance(value, float) else str(value) for key, value in trial.params.items()
    }
    return ", ".join(f"{key.rpartition('.')[2]}={text.rpartition(':')[2]}" for key, text in texts.items())


def duration(seconds: float) -> str:
    """A time for people."""
    minutes, seconds = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _seconds(trial: Any) -> float:
    return trial.duration.total_seconds() if trial.duration is not None else 0.0
