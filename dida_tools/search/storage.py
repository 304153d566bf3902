"""
Where trials are kept: a journal file, which any number of processes append to, or a database.

Optuna's own locks for journal files are files, which a killed process leaves behind; all others then wait for
half a minute. This one is the kernel's, and ends with its process.
"""

import os
from pathlib import Path
from typing import Any

from filelock import FileLock
from optuna import storages
from optuna.storages.journal import JournalFileBackend

from ..config.errors import UserError
from ..utils.redact import Redactor


class KernelLock:
    """A lock on a journal file, as Optuna wants it."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, FileLock(path.with_name(f".{path.name}.lock"))

    def acquire(self) -> bool:
        """Wait for those that write, and remove the line that one who was killed has half written."""
        self._lock.acquire()
        try:
            with open(self._path, "r+b") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - 1))
                if size > 0 and file.read(1) != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
        except BaseException:
            self._lock.release()
            raise
        return True

    def release(self) -> None:
        """Let the next one write."""
        self._lock.release()


def open_storage(place: str) -> Any:
    """
    Open a storage of trials.

    :param place: a journal file, which is made where it is missing, or the URL of a database
    :raises UserError: if it cannot be opened
    """
    try:
        if "://" in place:
            return storages.get_storage(storages.RDBStorage(place, engine_kwargs={"pool_pre_ping": True}))
        path = Path(place).absolute()
        path.parent.mkdir(parents=True, exist_ok=True)
        lock: Any = KernelLock(path)
        return storages.JournalStorage(JournalFileBackend(str(path), lock))
    except ImportError as error:
        name = getattr(error.__cause__, "name", None) or error.name  # of the database's driver
        driver = {"psycopg": "'psycopg[binary]'", "psycopg2": "psycopg2-binary"}.get(str(name), name)
        raise UserError(f"--storage needs {name}, which is not installed: pip install {driver}") from error
    except Exception as error:  # each database has errors of its own
        reason = " ".join(str(error).split())[:300]
        raise UserError(Redactor().text(f"--storage {place} cannot be opened: {reason}")) from error
