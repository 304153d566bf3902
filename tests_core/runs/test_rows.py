"""The tracker's rows follow from the journals: also of runs that were killed, also lost ones."""

import shutil
from pathlib import Path

import pytest
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
    for _ in range(2):  # it is resumed
        begin_run(tmp_path, "run").close()
        with locked(tmp_path / "run" / ".lock"):
            assert current_row(tmp_path / "run")["STATUS"] == "running"
        assert current_row(tmp_path / "run")["STATUS"] == "killed"
    write_run(tmp_path, "run", {"test.f1": 0.5})
    row = current_row(tmp_path / "run")
    assert (row["STATUS"], row["test.f1"], row["WEIGHTS_DIGEST"]) == ("finished", 0.5, "d")
    for hours_ago, expected in ((0.1, "running"), (2, "killed")):  # another machine is believed for an hour
        begin_run(tmp_path, expected, hours_ago, host="elsewhere").close()
        assert current_row(tmp_path / expected)["STATUS"] == expected


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
    first, datasets, tiny_config, global_config, tmp_path
):
    log = log_of(global_config)
    child = Child(lambda: train(*datasets, tiny_config | {"EPOCHS": 500}, global_config), tmp_path / "output")
    wait_until(lambda: [row for row in rows_of(global_config)[1:] if row["EPOCH"]])
    child.kill()
    before = rows_of(global_config)[1]
    assert before["STATUS"] == "running" and before["PID"] == child.pid
    remove_rows(log, [before["NAME"]])  # lost rows come back, and added columns stay
    write_log(log, {"NAME": first["NAME"], "for the customer": "yes"})
    last = train(*datasets, tiny_config, global_config)
    rows = {row["NAME"]: row for row in rows_of(global_config)}
    killed = rows[before["NAME"]]
    assert killed["HEARTBEAT"] >= before["HEARTBEAT"] and killed["EPOCH"] >= 1
    statuses = {first["NAME"]: "finished", before["NAME"]: "killed", last.name: "finished"}
    assert {name: row["STATUS"] for name, row in rows.items()} == statuses
    train(*datasets, tiny_config | {"RESUME": killed["NAME"], "EPOCHS": killed["EPOCH"] + 1}, global_config)
    assert {row["STATUS"] for row in rows_of(global_config)} == {"finished"}
    assert rows_of(global_config)[0]["for the customer"] == "yes"


def test_whatever_the_file_is_training_continues(first, datasets, tiny_config, global_config, capsys):
    log = log_of(global_config)
    log.unlink()
    log.mkdir()  # nobody can write to that, not even root
    second = train(*datasets, tiny_config | {"EPOCHS": 1}, global_config)
    assert second.metrics["test.f1"] > 0 and "CsvTracker failed" in capsys.readouterr().out
    log.rmdir()
    log.write_text("nonsense")

    def lose(run) -> None:
        remove_rows(log, [run.name])

    third = train(*datasets, tiny_config | {"AFTER_EPOCH": lose}, global_config)
    rows = {row["NAME"]: row for row in read_log(log)}
    assert rows.keys() >= {first["NAME"], second.name, third.name}
    same = [key for key in first if key.startswith(("test.", "validation.", "MODEL", "STATUS"))]
    assert same and all(first[key] == rows[third.name][key] == rows[first["NAME"]][key] for key in same)


def test_the_rebuilt_file_is_the_one_that_the_trainings_wrote(first, global_config):
    log, log_dir = log_of(global_config), Path(global_config["LOG_DIR"])
    written = log.read_bytes()
    log.unlink()
    rebuild(log, find_rows(log_dir))
    assert log.read_bytes() == written
    write_run(log_dir, "other", {}, SCHEDULER=None, LOGFILE="others.csv")
    write_run(log_dir, "more", {"test.f2": 0.5}, SCHEDULER=None)
    rebuild(log, rows := find_rows(log_dir))
    columns = dict.fromkeys(key for row in rows for key in row)
    assert read_log(log) == [{key: row.get(key) for key in columns} for row in rows] and len(rows) == 2
    assert log.with_name("experiments.csv.old").read_bytes() == written


def test_a_logfile_in_another_folder_is_refused(datasets, tiny_config, global_config):
    for logfile in ("../x.csv", "/tmp/x.csv", "sub/x.csv"):
        with pytest.raises(ValueError, match="LOGFILE is"):
            train(*datasets, tiny_config | {"LOGFILE": logfile}, global_config)
    assert run_names(global_config["LOG_DIR"]) == []


def test_looking_at_many_runs_reads_only_what_has_changed(tmp_path, monkeypatch):
    for number in range(20):
        write_run(tmp_path, f"run-{number:03d}", {"test.f1": 0.5})
    assert len(find_rows(tmp_path)) == 20
    read: list[str] = []
    monkeypatch.setattr(
        rows, "read_journal", lambda path, **how: read.append(path) or read_journal(path, **how)
    )
    write_run(tmp_path, "run-007", {"test.f1": 0.6})
    assert [row["test.f1"] for row in find_rows(tmp_path)].count(0.6) == 1
    assert read == [tmp_path / "run-007" / "journal.jsonl"]
