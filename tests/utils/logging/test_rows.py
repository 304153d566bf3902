"""The tracker's rows follow from the journals: rebuilt, merged later, and those of killed runs."""

import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from dida_tools.config.capture import capture
from dida_tools.training.pytorch_training import train
from dida_tools.utils.logging import read_frame, read_log, write_log
from dida_tools.utils.logging.csv import remove_rows
from dida_tools.utils.logging.journal import Journal
from dida_tools.utils.logging.rows import rebuild_log, refresh_log
from dida_tools.utils.logging.runs import run_names


def log_of(global_config: dict) -> Path:
    return Path(global_config["LOG_DIR"]) / "experiments.csv"


def fork_training(datasets, config: dict, global_config: dict) -> int:
    """A training in a process of its own, which is forked so that it starts at once."""
    process = os.fork()
    if process == 0:
        try:
            train(*datasets, config, global_config)
        finally:
            os._exit(0)
    return process


def kill_while_training(datasets, config: dict, global_config: dict) -> None:
    process = fork_training(datasets, config | {"EPOCHS": 500}, global_config)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        rows = read_log(log_of(global_config))
        if rows and rows[-1]["STATUS"] == "running" and rows[-1]["EPOCH"] >= 1:
            break
        time.sleep(0.02)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def test_a_killed_run_is_shown_as_killed_when_the_next_one_starts(datasets, tiny_config, global_config):
    kill_while_training(datasets, tiny_config, global_config)
    row = read_log(log_of(global_config))[0]
    assert (row["STATUS"], row["HOST"]) == ("running", socket.gethostname())
    second = train(*datasets, tiny_config, global_config)
    rows = read_log(log_of(global_config))
    assert [row["STATUS"] for row in rows] == ["killed", "finished"]
    assert rows[0]["HEARTBEAT"] >= row["HEARTBEAT"] and rows[0]["EPOCH"] >= 1
    assert second.name == rows[1]["NAME"]


def test_a_run_that_is_being_trained_is_not_called_killed(datasets, tiny_config, global_config):
    kill_while_training(datasets, tiny_config, global_config)
    name = run_names(global_config["LOG_DIR"])[0]
    with FileLock(Path(global_config["LOG_DIR"]) / name / ".lock"):
        refresh_log(global_config["LOG_DIR"])
        assert read_log(log_of(global_config))[0]["STATUS"] == "running"
    refresh_log(global_config["LOG_DIR"])
    assert read_log(log_of(global_config))[0]["STATUS"] == "killed"


def test_a_killed_run_that_goes_on_is_running_and_then_finished(datasets, tiny_config, global_config):
    kill_while_training(datasets, tiny_config, global_config)
    refresh_log(global_config["LOG_DIR"])
    row = read_log(log_of(global_config))[0]
    train(*datasets, tiny_config | {"RESUME": row["NAME"], "EPOCHS": row["EPOCH"] + 1}, global_config)
    assert [row["STATUS"] for row in read_log(log_of(global_config))] == ["finished"]


@pytest.mark.parametrize(("age_seconds", "expected"), [(60, "running"), (2 * 3600, "killed")])
def test_a_run_of_another_machine_is_believed_for_an_hour(tmp_path, age_seconds, expected):
    (tmp_path / "run").mkdir()
    journal = Journal(tmp_path / "run" / "journal.jsonl")
    event = {"event": "start", "name": "run", "host": "elsewhere", "pid": 1, "epoch": 0, "best_epoch": None}
    event |= {"device": "cpu", "precision": "fp32", "not_rerunnable": "", "time": time.time() - age_seconds}
    journal.write(event | capture({"LOGFILE": "experiments.csv"}))
    journal.close()
    refresh_log(tmp_path)
    assert [row["STATUS"] for row in read_log(tmp_path / "experiments.csv")] == [expected]


def test_while_the_file_cannot_be_written_training_goes_on_and_the_row_is_merged_later(
    datasets, tiny_config, global_config, capsys
):
    # A folder in its place: nobody can write to that, not even root.
    log_of(global_config).mkdir(parents=True)
    first = train(*datasets, tiny_config, global_config)
    said = capsys.readouterr().out
    assert "it is in the journal, and will be merged later" in said
    assert first.metrics["test.f1"] > 0
    log_of(global_config).rmdir()
    second = train(*datasets, tiny_config, global_config)
    rows = {row["NAME"]: row for row in read_log(log_of(global_config))}
    assert rows.keys() == {first.name, second.name}
    same = [key for key in rows[first.name] if key.startswith(("test.", "validation.", "MODEL", "STATUS"))]
    assert {key: rows[first.name][key] for key in same} == {key: rows[second.name][key] for key in same}


def test_a_row_that_another_program_has_removed_comes_back(datasets, tiny_config, global_config):
    first = train(*datasets, tiny_config, global_config)
    before = read_log(log_of(global_config))
    remove_rows(log_of(global_config), [first.name])
    assert read_log(log_of(global_config)) == []
    refresh_log(global_config["LOG_DIR"])
    assert read_log(log_of(global_config)) == before


def test_the_rebuilt_file_is_the_one_that_the_trainings_wrote(datasets, tiny_config, global_config):
    train(*datasets, tiny_config, global_config)
    train(*datasets, tiny_config | {"OPTIMIZER": torch.optim.SGD, "SCHEDULER": None}, global_config)
    train(*datasets, tiny_config | {"LOGFILE": "others.csv"}, global_config)
    written = log_of(global_config).read_bytes()
    log_of(global_config).unlink()
    assert rebuild_log(global_config["LOG_DIR"]) == 2
    assert log_of(global_config).read_bytes() == written
    others = log_of(global_config).with_name("others.csv")
    written = others.read_bytes()
    assert rebuild_log(global_config["LOG_DIR"], "others.csv") == 1
    assert others.read_bytes() == written and others.with_name("others.csv.old").read_bytes() == written


def test_columns_of_ones_own_stay_while_trainings_write(datasets, tiny_config, global_config):
    first = train(*datasets, tiny_config, global_config)
    write_log(log_of(global_config), {"NAME": first.name, "for the customer": "yes"})
    train(*datasets, tiny_config | {"RESUME": first.name, "EPOCHS": 3}, global_config)
    row = read_log(log_of(global_config))[0]
    assert (row["for the customer"], row["EPOCH"]) == ("yes", 3)


def test_a_frame_has_the_same_values(tmp_path):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    write_log(tmp_path / "log.csv", {"NAME": "a", "x": 0.1, "text": "=1"})
    write_log(tmp_path / "log.csv", {"NAME": "b", "y": True})
    frame = read_frame(tmp_path / "log.csv")
    assert isinstance(frame, pandas.DataFrame)
    assert frame["x"][0] == 0.1 and frame["text"][0] == "=1" and list(frame["NAME"]) == ["a", "b"]
