"""
A CSV file with a row for each name, which any number of processes may write to.

Columns and cells that a person or another program adds stay. Numbers are read back exactly, None is an empty
cell. A string gets an apostrophe in front where a spreadsheet would compute it (=, +, -, @), where it looks
like another type, or is empty. What no CSV file can hold is left out (NUL) or written as its number (half of
a surrogate pair).
"""

import codecs
import csv
import functools
import io
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from .files import write_atomic
from .locks import locked

KEY = "NAME"
LOCK_SECONDS = 60
_LONGEST_CELL = 2**31 - 1
_CELL = r'(?:"(?:[^"]++|"")*+"|[^",\r\n]*+)'


def read_rows(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Read all rows, with values of the types they were written with. Empty cells are None."""
    columns, rows = _parse(_read(Path(path)))
    return [dict(zip(columns, map(_from_cell, row), strict=True)) for row in rows]


def write_rows(path: str | os.PathLike, rows: Iterable[dict[str, Any]]) -> None:
    """
    Write rows: new ones, or cells of those with the same name. Nothing is written where nothing changes.

    :param rows: strings, numbers, booleans and None by column
    :raises TimeoutError: if another process holds the file for more than a minute
    """
    changes = [_to_cells(row) for row in rows]
    with _edited(Path(path)) as table:
        table.merge(changes)


def remove_rows(path: str | os.PathLike, names: Iterable[str]) -> None:
    """Remove the rows with these names."""
    removed = {_to_cell(name) for name in names}
    with _edited(Path(path)) as table:
        table.rows = [(name, text) for name, text in table.rows if name not in removed]


def rebuild(path: str | os.PathLike, rows: Iterable[dict[str, Any]]) -> None:
    """
    Rewrite the file: these rows, and what it has by name. The old file stays, with .old behind its name.

    Rows and columns without a cell go.
    """
    path, changes = Path(path), [_to_cells(row) for row in rows]
    with _edited(path) as table:
        if path.exists():
            write_atomic(path.with_name(f"{path.name}.old"), lambda file: file.write(path.read_bytes()))
        columns, old = _parse(_read(path))
        cells = [{key: cell for key, cell in zip(columns, row, strict=True) if cell} for row in old]
        table.columns, table.rows = [], []
        table.merge([*filter(None, cells), *changes])


@contextmanager
def _edited(path: Path) -> Iterator["_Table"]:
    """Yield the table of a file, and write it where anything has changed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    busy = f"{path}: another process has held it for {LOCK_SECONDS} s. Is it hanging?"
    with locked(path.with_name(f".{path.name}.lock"), LOCK_SECONDS, busy):
        before = _read(path)
        table = _Table(before)
        yield table
        header = _to_text(table.columns) if table.columns else ""
        text = header + "".join(text for _, text in table.rows)
        if text != before:
            write_atomic(path, lambda file: file.write(text.encode(errors="surrogateescape")))


class _Table:
    """
    The columns, and the name and text of each row.

    Of 10,000 rows one changes at a time, so the others are not taken apart: writing is ten times faster.
    """

    def __init__(self, text: str) -> None:
        header = re.match(rf"{_CELL}(?:,{_CELL})*\n", text)
        self.columns = _parse(header[0])[0] if header else []
        self.rows: list[tuple[str, str]] = []
        if KEY in self.columns:
            place = self.columns.index(KEY)
            row = rf"(?:{_CELL},){{{place}}}({_CELL})(?:,{_CELL}){{{len(self.columns) - place - 1}}}\n"
            found = [(match[1], match[0]) for match in re.finditer(row, text)]
            self.rows = [(_split(name)[0] if '"' in name else name, one) for name, one in found[1:]]
            if "".join(one for _, one in found) == text:
                return
        # Not as we write it: all is taken apart.
        self.columns, rows = _parse(text)
        self.rows = [(dict(zip(self.columns, row, strict=True)).get(KEY, ""), _to_text(row)) for row in rows]

    def merge(self, changes: list[dict[str, str]]) -> None:
        """Change the cells of rows with the same name, and add the other rows."""
        new = [key for key in dict.fromkeys(chain.from_iterable(changes)) if key not in self.columns]
        self.columns += new
        self.rows = [(name, f"{text[:-1]}{',' * len(new)}\n") for name, text in self.rows]
        places = {
            name: place for place, (name, _) in reversed([*enumerate(self.rows)])
        }  # the first one counts
        for cells in changes:
            name = cells.get(KEY, "")
            place = places.setdefault(name, len(self.rows)) if name else len(self.rows)
            if place == len(self.rows):
                self.rows.append((name, "," * (len(self.columns) - 1)))
            pairs = zip(self.columns, _split(self.rows[place][1]), strict=True)
            self.rows[place] = name, _to_text([cells.get(key, old) for key, old in pairs])


def _read(path: Path) -> str:
    content = path.read_bytes() if path.is_file() else b""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # a spreadsheet's "Unicode text"
        return content.decode("utf-16", "replace")
    return content.decode("utf-8-sig", "surrogateescape")


def _parse(text: str) -> tuple[list[str], list[list[str]]]:
    """
    Return the columns, and the cells of each row.

    What others left is kept: bytes that are no UTF-8, cells without a column, several columns of one name.
    """
    delimiter = max(",;\t", key=text.partition("\n")[0].count)  # spreadsheets save it with each of them
    limit = csv.field_size_limit(_LONGEST_CELL)
    try:
        lines = [line for line in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if line]
    finally:
        csv.field_size_limit(limit)
    width = max(map(len, lines), default=0)
    header, *rows = [line + [""] * (width - len(line)) for line in lines] or [[]]
    columns = [
        name if name and name not in header[:index] else f"column {index + 1}"
        for index, name in enumerate(header)
    ]
    return columns, rows


def _split(text: str) -> list[str]:
    """Return the cells of a row as we write it."""
    cells = re.findall(rf"({_CELL})[,\n]", text.rstrip("\n") + "\n")
    return [cell[1:-1].replace('""', '"') if cell[:1] == '"' else cell for cell in cells]


def _to_text(row: list[str]) -> str:
    # Not by the csv module, which leaves a carriage return bare and then reads it as the end of the row.
    quoted = ['"' + cell.replace('"', '""') + '"' if set(cell) & set(',"\r\n') else cell for cell in row]
    return (",".join(quoted) or '""') + "\n"


def _to_cells(row: dict[str, Any]) -> dict[str, str]:
    return {key: _to_cell(value) for key, value in row.items()}


def _to_cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        text = value.replace("\0", "").encode(errors="backslashreplace").decode()
        needs_mark = text == "" or text[0] in "=+-@'\t\r" or _from_cell(text) != text
        return f"'{text}" if needs_mark else text
    for kind in (bool, int, float):
        if isinstance(value, kind):
            return repr(kind(value))  # numpy's float64 is a float, too, and calls itself np.float64(0.5)
    raise TypeError(f"a cell holds a string, a number, a boolean or None, not {value!r}")


@functools.lru_cache(maxsize=2**16)  # most cells of a table are the same as those of the row above
def _from_cell(cell: str) -> Any:
    if cell in ("", "True", "False"):
        return None if cell == "" else cell == "True"
    if cell.startswith("'"):
        return cell[1:]
    for number in (int, float):
        try:
            if "_" not in cell and cell == cell.strip():
                return number(cell)
        except ValueError:
            continue
    return cell
