"""
Measures how long the tracker takes: one more row, and reading, for files that grow.

    python benchmarks/tracker.py
"""

import csv
import random
import tempfile
import time
from pathlib import Path

from dida_tools.utils.logging import read_log, write_log
from dida_tools.utils.logging.csv import replace_log

NUM_COLUMNS = 60
REPEATS = 5


def make_row(number: int) -> dict:
    """A row like a training's: a third numbers, a third text, a third empty."""
    random.seed(number)
    values = [random.random(), f".models.unet:UNET{number % 7}", None]
    return {"NAME": f"run-{number}"} | {f"column_{i}": values[i % 3] for i in range(NUM_COLUMNS - 1)}


def seconds(function) -> float:
    """The shortest of some runs."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Prints a table."""
    print(f"{NUM_COLUMNS} columns, shortest of {REPEATS}; csv.reader is Python's own, without types")
    print(f"{'rows':>7} {'file':>9} {'write_log':>10} {'read_log':>10} {'csv.reader':>11}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "experiments.csv"
        for number in (100, 1_000, 10_000):
            replace_log(file, [make_row(index) for index in range(number)])
            write = seconds(
                lambda: write_log(file, {"NAME": "run-50", "STATUS": "running", "column_0": random.random()})
            )
            read = seconds(lambda: read_log(file))
            bare = seconds(lambda: list(csv.reader(file.open(newline=""))))
            size = file.stat().st_size / 1e6
            print(f"{number:>7} {size:>6.1f} MB {write:>8.3f} s {read:>8.3f} s {bare:>9.3f} s")


if __name__ == "__main__":
    main()
