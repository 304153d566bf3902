"""
Contains the experiment tracker: a CSV file with one row for each run, which any number of processes may write to.

Values: numbers are written so that they are read back exactly, None as an empty cell, and a string so that it is read
back as the same string: one that a spreadsheet would compute (it begins with = + - @), that looks like another type, or
that is empty, gets an apostrophe in front. What no CSV file can hold, is left out (NUL) or written as its number (half
of a surrogate pair).
"""

import contextlib
import csv
import functools
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ...training.listener import Listener, Result, RunView
from ..files import write_atomic
from .journal import Event, read_journal

KEY = "NAME"
LOCK_SECONDS = 60
_LONGEST_CELL = 2**31 - 1


class CsvTracker(Listener):
    """Keeps a run's row up to date."""

    def __init__(self, seconds: float = 60.0) -> None:
        """:param seconds: between two rows within an epoch"""
        self._seconds, self._written = seconds, 0.0

    def started(self, run: RunView) -> None:
        """Write the row."""
        self._write(run)

    def step(self, run: RunView, event: Event) -> None:
        """Write the row, if the last time is long ago."""
        if time.monotonic() - self._written >= self._seconds:
            self._write(run)

    def epoch(self, run: RunView, event: Event) -> None:
        """Write the row."""
        self._write(run)

    def finished(self, run: RunView, result: Result) -> None:
        """Write the row with the results."""
        self._write(run)

    def ended(self, run: RunView, status: str, error: BaseException) -> None:
        """Write the row of a run that ends without a result."""
        self._write(run)

    def _write(self, run: RunView) -> None:
        from .rows import row_of

        self._written = time.monotonic()
        file = run.log_dir.parent / run.config["LOGFILE"]
        write_log(file, row_of(read_journal(run.log_dir / "journal.jsonl")))


def write_log(path: str | os.PathLike, content: dict[str, Any]) -> None:
    """
    Writes a row: a new one, or more columns of the one with the same NAME.

    New keys become new columns, keys that are not given stay as they are. When this returns, the row is on the disk;
    when the process is killed meanwhile, the file is as it was before.

    :param content: strings, numbers, booleans and None by column
    :raises TimeoutError: if another process holds the file for more than a minute
    """
    path = Path(path)
    with _locked(path):
        columns, rows = _read_cells(path)
        columns += [key for key in content if key not in columns]
        cells = {key: _to_cell(value) for key, value in content.items()}
        for row in rows:
            if cells.get(KEY) and row.get(KEY) == cells[KEY]:
                row.update(cells)
                break
        else:
            rows.append(cells)
        _write_cells(path, columns, rows)


def replace_log(path: str | os.PathLike, contents: list[dict[str, Any]]) -> None:
    """
    Writes all rows anew. The file as it was stays beside it, with .old behind its name.

    :raises TimeoutError: if another process holds the file for more than a minute
    """
    path = Path(path)
    with _locked(path):
        if path.exists():
            old = path.read_bytes()
            write_atomic(path.with_name(f"{path.name}.old"), lambda file: file.write(old))
        columns = list(dict.fromkeys(key for content in contents for key in content))
        _write_cells(
            path, columns, [{key: _to_cell(value) for key, value in row.items()} for row in contents]
        )


def remove_rows(path: str | os.PathLike, names: Iterable[str]) -> None:
    """
    Removes the rows with these names.

    :raises TimeoutError: if another process holds the file for more than a minute
    """
    path, cells = Path(path), {_to_cell(name) for name in names}
    with _locked(path):
        columns, rows = _read_cells(path)
        _write_cells(path, columns, [row for row in rows if row.get(KEY) not in cells])


def read_log(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Reads all rows, with values of the types they were written with. Empty cells are None."""
    _, rows = _read_cells(Path(path))
    return [{key: _from_cell(cell) for key, cell in row.items()} for row in rows]


def read_frame(path: str | os.PathLike) -> Any:
    """
    All rows as a pandas.DataFrame.

    :raises ImportError: where there is no pandas; nothing else here needs it
    """
    import pandas

    return pandas.DataFrame(read_log(path))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path.with_name(f".{path.name}.lock"), timeout=LOCK_SECONDS):
            yield
    except Timeout as error:
        raise TimeoutError(
            f"{path}: another process has held it for {LOCK_SECONDS} s; is it hanging?"
        ) from error


def _write_cells(path: Path, columns: list[str], rows: list[dict[str, str]]) -> None:
    lines = [columns, *([row.get(column, "") for column in columns] for row in rows)]
    text = "".join(_to_line(line) for line in lines)
    write_atomic(path, lambda file: file.write(text.encode(errors="surrogateescape")))


def _read_cells(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """
    The columns, and the cells of each row by column.

    What another program or a hand left is kept: bytes that are no UTF-8, cells without a column, columns of one name.
    """
    if not path.is_file():
        return [], []
    limit = csv.field_size_limit(_LONGEST_CELL)
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            header, *lines = [line for line in csv.reader(file) if line] or [[]]
    finally:
        csv.field_size_limit(limit)
    header += [""] * (max(map(len, lines), default=0) - len(header))
    columns = [
        name if name and name not in header[:index] else f"column {index + 1}"
        for index, name in enumerate(header)
    ]
    return columns, [dict(zip(columns, line, strict=False)) for line in lines]


def _to_line(cells: list[str]) -> str:
    # Not by the csv module, which leaves a carriage return bare and then reads it as the end of the row.
    quoted = ('"' + cell.replace('"', '""') + '"' if set(cell) & set(',"\r\n') else cell for cell in cells)
    return (",".join(quoted) or '""') + "\n"


def _to_cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        text = value.replace("\0", "").encode(errors="backslashreplace").decode()
        needs_mark = text == "" or text[0] in "=+-@'\t\r" or _from_cell(text) != text
        return f"'{text}" if needs_mark else text
    if isinstance(value, bool):
        return repr(value)
    for number in (int, float):
        if isinstance(value, number):
            return repr(number(value))  # numpy's float64 is a float, too, and calls itself np.float64(0.5)
    raise TypeError(f"a cell holds a string, a number, a boolean or None, not {value!r}")


@functools.lru_cache(maxsize=2**16)  # most cells of a table are the same as those of the row above
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
