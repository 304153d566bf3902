"""The search script, run as a user runs it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT, folder_of, global_config_of, rows_of, run_script, wait_until

LR, DROPOUT = '"OPTIMIZER_CONFIG.lr": log_uniform(1e-3, 1e-1)', '"MODEL_CONFIG.dropout": uniform(0.0, 0.4)'
SPACE = "{" + LR + ', "OPTIMIZER": choice(torch.optim.AdamW, torch.optim.SGD), ' + DROPOUT + "}"
TINY = ("MODEL_CONFIG.bulk_ch=8", "MODEL_CONFIG.n_recursions=1", "DATASET_CONFIG.train.crop=16", "DEVICE=cpu")
TINY += ("DATASET_CONFIG.train.crops_per_image=1", "EPOCHS=2", "PRECISION=fp32")


def script(folder: Path, space: str = SPACE) -> Path:
    """The script with another space, as a user would edit it."""
    folder.mkdir(parents=True, exist_ok=True)
    text = (ROOT / "hyperparameter.py").read_text()
    start = text.index("    return {  # <- your space here")
    end = text.index("    }\n", start) + len("    }\n")
    file = folder / "hyperparameter.py"
    file.write_text(f"{text[:start]}    return {space}\n{text[end:]}")
    return file


def run(project: Path, *arguments: object, code: int = 0, space: str = SPACE) -> tuple[str, str]:
    variables = {"OPTUNA_STORAGE": "", "ROOT_PATH": str(project), "PYTHONPATH": str(ROOT)}  # of its workers
    done = run_script(str(script(project, space)), *arguments, root=project, **variables)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


def start(project: Path, *arguments: object) -> subprocess.Popen:
    """The same in a process of its own."""
    environment = os.environ | {"ROOT_PATH": str(project), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("OPTUNA_STORAGE", None)
    command = [sys.executable, str(script(project)), *map(str, arguments)]
    output = open(project / "output.txt", "a")  # noqa: SIM115
    return subprocess.Popen(command, cwd=project, env=environment, stdout=output, stderr=output)


def rows(project: Path) -> list[dict]:
    return rows_of(global_config_of(project))


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("project")


@pytest.fixture(scope="module")
def searched(project, pairs_dir) -> str:
    """Three trials by two workers; what was printed."""
    return run(project, "--data", pairs_dir, *TINY, "--trials", 3, "--workers", 2)[0]


def test_a_search_by_two_workers_leaves_rows_the_best_config_and_pictures(project, searched):
    found = sorted((row["STUDY"], row["TRIAL"], row["STATUS"]) for row in rows(project))
    assert found == [("search", number, "finished") for number in range(3)]
    best = max(rows(project), key=lambda row: row["validation.f1"])
    folder = folder_of(project, "LOG_DIR") / "search" / "search"
    saved = json.loads((folder / "best_config.json").read_text())
    found = (best["NAME"], best["TRIAL"], best["validation.f1"])
    assert (saved["run"], saved["trial"], saved["value"]) == found
    assert saved["config"]["OPTIMIZER_CONFIG"]["lr"] == best["OPTIMIZER_CONFIG.lr"]
    assert {"history.png", "slices.png"} <= {file.name for file in folder.iterdir()}
    assert f"f1 {best['validation.f1']:.4f}" in searched and "--train-best" in searched


def test_another_search_needs_another_name(project, searched, pairs_dir):
    _, err = run(project, "--data", pairs_dir, *TINY, "EPOCHS=3", "--trials", 4, code=1)
    assert "EPOCHS (was 2, is 3)" in err and "--study search-2" in err


def test_the_best_config_is_trained_in_full(project, searched):
    best = max(rows(project), key=lambda row: row["validation.f1"])
    run(project, "--train-best", "EPOCHS=3")
    row = rows(project)[-1]
    keys = ("OPTIMIZER_CONFIG.lr", "OPTIMIZER", "MODEL_CONFIG.dropout", "MODEL_CONFIG.bulk_ch", "TRIAL")
    assert {key: row[key] for key in keys} == {key: best[key] for key in keys}
    assert (row["STATUS"], row["EPOCHS"], row["STUDY"]) == ("finished", 3, "search")
    assert row["SESSION_NAME"] == "search-best"


def test_impossible_keys_are_refused_before_the_first_trial(tmp_path, pairs_dir):
    space = '{"OPTIMIZER_CONFIG.lrr": uniform(0, 1), "EPOCH": choice(1, 2)}'
    _, err = run(tmp_path, "--data", pairs_dir, *TINY, "ACCUMULATE=0", code=1, space=space)
    assert "did you mean EPOCHS?" in err
    assert not list(folder_of(tmp_path, "LOG_DIR").glob("**/journal*"))


def test_usage_errors(tmp_path):
    for argument, told in (("--trials=0", "give 1 or more"), ("--what", "--what")):
        assert told in run(tmp_path, argument, code=2)[1]


def test_help_imports_neither_torch_nor_optuna():
    code = (
        "import runpy, sys; sys.argv = ['hyperparameter.py', '--help']\n"
        "try: runpy.run_path('hyperparameter.py', run_name='__main__')\n"
        "finally: assert not {'torch', 'optuna', 'numpy'} & set(sys.modules), sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "KEY=VALUE" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_ends_cleanly_and_the_next_call_resumes(tmp_path, pairs_dir, workers):
    command = ("--data", pairs_dir, *TINY, "--trials", workers, "--workers", workers, "CHECKPOINT_SECONDS=0")

    def output() -> str:
        files = [tmp_path / "output.txt", *folder_of(tmp_path, "LOG_DIR").glob("search/search/worker-*.log")]
        return "".join(file.read_text() for file in files)

    def saved() -> bool:
        return len(list(folder_of(tmp_path, "WEIGHT_DIR").glob("*/last-*.pt"))) >= workers

    for times, (condition, signum) in enumerate(
        [(saved, signal.SIGINT), (lambda: "resumes after epoch" in output(), signal.SIGTERM)]
    ):
        process = start(tmp_path, *command, "EPOCHS=1000")
        try:
            wait_until(lambda condition=condition, one=process: one.poll() is not None or condition(), 300)
            assert process.poll() is None, output()
            process.send_signal(signum)
            assert process.wait(300) == 75, output()
        finally:
            process.kill()
        assert output().count("The same command resumes") == times + 1 and "Traceback" not in output()
        assert [row["STATUS"] for row in rows(tmp_path)] == ["preempted"] * workers
