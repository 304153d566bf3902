"""A run can be done again from its record, and the command proves that the weights are the same."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR

from dida_tools.config.errors import UserError
from dida_tools.config.project import project_of
from dida_tools.training.environment import find_differences
from dida_tools.training.pytorch_training import train
from dida_tools.utils.data import NpyDataset
from dida_tools.utils.data.build import build_datasets
from dida_tools.utils.logging import read_log
from dida_tools.utils.logging.runs import read_run_config

pytestmark = pytest.mark.usefixtures("quick")

ROOT = Path(__file__).resolve().parents[2]
TINY = ["EPOCHS=2", "MODEL_CONFIG.bulk_ch=8", "MODEL_CONFIG.n_recursions=1", "DEVICE=cpu", "PRECISION=fp32"]


def rows(global_config: dict) -> list[dict]:
    return read_log(Path(global_config["LOG_DIR"]) / "experiments.csv")


def rerun(name: str, global_config: dict, **changes):
    """As train.py --rerun does: everything comes from the record."""
    config = (
        read_run_config(Path(global_config["LOG_DIR"]) / name, project_of("dida_tools"))
        | {"RERUN_OF": name, "DATE": None}
        | changes
    )
    train_dataset, test_dataset, validation_dataset = build_datasets(config)
    return train(train_dataset, test_dataset, config, global_config, validation_dataset)


def test_a_run_done_again_has_identical_weights(datasets, tiny_config, global_config, capsys):
    first = train(*datasets, tiny_config, global_config)
    again = rerun(first.name, global_config)
    assert again.identical is True and again.digest == first.digest and again.name != first.name
    said = capsys.readouterr().out
    assert f"identical: the weights are those of {first.name}, bit for bit" in said
    assert "Not as it was" not in said
    row = rows(global_config)[-1]
    assert (row["RERUN_OF"], row["RERUN_IDENTICAL"]) == (first.name, True)


def test_what_differs_is_said_and_the_first_step_that_does(datasets, tiny_config, global_config, capsys):
    first = train(*datasets, tiny_config, global_config)
    again = rerun(first.name, global_config, SEED=1)
    assert again.identical is False
    assert "not identical: " in (said := capsys.readouterr().out)
    assert "the losses differ first in step 1" in said
    assert rows(global_config)[-1]["RERUN_IDENTICAL"] is False


def test_changed_data_is_said(pairs_dir, tiny_config, global_config, tmp_path, capsys):
    folder = shutil.copytree(pairs_dir, tmp_path / "pairs")
    sets = [NpyDataset(folder / part / "x", folder / part / "y") for part in ("train", "test")]
    first = train(*sets, tiny_config, global_config)
    image = folder / "train" / "x" / "image_03.npy"
    np.save(image, np.load(image) // 2)
    again = rerun(first.name, global_config)
    assert (
        "Not as it was: data: 1 files are not what they were, such as train/x/image_03.npy"
        in capsys.readouterr().out
    )
    assert again.identical is False


def test_a_run_that_was_not_finished_cannot_be_compared_with(datasets, tiny_config, global_config):
    first = train(*datasets, tiny_config, global_config)
    journal = first.log_dir / "journal.jsonl"
    journal.write_bytes(
        b"".join(line for line in journal.read_bytes().splitlines(True) if b'"test"' not in line)
    )
    with pytest.raises(UserError, match="was not trained to its end"):
        rerun(first.name, global_config)


def test_a_run_prolonged_under_a_schedule_says_that_it_cannot_be_done_again(
    datasets, tiny_config, global_config, capsys
):
    tiny_config["SCHEDULER"] = OneCycleLR
    first = train(*datasets, tiny_config, global_config)
    assert rows(global_config)[0]["RERUNNABLE"] == "yes"
    train(*datasets, tiny_config | {"RESUME": first.name, "EPOCHS": 3}, global_config)
    assert rows(global_config)[0]["RERUNNABLE"] == "no: it was interrupted and went on with another EPOCHS"
    rerun(first.name, global_config)
    assert "Not as it was: the run itself: it was interrupted and went on" in capsys.readouterr().out


def test_a_run_prolonged_without_a_schedule_can_be_done_again(datasets, tiny_config, global_config):
    first = train(*datasets, tiny_config, global_config)
    train(*datasets, tiny_config | {"RESUME": first.name, "EPOCHS": 3}, global_config)
    assert rows(global_config)[0]["RERUNNABLE"] == "yes"
    assert rerun(first.name, global_config).identical is True


def test_other_initial_weights_are_said(datasets, tiny_config, global_config, tmp_path, capsys):
    start = train(*datasets, tiny_config, global_config)
    file = shutil.copy(start.weights["best"], tmp_path / "start.pt")
    first = train(*datasets, tiny_config | {"INIT_WEIGHTS": str(file)}, global_config)
    shutil.copy(start.weights["last"], file)
    rerun(first.name, global_config)
    assert "files are not what they were, such as INIT_WEIGHTS" in capsys.readouterr().out


def test_differences_of_code_versions_and_machine_are_named():
    before = {
        "git_commit": "a",
        "git_diff": "",
        "threads": 2,
        "python": "3.11.7",
        "packages": {"torch": "2.13.0"},
    }
    before |= {
        "cpu_capability": "AVX512",
        "device": "cpu",
        "device_name": "x",
        "precision": "fp32",
        "data": {"a": "1"},
    }
    assert find_differences(before, dict(before)) == []
    now = before | {
        "git_commit": "b",
        "git_diff": "+1",
        "threads": 4,
        "packages": {"torch": "2.14.0"},
        "data": {},
    }
    text = "\n".join(find_differences(before, now))
    for part in (
        "code (commit): a then, b now",
        "changes since the commit",
        "threads: 2 then, 4 now",
        "torch: 2.13.0",
    ):
        assert part in text
    assert "data: 1 files" in text


def run(folder: Path, *command: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "ROOT_PATH")}
    environment |= {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_in_a_fresh_process_and_in_a_fresh_clone(tmp_path, pairs_dir):
    first, clone = tmp_path / "first", tmp_path / "clone"
    first.mkdir()
    for name in ("dida_tools", "train.py", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, first / name)
    (first / ".gitignore").write_text("logs/\nweights/\n__pycache__/\n")
    commit = ["-c", "user.name=test", "-c", "user.email=test@example.org", "commit", "-qm", "first"]
    for command in (["init", "-q"], ["add", "-A"], commit):
        subprocess.run(["git", *command], cwd=first, check=True)
    trained = run(first, "train.py", "--data", str(pairs_dir), *TINY)
    assert trained.returncode == 0, trained.stderr
    environment = json.loads(next(first.glob("logs/*/environment.json")).read_text())
    assert environment["git_diff"] == "" and len(environment["git_commit"]) == 40
    again = run(first, "train.py", "--rerun", "1")
    assert again.returncode == 0, again.stderr
    assert "\nidentical: " in again.stdout and "Not as it was" not in again.stdout

    subprocess.run(["git", "clone", "-q", first, clone], check=True)
    logs = {"LOG_DIR": str(first / "logs"), "WEIGHT_DIR": str(first / "weights")}
    cloned = run(clone, "train.py", "--rerun", "1", **logs)
    assert cloned.returncode == 0, cloned.stderr
    assert "\nidentical: " in cloned.stdout and "Not as it was" not in cloned.stdout

    model = clone / "dida_tools" / "layers" / "conv.py"
    model.write_text(model.read_text() + "\n# changed\n")
    changed = run(clone, "train.py", "--rerun", "1", **logs)
    assert "Not as it was: code (changes since the commit)" in changed.stdout
    refused = run(clone, "train.py", "--rerun", "1", "EPOCHS=3", **logs)
    assert refused.returncode == 2 and "leave KEY=VALUE out" in refused.stderr


@pytest.mark.slow
def test_a_rerun_that_is_not_identical_ends_with_an_error(tmp_path, pairs_dir):
    variables = {"ROOT_PATH": str(tmp_path)}
    command = ("train.py", "--data", str(pairs_dir), *TINY)
    trained = run(ROOT, *command, **variables)
    assert trained.returncode == 0, trained.stderr
    journal = next(tmp_path.glob("logs/*/journal.jsonl"))
    from dida_tools.utils.logging.journal import Journal

    log = Journal(journal)
    log.write({**next(event for event in log.events if event["event"] == "test"), "digest": "0" * 64})
    log.close()
    again = run(ROOT, "train.py", "--rerun", "latest", **variables)
    assert again.returncode == 1 and "not identical: " in again.stdout
    assert "although the losses of all steps are the same" in again.stdout


def test_the_default_generators_do_not_matter(datasets, tiny_config, global_config):
    first = train(*datasets, tiny_config, global_config)
    torch.manual_seed(99)
    np.random.seed(99)
    assert rerun(first.name, global_config).identical is True
