"""
The experiment tracker: a CSV file with one row for each run.

The file is a view: a run's row follows from its journal. Columns and cells that are added by hand stay.
"""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dida_core.errors import checked_call
from dida_core.report.listener import Listener
from dida_core.runs.lookup import current_row, find_rows
from dida_core.storage.journal import Event
from dida_core.storage.table import read_rows, write_rows

from ..path import create_dirs

if TYPE_CHECKING:  # runs.py does without torch
    from dida_core.report.listener import Result, RunView


class CsvTracker(Listener):
    """Listener that keeps a run's row up to date."""

    def __init__(self, seconds: float = 60.0) -> None:
        """:param seconds: between two rows within an epoch"""
        self._seconds, self._written = seconds, 0.0

    def started(self, run: "RunView") -> None:
        """Write the rows of all runs: one that was killed could not do it itself."""
        self._written = time.monotonic()
        create_dirs(run.log_dir.parent)
        write_rows(_file(run), find_rows(run.log_dir.parent, run.config["LOGFILE"]))

    def step(self, run: "RunView", event: Event) -> None:
        """Write the row, if the last time is long ago."""
        if time.monotonic() - self._written >= self._seconds:
            self._write(run)

    def epoch(self, run: "RunView", event: Event) -> None:
        """Write the row."""
        self._write(run)

    def finished(self, run: "RunView", result: "Result") -> None:
        """Write the row with the results."""
        self._write(run)

    def ended(self, run: "RunView", status: str, error: BaseException) -> None:
        """Write the row of a run that ends without a result."""
        self._write(run)

    def _write(self, run: "RunView") -> None:
        self._written = time.monotonic()
        row = current_row(run.log_dir)
        if not row:
            raise OSError(f"{run.log_dir}: its journal cannot be read now, so its row stays as it was.")
        write_log(_file(run), row)  # <- your columns: row | {"MINE": ...}


def _file(run: "RunView") -> Path:
    return run.log_dir.parent / run.config["LOGFILE"]


@checked_call
def write_log(path: str | os.PathLike, content: dict[str, Any]) -> None:
    """
    Write a row: a new one, or cells of the one with the same NAME.

    New keys become new columns, keys that are not given stay as they are. Any number of processes may write.
    When this returns, the row is on the disk; when the process is killed meanwhile, the file is as it was.

    :param content: strings, numbers, booleans and None by column
    :raises TimeoutError: if another process holds the file for more than a minute
    """
    write_rows(path, [content])


def read_log(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Read all rows, with values of the types they were written with. Empty cells are None."""
    return read_rows(path)


def read_frame(path: str | os.PathLike) -> Any:
    """
    Return all rows as a pandas.DataFrame.

    :raises ImportError: where there is no pandas; nothing else here needs it
    """
    import pandas

    return pandas.DataFrame(read_log(path))
