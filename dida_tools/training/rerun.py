"""
Contains how a run is done again and compared with the first time: with equal code, versions, data and machine it ends
with the same weights, bit for bit.
"""

import json
from pathlib import Path
from typing import Any

from ..config.errors import UserError
from ..utils.logging.journal import Event, read_journal
from .environment import find_differences


def find_end(run_dir: Path) -> Event:
    """
    How a run ended.

    :raises UserError: if it has not, so that there is nothing to compare with
    """
    ends = [event for event in read_journal(run_dir / "journal.jsonl") if event["event"] == "test"]
    if not ends:
        raise UserError(
            f"{run_dir.name} was not trained to its end: finish it first, with --resume {run_dir.name}."
        )
    return ends[-1]


def differences_from(run_dir: Path, environment: dict[str, Any]) -> list[str]:
    """What is not as it was when a run was trained, a sentence each."""
    try:
        before = json.loads((run_dir / "environment.json").read_bytes())
    except (OSError, ValueError) as error:
        return [f"environment.json of {run_dir.name} cannot be read ({error}): what has changed is not known"]
    starts = [event for event in read_journal(run_dir / "journal.jsonl") if event["event"] == "start"]
    reason = starts[-1]["not_rerunnable"] if starts else ""
    return [*([f"the run itself: {reason}"] if reason else []), *find_differences(before, environment)]


def compare_runs(run_dir: Path, events: list[Event], digest: str) -> tuple[bool, str]:
    """
    Compares a finished run with one that repeats it.

    :param events: of the repeating run
    :param digest: of its last weights
    :return: whether the weights are identical, and a sentence
    """
    if find_end(run_dir)["digest"] == digest:
        return True, f"identical: the weights are those of {run_dir.name}, bit for bit ({digest[:16]}...)"
    first = {
        event["step"]: event for event in read_journal(run_dir / "journal.jsonl") if event["event"] == "step"
    }
    for event in events:
        before = first.get(event.get("step", -1), event)
        if event["event"] == "step" and event["loss"] != before["loss"]:
            where = f"first in step {event['step']}: loss {before['loss']!r} then, {event['loss']!r} now"
            return False, f"not identical: {run_dir.name} had other weights; the losses differ {where}"
    return (
        False,
        f"not identical: {run_dir.name} had other weights, although the losses of all steps are the same",
    )
