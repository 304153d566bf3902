"""The search script, run as a user runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dida_tools.utils.logging import read_log

ROOT = Path(__file__).resolve().parents[2]
SPACE = """search_space = {
    "OPTIMIZER_CONFIG.lr": log_uniform(1e-3, 1e-1),
    "OPTIMIZER": choice(torch.optim.AdamW, torch.optim.SGD),
    "MODEL_CONFIG.dropout": uniform(0.0, 0.4),
}
"""
TINY = ("MODEL_CONFIG.bulk_ch=8", "MODEL_CONFIG.n_recursions=1", "DATASET_CONFIG.train.crop=16", "DEVICE=cpu")
TINY += ("DATASET_CONFIG.train.crops_per_image=1", "EPOCHS=2", "PRECISION=fp32")


def script(folder: Path, space: str = SPACE) -> Path:
    """The script with another space, as a user would edit it."""
    folder.mkdir(parents=True, exist_ok=True)
    text = (ROOT / "hyperparameter.py").read_text()
    start, end = text.index("search_space = {"), text.index("_NUM_SHOWN")
    file = folder / "hyperparameter.py"
    file.write_text(text[:start] + space + text[end:])
    return file


def start(project: Path, *arguments: object, space: str = SPACE) -> subprocess.Popen:
    environment = os.environ | {"ROOT_PATH": str(project), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("OPTUNA_STORAGE", None)
    command = [sys.executable, str(script(project, space)), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=project, env=environment, **pipes)


def run(project: Path, *arguments: object, code: int = 0, space: str = SPACE) -> tuple[str, str]:
    process = start(project, *arguments, space=space)
    out, err = process.communicate(timeout=500)
    assert process.returncode == code, out + err
    return out, err


def rows_of(project: Path) -> list[dict]:
    return read_log(project / "logs" / "experiments.csv")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("project")


@pytest.fixture(scope="module")
def searched(project, pairs_dir) -> str:
    """Three trials by two workers; what was printed."""
    return run(project, "--data", pairs_dir, *TINY, "--trials", 3, "--workers", 2)[0]


def test_a_search_leaves_rows_the_best_config_and_pictures(project, searched):
    rows = rows_of(project)
    assert [(row["STUDY"], row["STATUS"]) for row in rows] == [("search", "finished")] * 3
    assert {row["TRIAL"] for row in rows} == {0, 1, 2}
    best = max(rows, key=lambda row: row["validation.f1"])
    folder = project / "logs" / "search" / "search"
    saved = json.loads((folder / "best_config.json").read_text())
    assert (saved["run"], saved["trial"], saved["value"]) == (
        best["NAME"],
        best["TRIAL"],
        best["validation.f1"],
    )
    assert saved["config"]["OPTIMIZER_CONFIG"]["lr"] == best["OPTIMIZER_CONFIG.lr"]
    assert {"history.png", "slices.png"} <= {file.name for file in folder.iterdir()}
    assert f"f1 {best['validation.f1']:.4f}" in searched and "--train-best" in searched


def test_another_search_needs_another_name(project, searched, pairs_dir):
    _, err = run(project, "--data", pairs_dir, *TINY, "EPOCHS=3", "--trials", 4, code=1)
    assert "EPOCHS (was 2, is 3)" in err and "--study search-2" in err and "Traceback" not in err


@pytest.mark.slow
def test_the_best_config_is_trained_in_full(project, searched):
    best = max(rows_of(project), key=lambda row: row["validation.f1"])
    run(project, "--train-best", "EPOCHS=3")
    row = rows_of(project)[-1]
    assert (row["STATUS"], row["EPOCHS"], row["STUDY"], row["TRIAL"]) == (
        "finished",
        3,
        "search",
        best["TRIAL"],
    )
    keys = ("OPTIMIZER_CONFIG.lr", "OPTIMIZER", "MODEL_CONFIG.dropout", "MODEL_CONFIG.bulk_ch")
    assert {key: row[key] for key in keys} == {key: best[key] for key in keys}
    assert row["NAME"].endswith("_search-best")


def test_impossible_keys_are_refused_before_the_first_trial(tmp_path, pairs_dir):
    space = 'search_space = {"OPTIMIZER_CONFIG.lrr": uniform(0, 1), "EPOCH": choice(1, 2)}\n'
    _, err = run(tmp_path, "--data", pairs_dir, *TINY, "ACCUMULATE=0", code=1, space=space)
    assert "did you mean EPOCHS?" in err and "Traceback" not in err
    assert not list((tmp_path / "logs").glob("**/journal*"))


def test_ctrl_c_ends_cleanly_and_the_next_call_goes_on(tmp_path, pairs_dir):
    command = ("--data", pairs_dir, *TINY, "--trials", 1, "CHECKPOINT_SECONDS=0")
    process = start(tmp_path, *command, "EPOCHS=1000")
    deadline = time.monotonic() + 300
    while not list((tmp_path / "weights").glob("*/last-*.pt")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 75, out + err
    assert "The same command goes on" in out and "Traceback" not in err
    assert [row["STATUS"] for row in rows_of(tmp_path)] == ["preempted"]
    again = start(tmp_path, *command, "EPOCHS=1000")
    while "goes on after epoch" not in (tmp_path / "logs/search/search/worker-0.log").read_text():
        assert again.poll() is None and time.monotonic() < deadline + 300, again.communicate()
        time.sleep(0.05)
    again.send_signal(signal.SIGTERM)
    again.communicate(timeout=300)
    assert again.returncode == 75 and len(rows_of(tmp_path)) == 1
