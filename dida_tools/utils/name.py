"""Contains how runs are named: DATE_SESSION_NAME, safe as a file name, and used only once."""

import os
import re
import unicodedata
from datetime import datetime
from pathlib import Path

_RESERVED = {
    "con",
    "prn",
    "aux",
    "nul",
    *(f"{port}{digit}" for port in ("com", "lpt") for digit in range(1, 10)),
}


def safe_name(text: str, max_length: int = 100) -> str:
    """
    Makes a text safe as a file name on every system: letters (without accents), digits, ``-``, ``_`` and ``.`` stay,
    the rest becomes ``-``. Names that Windows keeps for devices, such as ``nul.txt``, get a ``_`` in front.

    :return: 1 to max_length ASCII characters; "unnamed" where nothing is left
    """
    letters = "".join(char for char in unicodedata.normalize("NFKD", text) if not unicodedata.combining(char))
    name = re.sub(r"[^A-Za-z0-9_.]+", "-", letters).strip("-.")[:max_length].rstrip("-.")
    if name.split(".")[0].lower() in _RESERVED:
        name = f"_{name}"[:max_length].rstrip("-.")
    return name or "unnamed"[:max_length]


def date_now() -> str:
    """Date and time as the first part of a run's name, local time, to the second."""
    return datetime.now().strftime("%Y-%m-%d_%H-%M-%S")


def make_unique_dir(parent: str | os.PathLike, name: str) -> str:
    """
    Makes the folder ``parent/name``, or ``name-2``, ``name-3``, ... where that is taken, also by another process.

    :return: the name that it got
    """
    Path(parent).mkdir(parents=True, exist_ok=True)
    number, unique = 1, name
    while True:
        try:
            (Path(parent) / unique).mkdir()
            return unique
        except FileExistsError:
            number += 1
            unique = f"{name}-{number}"
