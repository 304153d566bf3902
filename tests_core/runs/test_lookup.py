"""Runs are found by name, part, number, as latest and best, and their configs are read back."""

import math
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from dida_core.config.capture import capture
from dida_core.config.project import project_of
from dida_core.errors import ConfigError, UserError
from dida_core.runs.lookup import (
    find_rows,
    find_run,
    read_record,
    read_run_config,
    remove_unbegun,
    run_names,
    write_record,
)
from dida_core.storage.locks import Busy, is_locked, locked

from dida_tools.models.unet import UNET
from dida_tools.utils.loss import f1, smooth_dice_loss

from tests.helpers import PACKAGE, begin_run, write_run

PROJECT = project_of(PACKAGE)
NAMES = [
    "2024-01-01_10-00-00_roads",
    "2024-01-02_10-00-00_roads",
    "2024-01-02_11-00-00_trees",
    "2024-01-03_sea",
]
CONFIG: dict[str, Any] = {
    "MODEL": UNET,
    "MODEL_CONFIG": {"ch_in": 3, "ch_out": 2, "activ": torch.nn.ELU},
    "OPTIMIZER": torch.optim.SGD,
    "OPTIMIZER_CONFIG": {"lr": 1e-3},
    "LOSS": smooth_dice_loss,
    "METRICS": {"f1": f1},
    "EPOCHS": 3,
}


@pytest.fixture
def log_dir(tmp_path: Path) -> Path:
    """Four runs of which only config.json is left."""
    for name in NAMES:
        write_record(tmp_path / name, capture(CONFIG, PROJECT) | {"name": name})
    (tmp_path / "not-a-run").mkdir()
    return tmp_path


def find(log_dir: Path, wanted: str, **options: Any) -> str:
    return find_run({"LOG_DIR": str(log_dir), "WEIGHT_DIR": f"{log_dir}/w"}, wanted, **options)


def write_results(log_dir: Path, *values: Any, monitor: str = "max f1", **config: Any) -> None:
    """Finish runs, one after the other, with these results."""
    for number, (name, value) in enumerate(zip(NAMES, values, strict=False)):
        results = {f"validation.{monitor.split()[1]}": value}
        write_run(log_dir, name, results, hours_ago=10 - number, MONITOR=monitor, **config)


@pytest.mark.parametrize(
    "wanted, name",
    [*zip(NAMES, NAMES, strict=True), ("trees", NAMES[2]), ("01-03", NAMES[3]), ("2024-01-01", NAMES[0])],
)
def test_a_run_is_found_by_its_name_or_a_part_of_it(log_dir: Path, wanted: str, name: str) -> None:
    write_record(
        log_dir / (NAMES[1] + "-2"), {"version": 1, "config": {}}
    )  # a name goes before a part of another
    assert find(log_dir, wanted) == name


@pytest.mark.parametrize(
    "wanted, message",
    [
        ("roads", f"'roads' fits 2 runs, such as {NAMES[0]}, {NAMES[1]}: give more"),
        ("lakes", f"no run is called 'lakes': the last ones are .*{NAMES[3]}"),
        ("not-a-run", "no run is called 'not-a-run'"),
        ("..", r"no run is called '\.\.'"),
        ("99", "no run is called '99'"),
        ("²", "no run is called '²'"),
        ("best", "no run is finished yet"),
    ],
)
def test_what_is_not_found_is_refused_with_examples(log_dir: Path, wanted: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find(log_dir, wanted)


@pytest.mark.parametrize("wanted", ["latest", "best", "x", "1"])
def test_without_runs_the_way_to_one_is_said(tmp_path: Path, wanted: str) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="no runs yet; train one"):
            find(folder, wanted)


def test_the_latest_run_is_the_one_written_last(log_dir: Path) -> None:
    for seconds, name in enumerate([NAMES[3], NAMES[0], NAMES[2], NAMES[1]]):
        os.utime(log_dir / name / "config.json", (1e9 + seconds, 1e9 + seconds))
    assert find(log_dir, "latest") == NAMES[1]
    with pytest.raises(UserError, match="no run has weights yet"):
        find(log_dir, "latest", with_weights=True)
    (log_dir / "w" / NAMES[2]).mkdir(parents=True)
    (log_dir / "w" / NAMES[2] / "best.pt").touch()
    assert find(log_dir, "latest", with_weights=True) == NAMES[2]
    begin_run(log_dir, NAMES[0]).close()
    assert find(log_dir, "latest") == NAMES[0]


def test_one_function_numbers_runs_by_their_start_whatever_the_file_says(tmp_path: Path) -> None:
    for hours_ago, name in enumerate(["third", "second", "first"]):
        write_run(tmp_path, name, {}, hours_ago=hours_ago)
    write_run(tmp_path, "another", {}, hours_ago=9, LOGFILE="other.csv")
    (tmp_path / "experiments.csv").write_text("NAME;x\nthird;1\nalien;2\nfirst;3\n")
    numbered = [row["NAME"] for row in find_rows(tmp_path)]
    assert numbered == ["first", "second", "third"]
    assert [find(tmp_path, str(number)) for number in (1, 2, 3)] == numbered
    begin_run(tmp_path, "first").close()  # is resumed
    assert [row["NAME"] for row in find_rows(tmp_path)] == numbered
    assert find(tmp_path, "1", logfile="other.csv") == "another"


@pytest.mark.parametrize(
    "monitor, values, best",
    [
        ("max f1", [0.5, 0.75, 0.5], 1),
        ("min loss", [0.5, 0.25, 0.75], 1),
        ("max f1.water", [0.9, 0.75, 0.5], 0),
        *(("max f1", [value, 0.5, value], 1) for value in (math.nan, None, "much")),
        ("max f1", [-math.inf, 0.0, -1.0], 1),
    ],
)
def test_the_best_run_by_its_monitor(log_dir: Path, monitor: str, values: list[Any], best: int) -> None:
    write_results(log_dir, *values, monitor=monitor)
    assert find(log_dir, "best") == NAMES[best]


@pytest.mark.parametrize("metric, best", [("iou", 1), ("loss", 0)])
def test_the_best_run_by_another_metric(log_dir: Path, metric: str, best: int) -> None:
    write_results(log_dir, 0.5, 0.75, 0.5, monitor=f"max {metric}")
    assert find(log_dir, f"best:{metric}") == NAMES[best]
    with pytest.raises(UserError, match="no finished run has a validation result for recall"):
        find(log_dir, "best:recall")


def test_only_runs_that_can_be_compared_with_the_last_are(log_dir: Path) -> None:
    monitors = ["min loss", "max f1", "min loss"]
    for number, monitor in enumerate(monitors):
        results = {"validation.loss": [0.01, 0.001, 0.02][number], "validation.f1": 0.5}
        write_run(log_dir, NAMES[number], results, hours_ago=9 - number, MONITOR=monitor)
    assert find(log_dir, "best") == NAMES[0]
    write_run(log_dir, NAMES[3], {"validation.f1": 0.4}, hours_ago=1)
    assert find(log_dir, "best") == NAMES[1]
    begin_run(log_dir, "unfinished").close()
    assert find(log_dir, "best") == NAMES[1]
    write_run(log_dir, "elsewhere", {"validation.f1": 0.1}, DATASET_CONFIG={"test": {"x_dir": "other"}})
    assert find(log_dir, "best") == "elsewhere"


def test_results_that_are_means_over_samples_count(log_dir: Path) -> None:
    for number, results in enumerate([{"f1_sample_mean": 0.8}, {"f1_sample_mean": 0.9}, {"f1": 0.1}]):
        named = {f"validation.{name}": value for name, value in results.items()}
        write_run(log_dir, NAMES[number], named, hours_ago=9 - number)
    assert find(log_dir, "best") == NAMES[1]


def test_without_a_result_there_is_no_best(log_dir: Path) -> None:
    write_results(log_dir, math.nan)
    with pytest.raises(UserError, match="no finished run has a validation result for MONITOR 'max f1'"):
        find(log_dir, "best")


def test_the_config_of_a_run_is_read_back_to_the_same_objects(log_dir: Path) -> None:
    config = read_run_config(str(log_dir / NAMES[0]), PROJECT)
    assert config == CONFIG and config["MODEL"] is UNET and config["METRICS"]["f1"] is f1


def test_a_part_of_the_config_needs_nothing_that_the_rest_names(log_dir: Path) -> None:
    references = {"MODEL": {"@ref": ".models.unet:UNET"}, "LOSS": {"@ref": ".not_here:loss"}}
    write_record(log_dir / NAMES[0], {"version": 1, "config": references})
    wanted = ("MODEL", "MODEL_CONFIG")
    assert read_run_config(log_dir / NAMES[0], PROJECT, keys=wanted) == {"MODEL": UNET}
    with pytest.raises(ConfigError, match="not_here"):
        read_run_config(log_dir / NAMES[0], PROJECT)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"\xff\xfe", b"null", b"[]", b'{"version": 1}', b'{"version": 99, "config": {}}',
        b"[" * 100_000,
        b'{"version": 1, "config": {"MODEL": {"@ref": "os:system"}}}', *(0, 20, 100, 200, -1),
    ],
    ids=lambda content: repr(content)[:40],
)  # fmt: skip
def test_a_damaged_config_is_refused_or_taken_from_the_journal(log_dir: Path, content: bytes | int) -> None:
    file = log_dir / NAMES[0] / "config.json"
    file.write_bytes(file.read_bytes()[:content] if isinstance(content, int) else content)
    with pytest.raises(ConfigError, match=r"the config has 1 problem: .*config\.json is damaged or missing"):
        read_run_config(log_dir / NAMES[0], PROJECT)
    begin_run(log_dir, NAMES[0]).close()
    file.write_bytes(b"damaged")
    said: list[str] = []
    assert read_record(log_dir / NAMES[0], said.append)["config"]["MONITOR"] == "max f1"
    assert len(said) == 1 and said[0].endswith("the copy in the journal is used.")


def test_a_missing_config_is_refused_with_its_path(log_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json is damaged or missing .*No such file"):
        read_run_config(log_dir / "not-a-run", PROJECT)


@pytest.mark.parametrize("left", [(), (".lock",), (".lock", "journal.jsonl", ".config.json.123.tmp")])
def test_a_folder_in_which_no_run_has_begun_is_none_and_can_be_removed(tmp_path: Path, left: tuple) -> None:
    (tmp_path / "run").mkdir()
    for name in left:
        (tmp_path / "run" / name).touch()
    assert run_names(tmp_path) == []
    for _ in range(2):
        remove_unbegun(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("file", ["config.json", "journal.jsonl", "notes.txt"])
def test_a_folder_that_holds_anything_is_not_removed(tmp_path: Path, file: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / file).write_text("something")
    assert run_names(tmp_path) == ([] if file == "notes.txt" else ["run"])
    remove_unbegun(tmp_path / "run")
    assert (tmp_path / "run" / file).read_text() == "something"


def test_what_is_being_removed_is_no_run(log_dir: Path) -> None:
    os.replace(log_dir / NAMES[-1], log_dir / f".deleted-{NAMES[-1]}")
    assert run_names(log_dir) == NAMES[:-1]


def test_looking_at_a_lock_writes_nothing_and_keeps_nobody_away(tmp_path: Path) -> None:
    file, stop, seen = tmp_path / ".lock", threading.Event(), []
    assert not is_locked(file) and not file.exists()
    file.touch()

    def look() -> None:
        while not stop.is_set():
            seen.append(is_locked(file))

    with ThreadPoolExecutor(4) as pool:
        lookers = [pool.submit(look) for _ in range(4)]
        while len(seen) < 2000:
            time.sleep(0.01)
        stop.set()
    for looker in lookers:
        looker.result()
    assert set(seen) == {False}  # those that look do not see one another
    with locked(file):
        assert is_locked(file)
    assert not is_locked(file)


def test_a_lock_that_is_held_is_reported(tmp_path: Path) -> None:
    with locked(tmp_path / ".lock"):
        for busy, message in (("", r"\.lock is locked by another process"), ("wait a bit", "^wait a bit$")):
            with pytest.raises(Busy, match=message) as caught, locked(tmp_path / ".lock", 0.01, busy):
                pass
            assert isinstance(caught.value, UserError) and isinstance(caught.value, TimeoutError)
    with pytest.raises(KeyError), locked(tmp_path / ".lock", 0):
        raise KeyError
    assert not is_locked(tmp_path / ".lock")
