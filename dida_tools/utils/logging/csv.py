"""
Contains the experiment tracker: a CSV file with one row for each run, which any number of processes may write to.

Values: numbers are written so that they are read back exactly, None as an empty cell, and a string so that it is read
back as the same string: one that a spreadsheet would compute (it begins with = + - @), that looks like another type, or
that is empty, gets an apostrophe in front.
"""

import csv
import io
import os
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..path import write_atomic

KEY = "NAME"
LOCK_SECONDS = 60


def write_log(path: str | os.PathLike, content: dict[str, Any]) -> None:
    """
    Writes a row: a new one, or more columns of the one with the same NAME.

    New keys become new columns, keys that are not given stay as they are. When this returns, the row is on the disk; when
    the process is killed meanwhile, the file is as it was before.

    :param content: strings, numbers, booleans and None by column
    :raises TimeoutError: if another process holds the file for more than a minute
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path.with_name(f".{path.name}.lock"), timeout=LOCK_SECONDS):
            columns, rows = _read_cells(path)
            columns += [key for key in content if key not in columns]
            cells = {key: _to_cell(value) for key, value in content.items()}
            for row in rows:
                if KEY in cells and row.get(KEY) == cells[KEY]:
                    row.update(cells)
                    break
            else:
                rows.append(cells)
            text = io.StringIO(newline="")
            writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            write_atomic(path, lambda file: file.write(text.getvalue().encode()))
    except Timeout as error:
        raise TimeoutError(f"{path}: another process has held it for {LOCK_SECONDS} s; is it hanging?") from error


def read_log(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Reads all rows, with values of the types they were written with. Empty cells are None."""
    _, rows = _read_cells(Path(path))
    return [{key: _from_cell(cell) for key, cell in row.items()} for row in rows]


def _read_cells(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    if not path.is_file():
        return [], []
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, restval="", restkey=None)
        rows = [{key: cell for key, cell in row.items() if key is not None} for row in reader]
        return list(reader.fieldnames or []), rows


def _to_cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        text = value.replace("\0", "")  # no CSV reader takes it
        needs_mark = text == "" or text[0] in "=+-@'\t\r" or _from_cell(text) != text
        return f"'{text}" if needs_mark else text
    if isinstance(value, bool | int | float):
        return repr(value)
    raise TypeError(f"a cell holds a string, a number, a boolean or None, not {value!r}")


def _from_cell(cell: str | None) -> Any:
    if not cell:
        return None
    if cell.startswith("'"):
        return cell[1:]
    if cell in ("True", "False"):
        return cell == "True"
    for number in (int, float):
        try:
            if "_" not in cell and cell == cell.strip():
                return number(cell)
        except ValueError:
            continue
    return cell
