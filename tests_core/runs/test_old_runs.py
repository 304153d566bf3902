"""Runs made by version 0.1 (version_0_1/make_runs.py): listed, predicted with, resumed and rerun."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers import events_of, run_script

OLD = Path(__file__).parents[1] / "version_0_1" / "runs"
NAMES = {
    name: f"2026-11-01_12-00-00_{name}"
    for name in (
        "finished",
        "own-loss",
        "scenes",
        "killed-pytorch_training",
        "killed-fastai_training",
        "whole-pytorch_training",
        "whole-fastai_training",
    )
}


@pytest.fixture
def old(tmp_path, monkeypatch) -> Path:
    """A project's folder as version 0.1 left it, and the working directory."""
    folder = tmp_path / "old"
    shutil.copytree(OLD, folder)
    monkeypatch.chdir(folder)
    torch.set_num_threads(1)
    return folder


def is_same_machine(run_dir: Path) -> bool:
    """Tell whether a training ends with the same bits here, as far as the record tells."""
    environment = json.loads((run_dir / "environment.json").read_text())
    here = torch.__version__, torch.backends.cpu.get_cpu_capability()
    return (environment["packages"]["torch"], environment["cpu_capability"]) == here


def test_they_are_listed_and_shown(old):
    listed = json.loads(run_script("runs.py", "list", "--json", root=old).stdout)
    assert sorted(row["NAME"] for row in listed) == sorted(NAMES.values())
    states = {row["NAME"]: row["STATUS"] for row in listed}
    assert {name for name, state in states.items() if state == "killed"} == {
        NAMES["killed-pytorch_training"],
        NAMES["killed-fastai_training"],
    }
    assert listed[0]["__COMMENT"] == "made by version 0.1" and 0 < listed[0]["test.f1"] <= 1
    assert listed[0]["RERUNNABLE"] == "yes"
    shown = run_script("runs.py", "show", "1", root=old)
    assert shown.returncode == 0 and NAMES["finished"] in shown.stdout
    compared = run_script("runs.py", "compare", "1", "2", root=old)
    assert compared.returncode == 0 and "ignite_training" in compared.stdout


@pytest.mark.parametrize("name", ["finished", "own-loss", "killed-pytorch_training"])
def test_they_predict(old, name):
    done = run_script("run_prediction.py", NAMES[name], "-i", "data/test/x", "-o", "maps", root=old)
    assert done.returncode == 0, done.stderr
    maps = sorted(Path("maps").glob("*.npy"))
    assert len(maps) == 2
    assert all(np.load(file).shape[:2] == (16, 16) for file in maps)


@pytest.mark.parametrize("routine", ["pytorch_training", "fastai_training"])
def test_a_killed_one_resumes_and_ends_as_if_it_had_not_been_killed(old, routine):
    pytest.importorskip(routine.partition("_")[0].replace("pytorch", "torch"))
    name, whole = NAMES[f"killed-{routine}"], NAMES[f"whole-{routine}"]
    done = run_script("train.py", "--resume", name, root=old)
    assert done.returncode == 0, done.stderr
    (end,), (expected,) = (events_of(old / "logs" / one, "test") for one in (name, whole))
    assert end["step"] == expected["step"] == 16
    if is_same_machine(old / "logs" / name):
        assert end["digest"] == expected["digest"]
    rows = json.loads(run_script("runs.py", "list", "--json", root=old).stdout)
    row = next(row for row in rows if row["NAME"] == name)
    assert (row["STATUS"], row["RERUNNABLE"]) == ("finished", "yes")


@pytest.mark.parametrize("name", ["finished", "own-loss"])
def test_they_are_rerun_to_the_same_weights(old, name):
    if name == "own-loss":
        pytest.importorskip("ignite")
    done = run_script("train.py", "--rerun", NAMES[name], root=old)
    if is_same_machine(old / "logs" / NAMES[name]):
        assert done.returncode == 0, done.stderr
        assert "identical: the weights are those of" in done.stdout
    else:
        assert "identical" in done.stdout


@pytest.mark.slow  # the scenes are made first
def test_a_run_on_the_scenes_is_rerun(old):
    test_they_are_rerun_to_the_same_weights(old, "scenes")
    (again,) = (
        row
        for row in json.loads(run_script("runs.py", "list", "--json", root=old).stdout)
        if row.get("RERUN_OF") == NAMES["scenes"]
    )
    assert again["DATASET_CONFIG.train.split"] == "train"
