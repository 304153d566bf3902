"""The command line over runs."""

import io
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from dida_core.storage.checkpoint import save_checkpoint
from dida_core.storage.locks import is_locked, locked

from dida_tools.utils.logging import read_log, write_log

from tests.helpers import begin_run, folder_of, run_script, write_run

NAMES = ["2026-01-01_roads", "2026-01-02_roads", "2026-01-02_roads-2"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Three finished runs; the second has another learning rate, and other weights."""
    for number, (name, rate) in enumerate(zip(NAMES, (1e-2, 1e-3, 1e-2), strict=True)):
        results = {"validation.f1": 0.5, "test.f1": 0.9 - rate, "test.loss": rate}
        config = {"MODEL_CONFIG": {"ch_in": 3}, "OPTIMIZER_CONFIG": {"lr": rate}}
        write_run(
            folder_of(tmp_path, "LOG_DIR"), name, results, hours_ago=9 - number, digest=str(rate), **config
        )
        environment = {
            "packages": {"torch": "2.13"},
            "cpu_capability": "AVX2",
            "arguments": ["train.py", "x"],
        }
        (folder_of(tmp_path, "LOG_DIR") / name / "environment.json").write_text(json.dumps(environment))
        save_checkpoint(folder_of(tmp_path, "WEIGHT_DIR") / name, 4, {"x": 1})
        (folder_of(tmp_path, "WEIGHT_DIR") / name / "best.pt").touch()
    return tmp_path


def answer(project: Path, *arguments: str, code: int = 0, columns: int = 120, given: Any = "") -> str:
    done = run_script("runs.py", *arguments, root=project, given=given, COLUMNS=str(columns))
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    return done.stderr if code and done.stderr else done.stdout


def test_the_table_of_all_runs_fits_the_terminal_and_ends_with_the_best(project: Path) -> None:
    for columns in (60, 80, 120, 300):
        lines = answer(project, "list", columns=columns).splitlines()
        assert len(lines) == 4 and max(map(len, lines)) <= columns
        assert columns < 120 or ("test.f1" in lines[0] and NAMES[0] in lines[1])

    wide = answer(project, "list", "--columns", "OPTIMIZER_CONFIG.lr,RAN_ON,MODEL_CONFIG.ch_in", columns=80)
    assert max(map(len, wide.splitlines())) <= 80 and "finished" not in wide.replace(" finished ", "")
    for line, rate in zip(wide.splitlines()[1:], ("0.01", "0.001", "0.01"), strict=True):
        assert f" {rate} " in line and not re.search(r"fi\S*…|…\S*ed\b", line)

    def values(*arguments: str) -> list[float]:
        return [row[arguments[1]] for row in json.loads(answer(project, "list", *arguments, "--json"))]

    assert values("--sort", "test.f1") == [0.89, 0.89, 0.899]
    assert values("--sort", "test.loss") == [0.01, 0.01, 0.001]
    assert values("--sort", "test.f1", "-n", "1") == [0.899]
    refused = answer(project, "list", "--sort", "test.f2", code=1)
    assert "there is no column 'test.f2'; there are validation.f1, test.f1, test.loss." in refused


def test_a_run_is_shown_with_results_config_environment_and_places(project: Path) -> None:
    text = answer(project, "show", NAMES[1])
    parts = (NAMES[1], "test.f1", "OPTIMIZER_CONFIG.lr", "0.001", "cpu_capability", "train.py x")
    assert all(part in text for part in (*parts, str(folder_of(project, "WEIGHT_DIR"))))
    found = json.loads(answer(project, "show", "2", "--json"))
    assert found["row"]["NAME"] == NAMES[1] and "torch" in found["environment"]["packages"]


def test_comparing_shows_what_differs(project: Path) -> None:
    text = answer(project, "compare", "1", "2")
    assert "OPTIMIZER_CONFIG.lr" in text and "MODEL_CONFIG.ch_in" not in text and "identical" not in text
    assert "MODEL_CONFIG.ch_in" in answer(project, "compare", "1", "2", "--all")
    compared = json.loads(answer(project, "compare", "1", "2", "--json"))
    assert compared["values"]["OPTIMIZER_CONFIG.lr"] == [0.01, 0.001] and compared["runs"] == NAMES[:2]
    assert "The weights are identical, bit for bit." in answer(project, "compare", "1", "3")


def test_runs_of_other_classes_are_compared_without_what_one_of_them_cannot_have(project: Path) -> None:
    for number, (name, argument) in enumerate({"A": "x_dir", "B": "split"}.items()):
        config = {"DATASET": name, "DATASET_CONFIG": {"train": {argument: "x", "crop": 16 * number}}}
        write_run(
            folder_of(project, "LOG_DIR"), f"of-{name}", {f"test.f1.{name}": 0.5, "test.f1": number}, **config
        )
    keys = json.loads(answer(project, "compare", "of-A", "of-B", "--json"))["values"]
    assert list(keys) == ["DATASET", "DATASET_CONFIG.train.crop", "test.f1"]
    assert "split" in answer(project, "compare", "of-A", "of-B", "--all")


def test_paths_of_weights(project: Path) -> None:
    folder = folder_of(project, "WEIGHT_DIR") / NAMES[0]
    assert answer(project, "weights", NAMES[0]).strip() == str(folder / "best.pt")
    assert answer(project, "weights", "1", "--last").strip() == str(folder / "last-00000004.pt")
    shutil.rmtree(folder)
    assert "has no weights yet" in answer(project, "weights", "1", code=1)


@pytest.mark.parametrize("command", ["show", "compare", "weights", "delete"])
def test_unknown_runs_are_refused(project: Path, tmp_path_factory: Any, command: str) -> None:
    for name in (
        "nonsense",
        ".",
        "..",
        f"../{folder_of(project, 'LOG_DIR').name}",
        str(folder_of(project, "LOG_DIR")),
    ):
        assert f"no run is called {name!r}" in answer(project, command, name, code=1)
    assert set(project.iterdir()) == {folder_of(project, key) for key in ("LOG_DIR", "WEIGHT_DIR")}
    empty = tmp_path_factory.mktemp("empty")
    assert "python train.py" in answer(empty, "list")
    answer(empty, command, "latest", code=1)
    assert not folder_of(empty, "LOG_DIR").exists()


def test_the_view_is_brought_up_to_date_and_keeps_what_was_added(project: Path) -> None:
    log = folder_of(project, "LOG_DIR") / "experiments.csv"
    answer(project, "list")
    assert [row["STATUS"] for row in read_log(log)] == ["finished"] * 3
    write_log(log, {"NAME": NAMES[1], "remark": "for Ada", "test.f1": 7})  # a result is not for hands
    begin_run(folder_of(project, "LOG_DIR"), NAMES[0]).close()  # resumed, and killed
    text = answer(project, "list", "--columns", "remark", columns=300)
    assert "for Ada" in text and "killed" in text
    rows = {row["NAME"]: row for row in read_log(log)}
    assert rows[NAMES[0]]["STATUS"] == "killed" and rows[NAMES[1]]["remark"] == "for Ada"
    assert rows[NAMES[1]]["test.f1"] == 0.899
    before = read_log(log)
    log.write_text("nonsense")
    assert "3 runs" in answer(project, "rebuild")
    assert read_log(log) == [{key: row[key] for key in row if key != "remark"} for row in before]
    assert log.with_name("experiments.csv.old").read_text() == "nonsense"
    log.unlink()
    log.mkdir()  # it cannot be written
    assert NAMES[2] in answer(project, "list")


def test_deleting_asks_and_removes_everything(project: Path) -> None:
    answer(project, "list")
    folders = [folder_of(project, "LOG_DIR") / NAMES[2], folder_of(project, "WEIGHT_DIR") / NAMES[2]]
    answer(project, "delete", "latest", code=1)  # a whole name, lest the wrong one goes
    for given in ("", "n\n"):
        assert "Nothing was removed." in answer(project, "delete", NAMES[2], code=1, given=given)
    with locked(folders[0] / ".lock"):
        assert "is being trained" in answer(project, "delete", NAMES[2], "--yes", code=1)
    seen = []

    class Asked(io.StringIO):
        def readline(self, *_: Any) -> str:
            seen.append(is_locked(folders[0] / ".lock"))
            return "n\n"

    answer(project, "delete", NAMES[2], code=1, given=Asked())
    assert seen == [True] and all(folder.is_dir() for folder in folders)  # nobody resumes it meanwhile
    os.replace(folders[1], folders[1].with_name(f".deleted-{NAMES[2]}"))  # of a deletion that was killed
    folders[1].mkdir()
    answer(project, "delete", NAMES[2], given="y\n")
    assert sorted(os.listdir(folder_of(project, "WEIGHT_DIR"))) == NAMES[:2]
    assert [row["NAME"] for row in read_log(folder_of(project, "LOG_DIR") / "experiments.csv")] == NAMES[:2]
    assert NAMES[2] not in answer(project, "list")


def test_a_row_without_a_run_can_be_removed_and_names_no_other_folder(project: Path) -> None:
    log = folder_of(project, "LOG_DIR") / "experiments.csv"
    for name in ("gone", "..", "."):
        write_log(log, {"NAME": name})
    answer(project, "delete", "gone", "..", ".", "--yes")
    assert read_log(log) == [] and set(project.iterdir()) == {
        folder_of(project, key) for key in ("LOG_DIR", "WEIGHT_DIR")
    }
    assert sorted(path.name for path in (folder_of(project, "LOG_DIR")).iterdir() if path.is_dir()) == NAMES
