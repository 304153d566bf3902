"""The command line over runs."""

import io
import json
import os
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from dida_tools.config.config import global_config, make_global_config
from dida_tools.training.pytorch_training import train
from dida_tools.utils.data import NpyDataset
from dida_tools.utils.logging import read_log
from dida_tools.utils.logging.runs import is_in_training

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, pairs_dir) -> tuple[Path, list[str]]:
    """A folder with three runs, and their names."""
    from dida_tools.models import UNET
    from dida_tools.utils.loss import f1, multi_class_dice_ce_sum

    folder = tmp_path_factory.mktemp("project")
    sets = [NpyDataset(pairs_dir / part / "x", pairs_dir / part / "y") for part in ("train", "test")]
    config = {
        "MODEL": UNET,
        "MODEL_CONFIG": {"ch_in": 3, "ch_out": 3, "bulk_ch": 4, "n_recursions": 1},
        "EPOCHS": 1,
    }
    config |= {
        "OPTIMIZER": torch.optim.AdamW,
        "OPTIMIZER_CONFIG": {"lr": 1e-2},
        "LOSS": multi_class_dice_ce_sum,
    }
    config |= {"METRICS": {"f1": f1}, "MONITOR": "max f1", "DEVICE": "cpu", "PRECISION": "fp32"}
    variants = [{}, {"OPTIMIZER_CONFIG": {"lr": 1e-3}, "EPOCHS": 2}, {}]
    names = [train(*sets, config | changes, make_global_config(folder)).name for changes in variants]
    return folder, names


def run(
    folder: Path, *arguments: str, columns: int = 120, given: str | io.StringIO = ""
) -> subprocess.CompletedProcess:
    """Runs the script as Python would, but in this process, where everything is imported already."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        for key, value in make_global_config(folder).items():
            patch.setitem(global_config, key, value)
        patch.setenv("COLUMNS", str(columns))
        patch.setattr(sys, "argv", ["runs.py", *arguments])
        patch.setattr(sys, "stdin", io.StringIO(given) if isinstance(given, str) else given)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "runs.py"), run_name="__main__")
    return subprocess.CompletedProcess(arguments, ended.value.code or 0, out.getvalue(), err.getvalue())


def answer(folder: Path, *arguments: str, **options) -> str:
    done = run(folder, *arguments, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("columns", [60, 80, 120, 300])
def test_the_table_of_all_runs_fits_the_terminal(trained, columns):
    folder, names = trained
    lines = answer(folder, "list", columns=columns).splitlines()
    assert len(lines) == 4 and max(map(len, lines)) <= columns
    assert "test.f1" in lines[0] or columns < 120
    assert names[0] in lines[1] or columns < 120


def test_the_best_run_is_sorted_to_the_end(trained):
    folder, _ = trained
    rows = json.loads(answer(folder, "list", "--sort", "test.f1", "--json"))
    assert [row["test.f1"] for row in rows] == sorted(row["test.f1"] for row in rows)
    losses = [row["test.loss"] for row in json.loads(answer(folder, "list", "--sort", "test.loss", "--json"))]
    assert losses == sorted(losses, reverse=True)
    assert len(json.loads(answer(folder, "list", "-n", "2", "--json"))) == 2
    refused = run(folder, "list", "--sort", "test.f2")
    assert refused.returncode == 1 and "there is no column 'test.f2'" in refused.stderr


def test_a_run_is_shown_with_results_config_environment_and_places(trained):
    folder, names = trained
    text = answer(folder, "show", names[1])
    for part in (
        names[1],
        "test.f1",
        "OPTIMIZER_CONFIG.lr",
        "0.001",
        "cpu_capability",
        str(folder / "weights"),
    ):
        assert part in text
    shown = json.loads(answer(folder, "show", "2", "--json"))
    assert shown["row"]["NAME"] == names[1] and "torch" in shown["environment"]["packages"]


def test_comparing_shows_what_differs(trained):
    folder, names = trained
    text = answer(folder, "compare", "1", "2")
    assert "OPTIMIZER_CONFIG.lr" in text and "MODEL_CONFIG.ch_in" not in text
    assert "MODEL_CONFIG.ch_in" in answer(folder, "compare", "1", "2", "--all")
    compared = json.loads(answer(folder, "compare", "1", "2", "--json"))
    assert compared["values"]["OPTIMIZER_CONFIG.lr"] == [0.01, 0.001] and compared["runs"] == names[:2]
    assert "The weights are identical, bit for bit." in answer(folder, "compare", "1", "3")
    assert "identical" not in text


def test_paths_of_weights(trained):
    folder, names = trained
    assert answer(folder, "weights", names[0]).strip() == str(folder / "weights" / names[0] / "best.pt")
    last = Path(answer(folder, "weights", "1", "--last").strip())
    assert last.is_file() and last.name.startswith("last-")


def test_unknown_runs_are_refused_with_what_there_is(trained):
    folder, names = trained
    for command in ("show", "compare", "weights"):
        refused = run(folder, command, "nonsense")
        assert refused.returncode == 1 and names[-1] in refused.stderr and "Traceback" not in refused.stderr


def test_without_runs_it_says_how_to_train_one(tmp_path):
    assert "python train.py" in answer(tmp_path, "list")
    assert run(tmp_path, "show", "latest").returncode == 1


def test_help_shows_every_command_by_example():
    text = answer(Path("."), "--help")
    for command in ("list", "show", "compare", "weights", "delete", "rebuild"):
        assert f"python runs.py {command}" in text


def test_rebuilding(trained):
    folder, _ = trained
    log = folder / "logs" / "experiments.csv"
    before = read_log(log)
    log.write_text("nonsense")
    assert "3 runs" in answer(folder, "rebuild")
    assert read_log(log) == before
    assert log.with_name("experiments.csv.old").read_text() == "nonsense"


def test_deleting_asks_and_removes_everything(trained):
    folder, names = trained  # the last test of this module: it takes the last run away
    places = [folder / "logs" / names[2], folder / "weights" / names[2]]
    assert run(folder, "delete", "latest").returncode == 1  # a whole name, lest the wrong one goes
    for given in ("", "n\n"):
        kept = run(folder, "delete", names[2], given=given)
        assert kept.returncode == 1 and "Nothing was removed." in kept.stdout
        assert all(place.is_dir() for place in places)
    with FileLock(places[0] / ".lock"):
        assert "is being trained" in run(folder, "delete", names[2], "--yes").stderr
    seen = []

    class Asked(io.StringIO):
        def readline(self, *_) -> str:
            seen.append(is_in_training(places[0]))
            return "n\n"

    assert run(folder, "delete", names[2], given=Asked()).returncode == 1
    assert seen == [True]  # nobody goes on with it while the question stands
    os.replace(
        places[1], places[1].with_name(f".deleted-{names[2]}")
    )  # as a deletion that was killed leaves it
    assert run(folder, "delete", names[2], given="y\n").returncode == 0
    assert not any(file.name.startswith(".deleted") for place in places for file in place.parent.iterdir())
    assert not any(place.exists() for place in places)
    assert [row["NAME"] for row in read_log(folder / "logs" / "experiments.csv")] == names[:2]
    assert sorted(entry.name for entry in (folder / "logs").iterdir() if entry.is_dir()) == sorted(names[:2])
    assert names[2] not in answer(folder, "list")
