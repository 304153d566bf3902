"""Files that are written intact or not at all, and names that every file system takes."""

import errno
import os
import re
import unicodedata
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

# Windows keeps these names for devices, with any ending.
_DEVICE = re.compile(r"(con|prn|aux|nul|(com|lpt)[1-9])(\.|$)", re.IGNORECASE)


def write_atomic(path: str | os.PathLike, write: Callable[[BinaryIO], object]) -> None:
    """
    Write a file such that a reader, even after a crash at any moment, finds the old or the new content.

    :param path: the file; its folder is created
    :param write: receives the open temporary file, for reading and writing
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
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
    """Make a folder's new names survive a power cut, where the system can."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network drives cannot
                raise
        finally:
            os.close(handle)


def relative_path(path: str | os.PathLike) -> str:
    """Return a path for people: relative where it lies below the working directory."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def safe_name(text: str, max_length: int = 100) -> str:
    """
    Return a text as a name that is safe for a file on every system.

    Letters (without accents), digits, ``-``, ``_`` and ``.`` stay, the rest becomes ``-``. Names that Windows
    keeps for devices, such as ``nul.txt``, get a ``_`` in front.

    :return: 1 to max_length ASCII characters; "unnamed" where nothing is left
    """
    letters = "".join(char for char in unicodedata.normalize("NFKD", text) if not unicodedata.combining(char))
    name = re.sub(r"[^A-Za-z0-9_.]+", "-", letters).strip("-.")[:max_length].rstrip("-.")
    if _DEVICE.match(name):
        name = f"_{name}"[:max_length].rstrip("-.")
    return name or "unnamed"[:max_length]


def make_unique_dir(parent: str | os.PathLike, name: str) -> str:
    """
    Make the folder ``parent/name``, or ``name-2``, ... where that is taken, also by another process.

    :param name: any text; what is not safe in a file name is replaced
    :return: the name that it got
    """
    Path(parent).mkdir(parents=True, exist_ok=True)
    unique = wanted = safe_name(name, max_length=240)
    number = 1
    while True:
        try:
            (Path(parent) / unique).mkdir()
            return unique
        except FileExistsError:
            number += 1
            unique = f"{wanted}-{number}"
