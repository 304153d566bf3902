"""
A CSV file with a row for each name, which any number of processes may write to.

Columns and cells that a person or another program adds stay. Numbers are read back exactly, None is an empty
cell. A string gets an apostrophe in front where a spreadsheet would compute it (=, +, -, @), where it looks
like another type, or is empty. What no CSV file can hold is left out (NUL) or written as its number (half of
a surrogate pair).
"""

import csv
import functools
import io
import os
import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from .files import write_atomic
from .locks import locked

KEY = "NAME"
LOCK_SECONDS = 60
_LONGEST_CELL = 2**31 - 1
_QUOTED = re.compile(r'"[^"]*"')


def read_rows(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Read all rows, with values of the types they were written with. Empty cells are None."""
    return [{key: _from_cell(cell) for key, cell in cells.items()} for cells in _read_cells(Path(path))[1]]


def write_rows(path: str | os.PathLike, rows: Iterable[dict[str, Any]]) -> None:
    """
    Write rows: new ones, or cells of those with the same name. Nothing is written where nothing changes.

    :param rows: strings, numbers, booleans and None by column
    :raises TimeoutError: if another process holds the file for more than a minute
    """
    path, cells = Path(path), [_to_cells(row) for row in rows]
    with _locked(path):
        _write_records(path, *_merge(*_read_records(path), cells))


def remove_rows(path: str | os.PathLike, names: Iterable[str]) -> None:
    """Remove the rows with these names."""
    path, removed = Path(path), {_to_cell(name) for name in names}
    with _locked(path):
        columns, records = _read_records(path)
        named = zip(_names(columns, records), records, strict=True)
        _write_records(path, columns, [record for name, record in named if name not in removed])


def rebuild(path: str | os.PathLike, rows: Iterable[dict[str, Any]]) -> None:
    """
    Rewrite the file: these rows, and what it has by name. The old file stays, with .old behind its name.

    Rows without a name and columns without a cell go.
    """
    path, cells = Path(path), [_to_cells(row) for row in rows]
    with _locked(path):
        if path.exists():
            content = path.read_bytes()
            write_atomic(path.with_name(f"{path.name}.old"), lambda file: file.write(content))
        old = [{key: cell for key, cell in row.items() if cell} for row in _read_cells(path)[1]]
        _write_records(path, *_merge([], [], [*(row for row in old if KEY in row), *cells]))


def _locked(path: Path) -> AbstractContextManager[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    busy = f"{path}: another process has held it for {LOCK_SECONDS} s. Is it hanging?"
    return locked(path.with_name(f".{path.name}.lock"), LOCK_SECONDS, busy)


# ---------------------------------------------------------------------------------------------------- records
# A record is a row as text, with a cell for every column. Of 10,000 rows one changes at a time, so the others
# are not taken apart: that makes writing ten times faster.


def _merge(columns: list[str], records: list[str], rows: list[dict[str, str]]) -> tuple[list[str], list[str]]:
    new = [key for key in dict.fromkeys(key for cells in rows for key in cells) if key not in columns]
    columns, records = columns + new, [record + "," * len(new) for record in records]
    places: dict[str, int] = {}
    for place, name in enumerate(_names(columns, records)):
        places.setdefault(name, place)  # of several rows with a name, the first one counts
    for cells in rows:
        name = cells.get(KEY, "")
        if name and name in places:
            (old,) = _parse([records[places[name]]])
            records[places[name]] = _to_record(columns, dict(zip(columns, old, strict=True)) | cells)
        else:
            places[name] = len(records)
            records.append(_to_record(columns, cells))
    return columns, records


def _read_records(path: Path) -> tuple[list[str], list[str]]:
    text = _read_text(path)
    records, pending = [], ""
    for line in text.split("\n"):
        pending = f"{pending}\n{line}" if pending else line
        if pending.count('"') % 2 == 0:  # else the line end is within a cell
            records.append(pending)
            pending = ""
    rest = pending or records.pop()
    columns = next(iter(_parse(records[:1])), [])
    is_ours = not rest and "\r" not in text and KEY in columns and len(set(columns) - {""}) == len(columns)
    if is_ours and all(_QUOTED.sub("", record).count(",") + 1 == len(columns) for record in records):
        return columns, records[1:]
    columns, rows = _read_cells(path)
    return columns, [_to_record(columns, cells) for cells in rows]


def _names(columns: list[str], records: list[str]) -> list[str]:
    """Return the cell of each row that holds its name."""
    if KEY not in columns:
        return [""] * len(records)
    index = columns.index(KEY)
    heads = [record.split(",", index + 1)[: index + 1] for record in records]
    is_quoted = ['"' in "".join(head) for head in heads]
    return [
        _parse([record])[0][index] if quoted else head[index]
        for record, head, quoted in zip(records, heads, is_quoted, strict=True)
    ]


def _write_records(path: Path, columns: list[str], records: list[str]) -> None:
    header = [_to_record(columns, dict(zip(columns, columns, strict=True)))] if columns else []
    content = "".join(f"{line}\n" for line in [*header, *records]).encode(errors="surrogateescape")
    if content != (path.read_bytes() if path.is_file() else b""):
        write_atomic(path, lambda file: file.write(content))


def _to_record(columns: list[str], cells: dict[str, str]) -> str:
    # Not by the csv module, which leaves a carriage return bare and then reads it as the end of the row.
    values = [cells.get(column, "") for column in columns]
    quoted = ['"' + cell.replace('"', '""') + '"' if set(cell) & set(',"\r\n') else cell for cell in values]
    return ",".join(quoted) or '""'


# ------------------------------------------------------------------------------------------------------ cells


def _read_cells(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """
    Return the columns, and the cells of each row by column.

    What others left is kept: bytes that are no UTF-8, cells without a column, several columns of one name.
    """
    text = _read_text(path)
    first = text.partition("\n")[0].strip().split(";")
    delimiter = ";" if KEY in first and len(first) > 1 else ","  # some spreadsheets save it with semicolons
    header, *lines = [line for line in _parse(io.StringIO(text, newline=""), delimiter) if line] or [[]]
    header += [""] * (max(map(len, lines), default=0) - len(header))
    columns = [
        name if name and name not in header[:index] else f"column {index + 1}"
        for index, name in enumerate(header)
    ]
    return columns, [dict(zip(columns, line, strict=False)) for line in lines]


def _read_text(path: Path) -> str:
    return path.read_bytes().decode("utf-8-sig", "surrogateescape") if path.is_file() else ""


def _parse(lines: Iterable[str], delimiter: str = ",") -> list[list[str]]:
    limit = csv.field_size_limit(_LONGEST_CELL)
    try:
        return list(csv.reader(lines, delimiter=delimiter))
    finally:
        csv.field_size_limit(limit)


def _to_cells(row: dict[str, Any]) -> dict[str, str]:
    return {key: _to_cell(value) for key, value in row.items()}


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
