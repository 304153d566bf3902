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
from dida_tools.config.project import project_of
from dida_tools.training.pytorch_training import train
from dida_tools.utils.logging import read_frame, read_log, write_log
from dida_tools.utils.logging import rows as rows_module
from dida_tools.utils.logging.csv import remove_rows
from dida_tools.utils.logging.journal import Journal
from dida_tools.utils.logging.rows import rebuild_log, refresh_log
from dida_tools.utils.logging.runs import run_names


def log_of(global_config: dict) -> Path:
    return Path(global_config["LOG_DIR"]) / "experiments.csv"


def begin(run_dir: Path, host: str = socket.gethostname(), seconds_ago: float = 0) -> Journal:
    """What a run writes first."""
    run_dir.mkdir()
    journal = Journal(run_dir / "journal.jsonl")
    event = {"event": "start", "name": run_dir.name, "host": host, "pid": 1, "epoch": 0}
    event |= {"best_epoch": None, "device": "cpu", "precision": "fp32", "not_rerunnable": ""}
    event |= {"time": time.time() - seconds_ago}
    journal.write(
        event | capture({"LOGFILE": "experiments.csv", "MONITOR": "max f1"}, project_of("dida_tools"))
    )
    return journal


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
    begin(tmp_path / "run", host="elsewhere", seconds_ago=age_seconds).close()
    refresh_log(tmp_path)
    assert [row["STATUS"] for row in read_log(tmp_path / "experiments.csv")] == [expected]


def test_a_run_that_ends_while_it_is_looked_at_is_not_called_killed(tmp_path, monkeypatch):
    journal = begin(tmp_path / "run")
    lock = FileLock(tmp_path / "run" / ".lock")
    lock.acquire()
    look = rows_module.is_in_training

    def look_late(run_dir):  # after its journal was read, the run writes its end and releases its lock
        if lock.is_locked:
            journal.write(
                {"event": "test", "seconds": 1.0, "digest": "d", "test.f1": 0.5, "time": time.time()}
            )
            lock.release()
        return look(run_dir)

    monkeypatch.setattr(rows_module, "is_in_training", look_late)
    refresh_log(tmp_path)
    assert [row["STATUS"] for row in read_log(tmp_path / "experiments.csv")] == ["finished"]


def test_a_file_without_the_column_of_names_ends_no_training(tmp_path):
    begin(tmp_path / "run").close()
    (tmp_path / "experiments.csv").write_text("NAME;STATUS\nother;finished\n")  # as some spreadsheets save it
    refresh_log(tmp_path)
    assert [row.get("NAME") for row in read_log(tmp_path / "experiments.csv")] == [None, "run"]


def test_a_row_that_is_lost_meanwhile_comes_back_whole(datasets, tiny_config, global_config):
    log = log_of(global_config)

    def lose(run) -> bool:
        remove_rows(log, [run.name])
        return False

    result = train(*datasets, tiny_config | {"AFTER_EPOCH": lose}, global_config)
    (row,) = read_log(log)
    assert (row["NAME"], row["STATUS"], row["MONITOR"]) == (result.name, "finished", "max f1")
    assert row["STARTED"] and row["MODEL_CONFIG.bulk_ch"] == 4


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
