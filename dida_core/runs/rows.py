"""How a run's row in the tracker follows from the events of its journal."""

import contextlib
import logging
import os
import socket
import time
from pathlib import Path
from typing import Any

from ..config.tree import flatten
from ..errors import printable
from ..storage.files import is_plain, plain, read_plain
from ..storage.journal import Event, from_line, read_journal, to_line
from ..storage.locks import is_locked

_CLOCK = "%Y-%m-%d %H:%M:%S"
_FORMAT = 2  # another number where a row comes to follow from a journal in another way
_SECONDS_TO_BELIEVE_OTHERS = 3600.0

logger = logging.getLogger(__name__)


def row_of(events: list[Event]) -> dict[str, Any]:
    """Return the row of a run with these events; empty where its start is not among them."""
    row: dict[str, Any] = {}
    for event in events:
        row = fold(row, event)
    return row if "NAME" in row else {}


def fold(row: dict[str, Any], event: Event) -> dict[str, Any]:
    """Return the row after an event."""
    columns: dict[str, Any] = {}
    kind = event["event"]
    if kind == "start":
        # Epochs after the checkpoint are trained again, but those in the journal are not appended again.
        is_ahead = (row.get("EPOCH") or 0) > event["epoch"]
        columns = {
            "NAME": event["name"],
            "STATUS": "running",
            "STARTED": row.get("STARTED", clock(event["started" if "started" in event else "time"])),
            "SECONDS": None,
            "EPOCH": row["EPOCH"] if is_ahead else event["epoch"],
            "BEST_EPOCH": row["BEST_EPOCH"] if is_ahead else event["best_epoch"],
            "HEARTBEAT": None,
            "HOST": event["host"],
            "PID": event["pid"],
            "ERROR": None,
            "RAN_ON": f"{event['device']} {event['precision']}",
            "RERUNNABLE": f"no: {event['not_rerunnable']}" if event["not_rerunnable"] else "yes",
        }
        if "resumed_with" in event:
            columns["RESUMED_WITH"] = f"another {event['resumed_with']}"
        columns |= {"DATA_DIGEST": event["data_digest"]} if "data_digest" in event else {}
        # A run that is resumed may have fewer options than before.
        columns |= {key: None for key in row if key.partition(".")[0] in event["config"]}
        columns |= flatten(event["config"])
    elif kind == "epoch":
        columns = {"EPOCH": event["epoch"], "train.loss": event["train.loss"]}
        if event["best"]:
            columns["BEST_EPOCH"] = event["epoch"]
    elif kind == "test":
        columns = {"STATUS": "finished", "SECONDS": event["seconds"], "WEIGHTS_DIGEST": event["digest"]}
        columns |= {"BEST_DIGEST": event["best_digest"]} if "best_digest" in event else {}
        columns |= {key: value for key, value in event.items() if key.startswith(("validation.", "test."))}
        if "identical" in event:
            columns["RERUN_IDENTICAL"] = event["identical"]
    elif kind == "end":
        columns = {"STATUS": event["status"], "ERROR": event["error"], "SECONDS": event["seconds"]}
    return row | columns | {"HEARTBEAT": clock(event["time"])}


def is_start(event: Event) -> bool:
    """Tell whether an event is a start of a run, with its config."""
    return event.get("event") == "start" and isinstance(event.get("config"), dict) and "version" in event


def clock(seconds: float) -> str:
    """Return a point in time as the tracker shows it, local time."""
    return time.strftime(_CLOCK, time.localtime(seconds))


def is_in_training(run_dir: str | os.PathLike) -> bool:
    """Return whether a process trains the run, without disturbing it."""
    return is_locked(Path(run_dir) / ".lock")


def current_row(run_dir: str | os.PathLike) -> dict[str, Any]:
    """
    Return a run's row by its journal; one that is running, but is not being trained, was killed.

    Of a journal that holds what none of ours does it is empty.
    """
    try:
        row = _current_row(run_dir)
    except Exception as error:  # whatever a journal of unknown origin leads to
        logger.warning("%s is left out: its journal is damaged (%r).", run_dir, error)
        return {}
    return {printable(key): _cell(value) for key, value in row.items()}


def _cell(value: Any) -> Any:
    return value if value is None or isinstance(value, int | float) else printable(str(value))


def _current_row(run_dir: str | os.PathLike) -> dict[str, Any]:
    row = _row_by_journal(Path(run_dir))
    if row.get("STATUS") == "running" and not is_in_training(run_dir):
        row = _row_by_journal(Path(run_dir))  # it may have ended between the two looks
        if row["STATUS"] == "running" and not is_in_training(run_dir) and not _is_believed(row):
            row["STATUS"] = "killed"
    return row


def _is_believed(row: dict[str, Any]) -> bool:
    """Return whether a run may be trained on another machine; not every network drive shows its lock."""
    age = time.time() - time.mktime(time.strptime(row["HEARTBEAT"], _CLOCK))
    return row["HOST"] != socket.gethostname() and age < _SECONDS_TO_BELIEVE_OTHERS


def _row_by_journal(run_dir: Path) -> dict[str, Any]:
    """Return the row, from a cache beside the journal unless that has changed since."""
    journal, cache = run_dir / "journal.jsonl", run_dir / ".row.json"
    if not is_plain(journal):
        return {}
    about, named = journal.stat(), {"NAME": run_dir.name}  # whatever its files say
    state = [_FORMAT, about.st_size, about.st_mtime_ns]
    with contextlib.suppress(OSError):
        row = from_line(read_plain(cache)) or {}
        if row.pop("journal", None) == state:
            return row | named
    row = row_of(read_journal(journal, without="step"))
    if row:
        row |= named
        with contextlib.suppress(OSError), open(cache, "wb", opener=plain) as file:  # may be read-only
            file.write(to_line({"journal": state} | row))
    return row
