"""What runs.py does: show, compare and remove runs."""

import contextlib
import functools
import json
import logging
import os
import shutil
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..config.keys import KEYS
from ..errors import UserError, printable
from ..storage import table
from ..storage.files import read_plain
from ..storage.locks import locked
from .lookup import NO_RUNS, all_rows, find_rows, find_run, run_names

STATE = ("NAME", "STATUS", "EPOCH", "BEST_EPOCH", "SECONDS")
ABOUT_ENVIRONMENT = ("python", "git_commit", "device_name", "cpu_capability", "threads", "arguments")
# What a comparison need not show: it differs for every run, or says where and when.
UNINTERESTING = (
    "ROW", "NAME", "STARTED", "HEARTBEAT", "DATE", "PID", "HOST", "SECONDS", "LOGFILE", "WEIGHTS_DIGEST",
)  # fmt: skip

_SHORTEST = 12  # characters that a cell is cut to

logger = logging.getLogger(__name__)


class Runs:
    """All runs of a project, and the tracker's file as a view of them."""

    def __init__(self, global_config: dict[str, str], logfile: str) -> None:
        self.log_dir, self.weight_dir = Path(global_config["LOG_DIR"]), Path(global_config["WEIGHT_DIR"])
        if problem := KEYS["LOGFILE"].test(logfile):
            raise UserError(f"--logfile {logfile}: it {problem}.")
        self.file = self.log_dir / logfile
        self.find = functools.partial(find_run, global_config, logfile=logfile)

    @functools.cached_property
    def all_rows(self) -> list[dict[str, Any]]:
        """
        Row of each run, with its number as ROW and what was added by hand.

        It also brings the tracker's file up to date.
        """
        rows, added = all_rows(self.log_dir), {}
        try:
            if own := [row for row in rows if row.get("LOGFILE") == self.file.name]:
                table.write_rows(self.file, own)
            added = {row.get(table.KEY): row for row in reversed(table.read_rows(self.file))}
        except OSError as error:
            logger.warning("%s cannot be brought up to date (%s).", self.file, error)
        return [added.get(row[table.KEY], {}) | row | {"ROW": n} for n, row in enumerate(rows, start=1)]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows that the tracker's file has."""
        return [row for row in self.all_rows if row.get("LOGFILE") == self.file.name]

    def row(self, wanted: str) -> dict[str, Any]:
        """Return the row of a run; with its name alone where its journal is lost."""
        name = self.find(wanted)
        return next((row for row in self.all_rows if row[table.KEY] == name), {table.KEY: name})

    def folders(self, name: str) -> list[Path]:
        """
        Return the folders that a run has, and no others, whatever the name.

        :raises UserError: if one is a link
        """
        roots = [root for root in (self.weight_dir, self.log_dir) if root.is_dir()]
        folders = [root / name for root in roots if name in os.listdir(root)]
        if odd := [folder for folder in folders if folder.is_symlink() or not folder.is_dir()]:
            raise UserError(f"{odd[0]} is a link or no folder, which may lead anywhere: remove it.")
        is_run = name in run_names(self.log_dir)
        return [one for one in folders if is_run or (one.parent != self.log_dir and any(one.glob("*.pt")))]


def list_runs(runs: Runs, arguments: Namespace) -> None:
    """Show all runs in a table."""
    rows = runs.rows
    if arguments.sort:
        rows = _sorted(rows, arguments.sort)
    rows = rows[-arguments.n :] if arguments.n else rows
    if arguments.json:
        print(json.dumps(rows, indent=2))
    elif not rows:
        print(f"{runs.log_dir}: {NO_RUNS}")
    else:
        wanted = [key for key in (arguments.sort, *(arguments.columns or "").split(",")) if key]
        goals = dict.fromkeys(filter(None, map(_monitored, rows)))
        results = [f"{split}.{goal}" for goal in goals for split in ("validation", "test")]
        asked = list(dict.fromkeys(["ROW", "NAME", *wanted]))
        others = [key for key in dict.fromkeys([*results, *STATE]) if key not in asked]
        table_of = {key: [key, *(_text(row.get(key)) for row in rows)] for key in [*asked, *others]}
        while others and _narrowest(table_of.values()) > _terminal_width():
            del table_of[others.pop()]
        columns = [key for key in ("ROW", *STATE, *wanted, *results) if key in table_of]
        print_table(zip(*(table_of[key] for key in dict.fromkeys(columns)), strict=True))


def show_run(runs: Runs, arguments: Namespace) -> None:
    """Show all about a run."""
    row = runs.row(arguments.name)
    log_dir, weight_dir = runs.log_dir / row["NAME"], runs.weight_dir / row["NAME"]
    environment: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):  # missing or damaged
        environment = dict(json.loads(read_plain(log_dir / "environment.json")))
    places = {"log": log_dir, "picture": log_dir / "picture.png", "weights": weight_dir}
    found = {key: str(path) for key, path in places.items() if path.exists()}
    if arguments.json:
        print(json.dumps({"row": row, "environment": environment, "places": found}, indent=2))
        return
    sections = {
        row["NAME"]: found,
        "\nresults": {key: value for key, value in row.items() if _is_result(key)},
        "\nconfig and state": {key: value for key, value in row.items() if not _is_result(key)},
        "\nenvironment (environment.json has it all)": {
            key: environment.get(key) for key in ABOUT_ENVIRONMENT
        },
    }
    for title, values in sections.items():
        print(title)
        for key, value in values.items():
            if value is not None:
                text = " ".join(map(_text, value)) if isinstance(value, list) else _text(value)
                print(f"  {printable(key):<34} {text}")


def compare_runs(runs: Runs, arguments: Namespace) -> None:
    """Show what differs between runs, a line for each key."""
    rows = [runs.row(name) for name in arguments.names]
    names = [row["NAME"] for row in rows]
    keys = dict.fromkeys(key for row in rows for key in row if key not in UNINTERESTING)
    compared = {key: [row.get(key) for row in rows] for key in sorted(keys, key=_is_result)}
    if not arguments.all:
        compared = {key: found for key, found in compared.items() if any(one != found[0] for one in found)}
        compared = {key: found for key, found in compared.items() if not _is_of_another(key, compared)}
    if arguments.json:
        print(json.dumps({"runs": names, "values": compared}, indent=2))
        return
    print_table([["", *names], *([key, *values] for key, values in compared.items())])
    digests = {row.get("WEIGHTS_DIGEST") for row in rows}
    if len(digests) == 1 and None not in digests:
        print("The weights are identical, bit for bit.")


def show_weights(runs: Runs, arguments: Namespace) -> None:
    """Show the path of a run's weights."""
    folder = runs.weight_dir / runs.find(arguments.name, with_weights=not arguments.last)
    files = sorted(folder.glob("best.pt"))
    if arguments.last:
        from ..storage.checkpoint import checkpoint_files  # imports torch

        files = checkpoint_files(folder)
    if not files:
        raise UserError(f"{folder.name} has no weights yet: {folder}")
    print(files[0])


def delete_runs(runs: Runs, arguments: Namespace) -> int:
    """Remove log, weights and row of runs."""
    known = {*run_names(runs.log_dir), *(str(row.get(table.KEY)) for row in table.read_rows(runs.file))}
    for name in arguments.names:
        if name not in known:
            raise UserError(f"no run is called {name!r}: give full names, as list shows them.")
    with contextlib.ExitStack() as locks:  # nobody resumes them while the question stands
        for name in arguments.names:
            folders = runs.folders(name)
            if runs.log_dir / name in folders:
                lock_file = runs.log_dir / name / ".lock"
                locks.enter_context(locked(lock_file, 1, f"{name} is being trained: end it first."))
            files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
            size = sum(file.stat().st_size for file in files) / 1e6
            print(printable(f"{name}: {', '.join(map(str, folders)) or 'its row'} ({size:.1f} MB)"))
        if not arguments.yes and not _is_confirmed():
            print("Nothing was removed.")
            return 1
    for folder in [folder for name in arguments.names for folder in runs.folders(name)]:
        hidden = folder.with_name(f".deleted-{folder.name}")  # at once: half a run is none
        shutil.rmtree(hidden, ignore_errors=True)  # of a deletion that was killed
        os.replace(folder, hidden)
        shutil.rmtree(hidden)
    table.remove_rows(runs.file, arguments.names)
    return 0


def rebuild(runs: Runs, arguments: Namespace) -> None:
    """Rewrite the tracker's file."""
    rows = find_rows(runs.log_dir, runs.file.name)
    table.rebuild(runs.file, rows)
    print(f"{runs.file} has the rows of {len(rows)} runs; the old one is {runs.file}.old")


def _is_confirmed() -> bool:
    try:
        return input("Remove for good? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _monitored(row: dict[str, Any]) -> str:
    """Return the result that a run's best weights were chosen by."""
    goal = str(row.get("MONITOR") or "").partition(" ")[2]
    return f"{goal}_sample_mean" if row.get(f"validation.{goal}_sample_mean") is not None else goal


def _sorted(rows: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """Return the rows that have a number under this key, the best last."""
    if not any(key in row for row in rows):
        known = dict.fromkeys(key for row in rows for key in row if _is_result(key))
        raise UserError(f"there is no column {key!r}; there are {', '.join(known)}.")
    numbers = [row for row in rows if isinstance(row.get(key), int | float) and row[key] == row[key]]
    minimized = f"min {key.partition('.')[2]}"
    is_loss = key.endswith(".loss") or any(row.get("MONITOR") == minimized for row in rows)
    return sorted(numbers, key=lambda row: row[key], reverse=is_loss)


def _is_result(key: str) -> bool:
    return key.startswith(("validation.", "test.", "train."))


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else printable(" ".join(str(value).split()))


def _is_of_another(key: str, compared: dict[str, list[Any]]) -> bool:
    """Tell whether some runs lack a value because their class, or the classes of their data, are others."""
    owner, is_argument, _ = key.partition("_CONFIG.")
    is_of_class = _is_result(key) and key.count(".") > 1
    return None in compared[key] and (owner if is_argument else "DATASET" * is_of_class) in compared


def _terminal_width() -> int:
    return shutil.get_terminal_size((120, 24)).columns


def _narrowest(columns: Iterable[list[str]]) -> int:
    """Return the width of a table whose long cells are cut."""
    return sum(2 + min(_SHORTEST, max(map(len, column))) for column in columns) - 2


def print_table(rows: Iterable[Iterable[Any]]) -> None:
    """Print a table as wide as the terminal: long cells are cut in their middle, but not beyond reading."""
    lines = [[_text(cell) for cell in line] for line in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    room = _terminal_width() - 2 * (len(widths) - 1)
    while sum(widths) > room and max(widths) > _SHORTEST:
        widths[widths.index(max(widths))] -= 1
    for line in lines:
        cells = [_cut(cell, width).ljust(width) for cell, width in zip(line, widths, strict=True)]
        print("  ".join(cells).rstrip())


def _cut(text: str, width: int) -> str:
    head = (width - 1) // 2
    return text if len(text) <= width else f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"
