"""Files that are written intact or not at all, and names that every file system takes."""

import errno
import os
import re
import unicodedata
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from ..errors import UserError

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


def plain(path: str, flags: int) -> int:
    """Open a file itself, not what a link leads to, and wait for nobody: an opener for open."""
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    return os.open(path, flags, 0o666)


def read_plain(path: str | os.PathLike) -> bytes:
    """Return what is in a file, which is no link."""
    with open(path, "rb", opener=plain) as file:
        return file.read()


def is_plain(path: str | os.PathLike) -> bool:
    """Tell whether a file is there, and neither a link to one elsewhere nor a pipe or device."""
    return os.path.isfile(path) and not os.path.islink(path)


def refuse_links(*places: str | os.PathLike) -> None:
    """
    Refuse to work where a link leads elsewhere, as in a folder that somebody else has made.

    :param places: files and folders, which need not be there; folders with all that they hold
    :raises UserError: if one is neither a file nor a folder of its own
    """
    for place in map(Path, places):
        for path in (place, *(place.rglob("*") if place.is_dir() and not place.is_symlink() else ())):
            if path.is_symlink() or (path.exists() and not path.is_dir() and not path.is_file()):
                raise UserError(f"{path} is a link or no ordinary file, which may lead anywhere: remove it.")


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
