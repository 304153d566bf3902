"""Contains how tracked runs are found again, with their configs."""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...config.capture import ConfigError, restore
from ...config.errors import UserError
from .csv import read_log


def find_run(
    global_config: dict[str, str], wanted: str, logfile: str = "experiments.csv", with_weights: bool = False
) -> str:
    """
    The name of a run.

    :param wanted: a name or a part of one, "latest", or "best": of the finished runs with the MONITOR and the test
        data of the last one, the one with the best validation result
    :param with_weights: whether "latest" leaves out runs without best weights
    :raises UserError: if there is none, or more than one
    """
    log_dir = Path(global_config["LOG_DIR"])
    names = sorted(folder.parent.name for folder in log_dir.glob("*/config.json"))
    if not names:
        raise UserError(f"{log_dir}: there are no runs yet; train one with: python train.py")
    if wanted in names:
        return wanted
    if wanted == "latest":
        if with_weights:
            names = [name for name in names if (Path(global_config["WEIGHT_DIR"]) / name / "best.pt").is_file()]
            if not names:
                raise UserError(f"{global_config['WEIGHT_DIR']}: no run has weights yet.")
        return max(names, key=lambda name: (log_dir / name / "config.json").stat().st_mtime_ns)
    if wanted == "best":
        return _best_run(read_log(log_dir / logfile), names)
    matching = [name for name in names if wanted in name]
    if len(matching) == 1:
        return matching[0]
    if not matching:
        raise UserError(f"no run is called {wanted!r}: the last ones are {', '.join(names[-5:])}.")
    raise UserError(f"{wanted!r} fits {len(matching)} runs, such as {', '.join(matching[-3:])}: give more of the name.")


def _best_run(rows: list[dict[str, Any]], names: list[str]) -> str:
    rows = [row for row in rows if row.get("STATUS") == "finished" and row.get("NAME") in names and row.get("MONITOR")]
    if not rows:
        raise UserError("no run is finished yet, so there is no best one.")
    monitor = rows[-1]["MONITOR"]
    direction, goal = monitor.split()
    values = {}
    for row in rows:
        if _test_data(row) != _test_data(rows[-1]):
            continue  # results on other data cannot be compared
        value = row.get(f"validation.{goal}")
        if value is None:  # also where only another run has the column
            value = row.get(f"validation.{goal}_sample_mean")
        if row["MONITOR"] == monitor and isinstance(value, int | float) and not math.isnan(value):
            values[row["NAME"]] = value
    if not values:
        raise UserError(f"no finished run has a validation result for MONITOR {monitor!r}: give a name instead.")
    return (max if direction == "max" else min)(values, key=lambda name: values[name])


def _test_data(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key.startswith("DATASET_CONFIG.test") and value is not None}


def read_run_config(run_dir: str | os.PathLike, roots: Iterable[str] = ()) -> dict[str, Any]:
    """
    The config of a run with its live objects.

    :param roots: libraries that may be imported besides references.ALLOWED_ROOTS
    :raises ConfigError: if it is missing or damaged, or names what is not allowed
    """
    file = Path(run_dir) / "config.json"
    try:
        stored = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError([f"{file} cannot be read: {error}"]) from error
    return restore(stored, roots)
