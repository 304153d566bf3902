"""Contains folders and files that are written whole or not at all."""

import errno
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def create_dirs(*paths: str | os.PathLike) -> None:
    """Creates folders and what they lie in; existing ones are left as they are."""
    for path in paths:
        Path(path).mkdir(parents=True, exist_ok=True)


def shown(path: str | os.PathLike) -> str:
    """A path for people: relative where it lies below the working directory."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def write_atomic(path: str | os.PathLike, write: Callable[[BinaryIO], object]) -> None:
    """
    Writes a file so that whoever reads it, even after a crash at any moment, finds the old one or the new one whole.

    :param path: the file; its folder is created
    :param write: gets the open temporary file, for reading and writing
    """
    path = Path(path)
    create_dirs(path.parent)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "x+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_dir(path.parent)


def sync_dir(path: str | os.PathLike) -> None:
    """Makes a folder's new names survive a power cut, where the system can."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network drives cannot
                raise
        finally:
            os.close(handle)
