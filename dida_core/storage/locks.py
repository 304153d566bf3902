"""Locks between processes: the system releases them when their process ends, however it ends."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from filelock import FileLock, Timeout

from ..errors import UserError
from .files import plain, refuse_links

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class Busy(UserError, TimeoutError):
    """Another process holds the lock."""


@contextmanager
def locked(path: str | os.PathLike, seconds: float = -1, busy: str = "") -> Iterator[None]:
    """
    Hold a lock.

    :param path: the lock's file, in an existing folder
    :param seconds: how long to wait for it; negative: forever
    :param busy: message of the error
    :raises Busy: if another process holds it for longer
    :raises UserError: if the file is a link
    """
    refuse_links(path)
    lock = FileLock(path, timeout=seconds)
    try:
        lock.acquire()
    except Timeout as error:
        raise Busy(busy or f"{path} is locked by another process.") from error
    try:
        yield
    finally:
        lock.release()


def is_locked(path: str | os.PathLike) -> bool:
    """Return whether a process holds a lock. Nothing is written, and two that look do not see one another."""
    try:
        if fcntl is None:
            with locked(path, 0):
                return False
        with suppress(FileNotFoundError), open(path, "rb", opener=plain) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (Busy, BlockingIOError):
        return True
    return False
