"""The tracker's rows follow from the journals: also of runs that were killed, also lost ones."""

import shutil
import time
from pathlib import Path

import pytest
import torch
from dida_core.runs import rows
from dida_core.runs.lookup import find_rows, read_record, run_names
from dida_core.runs.rows import current_row, row_of
from dida_core.storage.checkpoint import load_checkpoint
from dida_core.storage.journal import read_journal
from dida_core.storage.locks import locked
from dida_core.storage.table import rebuild, remove_rows

from dida_tools.training.pytorch_training import train
from dida_tools.utils.logging import read_log, write_log

from tests.helpers import ROOT, Child, begin_run, rows_of, wait_until, write_run

pytestmark = pytest.mark.usefixtures("quick")


def log_of(global_config: dict) -> Path:
    return Path(global_config["LOG_DIR"]) / "experiments.csv"


def test_a_run_is_killed_if_it_neither_ended_nor_is_in_training(tmp_path):
    begin_run(tmp_path, "run").close()
    with locked(tmp_path / "run" / ".lock"):
        assert current_row(tmp_path / "run")["STATUS"] == "running"
    assert current_row(tmp_path / "run")["STATUS"] == "killed"
    begin_run(tmp_path, "run").close()  # it is resumed
    with locked(tmp_path / "run" / ".lock"):
        assert current_row(tmp_path / "run")["STATUS"] == "running"
    write_run(tmp_path, "run", {"test.f1": 0.5})
    row = current_row(tmp_path / "run")
    assert (row["STATUS"], row["test.f1"], row["WEIGHTS_DIGEST"]) == ("finished", 0.5, "d")


@pytest.mark.parametrize(("hours_ago", "expected"), [(0.1, "running"), (2, "killed")])
def test_a_run_of_another_machine_is_believed_for_an_hour(tmp_path, hours_ago, expected):
    begin_run(tmp_path, "run", hours_ago, host="elsewhere").close()
    assert current_row(tmp_path / "run")["STATUS"] == expected


def test_a_run_that_ends_while_it_is_looked_at_is_not_called_killed(tmp_path, monkeypatch):
    begin_run(tmp_path, "run").close()
    look = rows.is_in_training

    def look_late(run_dir):  # after its journal was read, the run writes its end and releases its lock
        write_run(tmp_path, "run", {"test.f1": 0.5})
        return look(run_dir)

    monkeypatch.setattr(rows, "is_in_training", look_late)
    assert current_row(tmp_path / "run")["STATUS"] == "finished"


def test_the_cached_row_is_that_of_the_journal(tmp_path):
    run_dir, values = tmp_path / "run", {"validation.f1": float("nan"), "test.f1": 0.1 + 0.2}
    write_run(tmp_path, "run", values)
    expected = repr(row_of(read_journal(run_dir / "journal.jsonl")))
    cache = run_dir / ".row.json"
    assert not cache.exists() and repr(current_row(run_dir)) == expected
    content = cache.read_bytes()
    assert repr(current_row(run_dir)) == expected and cache.read_bytes() == content
    for damaged in (b"", content[:50], content.replace(b"0.3", b"0.4"), b"[]\n", b"\xff" * 9):
        cache.write_bytes(damaged)
        assert repr(current_row(run_dir)) == expected
    cache.unlink()
    cache.mkdir()  # it cannot be written
    assert repr(current_row(run_dir)) == expected


def test_a_copied_run_has_its_own_name_and_a_run_without_a_start_no_row(tmp_path):
    write_run(tmp_path, "run", {})
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    (tmp_path / "empty").mkdir()
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost" / "journal.jsonl").write_text("damaged\n")
    assert sorted(row["NAME"] for row in find_rows(tmp_path)) == ["copy", "run"]
    assert current_row(tmp_path / "empty") == current_row(tmp_path / "lost") == {}


def test_runs_of_version_0_1_have_the_rows_that_it_wrote(tmp_path, monkeypatch):
    old = shutil.copytree(ROOT / "tests_core" / "version_0_1" / "runs", tmp_path / "old")
    monkeypatch.setattr(rows, "_SECONDS_TO_BELIEVE_OTHERS", 0.0)
    written = {row["NAME"]: row for row in read_log(old / "logs" / "experiments.csv")}
    found = {row["NAME"]: row for row in find_rows(old / "logs")}
    assert found.keys() == written.keys() and len(found) > 5
    for name, row in found.items():
        renamed = {key for key in row if key == "NORMALIZE" or key.endswith(".split")}
        changed = {key for key in row.keys() - renamed if written[name][key] != row[key]}
        assert changed <= {"STARTED", "HEARTBEAT"}  # in local time
        said: list[str] = []
        assert read_record(old / "logs" / name, said.append)["config"]["LOGFILE"] == "experiments.csv"
        assert load_checkpoint(old / "weights" / name, said.append) is not None and said == []


def test_a_killed_run_is_shown_as_killed_when_the_next_one_starts(
    datasets, tiny_config, global_config, tmp_path
):
    child = Child(lambda: train(*datasets, tiny_config | {"EPOCHS": 500}, global_config), tmp_path / "output")
    wait_until(lambda: [row for row in rows_of(global_config) if row["EPOCH"]])
    child.kill()
    before = rows_of(global_config)[0]
    assert before["STATUS"] == "running" and before["PID"] == child.pid
    second = train(*datasets, tiny_config, global_config)
    first, last = rows_of(global_config)
    assert (first["STATUS"], last["STATUS"], last["NAME"]) == ("killed", "finished", second.name)
    assert first["HEARTBEAT"] >= before["HEARTBEAT"] and first["EPOCH"] >= 1
    train(*datasets, tiny_config | {"RESUME": first["NAME"], "EPOCHS": first["EPOCH"] + 1}, global_config)
    assert [row["STATUS"] for row in rows_of(global_config)] == ["finished", "finished"]


def test_a_row_that_is_lost_meanwhile_comes_back_and_added_columns_stay(datasets, tiny_config, global_config):
    log = log_of(global_config)

    def lose(run) -> bool:
        remove_rows(log, [run.name])
        return False

    result = train(*datasets, tiny_config | {"AFTER_EPOCH": lose}, global_config)
    (row,) = read_log(log)
    assert (row["NAME"], row["STATUS"], row["MONITOR"]) == (result.name, "finished", "max f1")
    assert row["STARTED"] and row["MODEL_CONFIG.bulk_ch"] == 4
    write_log(log, {"NAME": result.name, "for the customer": "yes"})
    train(*datasets, tiny_config | {"RESUME": result.name, "EPOCHS": 3}, global_config)
    (row,) = read_log(log)
    assert (row["for the customer"], row["EPOCH"]) == ("yes", 3)


@pytest.mark.parametrize("in_the_way", ["a folder", "NAME;STATUS\nother;finished\n", "nonsense"])
def test_whatever_the_file_is_training_continues(datasets, tiny_config, global_config, in_the_way, capsys):
    log = log_of(global_config)
    log.parent.mkdir(parents=True)
    log.mkdir() if in_the_way == "a folder" else log.write_text(in_the_way)
    first = train(*datasets, tiny_config, global_config)
    assert first.metrics["test.f1"] > 0
    if in_the_way == "a folder":  # nobody can write to that, not even root
        assert "CsvTracker failed" in capsys.readouterr().out
        log.rmdir()
    second = train(*datasets, tiny_config, global_config)
    found = {row["NAME"]: row for row in read_log(log)}
    assert found.keys() >= {first.name, second.name}
    same = [key for key in found[first.name] if key.startswith(("test.", "validation.", "MODEL", "STATUS"))]
    assert same and all(found[first.name][key] == found[second.name][key] for key in same)


def test_the_rebuilt_file_is_the_one_that_the_trainings_wrote(datasets, tiny_config, global_config):
    log, log_dir = log_of(global_config), global_config["LOG_DIR"]
    train(*datasets, tiny_config, global_config)
    train(*datasets, tiny_config | {"OPTIMIZER": torch.optim.SGD, "SCHEDULER": None}, global_config)
    train(*datasets, tiny_config | {"LOGFILE": "others.csv"}, global_config)
    for file, number in ((log, 2), (log.with_name("others.csv"), 1)):
        written = file.read_bytes()
        file.unlink()
        rebuild(file, rows := find_rows(log_dir, file.name))
        assert len(rows) == number and file.read_bytes() == written
        rebuild(file, rows)
        assert read_log(file) == rows and file.with_name(f"{file.name}.old").read_bytes() == written


def test_a_logfile_in_another_folder_is_refused(datasets, tiny_config, global_config):
    for logfile in ("../x.csv", "/tmp/x.csv", "sub/x.csv"):
        with pytest.raises(ValueError, match="LOGFILE is"):
            train(*datasets, tiny_config | {"LOGFILE": logfile}, global_config)
    assert run_names(global_config["LOG_DIR"]) == []


def test_looking_at_many_runs_reads_only_what_has_changed(tmp_path):
    for number in range(200):
        write_run(tmp_path, f"run-{number:03d}", {"test.f1": 0.5})
    assert len(find_rows(tmp_path)) == 200
    caches = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/.row.json")}
    time.sleep(0.01)
    write_run(tmp_path, "run-007", {"test.f1": 0.6})
    assert [row["test.f1"] for row in find_rows(tmp_path)].count(0.6) == 1
    changed = [file.parent.name for file, before in caches.items() if file.stat().st_mtime_ns != before]
    assert len(caches) == 200 and changed == ["run-007"]
