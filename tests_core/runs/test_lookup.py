"""Runs are found by name, part, number, as latest and best, and their configs are read back."""

import math
import os
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

from dida_tools.models.unet import UNET
from dida_tools.utils.loss import f1, smooth_dice_loss

from tests.helpers import PACKAGE, begin_run, write_run

PROJECT = project_of(PACKAGE)
ROADS, ROADS_2, TREES, SEA = NAMES = (
    "2024-01-01_10-00-00_roads", "2024-01-02_10-00-00_roads", "2024-01-02_11-00-00_trees", "2024-01-03_sea",
)  # fmt: skip
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


def test_a_run_is_found_by_its_name_or_a_part_of_it(log_dir: Path) -> None:
    write_record(
        log_dir / f"{ROADS_2}-2", {"version": 1, "config": {}}
    )  # a name goes before a part of another
    wanted = {name: name for name in NAMES} | {"trees": TREES, "01-03": SEA, "2024-01-01": ROADS}
    assert {key: find(log_dir, key) for key in wanted} == wanted


@pytest.mark.parametrize(
    "wanted, message",
    [
        ("roads", f"'roads' fits 2 runs, such as {ROADS}, {ROADS_2}: give more"),
        ("lakes", f"no run is called 'lakes': the last ones are .*{SEA}"),
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
    for folder in (log_dir / "not-a-run", log_dir / "missing"):
        with pytest.raises(UserError, match="no runs yet; train one"):
            find(folder, wanted)


def test_the_latest_run_is_the_one_written_last(log_dir: Path) -> None:
    for seconds, name in enumerate([SEA, ROADS, TREES, ROADS_2]):
        os.utime(log_dir / name / "config.json", (1e9 + seconds, 1e9 + seconds))
    assert find(log_dir, "latest") == ROADS_2
    with pytest.raises(UserError, match="no run has weights yet"):
        find(log_dir, "latest", with_weights=True)
    (log_dir / "w" / TREES).mkdir(parents=True)
    (log_dir / "w" / TREES / "best.pt").touch()
    assert find(log_dir, "latest", with_weights=True) == TREES
    begin_run(log_dir, ROADS).close()
    assert find(log_dir, "latest") == ROADS


def test_one_function_numbers_runs_by_their_start_whatever_the_file_says(tmp_path: Path) -> None:
    for hours_ago, name in enumerate(["third", "second", "first"]):
        write_run(tmp_path, name, {}, hours_ago=hours_ago)
    write_run(tmp_path, "another", {}, hours_ago=9, LOGFILE="other.csv")
    (tmp_path / "experiments.csv").write_text("NAME;x\nthird;1\nalien;2\nfirst;3\n")
    begin_run(tmp_path, "first").close()  # is resumed
    assert [row["NAME"] for row in find_rows(tmp_path)] == ["first", "second", "third"]
    assert [row["NAME"] for row in find_rows(tmp_path, "other.csv")] == ["another"]
    for logfile in ("experiments.csv", "other.csv"):  # --rerun N cannot know which one list was asked for
        numbered = [find(tmp_path, str(number), logfile=logfile) for number in (1, 2, 3, 4)]
        assert numbered == ["another", "first", "second", "third"]
    write_run(tmp_path, "2024-05-05_only-one", {})
    for number in ("0", "7", "2024"):  # no row, and no part of a name
        with pytest.raises(UserError, match=f"no run is called '{number}'"):
            find(tmp_path, number)


@pytest.mark.parametrize(
    "monitor, values, best, wanted",
    [
        ("max f1", [0.5, 0.75, 0.5], 1, "best"),
        ("min loss", [0.5, 0.25, 0.75], 1, "best"),
        ("max f1.water", [0.9, 0.75, 0.5], 0, "best"),
        *(("max f1", [value, 0.5, value], 1, "best") for value in (math.nan, None, "much")),
        ("max f1", [-math.inf, 0.0, -1.0], 1, "best"),
        ("max iou", [0.5, 0.75, 0.5], 1, "best:iou"),
        ("max loss", [0.5, 0.75, 0.5], 0, "best:loss"),
    ],
)
def test_the_best_run(log_dir: Path, monitor: str, values: list, best: int, wanted: str) -> None:
    for number, (name, value) in enumerate(zip(NAMES, values, strict=False)):
        results = {f"validation.{monitor.split()[1]}": value}
        write_run(log_dir, name, results, hours_ago=10 - number, MONITOR=monitor)
    assert find(log_dir, wanted) == NAMES[best]
    with pytest.raises(UserError, match="no finished run has a validation result for recall"):
        find(log_dir, "best:recall")


def test_only_runs_that_can_be_compared_with_the_last_are(log_dir: Path) -> None:
    monitors = ["min loss", "max f1", "min loss"]
    for number, monitor in enumerate(monitors):
        results = {"validation.loss": [0.01, 0.001, 0.02][number], "validation.f1": 0.5}
        write_run(log_dir, NAMES[number], results, hours_ago=9 - number, MONITOR=monitor)
    assert find(log_dir, "best") == ROADS
    write_run(log_dir, SEA, {"validation.f1": 0.4}, hours_ago=1)
    assert find(log_dir, "best") == ROADS_2
    begin_run(log_dir, "unfinished").close()
    assert find(log_dir, "best") == ROADS_2
    elsewhere = {"DATASET_CONFIG": {"test": {"x_dir": "other"}}}
    write_run(log_dir, "elsewhere", {"validation.f1": math.nan}, **elsewhere)
    with pytest.raises(UserError, match="no finished run has a validation result for MONITOR 'max f1'"):
        find(log_dir, "best")
    write_run(log_dir, "means", {"validation.f1_sample_mean": 0.1}, **elsewhere)  # over samples
    assert find(log_dir, "best") == "means"


def test_the_config_of_a_run_is_read_back_to_the_same_objects(log_dir: Path) -> None:
    config = read_run_config(str(log_dir / ROADS), PROJECT)
    assert config == CONFIG and config["MODEL"] is UNET and config["METRICS"]["f1"] is f1
    references = {"MODEL": {"@ref": ".models.unet:UNET"}, "LOSS": {"@ref": ".not_here:loss"}}
    write_record(log_dir / ROADS, {"version": 1, "config": references})
    # A part of it needs nothing that the rest names.
    assert read_run_config(log_dir / ROADS, PROJECT, keys=("MODEL", "MODEL_CONFIG")) == {"MODEL": UNET}
    with pytest.raises(ConfigError, match="not_here"):
        read_run_config(log_dir / ROADS, PROJECT)
    with pytest.raises(ConfigError, match=r"config\.json is damaged or missing .*No such file"):
        read_run_config(log_dir / "not-a-run", PROJECT)


def test_a_damaged_config_is_refused_or_taken_from_the_journal(log_dir: Path) -> None:
    file = log_dir / ROADS / "config.json"
    content, hostile = file.read_bytes(), b'{"version": 1, "config": {"MODEL": {"@ref": "os:system"}}}'
    damaged = [b"", b"{", b"\xff\xfe", b"null", b"[]", b'{"version": 1}', b'{"version": 99, "config": {}}']
    damaged += [hostile, b"[" * 100_000, *(content[:length] for length in (20, 100, 200, -1))]
    for text in damaged:
        file.write_bytes(text)
        with pytest.raises(ConfigError, match=r"has 1 problem: .*config\.json is damaged or missing"):
            read_run_config(log_dir / ROADS, PROJECT)
    begin_run(log_dir, ROADS).close()
    said: list[str] = []
    for text in damaged:
        file.write_bytes(text)
        assert read_record(log_dir / ROADS, said.append)["config"]["MONITOR"] == "max f1"
    assert len(said) == len(damaged) and said[0].endswith("the copy in the journal is used.")


@pytest.mark.parametrize(
    "empty, filled, names",
    [
        ((), (), []),
        ((".lock", "journal.jsonl", ".config.json.123.tmp"), (), []),
        ((), ("config.json",), ["run"]),
        ((), ("journal.jsonl",), ["run"]),
        ((".lock",), ("notes.txt",), []),
    ],
)
def test_only_a_folder_in_which_no_run_has_begun_is_removed(
    tmp_path: Path, empty: tuple, filled: tuple, names: list
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for name in (*empty, *filled):
        (run_dir / name).write_text("something" * (name in filled))
    assert run_names(tmp_path) == names
    for _ in range(2):
        remove_unbegun(run_dir)
    assert sorted(os.listdir(run_dir) if run_dir.exists() else []) == sorted((*empty, *filled) * bool(filled))
    if names:
        os.replace(run_dir, tmp_path / ".deleted-run")  # what is being removed is no run
        assert run_names(tmp_path) == []
