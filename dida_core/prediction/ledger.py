"""What was made of which image, with which settings: what is done is not done again."""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from ..data.images import files_beside
from ..storage.journal import Journal, read_journal
from .jobs import Job

LEDGER = "predictions.jsonl"


def of_this_process(name: str) -> str:
    """Return the name of a file that each of several processes writes for itself."""
    rank = os.environ.get("RANK", "0")
    stem, _, ending = name.partition(".")
    return name if rank == "0" else f"{stem}.{rank}.{ending}"


class Ledger:
    """The predictions in a folder: all of them are read, those of this process are written."""

    def __init__(self, folder: Path, settings: dict[str, Any], about: dict[str, Any]) -> None:
        """
        :param settings: all that outputs depend on besides their images, as plain data
        :param about: what else is recorded with each output
        """
        self._about = about
        files = folder.glob(LEDGER.replace(".", "*."))
        events = [event for file in files for event in read_journal(file) if event["event"] == "prediction"]
        # The last event of each output, whichever process wrote it.
        self._done = {event["output"]: event for event in sorted(events, key=lambda event: event["time"])}
        self._journal = Journal(folder / of_this_process(LEDGER))
        self.close = self._journal.close
        self._settings = {"settings_digest": _digest(settings)}
        if not any(event.items() >= self._settings.items() for event in self._journal.events):
            self._journal.write({"event": "settings"} | self._settings | settings)

    def origin(self, job: Job) -> dict[str, Any]:
        """Return all that the outputs of an image depend on."""
        files = [one for file in job.inputs for one in (file, *files_beside(file))]
        stamps = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        origin = {"inputs": stamps} | self._settings
        return {"digest": _digest(origin)} | origin

    def add(self, origin: dict[str, Any], output: Path, kind: str) -> None:
        """Record an output that is complete."""
        event = {"event": "prediction", "output": output.name, "time": time.time(), "kind": kind}
        self._journal.write(event | _state(output) | origin | self._about)

    def is_done(self, job: Job) -> bool:
        """Return whether the outputs of an image are those that would be made of it now."""
        digest, known = {"digest": self.origin(job)["digest"]}, self._done
        return all(
            file.is_file() and known.get(file.name, {}).items() >= (digest | _state(file)).items()
            for file in job.outputs.values()
        )


def _state(output: Path) -> dict[str, int]:
    """Tell an output from one that was written later, which may well have the same size."""
    state = output.stat()
    return {"bytes": state.st_size, "mtime_ns": state.st_mtime_ns}


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
