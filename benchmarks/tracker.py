"""
Measure the tracker's file as it grows: writing a row, and reading all of it. What is added by hand is kept.

    python benchmarks/tracker.py
"""

import csv
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from dida_core.storage.table import write_rows

from dida_tools.utils.logging import read_log, write_log

NUM_COLUMNS = 60
REPEATS = 5


def make_row(number: int, text: str) -> dict:
    """Return a row like a training's: a third numbers, a third text, a third empty."""
    chance = random.Random(number)
    values = [chance.random(), text.format(number % 7), None]
    return {"NAME": f"run-{number}"} | {f"column_{i}": values[i % 3] for i in range(NUM_COLUMNS - 1)}


def seconds(function: Callable[[], object]) -> float:
    """Return the shortest time of some calls."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Print a table."""
    print(f"{NUM_COLUMNS} columns, shortest of {REPEATS}; csv.reader is Python's own, without types")
    titles = ("rows", "text cells", "file", "write_log", "read_log", "csv.reader", "by hand")
    print("{:>7} {:>11} {:>9} {:>10} {:>10} {:>11} {:>8}".format(*titles))
    with tempfile.TemporaryDirectory() as folder:
        for number in (100, 1_000, 10_000):
            for kind, text in {"plain": ".models.unet:UNET{}", "quoted": "[0.5, {}, 1]"}.items():
                file = Path(folder) / f"{number}-{kind}.csv"
                write_rows(file, [make_row(index, text) for index in range(number)])
                name = f"run-{number // 2}"
                write = seconds(lambda: write_log(file, {"NAME": name, "column_0": random.random()}))  # noqa: B023
                read = seconds(lambda: read_log(file))  # noqa: B023
                bare = seconds(lambda: list(csv.reader(file.open(newline=""))))  # noqa: B023
                size = file.stat().st_size / 1e6
                file.write_text(file.read_text().replace("\n", ",\n").replace(",\n", ",remark\n", 1))
                write_log(file, {"NAME": name, "remark": "kept"})
                write_rows(file, [make_row(index, text) for index in range(number)])
                kept = {row["NAME"]: row["remark"] for row in read_log(file)}[name]
                times = f"{write:>8.3f} s {read:>8.3f} s {bare:>9.3f} s"
                print(f"{number:>7} {kind:>11} {size:>6.1f} MB {times} {kept:>8}")


if __name__ == "__main__":
    main()
