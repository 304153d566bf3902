"""A run can be repeated from its record, and the command proves that the weights are the same."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from dida_core.config.project import project_of
from dida_core.data.build import build_datasets
from dida_core.errors import UserError
from dida_core.runs.environment import describe_environment, find_differences
from dida_core.runs.lookup import read_record, read_run_config, write_record
from dida_core.storage.journal import Journal
from torch.optim.lr_scheduler import OneCycleLR

from dida_tools.training.pytorch_training import train
from dida_tools.utils.data import NpyDataset

from tests.helpers import PACKAGE, ROOT, events_of, rows_of, run_script

pytestmark = pytest.mark.usefixtures("quick")


def rerun(name: str, global_config: dict, **changes):
    """As train.py --rerun does: everything comes from the record."""
    config = read_run_config(Path(global_config["LOG_DIR"]) / name, project_of(PACKAGE))
    config |= {"RERUN_OF": name, "DATE": None} | changes
    train_dataset, test_dataset, validation_dataset = build_datasets(config)
    return train(train_dataset, test_dataset, config, global_config, validation_dataset)


def test_a_repeated_run_has_identical_weights(first, global_config, capsys):
    torch.manual_seed(99)  # the default generators do not matter
    np.random.seed(99)
    again = rerun(first["NAME"], global_config)
    assert again.identical is True and again.digest == first["WEIGHTS_DIGEST"] and again.name != first["NAME"]
    said = capsys.readouterr().out
    assert f"identical: the weights are those of {first['NAME']}, bit for bit" in said
    assert "Not as it was" not in said
    row = rows_of(global_config)[-1]
    assert (row["RERUN_OF"], row["RERUN_IDENTICAL"]) == (first["NAME"], True)


def test_what_differs_is_said_and_the_first_step_that_does(first, global_config, capsys):
    assert rerun(first["NAME"], global_config, SEED=1).identical is False
    said = capsys.readouterr().out
    assert "not identical: " in said and "the losses differ first in step 1: loss" in said
    assert rows_of(global_config)[-1]["RERUN_IDENTICAL"] is False
    log_dir = Path(global_config["LOG_DIR"]) / first["NAME"]
    journal = Journal(log_dir / "journal.jsonl")
    journal.write({**events_of(log_dir, "test")[0], "digest": "0" * 64})
    journal.close()
    done = run_script("train.py", "--rerun", "1", root=Path(global_config["ROOT_PATH"]))
    assert done.returncode == 1 and "\nnot identical: " in done.stdout
    assert "although the losses of all steps are the same" in done.stdout
    refused = run_script("train.py", "--rerun", "1", "EPOCHS=3")
    assert refused.returncode == 2 and "leave KEY=VALUE out" in refused.stderr


def test_what_may_explain_a_difference_is_said_before_and_after(first, global_config, capsys):
    log_dir = Path(global_config["LOG_DIR"]) / first["NAME"]
    file, journal = log_dir / "environment.json", log_dir / "journal.jsonl"
    environment = json.loads(file.read_text())
    file.write_text(json.dumps(environment | {"cpu_capability": "older", "threads": 99}))
    with contextlib.closing(Journal(journal)) as writer:
        writer.write({**events_of(log_dir, "test")[0], "digest": "0" * 64})
    assert rerun(first["NAME"], global_config).identical is False
    lines = capsys.readouterr().out.splitlines()
    now = f"CPU capability: older then, {environment['cpu_capability']} now"
    assert lines[:2] == [f"Not as it was: {now}", f"Not as it was: {lines[1].partition(': ')[2]}"]
    assert lines[-1].endswith(f"; what may explain it: {now}; number of threads: 99 then, 1 now")
    file.write_text(json.dumps(environment))
    assert rerun(first["NAME"], global_config).identical is False
    assert "code, versions, data and machine are the same, as far as they are" in capsys.readouterr().out


def test_a_rerun_of_a_trial_is_no_trial(first, global_config):
    log_dir = Path(global_config["LOG_DIR"]) / first["NAME"]
    record = read_record(log_dir)
    write_record(log_dir, record | {"config": record["config"] | {"STUDY": "rates", "TRIAL": 3}})
    assert run_script("train.py", "--rerun", "1", root=Path(global_config["ROOT_PATH"])).returncode == 0
    row = rows_of(global_config)[-1]
    assert (row["STUDY"], row["TRIAL"], row["RERUN_IDENTICAL"]) == (None, None, True)


def test_changed_data_and_initial_weights_are_said(
    first, pairs_dir, tiny_config, global_config, tmp_path, capsys
):
    folder, weights = shutil.copytree(pairs_dir, tmp_path / "pairs"), tmp_path / "start.pt"
    weight_dir = Path(global_config["WEIGHT_DIR"]) / first["NAME"]
    shutil.copy(weight_dir / "best.pt", weights)
    sets = [NpyDataset(folder / split / "x", folder / split / "y") for split in ("train", "test")]
    before = train(*sets, tiny_config | {"INIT_WEIGHTS": str(weights), "EPOCHS": 1}, global_config)
    image = folder / "train" / "x" / "image_03.npy"
    np.save(image, np.load(image) // 2)
    shutil.copy(next(weight_dir.glob("last-*.pt")), weights)
    assert rerun(before.name, global_config).identical is False
    said = capsys.readouterr().out
    assert "Not as it was: data: 2 files are not what they were, such as INIT_WEIGHTS" in said


def test_a_run_that_was_not_finished_cannot_be_compared_with(first, global_config):
    journal = Path(global_config["LOG_DIR"]) / first["NAME"] / "journal.jsonl"
    lines = [line for line in journal.read_bytes().splitlines(True) if b'"test"' not in line]
    journal.write_bytes(b"".join(lines))
    with pytest.raises(UserError, match="was not trained to its end"):
        rerun(first["NAME"], global_config)


@pytest.mark.parametrize("scheduler", [OneCycleLR, pytest.param(None, marks=pytest.mark.slow)])
def test_a_run_prolonged_under_a_schedule_cannot_be_repeated(
    datasets, tiny_config, global_config, scheduler, capsys
):
    config = tiny_config | {"SCHEDULER": scheduler, "EPOCHS": 1}
    first = train(*datasets, config, global_config)
    assert rows_of(global_config)[0]["RERUNNABLE"] == "yes"
    train(*datasets, config | {"RESUME": first.name, "EPOCHS": 2}, global_config)
    rerunnable = rows_of(global_config)[0]["RERUNNABLE"]
    capsys.readouterr()
    again = rerun(first.name, global_config)
    if scheduler is None:
        assert rerunnable == "yes" and again.identical is True
    else:
        assert rerunnable.startswith("no: it was interrupted and ") and rerunnable.endswith("EPOCHS")
        assert "Not as it was: the run itself: it was interrupted and " in capsys.readouterr().out


def test_differences_of_code_versions_and_machine_are_named():
    before = {"git_commit": "a", "git_diff": "", "threads": 2, "python": "3.11.7"}
    before |= {"cpu_capability": "AVX512", "device": "cpu", "precision": "fp32", "data": {"a": "1", "b": "2"}}
    before |= {"packages": {"torch": "2.13.0"}}
    assert find_differences(before, dict(before)) == []
    now = before | {"git_commit": "b", "git_diff": "+1", "threads": 4, "packages": {}, "data": {"a": "1"}}
    assert find_differences(before, now | {"device": "cuda:0"}) == [
        "code (commit): a then, b now",
        "code (changes since the commit): not what they were",
        "number of threads: 2 then, 4 now",
        "device: cpu then, cuda:0 now",
        "torch: 2.13.0 then, None now",
        "data: 1 files are not what they were, such as b",
    ]


def commit(folder: Path) -> None:
    """Make a repository of a folder."""
    author = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    for command in (["init", "-q"], ["add", "-A"], [*author, "commit", "-qm", "first"]):
        subprocess.run(["git", *command], cwd=folder, check=True)


def test_code_is_described_by_commit_and_changes(tmp_path):
    device = torch.device("cpu")
    assert describe_environment(tmp_path, device)["git_commit"] is None
    (tmp_path / "code.py").write_text("a = 1\n")
    commit(tmp_path)
    before = describe_environment(tmp_path, device)
    assert len(before["git_commit"]) == 40 and before["git_diff"] == "" and "torch" in before["packages"]
    (tmp_path / "code.py").write_text("a = 2\n")
    after = describe_environment(tmp_path, device)
    assert "+a = 2" in after["git_diff"] and after["git_changed_files"] == [" M code.py"]
    assert find_differences(before, after) == ["code (changes since the commit): not what they were"]


def describe(folder):
    return describe_environment(folder, torch.device("cpu"))


def test_what_is_in_no_commit_is_recorded_and_can_be_restored(tmp_path):
    folder, clone = tmp_path / "code", tmp_path / "clone"
    (folder / "package").mkdir(parents=True)
    texts = {
        "a.py": "a = 1\n" * 30,
        "package/b.py": "b = 'ä'\r\n",
        "gone.txt": "x\n",
        "end.txt": "no newline",
    }
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode())
    commit(folder)
    subprocess.run(["git", "clone", "-q", folder, clone], check=True)
    (folder / "a.py").write_text("a = 0\n" + "a = 1\n" * 30 + "\n \n")
    (folder / "package" / "b.py").write_bytes("b = 'ö'\r\n".encode())
    (folder / "end.txt").write_text("still none")
    (folder / "gone.txt").unlink()
    (folder / "package" / "new one.py").write_bytes("c = 'é'\r\n".encode())
    found = describe(folder)
    assert found["unrecorded_files"] == []
    subprocess.run(["git", "apply"], cwd=clone, input=found["git_diff"].encode(), check=True)
    for name, new in found["untracked_files"].items():
        (clone / name).write_bytes(new["text"].encode())
    kept = [sorted(file for file in one.rglob("*") if ".git" not in file.parts) for one in (folder, clone)]
    assert [one.relative_to(folder) for one in kept[0]] == [one.relative_to(clone) for one in kept[1]]
    for one, other in zip(*kept, strict=True):
        assert one.is_dir() or one.read_bytes() == other.read_bytes()
    (folder / "package" / "new one.py").write_text("c = 2")
    new_files = "code (files that are in no commit): not what they were"
    assert find_differences(found, describe(folder)) == [new_files]


def test_what_is_not_recorded_is_named(tmp_path):
    assert describe(tmp_path)["unrecorded_files"] == ["all: the project is in no commit of git"]
    secret = ["PASSWORD = '''", *["xyz"] * 10, "canary", *["xyz"] * 10, "'''", ""]
    (tmp_path / ".gitignore").write_text("ignored\n")
    (tmp_path / "changed.bin").write_bytes(b"\0")
    (tmp_path / "latin.txt").write_bytes(b"a\n")
    (tmp_path / "keys.py").write_text("\n".join(secret).replace("canary", "before"))
    commit(tmp_path)
    (tmp_path / "keys.py").write_text("\n".join(secret))
    contents = {
        "changed.bin": b"\0\1",
        "latin.txt": b"\xe4\n",
        "a.npy": b"\0\1",
        "big.py": b"x = 1\n" * 40_000,
    }
    contents |= {".env": b"A=canary", "ignored": b"\0", "login.sh": b"export TOKEN=canary\ntrue\n"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "link").symlink_to("/etc/passwd")
    found = describe(tmp_path)
    assert sorted(found["unrecorded_files"]) == [
        ".env (its name is that of secrets)",
        "a.npy (no text)",
        "big.py (large)",
        "changed.bin (binary, large, not in UTF-8, or another repository)",
        "keys.py (8 lines that look like secrets)",
        "latin.txt (binary, large, not in UTF-8, or another repository)",
        "link (no text)",
        "login.sh (1 lines that look like secrets)",
    ]
    assert found["untracked_files"].keys() == {"login.sh"}
    assert found["untracked_files"]["login.sh"]["text"].endswith("\ntrue\n")
    assert "canary" not in json.dumps(found)


def test_many_files_in_no_commit_take_no_time(tmp_path):
    (tmp_path / "a.py").write_text("a = 1\n")
    commit(tmp_path)
    for number in range(3_000):
        (tmp_path / f"{number}.txt").write_text("1 0.5 0.5 0.1 0.1\n")
    start = time.monotonic()
    found = describe(tmp_path)
    assert len(found["untracked_files"]) == 1_000 and found["unrecorded_files"] == ["2000 more (too many)"]
    assert time.monotonic() - start < 5


class UnknownData(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.full((3, 16, 16), index / 8), torch.zeros(16, 16, dtype=torch.long)


def test_the_row_has_a_digest_of_the_data_or_says_that_there_is_none(
    first, datasets, tiny_config, global_config
):
    assert len(first["DATA_DIGEST"]) == len(first["BEST_DIGEST"]) == 64
    mixed = torch.utils.data.ConcatDataset([datasets[0], UnknownData()])
    config = tiny_config | {"EPOCHS": 1, "REQUIRE_RERUNNABLE": False, "NORMALIZE": False}
    for train_set, test_set, which in (
        (UnknownData(), UnknownData(), "train, test"),
        (mixed, datasets[1], "train"),
    ):
        train(train_set, test_set, config, global_config)
        digest = rows_of(global_config)[-1]["DATA_DIGEST"]
        assert digest == f"no: the {which} data has no hash, so a change would not be noticed"


def test_in_a_fresh_process_and_in_a_fresh_clone(first, global_config, tmp_path):
    code, clone = tmp_path / "code", tmp_path / "clone"
    code.mkdir()
    for name in (PACKAGE, "dida_core", "train.py", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, code / name)
    commit(code)
    subprocess.run(["git", "clone", "-q", code, clone], check=True)
    variables = os.environ | {"PYTHONPATH": str(clone), "OMP_NUM_THREADS": "1"}
    variables |= {key: global_config[key] for key in ("LOG_DIR", "WEIGHT_DIR")}
    command = [sys.executable, "train.py", "--rerun", first["NAME"]]
    done = subprocess.run(command, cwd=clone, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"\nidentical: the weights are those of {first['NAME']}" in done.stdout
    changed = [line for line in done.stdout.splitlines() if line.startswith("Not as it was")]
    assert all("code (" in line for line in changed)
    again = rows_of(global_config)[-1]["NAME"]
    environment = json.loads((Path(global_config["LOG_DIR"]) / again / "environment.json").read_text())
    assert environment["git_diff"] == "" and len(environment["git_commit"]) == 40
