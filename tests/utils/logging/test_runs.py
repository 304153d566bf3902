import math
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from dida_tools.config.capture import capture
from dida_tools.config.errors import ConfigError, UserError
from dida_tools.config.project import project_of
from dida_tools.models.unet import UNET
from dida_tools.utils.logging.csv import write_log
from dida_tools.utils.logging.runs import (
    find_run,
    is_in_training,
    read_run_config,
    remove_unbegun,
    run_names,
    write_record,
)
from dida_tools.utils.loss import f1, smooth_dice_loss

NAMES = [
    "2024-01-01_10-00-00_roads",
    "2024-01-02_10-00-00_roads",
    "2024-01-02_11-00-00_trees",
    "2024-01-03_09-00-00_sea",
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


def make_run(log_dir: Path, name: str, config: dict[str, Any] | None = None) -> None:
    (log_dir / name).mkdir(parents=True)
    write_record(log_dir / name, capture(config or CONFIG, project_of("dida_tools")) | {"name": name})


def make_row(
    log_dir: Path,
    name: str,
    value: Any,
    monitor: str = "max f1",
    status: str = "finished",
    more: dict[str, Any] | None = None,
) -> None:
    row = {"NAME": name, "STATUS": status, "MONITOR": monitor, f"validation.{monitor.split()[1]}": value}
    write_log(log_dir / "experiments.csv", row | (more or {}))


@pytest.fixture
def log_dir(tmp_path: Path) -> Path:
    for name in NAMES:
        make_run(tmp_path, name)
    (tmp_path / "not-a-run").mkdir()
    return tmp_path


def find(log_dir: Path, wanted: str, **options: Any) -> str:
    return find_run({"LOG_DIR": str(log_dir)}, wanted, **options)


# ---------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_found_by_its_name(log_dir: Path, name: str) -> None:
    assert find(log_dir, name) == name


@pytest.mark.parametrize("part, name", [("trees", NAMES[2]), ("01-03", NAMES[3]), ("2024-01-01", NAMES[0])])
def test_a_run_is_found_by_a_part_of_its_name(log_dir: Path, part: str, name: str) -> None:
    assert find(log_dir, part) == name


def test_a_whole_name_goes_before_a_part_of_another(log_dir: Path) -> None:
    make_run(log_dir, NAMES[0] + "-2")
    assert find(log_dir, NAMES[0]) == NAMES[0]


def test_an_ambiguous_part_is_refused_with_examples(log_dir: Path) -> None:
    with pytest.raises(ValueError, match=f"'roads' fits 2 runs, such as {NAMES[0]}, {NAMES[1]}: give more"):
        find(log_dir, "roads")


def test_an_unknown_name_is_refused_with_examples(log_dir: Path) -> None:
    with pytest.raises(ValueError, match=f"no run is called 'lakes': the last ones are .*{NAMES[3]}"):
        find(log_dir, "lakes")
    with pytest.raises(ValueError, match="no run is called 'not-a-run'"):
        find(log_dir, "not-a-run")


@pytest.mark.parametrize("wanted", ["latest", "best", "x"])
def test_without_runs_the_way_to_one_is_said(tmp_path: Path, wanted: str) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match="no runs yet; train one"):
            find(folder, wanted)


def test_the_latest_run_is_the_one_started_last(log_dir: Path) -> None:
    for seconds, name in enumerate([NAMES[3], NAMES[0], NAMES[2], NAMES[1]]):
        os.utime(log_dir / name / "config.json", (1e9 + seconds, 1e9 + seconds))
    assert find(log_dir, "latest") == NAMES[1]
    os.utime(log_dir / NAMES[0] / "config.json")
    assert find(log_dir, "latest") == NAMES[0]


# ----------------------------------------------------------------------------------------------------------------- best


@pytest.mark.parametrize("monitor, best", [("max f1", 2), ("min loss", 1)])
def test_the_best_run_is_that_of_the_largest_or_smallest_result(
    log_dir: Path, monitor: str, best: int
) -> None:
    for name, value in zip(NAMES, [0.5, 0.25, 0.75, 0.5], strict=True):
        make_row(log_dir, name, value, monitor)
    assert find(log_dir, "best") == NAMES[best]


@pytest.mark.parametrize("metric, best", [("iou", 1), ("loss", 0)])
def test_the_best_run_by_another_metric(log_dir: Path, metric: str, best: int) -> None:
    for name, value in zip(NAMES, [0.5, 0.75, 0.5], strict=False):
        make_row(log_dir, name, value, f"max {metric}")  # with results of this name
    assert find(log_dir, f"best:{metric}") == NAMES[best]
    with pytest.raises(UserError, match="no finished run has a validation result for recall"):
        find(log_dir, "best:recall")


@pytest.mark.parametrize("monitor", ["max f1", "min loss", "max f1.water"])
@pytest.mark.parametrize("value", [math.nan, None, "much"])
def test_runs_without_a_number_are_left_out_of_the_best(log_dir: Path, monitor: str, value: Any) -> None:
    make_row(log_dir, NAMES[0], value, monitor)
    make_row(log_dir, NAMES[1], 0.5, monitor)
    make_row(log_dir, NAMES[2], value, monitor)
    assert find(log_dir, "best") == NAMES[1]


@pytest.mark.parametrize("status", ["running", "failed", "interrupted"])
def test_unfinished_runs_are_left_out_of_the_best(log_dir: Path, status: str) -> None:
    make_row(log_dir, NAMES[0], 0.5)
    make_row(log_dir, NAMES[1], 0.9, status=status)
    assert find(log_dir, "best") == NAMES[0]


def test_only_runs_with_the_last_finished_runs_monitor_are_compared(log_dir: Path) -> None:
    make_row(log_dir, NAMES[0], 0.01, "min loss")
    make_row(log_dir, NAMES[1], 0.5, "max f1", more={"validation.loss": 0.001})
    make_row(log_dir, NAMES[2], 0.02, "min loss")
    assert find(log_dir, "best") == NAMES[0]
    make_row(log_dir, NAMES[3], 0.4, "max f1")
    assert find(log_dir, "best") == NAMES[1]


def test_runs_whose_folder_is_gone_are_left_out_of_the_best(log_dir: Path) -> None:
    make_row(log_dir, "2023-01-01_10-00-00_gone", 0.99)
    make_row(log_dir, NAMES[0], 0.5)
    assert find(log_dir, "best") == NAMES[0]


def test_results_that_are_means_over_samples_count(log_dir: Path) -> None:
    make_row(log_dir, NAMES[0], None, more={"validation.f1_sample_mean": 0.8})
    make_row(log_dir, NAMES[1], None, more={"validation.f1_sample_mean": 0.9})
    make_row(log_dir, NAMES[2], 0.1)
    assert find(log_dir, "best") == NAMES[1]


def test_without_a_finished_run_there_is_no_best(log_dir: Path) -> None:
    with pytest.raises(ValueError, match="no run is finished yet"):
        find(log_dir, "best")
    make_row(log_dir, NAMES[0], 0.5, status="running")
    with pytest.raises(ValueError, match="no run is finished yet"):
        find(log_dir, "best")


def test_without_a_result_there_is_no_best(log_dir: Path) -> None:
    make_row(log_dir, NAMES[0], math.nan)
    with pytest.raises(ValueError, match="no finished run has a validation result for MONITOR 'max f1'"):
        find(log_dir, "best")


def test_the_tracker_may_have_another_name(log_dir: Path) -> None:
    row = {"NAME": NAMES[1], "STATUS": "finished", "MONITOR": "max f1", "validation.f1": 0.5}
    write_log(log_dir / "other.csv", row)
    assert find(log_dir, "best", logfile="other.csv") == NAMES[1]


# --------------------------------------------------------------------------------------------------------------- config


def test_the_config_of_a_run_is_read_back_to_the_same_objects(log_dir: Path) -> None:
    config = read_run_config(log_dir / NAMES[0], project_of("dida_tools"))
    assert config == CONFIG and config["MODEL"] is UNET and config["METRICS"]["f1"] is f1
    assert read_run_config(str(log_dir / NAMES[0]), project_of("dida_tools")) == config


def test_a_part_of_the_config_needs_nothing_that_the_rest_names(log_dir: Path) -> None:
    record = {
        "version": 1,
        "config": {"MODEL": {"@ref": ".models.unet:UNET"}, "LOSS": {"@ref": ".not_here:loss"}},
    }
    write_record(log_dir / NAMES[0], record)
    assert read_run_config(log_dir / NAMES[0], project_of("dida_tools"), keys=("MODEL", "MODEL_CONFIG")) == {
        "MODEL": UNET
    }
    with pytest.raises(ConfigError, match="not_here"):
        read_run_config(log_dir / NAMES[0], project_of("dida_tools"))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"null",
        b"[]",
        b'{"version": 1}',
        b'{"version": 99, "config": {}}',
        b'{"version": 1, "config": {"MODEL": {"@ref": ".models.unet:NONE"}}}',
        b'{"version": 1, "config": {"MODEL": {"@ref": "os:system"}}}',
        b"[" * 100_000,
    ],
    ids=lambda content: repr(content[:40]),
)
def test_a_damaged_config_is_refused_with_a_sentence(log_dir: Path, content: bytes) -> None:
    (log_dir / NAMES[0] / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"the config has 1 problem: .{20}"):
        read_run_config(log_dir / NAMES[0], project_of("dida_tools"))


@pytest.mark.parametrize("length", [0, 1, 20, 100, 200, -1])
def test_a_config_that_is_cut_off_is_refused(log_dir: Path, length: int) -> None:
    file = log_dir / NAMES[0] / "config.json"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ConfigError, match=r"config\.json is damaged or missing"):
        read_run_config(log_dir / NAMES[0], project_of("dida_tools"))


def test_a_missing_config_is_refused_with_its_path(log_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json is damaged or missing .*No such file"):
        read_run_config(log_dir / "not-a-run", project_of("dida_tools"))


# ------------------------------------------------------------------------------------------------- the folder of a run


@pytest.mark.parametrize("left", [(), (".lock",), (".lock", "journal.jsonl", ".config.json.123.tmp")])
def test_a_folder_in_which_no_run_has_begun_is_none_and_can_be_removed(
    tmp_path: Path, left: tuple[str, ...]
) -> None:
    (tmp_path / "run").mkdir()
    for name in left:
        (tmp_path / "run" / name).touch()
    assert run_names(tmp_path) == []
    remove_unbegun(tmp_path / "run")
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


def test_looking_whether_a_run_is_trained_writes_nothing_and_keeps_nobody_away(log_dir: Path) -> None:
    folder = log_dir / NAMES[0]
    assert not is_in_training(folder) and not (folder / ".lock").exists()
    lock = FileLock(folder / ".lock", timeout=0)
    stop = threading.Event()
    seen: list[bool] = []

    def look() -> None:
        while not stop.is_set():
            seen.append(is_in_training(folder))

    (folder / ".lock").touch()
    with ThreadPoolExecutor(4) as pool:
        lookers = [pool.submit(look) for _ in range(4)]
        while len(seen) < 2000:
            time.sleep(0.01)
        stop.set()
    for looker in lookers:
        looker.result()
    assert set(seen) == {False}  # those that look do not see one another
    with lock:
        assert is_in_training(folder)
    assert not is_in_training(folder)
