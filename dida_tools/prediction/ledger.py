"""What was made of which image, with which settings: what is done is not done again."""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from ..utils.logging.journal import Journal, read_journal
from .jobs import Job

LEDGER = "predictions.jsonl"


def of_this_process(name: str) -> str:
    """Return the name of a file that each of several processes writes for itself."""
    rank = os.environ.get("RANK", "0")
    stem, _, ending = name.partition(".")
    return name if rank == "0" else f"{stem}.{rank}.{ending}"


class Ledger:
    """The predictions in a folder: all of them are read, those of this process are written."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        """:param settings: all that outputs depend on besides their images, as plain data"""
        files = folder.glob(LEDGER.replace(".", "*."))
        events = [event for file in files for event in read_journal(file) if event["event"] == "prediction"]
        # The last event of each output, whichever process wrote it.
        self._done = {event["output"]: event for event in sorted(events, key=lambda event: event["time"])}
        self._journal = Journal(folder / of_this_process(LEDGER))
        self._settings_digest = _digest(settings)
        if self._settings_digest not in [event.get("settings_digest") for event in self._journal.events]:
            event = {"event": "settings", "settings_digest": self._settings_digest}
            self._journal.write(event | settings)

    def close(self) -> None:
        """End writing."""
        self._journal.close()

    def origin(self, job: Job) -> dict[str, Any]:
        """Return all that the outputs of an image depend on."""
        stamps = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in job.inputs]
        origin = {"inputs": stamps, "settings_digest": self._settings_digest}
        return {"digest": _digest(origin)} | origin

    def add(self, origin: dict[str, Any], output: Path, kind: str) -> None:
        """Record an output that is complete."""
        event = {"event": "prediction", "output": output.name, "time": time.time(), "kind": kind}
        self._journal.write(event | _state(output) | origin)

    def is_done(self, job: Job) -> bool:
        """Return whether the outputs of an image are those that would be made of it now."""
        digest, events = self.origin(job)["digest"], [self._done.get(one.name, {}) for one in job.outputs]
        return all(
            event.get("digest") == digest and output.is_file() and event.items() >= _state(output).items()
            for event, output in zip(events, job.outputs, strict=True)
        )


def _state(output: Path) -> dict[str, int]:
    """Tell an output from one that was written later, which may well have the same size."""
    state = output.stat()
    return {"bytes": state.st_size, "mtime_ns": state.st_mtime_ns}


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
