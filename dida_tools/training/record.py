"""
Contains what a run leaves on the disk while it trains: its lock, config, environment, journal, TensorBoard and tracker
row. Of several processes only the main one has a record; the others have a Silent one.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..config.errors import ConfigError, UserError
from ..config.tree import difference, flatten
from ..utils.files import make_unique_dir, relative_path, write_atomic
from ..utils.logging.csv import write_log
from ..utils.logging.journal import Event, Journal, read_journal
from ..utils.logging.rows import fold, is_in_training, row_of
from ..utils.logging.runs import find_rows, read_record, run_names, write_record
from ..utils.name import run_name
from ..utils.table import write_rows
from .tensorboard import Board

# What may change when a run goes on: silently, or with a word. Anything else is another training.
_FREE_TO_CHANGE = (
    "DATE",
    "SESSION_NAME",
    "ROUTINE_NAME",
    "__COMMENT",
    "EPOCHS",
    "PATIENCE",
    "INIT_WEIGHTS",
    "CHECKPOINT_SECONDS",
    "LOGFILE",
    "RERUN_OF",
    "STUDY",
    "TRIAL",
    "NOTIFY",
    "DATA_LOADER_CONFIG.num_workers",
    "DATA_LOADER_CONFIG.pin_memory",
)
_CHANGE_IS_SAID = ("DATASET", "DEVICE", "PRECISION", "CHANNELS_LAST", "METRICS", "MASK_VALUES")
# What has no influence on the weights.
_HARMLESS = tuple(key for key in _FREE_TO_CHANGE if key not in ("EPOCHS", "PATIENCE"))
_SECONDS_FOR_A_LOOK = 2.0  # another process may just be looking whether the run is being trained
# What makes the same run started again, for RESUME=auto.
_NAMES_IT = ("SESSION_NAME", "EPOCHS", "DATASET")


class Record:
    """The files of one run."""

    def __init__(
        self,
        config: dict[str, Any],
        captured: dict[str, Any],
        global_config: dict[str, str],
        say: Callable[[str], None],
    ) -> None:
        """
        Makes the folder of a new run, or finds the one to go on with, and locks it.

        :param config: the completed config; RESUME is None, a name, or "auto"
        :param captured: the same as plain data
        :raises ConfigError: if there is no such run, or if it had another config
        :raises UserError: if another process trains it
        """
        self._captured, self._say = captured, say
        log_root, weight_root = Path(global_config["LOG_DIR"]), Path(global_config["WEIGHT_DIR"])
        self.log_file = log_root / config["LOGFILE"]
        resume = config["RESUME"]
        if resume == "auto":
            resume = find_unfinished(log_root, captured, say)
        self.goes_on = resume is not None
        if resume is None:
            self.name = make_unique_dir(log_root, run_name(config | captured["config"]))
        else:
            self.name = resume
            if self.name not in run_names(log_root):
                raise ConfigError([f"RESUME is {self.name!r}: there is no such run in {log_root}."])
        self.log_dir, self.weight_dir = log_root / self.name, weight_root / self.name
        self._lock = FileLock(self.log_dir / ".lock", timeout=_SECONDS_FOR_A_LOOK)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise UserError(
                f"the run {self.name} is being trained by another process: wait, or end it."
            ) from error
        try:
            for folder in (self.log_dir, self.weight_dir):
                for file in folder.glob(".*.tmp"):  # what a process that was killed was writing
                    file.unlink(missing_ok=True)
            self._compare_configs()
            self.journal = Journal(self.log_dir / "journal.jsonl")
        except BaseException:
            self._lock.release()
            raise
        try:
            write_rows(self.log_file, find_rows(log_root, config["LOGFILE"]))
        except (OSError, TimeoutError) as error:
            say(f"{self.log_file} could not be brought up to date ({error}): that is done later.")
        if self.journal.num_damaged:
            say(f"{self.journal.path}: {self.journal.num_damaged} damaged lines are left out.")
        self._row = row_of(self.journal.events)
        self._last_row = time.monotonic()
        self._pending: list[Event] = []  # what a full disk did not take yet
        self.board: Any = Silent()

    def begin(self, event: Event, environment: dict[str, Any], not_rerunnable: str) -> None:
        """Writes what is known at the start."""
        about = {"name": self.name, "not_rerunnable": not_rerunnable}
        write_record(self.log_dir, self._captured | about)
        text = json.dumps(environment, indent=2).encode()
        write_atomic(self.log_dir / "environment.json", lambda file: file.write(text))
        process = {"host": socket.gethostname(), "pid": os.getpid()}
        self.write({"event": "start"} | event | about | process | self._captured)
        self._write_pending()  # a disk that is full now is better told now
        self.write_row()

    def changes_on_the_way(self, start: Event) -> list[str]:
        """Why a run that goes on now cannot be done again in one piece."""
        starts = [event for event in self.journal.events if event["event"] == "start"]
        changed = {
            key
            for event in starts
            for key in ("device", "precision", "processes")
            if event[key] != start[key]
        }
        config = self._captured["config"]
        length_counts = config.get("SCHEDULER") or config.get("PATIENCE")
        harmless = _HARMLESS if length_counts else (*_HARMLESS, "EPOCHS")
        for event in starts:
            changed |= {
                key for key in difference(_bare(event), self._captured) if not key.startswith(harmless)
            }
        return (
            [f"it was interrupted and went on with another {', '.join(sorted(changed))}"] if changed else []
        )

    def open_tensorboard(self, step: int, is_end_of_epoch: bool) -> None:
        """
        Opens TensorBoard's file, without what a process that was killed had written after its last checkpoint.

        :param step: of the last checkpoint
        :param is_end_of_epoch: whether it was the last one of an epoch, whose results have the same step
        """
        folder = self.log_dir / "tensorboard"
        if not self.goes_on:
            self.board = Board(folder, self._say)
        elif not is_end_of_epoch:
            self.board = Board(folder, self._say, purge_step=step + 1)
        else:
            # The epoch's results may be there or not: that step is written again.
            self.board = Board(folder, self._say, purge_step=step)
            for event in read_journal(self.journal.path):
                if event["event"] == "step" and event["step"] == step:
                    self.board.write_event(event)

    def write(self, event: Event) -> None:
        """
        Appends an event to the journal, unless a step or epoch is there already, and takes it into the row. On a full
        disk it waits until there is space.
        """
        event = event | {"time": time.time()}
        self._row = fold(self._row, event)
        if event["event"] == "step":
            self.board.write_event(event)
        self._pending.append(event)
        try:
            self._write_pending()
        except OSError as error:
            if len(self._pending) == 1:
                why = error.strerror or error
                self._say(
                    f"{self.journal.path} cannot be written ({why}): training goes on, and writes it when it can be."
                )

    def _write_pending(self) -> None:
        while self._pending:
            event = self._pending.pop(0)
            try:
                self.journal.write(event)
            except OSError:
                self._pending.insert(0, event)
                raise

    def write_epoch(self, event: Event) -> None:
        """Appends the event of an epoch, and shows its numbers in TensorBoard."""
        self.write(event)
        self.board.write_event(event)

    def write_scalars(self, scalars: dict[str, float], step: int) -> None:
        """Shows numbers in TensorBoard."""
        self.board.write_scalars(scalars, step)

    def write_results(self, metrics: dict[str, float], step: int) -> None:
        """Shows in TensorBoard what was reached, and with what config."""
        tags = {name.replace(".", "/"): value for name, value in metrics.items()}
        self.board.write_scalars({tag: value for tag, value in tags.items() if tag.startswith("test/")}, step)
        self.board.write_hparams(flatten(self._captured), tags, step)

    def write_row(self, older_than_seconds: float = 0) -> None:
        """Writes the tracker's row, if the last time was that long ago: all of it, since it may be lost there."""
        if time.monotonic() - self._last_row < older_than_seconds:
            return
        self._last_row = time.monotonic()
        try:
            write_log(self.log_file, {"NAME": self.name} | self._row)
        except (OSError, TimeoutError) as error:
            self._say(
                f"The tracker's row could not be written ({error}); it is in the journal, and will be merged later."
            )

    def say_contradictions(self) -> None:
        """Says if this run, going on, came to other results than were in its journal."""
        if self.journal.contradictions:
            self._say(
                f"{len(self.journal.contradictions)} results differ from those before the interruption, first in "
                f"{self.journal.contradictions[0]}: code, data, config or machine are not what they were."
            )

    def end(self, status: str, error: str, seconds: float) -> None:
        """Takes note that the run ends without a result."""
        self.write({"event": "end", "status": status, "error": error, "seconds": seconds})
        self.write_row()

    def sync(self) -> None:
        """
        Makes what was written survive a power cut.

        :raises OSError: if the journal cannot take it all
        """
        self._write_pending()
        self.journal.sync()
        self.board.sync(lambda: read_journal(self.journal.path))

    def close(self) -> None:
        """Ends all writing."""
        self.board.close()
        try:
            with contextlib.suppress(OSError):
                self._write_pending()
            if self._pending:
                events = ", ".join(sorted({event["event"] for event in self._pending}))
                self._say(
                    f"{self.journal.path}: the last {len(self._pending)} events ({events}) are not in it."
                )
            self.journal.close()
        except OSError as error:
            self._say(f"{self.log_dir}: the last lines may not be on the disk ({error}).")
        finally:
            self._lock.release()

    def _compare_configs(self) -> None:
        """Refuses to go on with another config than that of the run."""
        if not self.goes_on:
            return
        refused = []
        for key, (before, now) in difference(
            _bare(read_record(self.log_dir, self._say)), self._captured
        ).items():
            if key.startswith(_CHANGE_IS_SAID):
                self._say(f"{self.name} goes on with another {key}: {before} before, {now} now.")
            elif not key.startswith(_FREE_TO_CHANGE):
                refused.append(f"{key} was {before} and is now {now}: that would be another training.")
        if refused:
            weights = relative_path(self.weight_dir / "best.pt")
            raise ConfigError(
                [*refused, f"Start a new run, if you like from its weights: INIT_WEIGHTS={weights}."]
            )


class Silent:
    """Stands in for what only the main process does: every method is there and does nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def find_unfinished(
    log_root: Path, captured: dict[str, Any], say: Callable[[str], None] = print
) -> str | None:
    """The newest run of this config that was not finished and is not being trained, or None."""
    found: dict[str, float] = {}
    free = tuple(key for key in (*_FREE_TO_CHANGE, *_CHANGE_IS_SAID) if key not in _NAMES_IT)
    for name in run_names(log_root):
        events = read_journal(log_root / name / "journal.jsonl")
        if row_of(events).get("STATUS") == "finished":
            continue
        try:
            stored = read_record(log_root / name, lambda text: None)
        except ConfigError:
            continue
        if not all(key.startswith(free) for key in difference(_bare(stored), captured)):
            continue
        if is_in_training(log_root / name):
            say(f"{name}, of the same config, is being trained by another process.")
        else:
            found[name] = events[0]["time"] if events else 0.0
    return max(found, key=lambda name: found[name]) if found else None


def _bare(record: dict[str, Any]) -> dict[str, Any]:
    return {"version": record["version"], "config": record["config"]}
