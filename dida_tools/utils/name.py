"""Contains how runs are named: DATE_SESSION_NAME, safe as a file name."""

import re
import unicodedata
from datetime import datetime

_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{digit}" for port in ("com", "lpt") for digit in range(1, 10))}


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
