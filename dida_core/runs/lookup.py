"""How runs are found again: their names, rows and configs."""

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

from ..config.keys import NOT_RESTORED, defaults
from ..config.kinds import GOAL
from ..config.project import Project
from ..errors import ConfigError, UserError
from ..storage.files import is_plain, read_plain, write_atomic
from ..storage.journal import read_journal
from .rows import current_row, is_start

LOGFILE = "experiments.csv"
NO_RUNS = "there are no runs yet; train one with: python train.py"

logger = logging.getLogger(__name__)


def run_names(log_dir: str | os.PathLike) -> list[str]:
    """Return the names of all runs, also of one whose config.json was lost."""
    found = os.scandir(os.fspath(log_dir)) if os.path.isdir(log_dir) else ()
    folders = [entry for entry in found if entry.is_dir(follow_symlinks=False)]  # a link leads elsewhere
    names = [entry.name for entry in folders if entry.name[0] != "." and entry.name.isprintable()]
    return sorted(name for name in names if _has_begun(os.path.join(log_dir, name)))


def _has_begun(folder: str) -> bool:
    files = f"{folder}/config.json", f"{folder}/journal.jsonl"
    return is_plain(files[0]) or (is_plain(files[1]) and os.path.getsize(files[1]) > 0)


def remove_unbegun(run_dir: str | os.PathLike) -> None:
    """
    Remove the folder of a run that has not begun, as a process that was killed leaves it.

    To be called only where no other process may be about to begin it.
    """
    folder = Path(run_dir)
    if folder.is_dir() and not _has_begun(str(folder)):
        ours = {".lock", "journal.jsonl", *(file.name for file in folder.glob("*.tmp"))}
        if ours >= set(os.listdir(folder)):
            shutil.rmtree(folder)


def all_rows(log_dir: str | os.PathLike) -> list[dict[str, Any]]:
    """
    Return the rows of all runs as their journals are now, in the order in which the runs were started.

    The number of a run, wherever one is shown or given, is its place in this list, from 1.
    """
    rows = [current_row(Path(log_dir) / name) for name in run_names(log_dir)]
    return sorted(filter(None, rows), key=lambda row: (str(row["STARTED"]), row["NAME"]))


def find_rows(log_dir: str | os.PathLike, logfile: str = LOGFILE) -> list[dict[str, Any]]:
    """Return the rows of one tracker's file, in the same order."""
    return [row for row in all_rows(log_dir) if row.get("LOGFILE") == logfile]


def find_run(
    global_config: dict[str, str], wanted: str, logfile: str = LOGFILE, with_weights: bool = False
) -> str:
    """
    Return the name of a run.

    :param wanted: a name or a part of one, the number of a row (from 1, as runs.py list shows it), "latest",
        or "best": of the finished runs with the MONITOR and the test data of the last one, the one with the
        best validation result; "best:iou" goes by another metric
    :param with_weights: whether "latest" leaves out runs without best weights
    :raises UserError: if there is none, or more than one
    """
    log_dir, weight_dir = Path(global_config["LOG_DIR"]), Path(global_config["WEIGHT_DIR"])
    names = run_names(log_dir)
    if not names:
        raise UserError(f"{log_dir}: {NO_RUNS}")
    if wanted in names:
        return wanted
    if wanted == "latest":
        names = [name for name in names if not with_weights or (weight_dir / name / "best.pt").is_file()]
        if not names:
            raise UserError(f"{weight_dir}: no run has weights yet.")
        return max(names, key=lambda name: _last_written(log_dir / name))
    if wanted == "best" or wanted.startswith("best:"):
        return _best_run(find_rows(log_dir, logfile), wanted.partition(":")[2])
    if wanted.isdecimal():  # never a part of another's name, such as of its date
        matching = [row["NAME"] for row in all_rows(log_dir)[: int(wanted)][int(wanted) - 1 :]]
    else:
        matching = [name for name in names if wanted in name]
    if not matching:
        raise UserError(f"no run is called {wanted!r}: the last ones are {', '.join(names[-5:])}.")
    if len(matching) > 1:
        such = ", ".join(matching[-3:])
        raise UserError(f"{wanted!r} fits {len(matching)} runs, such as {such}: give more of the name.")
    return matching[0]


def _last_written(run_dir: Path) -> float:
    files = (run_dir / "config.json", run_dir / "journal.jsonl")
    return max((file.stat().st_mtime for file in files if file.is_file()), default=0.0)


def _best_run(rows: list[dict[str, Any]], metric: str) -> str:
    rows = [row for row in rows if row["STATUS"] == "finished" and GOAL.fits(row.get("MONITOR"))]
    if not rows:
        raise UserError("no run is finished yet, so there is no best one.")
    monitor, test_data = rows[-1]["MONITOR"], _test_data(rows[-1])  # results on other data cannot be compared
    direction, goal = (("min" if metric == "loss" else "max"), metric) if metric else monitor.split()
    values = {}
    for row in rows:
        value = row.get(f"validation.{goal}", row.get(f"validation.{goal}_sample_mean"))
        is_comparable = _test_data(row) == test_data and (metric or row["MONITOR"] == monitor)
        if is_comparable and isinstance(value, int | float) and not math.isnan(value):
            values[row["NAME"]] = value
    if not values:
        about = metric or f"MONITOR {monitor!r}"
        raise UserError(f"no finished run has a validation result for {about}: give a name instead.")
    return (max if direction == "max" else min)(values, key=lambda name: values[name])


def _test_data(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in row if key.startswith("DATASET_CONFIG.test") and row[key] is not None}


def read_run_config(
    run_dir: str | os.PathLike,
    project: Project,
    say: Callable[[str], None] = logger.warning,
    keys: Container[str] | None = None,
) -> dict[str, Any]:
    """
    Return the config of a run with its live objects, without what acts outside of it; see NOT_RESTORED.

    :param say: receives a sentence where the copy in the journal is used, or something is not taken
    :param keys: only these, so that nothing is imported that only others name; None: all
    :raises ConfigError: if both are missing or damaged, or name what is not allowed
    """
    from ..config.capture import restore  # imports torch, which a list of runs does not need

    record = read_record(run_dir, say)
    if keys is not None:
        record = record | {"config": {key: value for key, value in record["config"].items() if key in keys}}
    config, usual = restore(record, project), defaults()
    left_out = [key for key in NOT_RESTORED if record["config"].get(key, usual[key]) != usual[key]]
    if left_out:
        say(f"{Path(run_dir).name}: {', '.join(left_out)} of its record: not taken, give it anew if wanted.")
    return config


def write_record(run_dir: str | os.PathLike, record: dict[str, Any]) -> None:
    """Write a captured config as a run's config.json, with its digest."""
    text = json.dumps(record | {"sha256": _digest(record)}, indent=2)
    write_atomic(Path(run_dir) / "config.json", lambda file: file.write(text.encode()))


def read_record(run_dir: str | os.PathLike, say: Callable[[str], None] = logger.warning) -> dict[str, Any]:
    """
    Return the captured config of a run, {"version": ..., "config": ...}.

    :param say: receives a sentence where config.json is damaged, and the copy in the journal is used
    :raises ConfigError: if both are missing or damaged
    """
    file = Path(run_dir) / "config.json"
    try:
        stored = json.loads(read_plain(file))
        if stored.pop("sha256") == _digest(stored) and isinstance(stored["config"], dict):
            return stored
        problem = "its content does not have the digest it was written with"
    except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    events = read_journal(Path(run_dir) / "journal.jsonl", without="step")
    starts = [event for event in events if is_start(event)]
    if not starts:
        raise ConfigError([f"{file} is damaged or missing ({problem}), and the journal holds no copy of it."])
    say(f"{file} is damaged or missing ({problem}): the copy in the journal is used.")
    return {"version": starts[-1]["version"], "config": starts[-1]["config"]}


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
