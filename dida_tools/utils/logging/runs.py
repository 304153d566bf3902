"""Contains how tracked runs are found again, with their configs."""

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ...config.capture import restore
from ...config.errors import ConfigError, UserError
from ...config.project import Project
from ..files import write_atomic
from .csv import read_log
from .journal import read_journal

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def find_run(
    global_config: dict[str, str], wanted: str, logfile: str = "experiments.csv", with_weights: bool = False
) -> str:
    """
    The name of a run.

    :param wanted: a name or a part of one, the number of a row of the tracker's file (from 1), "latest", or "best": of
        the finished runs with the MONITOR and the test data of the last one, the one with the best validation result;
        "best:iou" goes by another metric
    :param with_weights: whether "latest" leaves out runs without best weights
    :raises UserError: if there is none, or more than one
    """
    log_dir = Path(global_config["LOG_DIR"])
    names = run_names(log_dir)
    if not names:
        raise UserError(f"{log_dir}: there are no runs yet; train one with: python train.py")
    if wanted in names:
        return wanted
    if wanted == "latest":
        if with_weights:
            names = [
                name for name in names if (Path(global_config["WEIGHT_DIR"]) / name / "best.pt").is_file()
            ]
            if not names:
                raise UserError(f"{global_config['WEIGHT_DIR']}: no run has weights yet.")
        return max(names, key=lambda name: _last_written(log_dir / name))
    if wanted == "best" or wanted.startswith("best:"):
        return _best_run(read_log(log_dir / logfile), names, wanted.partition(":")[2])
    rows = read_log(log_dir / logfile) if wanted.isdigit() else []
    if 0 < int(wanted if wanted.isdigit() else 0) <= len(rows) and rows[int(wanted) - 1]["NAME"] in names:
        return rows[int(wanted) - 1]["NAME"]
    matching = [name for name in names if wanted in name]
    if len(matching) == 1:
        return matching[0]
    if not matching:
        raise UserError(f"no run is called {wanted!r}: the last ones are {', '.join(names[-5:])}.")
    raise UserError(
        f"{wanted!r} fits {len(matching)} runs, such as {', '.join(matching[-3:])}: give more of the name."
    )


def run_names(log_dir: str | os.PathLike) -> list[str]:
    """The names of all runs, also of one whose config.json was lost."""
    names = {file.parent.name for file in Path(log_dir).glob("*/config.json")}
    for journal in Path(log_dir).glob("*/journal.jsonl"):
        with contextlib.suppress(FileNotFoundError):  # it has just been removed
            if journal.stat().st_size > 0:
                names.add(journal.parent.name)
    return sorted(name for name in names if not name.startswith("."))


def remove_unbegun(run_dir: str | os.PathLike) -> None:
    """
    Removes the folder of a run that a process has left empty, since it was killed before the run began. To be called
    only where no other process may be about to begin it.
    """
    folder = Path(run_dir)
    if folder.is_dir() and folder.name not in run_names(folder.parent):
        for file in folder.iterdir():
            if file.name not in (".lock", "journal.jsonl") and file.suffix != ".tmp":
                return  # somebody else's
        shutil.rmtree(folder)


def is_in_training(run_dir: str | os.PathLike) -> bool:
    """Whether a process holds the lock of a run. Nothing is written, and two that look do not see one another."""
    file = Path(run_dir) / ".lock"
    if fcntl is None:
        lock = FileLock(file, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            return True
        lock.release()
        return False
    try:
        handle = os.open(file, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def _last_written(run_dir: Path) -> int:
    return max(
        file.stat().st_mtime_ns for name in ("config.json", "journal.jsonl") for file in run_dir.glob(name)
    )


def _best_run(rows: list[dict[str, Any]], names: list[str], metric: str) -> str:
    rows = [
        row
        for row in rows
        if row.get("STATUS") == "finished" and row.get("NAME") in names and row.get("MONITOR")
    ]
    if not rows:
        raise UserError("no run is finished yet, so there is no best one.")
    monitor = rows[-1]["MONITOR"]
    direction, goal = monitor.split()
    if metric:
        direction, goal = "min" if metric == "loss" else "max", metric
    values = {}
    for row in rows:
        if _test_data(row) != _test_data(rows[-1]):
            continue  # results on other data cannot be compared
        value = row.get(f"validation.{goal}")
        if value is None:  # also where only another run has the column
            value = row.get(f"validation.{goal}_sample_mean")
        if (metric or row["MONITOR"] == monitor) and isinstance(value, int | float) and not math.isnan(value):
            values[row["NAME"]] = value
    if not values:
        about = metric or f"MONITOR {monitor!r}"
        raise UserError(f"no finished run has a validation result for {about}: give a name instead.")
    return (max if direction == "max" else min)(values, key=lambda name: values[name])


def _test_data(row: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in row.items()
        if key.startswith("DATASET_CONFIG.test") and value is not None
    }


def read_run_config(
    run_dir: str | os.PathLike,
    project: Project,
    roots: Iterable[str] = (),
    say: Callable[[str], None] = print,
    keys: Container[str] | None = None,
) -> dict[str, Any]:
    """
    The config of a run with its live objects.

    :param roots: libraries that may be imported besides the project's ALLOWED_ROOTS
    :param say: gets a sentence where config.json is damaged, and the copy in the journal is used
    :param keys: only these, so that nothing is needed that only others name, such as a routine's framework; None: all
    :raises ConfigError: if both are missing or damaged, or name what is not allowed
    """
    record = read_record(run_dir, say)
    if keys is not None:
        record = record | {"config": {key: value for key, value in record["config"].items() if key in keys}}
    return restore(record, project, roots)


def write_record(run_dir: str | os.PathLike, record: dict[str, Any]) -> None:
    """Writes a captured config as a run's config.json, with its digest."""
    text = json.dumps(record | {"sha256": _digest(record)}, indent=2)
    write_atomic(Path(run_dir) / "config.json", lambda file: file.write(text.encode()))


def read_record(run_dir: str | os.PathLike, say: Callable[[str], None] = print) -> dict[str, Any]:
    """
    The captured config of a run, {"version": ..., "config": ...}.

    :param say: gets a sentence where config.json is damaged, and the copy in the journal is used
    :raises ConfigError: if both are missing or damaged
    """
    file = Path(run_dir) / "config.json"
    try:
        stored = json.loads(file.read_bytes())
        digest = stored.pop("sha256")
        if digest == _digest(stored):
            return stored
        problem = "its content does not have the digest it was written with"
    except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    starts = [event for event in read_journal(Path(run_dir) / "journal.jsonl") if event["event"] == "start"]
    if not starts:
        raise ConfigError([f"{file} is damaged or missing ({problem}), and the journal holds no copy of it."])
    say(f"{file} is damaged or missing ({problem}): the copy in the journal is used.")
    return {"version": starts[-1]["version"], "config": starts[-1]["config"]}


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
