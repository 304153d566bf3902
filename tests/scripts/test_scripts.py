"""The scripts, run as a user runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dida_tools.utils.logging import read_log

ROOT = Path(__file__).resolve().parents[2]
QUICK = (
    "MODEL_CONFIG.bulk_ch=8",
    "MODEL_CONFIG.n_recursions=1",
    "EPOCHS=1",
    "DATASET_CONFIG.train.crops_per_image=1",
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("project")


def run(project: Path, *command: object, ok: bool = True) -> subprocess.CompletedProcess:
    environment = os.environ | {"ROOT_PATH": str(project), "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (answer.returncode == 0) == ok, answer.stdout + answer.stderr
    return answer


@pytest.fixture(scope="module")
def trained(project: Path) -> str:
    """A run on the built-in scenes; what it printed."""
    return run(project, "train.py", *QUICK, "SESSION_NAME=first run").stdout


def test_training_says_what_was_reached_and_where_everything_lies(project, trained):
    row = read_log(project / "logs" / "experiments.csv")[0]
    assert row["STATUS"] == "finished"
    assert row["NAME"].endswith("_first-run")
    assert f"f1 {row['test.f1']:.4f}" in trained
    paths = [
        line.split()[1]
        for line in trained.splitlines()
        if line.startswith(("  weights", "  log", "  tr", "  pic"))
    ]
    assert len(paths) == 4
    assert all((ROOT / path).exists() for path in paths)
    assert f"python run_prediction.py {row['NAME']} -i" in trained


@pytest.mark.parametrize("which", ["latest", "best", "first-run"])
def test_a_tracked_run_predicts_by_its_name(project, trained, which):
    images = sorted((project / "data" / "scenes-1" / "test" / "x").iterdir())
    out_dir = project / f"predicted-{which}"
    run(project, "run_prediction.py", which, "-i", images[0], images[1], "-o", out_dir)
    for image in images[:2]:
        prediction = np.load(out_dir / image.name)
        assert prediction.shape == np.load(image, mmap_mode="r").shape[:2]
        assert prediction.dtype == np.uint8
        assert prediction.max() < 5


def test_the_explicit_config_predicts_the_same(project, trained):
    images = project / "data" / "scenes-1" / "test" / "x"
    name = read_log(project / "logs" / "experiments.csv")[0]["NAME"]
    run(project, "run_prediction.py", name, "-i", images, "-o", project / "a", "--output", "probabilities")
    script = (
        (ROOT / "predict.py")
        .read_text()
        .replace('"bulk_ch": 16, "n_recursions": 3', '"bulk_ch": 8, "n_recursions": 1')
    )
    edited = project / "my_predict.py"
    edited.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n" + script.replace('"classes",', '"probabilities",')
    )
    run(
        project,
        edited,
        "-i",
        images,
        "-o",
        project / "b",
        "--weights",
        project / "weights" / name / "best.pt",
    )
    for file in images.iterdir():
        first, second = (np.load(project / folder / file.name) for folder in "ab")
        assert np.array_equal(first, second, equal_nan=True) and not np.isnan(first).all()


def test_a_run_is_prolonged_by_name(project, trained):
    name = run(project, "train.py", *QUICK, "SESSION_NAME=longer").stdout.split(":")[0].split()[-1]
    printed = run(project, "train.py", "--resume", name, "EPOCHS=2").stdout
    assert "goes on after epoch 1" in printed
    row = next(row for row in read_log(project / "logs" / "experiments.csv") if row["NAME"] == name)
    assert (row["EPOCH"], row["EPOCHS"], row["STATUS"]) == (2, 2, "finished")


def test_ones_own_folder_is_enough(project, pairs_dir):
    printed = run(
        project, "train.py", "--data", pairs_dir, *QUICK, "SESSION_NAME=own", "DATASET_CONFIG.train.crop=16"
    )
    assert "test set" in printed.stdout
    row = read_log(project / "logs" / "experiments.csv")[-1]
    assert (row["MODEL_CONFIG.ch_in"], row["MODEL_CONFIG.ch_out"]) == (3, 3)
    record = json.loads((project / "logs" / row["NAME"] / "config.json").read_text())
    assert record["config"]["DATASET_CONFIG"]["train"]["x_dir"] == str(pairs_dir / "train" / "x")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["train.py", "EPOCH=3"], "did you mean EPOCHS?"),
        (["train.py", "DEVICE=cuda:99"], "DEVICE is 'cuda:99'"),
        (["train.py", "--data", "nowhere"], "holds no data"),
        (["train.py", "--routine", "tensorflow"], "tensorflow"),
        (["train.py", "--variant", "huge"], "huge"),
        (["train.py", "--resume", "nonsense"], "nonsense"),
        (["run_prediction.py", "nonsense", "-i", "x.npy", "-o", "out"], "nonsense"),
        (["predict.py", "-i", "x.npy", "-o", "out"], "there is no such weights file"),
    ],
)
def test_mistakes_are_answered_in_a_sentence_and_without_a_traceback(project, trained, command, message):
    answer = run(project, *command, ok=False)
    assert message in answer.stderr
    assert "Traceback" not in answer.stderr


def test_all_mistakes_of_a_command_line_are_told_at_once(project):
    command = [
        "train.py",
        "EPOCH=3",
        "MODEL_CONFIG.dropot=0.1",
        "METRICS.f=nonsense",
        "ACCUMULATE=0",
        "CLIP_NORM",
    ]
    told = run(project, *command, ok=False).stderr
    assert all(text in told for text in ("EPOCHS?", "dropout?", "nonsense", "ACCUMULATE is 0", "'CLIP_NORM'"))
    assert "the config has 5 problems" in told


def test_warnings_can_be_switched_off(project, tmp_path):
    script = tmp_path / "warns.py"
    script.write_text(
        f"import sys, warnings\nsys.path.insert(0, {str(ROOT)!r})\nimport train\n"
        "train.build_datasets = lambda config: warnings.warn('a strange warning')\n"
        "try:\n    train.main()\nexcept TypeError:\n    pass\n"
    )
    assert "a strange warning" in run(project, script).stderr
    assert "a strange warning" not in run(project, script, "-w").stderr


def test_help_teaches(project):
    for script in ("train.py", "predict.py", "run_prediction.py"):
        assert "python " + script in run(project, script, "--help").stdout
