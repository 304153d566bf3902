"""
Contains how a run's row in the tracker follows from its journal. The row that a training writes, and the one that is
made anew from the journal, come from the same function.
"""

import os
import socket
import time
from pathlib import Path
from typing import Any

from ...config.tree import flatten
from .csv import KEY, read_log, replace_log, write_log
from .journal import Event, read_journal
from .runs import is_in_training, run_names

_FORMAT = "%Y-%m-%d %H:%M:%S"
_SECONDS_OF_DELAY = 150.0  # a row is written every minute
_SECONDS_TO_BELIEVE_OTHERS = 3600.0


def fold(row: dict[str, Any], event: Event) -> dict[str, Any]:
    """The row after an event."""
    columns: dict[str, Any] = {}
    kind = event["event"]
    if kind == "start":
        columns |= {
            "NAME": event["name"],
            "STATUS": "running",
            "STARTED": row.get("STARTED", clock(event["time"])),
        }
        # Epochs after the checkpoint that are in the journal already are trained again, and not appended again.
        is_ahead = (row.get("EPOCH") or 0) > event["epoch"]
        where = (row["EPOCH"], row["BEST_EPOCH"]) if is_ahead else (event["epoch"], event["best_epoch"])
        columns |= {"SECONDS": None, "EPOCH": where[0], "BEST_EPOCH": where[1]}
        columns |= {"HEARTBEAT": None, "HOST": event["host"], "PID": event["pid"], "ERROR": None}
        columns["RAN_ON"] = f"{event['device']} {event['precision']}"
        columns["RERUNNABLE"] = f"no: {event['not_rerunnable']}" if event["not_rerunnable"] else "yes"
        # A run that goes on may have fewer options than before.
        columns |= {key: None for key in row if key.partition(".")[0] in event["config"]}
        columns |= flatten({"version": event["version"], "config": event["config"]})
    elif kind == "epoch":
        columns |= {"EPOCH": event["epoch"], "train.loss": event["train.loss"]}
        if event["best"]:
            columns["BEST_EPOCH"] = event["epoch"]
    elif kind == "test":
        columns |= {"STATUS": "finished", "SECONDS": event["seconds"], "WEIGHTS_DIGEST": event["digest"]}
        columns |= {key: value for key, value in event.items() if key.startswith(("validation.", "test."))}
        if "identical" in event:
            columns["RERUN_IDENTICAL"] = event["identical"]
    elif kind == "end":
        columns |= {"STATUS": event["status"], "ERROR": event["error"], "SECONDS": event["seconds"]}
    return row | columns | {"HEARTBEAT": clock(event["time"])}


def row_of(events: list[Event]) -> dict[str, Any]:
    """The row of a run with these events; empty where its start is not among them."""
    row: dict[str, Any] = {}
    for event in events:
        row = fold(row, event)
    return row if KEY in row else {}


def rebuild_log(log_dir: str | os.PathLike, logfile: str = "experiments.csv") -> int:
    """
    Makes the tracker's file anew from the journals. The old one, which may hold columns of your own, stays beside it.

    :return: how many runs have a journal
    """
    rows = [_current_row(Path(log_dir) / name) for name in run_names(log_dir)]
    rows = [row for row in rows if row.get("LOGFILE") == logfile]
    rows.sort(key=lambda row: (row["STARTED"], row[KEY]))
    replace_log(Path(log_dir) / logfile, rows)
    return len(rows)


def refresh_log(log_dir: str | os.PathLike, logfile: str = "experiments.csv") -> None:
    """
    Merges what the tracker's file lacks: rows that could not be written, and that a run was killed. It reads only the
    journals of runs that seem to be running, or that were written to after their row.
    """
    file = Path(log_dir) / logfile
    known = {row.get(KEY): row for row in read_log(file)}
    for name in run_names(log_dir):
        row, journal = known.get(name, {}), Path(log_dir) / name / "journal.jsonl"
        if row.get("STATUS") != "running" and not _is_newer(journal, row.get("HEARTBEAT")):
            continue
        current = _current_row(Path(log_dir) / name)
        if current.get("LOGFILE") == logfile and any(row.get(key) != value for key, value in current.items()):
            write_log(file, current)


def _current_row(run_dir: Path) -> dict[str, Any]:
    """A run's row by its journal; one that is running, but not being trained, was killed."""
    before, row = None, row_of(read_journal(run_dir / "journal.jsonl"))
    while row != before:  # it may have ended, or gone on, between the journal and the lock
        if row.get("STATUS") != "running" or is_in_training(run_dir):
            return row
        before, row = row, row_of(read_journal(run_dir / "journal.jsonl"))
    if (
        row["HOST"] != socket.gethostname()
        and time.time() - _seconds(row["HEARTBEAT"]) < _SECONDS_TO_BELIEVE_OTHERS
    ):
        return row  # not every network drive knows the locks of other machines
    return row | {"STATUS": "killed"}


def _is_newer(journal: Path, heartbeat: Any) -> bool:
    if not journal.is_file():
        return False
    return not isinstance(heartbeat, str) or journal.stat().st_mtime > _seconds(heartbeat) + _SECONDS_OF_DELAY


def _seconds(text: str) -> float:
    try:
        return time.mktime(time.strptime(text, _FORMAT))
    except (ValueError, OverflowError):
        return 0.0  # not ours: another program has changed it


def clock(seconds: float) -> str:
    """A point in time as the tracker shows it, local time."""
    return time.strftime(_FORMAT, time.localtime(seconds))
