"""
Shows, compares and removes tracked runs.

    python runs.py list                          all runs, the newest last
    python runs.py list --sort test.f1 -n 10     the ten best by a result
    python runs.py show latest                   config, results, environment and folders of a run
    python runs.py compare 3 5                   what differs between two runs, or more, side by side
    python runs.py weights best                  path of a run's best weights
    python runs.py delete NAME                   removes log, weights and row, after asking
    python runs.py rebuild                       makes experiments.csv anew from the journals

A run is named by its name or a part of it, by the number of its row, or as latest or best. --json gives data for
scripts. To go on with a run, to do it again, or to predict with it: see train.py and run_prediction.py.
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dida_tools.config.config import global_config
from dida_tools.config.errors import UserError
from dida_tools.training.checkpoint import checkpoint_files
from dida_tools.utils.logging import read_log
from dida_tools.utils.logging.csv import remove_rows
from dida_tools.utils.logging.rows import rebuild_log, refresh_log
from dida_tools.utils.logging.runs import find_run, run_names

LOG_DIR, WEIGHT_DIR = Path(global_config["LOG_DIR"]), Path(global_config["WEIGHT_DIR"])
STATE = ("NAME", "STATUS", "EPOCH", "BEST_EPOCH", "SECONDS")
# What a table of all runs need not show: it differs for every run, or says where and when.
UNINTERESTING = (
    "NAME",
    "STARTED",
    "HEARTBEAT",
    "DATE",
    "PID",
    "HOST",
    "SECONDS",
    "LOGFILE",
    "WEIGHTS_DIGEST",
)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--logfile", default="experiments.csv", help="the tracker's file (default: experiments.csv)"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    one = commands.add_parser("list", help="all runs in a table")
    one.add_argument("--sort", metavar="COLUMN", help="the best last: by MONITOR's direction for results")
    one.add_argument("-n", type=int, metavar="NUMBER", help="only the last ones")
    one.add_argument("--columns", metavar="A,B", help="further columns, such as OPTIMIZER_CONFIG.lr,test.iou")
    one.add_argument("--json", action="store_true", help="all columns as JSON")
    one.set_defaults(call=list_runs)

    one = commands.add_parser("show", help="all about a run")
    one.add_argument("name", metavar="NAME")
    one.add_argument("--json", action="store_true", help="as JSON")
    one.set_defaults(call=show_run)

    one = commands.add_parser("compare", help="what differs between runs")
    one.add_argument("names", nargs="+", metavar="NAME")
    one.add_argument("--all", action="store_true", help="what is the same, too")
    one.add_argument("--json", action="store_true", help="as JSON")
    one.set_defaults(call=compare_runs)

    one = commands.add_parser("weights", help="path of a run's weights")
    one.add_argument("name", metavar="NAME")
    one.add_argument(
        "--last", action="store_true", help="of the newest training state instead of the best weights"
    )
    one.set_defaults(call=show_weights)

    one = commands.add_parser("delete", help="removes runs")
    one.add_argument("names", nargs="+", metavar="NAME", help="whole names")
    one.add_argument("--yes", action="store_true", help="do not ask")
    one.set_defaults(call=delete_runs)

    one = commands.add_parser("rebuild", help="makes the tracker's file anew from the journals")
    one.set_defaults(call=rebuild)

    arguments = parser.parse_args()
    try:
        if arguments.command != "rebuild" and LOG_DIR.is_dir():
            refresh_log(LOG_DIR, arguments.logfile)
        code = arguments.call(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read it has seen enough, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1


def list_runs(arguments: argparse.Namespace) -> int:
    """All runs in a table."""
    rows = [{"ROW": number} | row for number, row in enumerate(read_rows(arguments), start=1)]
    if arguments.sort:
        rows = sorted_rows(rows, arguments.sort)
    rows = rows[-arguments.n :] if arguments.n else rows
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return 0
    if not rows:
        print(f"{LOG_DIR}: there are no runs yet; train one with: python train.py")
        return 0
    goals = [monitored(row) for row in rows]
    wanted = [*([arguments.sort] if arguments.sort else []), *(arguments.columns or "").split(",")]
    results = [f"{part}.{goal}" for goal in dict.fromkeys(goals) if goal for part in ("validation", "test")]
    columns = dict.fromkeys(["ROW", *STATE, *(key for key in wanted if key), *results])
    print_table([list(columns), *([text_of(row.get(key)) for key in columns] for row in rows)])
    return 0


def show_run(arguments: argparse.Namespace) -> int:
    """All about a run."""
    name = find_run(global_config, arguments.name, arguments.logfile)
    row = row_named(name, arguments)
    environment_file = LOG_DIR / name / "environment.json"
    environment = json.loads(environment_file.read_bytes()) if environment_file.is_file() else {}
    places = {"log": LOG_DIR / name, "picture": LOG_DIR / name / "picture.png", "weights": WEIGHT_DIR / name}
    shown = {key: str(path) for key, path in places.items() if path.exists()}
    if arguments.json:
        print(json.dumps({"row": row, "environment": environment, "places": shown}, indent=2))
        return 0
    about = ("python", "git_commit", "device_name", "cpu_capability", "threads", "arguments")
    sections = {
        "": shown,
        "results": {key: value for key, value in row.items() if is_result(key)},
        "config and state": {key: value for key, value in row.items() if not is_result(key)},
        "environment (environment.json has it all)": {key: environment.get(key) for key in about},
    }
    for title, values in sections.items():
        print(f"\n{title}" if title else name)
        for key, value in values.items():
            if value is not None:
                print(f"  {key:<34} {text_of(value) if not isinstance(value, list) else ' '.join(value)}")
    return 0


def compare_runs(arguments: argparse.Namespace) -> int:
    """What differs between runs, a line for each key."""
    rows = [
        row_named(find_run(global_config, name, arguments.logfile), arguments) for name in arguments.names
    ]
    keys = dict.fromkeys(key for row in rows for key in row)
    compared = {key: [row.get(key) for row in rows] for key in keys if key not in UNINTERESTING}
    if not arguments.all:
        compared = {
            key: values for key, values in compared.items() if any(value != values[0] for value in values)
        }
    if arguments.json:
        print(json.dumps({"runs": [row["NAME"] for row in rows], "values": compared}, indent=2))
        return 0
    ordered = sorted(compared, key=is_result)
    print_table(
        [["", *(row["NAME"] for row in rows)], *([key, *map(text_of, compared[key])] for key in ordered)]
    )
    digests = [row.get("WEIGHTS_DIGEST") for row in rows]
    if digests[0] is not None and len(set(digests)) == 1:
        print("The weights are identical, bit for bit.")
    return 0


def show_weights(arguments: argparse.Namespace) -> int:
    """Path of a run's weights."""
    name = find_run(global_config, arguments.name, arguments.logfile, with_weights=not arguments.last)
    best = WEIGHT_DIR / name / "best.pt"
    files = checkpoint_files(WEIGHT_DIR / name) if arguments.last else [best] if best.is_file() else []
    if not files:
        raise UserError(f"{name} has no weights yet: {WEIGHT_DIR / name}")
    print(files[0])
    return 0


def delete_runs(arguments: argparse.Namespace) -> int:
    """Removes log, weights and row."""
    known = {*run_names(LOG_DIR), *(row["NAME"] for row in read_rows(arguments))}
    for name in arguments.names:
        if name not in known:
            raise UserError(f"no run is called {name!r}: delete wants whole names, as list shows them.")
    with contextlib.ExitStack() as locks:  # nobody goes on with them while the question stands
        for name in arguments.names:
            if (LOG_DIR / name).is_dir():
                try:
                    locks.enter_context(FileLock(LOG_DIR / name / ".lock", timeout=1))
                except Timeout as error:
                    raise UserError(f"{name} is being trained: end it first.") from error
        for name in arguments.names:
            folders = [folder for folder in (LOG_DIR / name, WEIGHT_DIR / name) if folder.is_dir()]
            size = (
                sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())
                / 1e6
            )
            print(f"{name}: {', '.join(map(str, folders)) or 'its row'} ({size:.1f} MB)")
        if not arguments.yes and not is_confirmed():
            print("Nothing was removed.")
            return 1
    for name in arguments.names:
        for folder in (WEIGHT_DIR / name, LOG_DIR / name):
            hidden = folder.with_name(f".deleted-{name}")  # at once: half a run is none
            if hidden.is_dir():  # of a deletion that was killed
                shutil.rmtree(hidden)
            if folder.is_dir():
                os.replace(folder, hidden)
                shutil.rmtree(hidden)
    remove_rows(LOG_DIR / arguments.logfile, arguments.names)
    return 0


def is_confirmed() -> bool:
    """Asks."""
    try:
        return input("Remove for good? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def rebuild(arguments: argparse.Namespace) -> int:
    """Makes the tracker's file anew."""
    number = rebuild_log(LOG_DIR, arguments.logfile)
    file = LOG_DIR / arguments.logfile
    print(f"{file} has the rows of {number} runs; the old one is {file}.old")
    return 0


def read_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows of the tracker that have a name."""
    return [row for row in read_log(LOG_DIR / arguments.logfile) if row.get("NAME") is not None]


def row_named(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The row of a run."""
    rows = [row for row in read_rows(arguments) if row["NAME"] == name]
    if not rows:
        raise UserError(
            f"{name} has no row in {LOG_DIR / arguments.logfile}: python runs.py rebuild makes one."
        )
    return rows[0]


def monitored(row: dict[str, Any]) -> str:
    """The result that a run's best weights were chosen by."""
    goal = str(row.get("MONITOR") or "").partition(" ")[2]
    return f"{goal}_sample_mean" if row.get(f"validation.{goal}_sample_mean") is not None else goal


def sorted_rows(rows: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """The rows that have a number under this key, the best last."""
    if not any(key in row for row in rows):
        raise UserError(
            f"there is no column {key!r}; there are {', '.join(k for k in rows[-1] if is_result(k))}."
        )
    numbers = [row for row in rows if isinstance(row.get(key), int | float) and row[key] == row[key]]
    is_loss = key.rpartition(".")[2] == "loss" or any(
        row.get("MONITOR") == f"min {key.partition('.')[2]}" for row in rows
    )
    return sorted(numbers, key=lambda row: row[key], reverse=is_loss)


def is_result(key: str) -> bool:
    """Whether a column holds a result, not an option."""
    return key.startswith(("validation.", "test.", "train."))


def text_of(value: Any) -> str:
    """A value in a table."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())


def print_table(lines: list[list[str]]) -> None:
    """Prints a table that is as wide as the terminal at most: long cells are cut in their middle."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    room = shutil.get_terminal_size((120, 24)).columns - 2 * (len(widths) - 1)
    while sum(widths) > room and max(widths) > 6:
        widths[widths.index(max(widths))] -= 1
    for line in lines:
        print(
            "  ".join(
                cut(cell, width).ljust(width) for cell, width in zip(line, widths, strict=True)
            ).rstrip()
        )


def cut(text: str, width: int) -> str:
    """A text in so many characters."""
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


if __name__ == "__main__":
    sys.exit(main())
