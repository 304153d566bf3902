"""
Contains how a run's row in the tracker follows from its journal. The row that a training writes, and the one that is
made anew from the journal, come from the same function.

    python -m dida_tools.utils.logging.rows          makes experiments.csv anew from all journals
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

from ...config.capture import flatten
from ...config.config import global_config
from .csv import KEY, replace_log
from .journal import Event, read_journal


def fold(row: dict[str, Any], event: Event) -> dict[str, Any]:
    """The row after an event."""
    columns: dict[str, Any] = {}
    kind = event["event"]
    if kind == "start":
        columns |= {"NAME": event["name"], "STATUS": "running", "STARTED": row.get("STARTED", clock(event["time"]))}
        columns |= {"SECONDS": None, "EPOCH": event["epoch"], "BEST_EPOCH": event["best_epoch"]}
        columns |= {"HEARTBEAT": None, "HOST": event["host"], "PID": event["pid"], "ERROR": None}
        columns["RAN_ON"] = f"{event['device']} {event['precision']}"
        columns["RERUNNABLE"] = f"no: {event['not_rerunnable']}" if event["not_rerunnable"] else "yes"
        columns |= flatten({"version": event["version"], "config": event["config"]})
    elif kind == "epoch":
        columns |= {"EPOCH": event["epoch"], "train.loss": event["train.loss"]}
        if event["best"]:
            columns["BEST_EPOCH"] = event["epoch"]
    elif kind == "test":
        columns |= {"STATUS": "finished", "SECONDS": event["seconds"], "WEIGHTS_DIGEST": event["digest"]}
        columns |= {key: value for key, value in event.items() if key.startswith(("validation.", "test."))}
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
    rows = []
    for file in Path(log_dir).glob("*/journal.jsonl"):
        row = row_of(read_journal(file))
        if row.get("LOGFILE") == logfile:
            rows.append(row)
    rows.sort(key=lambda row: (row["STARTED"], row[KEY]))
    replace_log(Path(log_dir) / logfile, rows)
    return len(rows)


def clock(seconds: float) -> str:
    """A point in time as the tracker shows it, local time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


if __name__ == "__main__":
    number = rebuild_log(global_config["LOG_DIR"])
    print(f"{Path(global_config['LOG_DIR']) / 'experiments.csv'} has the rows of {number} runs.")
    sys.exit(0)
