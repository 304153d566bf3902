"""
How a run that repeats another is compared with it.

With equal code, versions, data and machine it ends with the same weights, bit for bit.
"""

import json
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..storage.files import read_plain
from ..storage.journal import Event, read_journal
from .environment import find_differences
from .rows import is_start


def find_end(run_dir: Path) -> Event:
    """
    Return the last event of a finished run, with the digest of its weights.

    :raises UserError: if it is not finished, so that there is nothing to compare with
    """
    ends = [event for event in _events(run_dir) if event.get("event") == "test" and "digest" in event]
    if not ends:
        name = run_dir.name
        raise UserError(f"{name} was not trained to its end: finish it first, with --resume {name}.")
    return ends[-1]


def differences_from(run_dir: Path, environment: dict[str, Any]) -> list[str]:
    """Return what is not as it was when a run was trained, in one piece or several, a sentence each."""
    segments = read_segments(run_dir)
    changes = [change for one in segments for change in find_differences(one, environment)]
    if not segments:
        changes = [f"environment.json of {run_dir.name} cannot be read: what has changed is not known"]
    reasons = [event.get("not_rerunnable") for event in _events(run_dir) if is_start(event)][-1:]
    return [*(f"the run itself: {why}" for why in reasons if why), *dict.fromkeys(changes)]


def read_segments(run_dir: Path) -> list[dict[str, Any]]:
    """Return the environments that a run was trained in, the last one first; none where they are lost."""
    try:
        latest = json.loads(read_plain(run_dir / "environment.json"))
        segments = [latest, *latest.pop("earlier", [])]
        return segments if not any(find_differences(one, one) for one in segments) else []
    except Exception:  # whatever a file of unknown origin leads to
        return []


def compare_runs(run_dir: Path, events: list[Event], digest: str, differences: list[str]) -> tuple[bool, str]:
    """
    Compare a finished run with one that repeats it.

    :param events: of the repeating run
    :param digest: of its last weights
    :param differences: what was not as it was, by differences_from
    :return: whether the weights are identical, and a sentence
    """
    name = run_dir.name
    if find_end(run_dir)["digest"] == digest:
        return True, f"identical: the weights are those of {name}, bit for bit ({digest[:16]}...)"
    first, now = (
        {event["step"]: event["loss"] for event in some if event.keys() >= {"step", "loss"}}
        for some in (read_journal(run_dir / "journal.jsonl"), events)
    )
    where = "although the losses of all steps are the same"
    for step, loss in now.items():
        if first.get(step, loss) != loss:
            where = f"the losses differ first in step {step}: loss {first[step]!r} then, {loss!r} now"
            break
    known = "code, versions, data and machine are the same, as far as they are recorded"
    why = f"what may explain it: {'; '.join(differences)}" if differences else known
    return False, f"not identical: {name} had other weights; {where}; {why}"


def _events(run_dir: Path) -> list[Event]:
    return read_journal(run_dir / "journal.jsonl", without="step")
