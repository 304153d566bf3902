"""The scripts, called as a user calls them; in this process, where everything is imported already."""

import importlib
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import dida_core.data.build as build
import numpy as np
import pytest
from dida_core.errors import UserError

from dida_tools.utils.logging import read_log

from tests.helpers import FIRST, ROOT, ROUTINES, folder_of, run_script

QUICK = ("MODEL_CONFIG.bulk_ch=8", "MODEL_CONFIG.n_recursions=1", "EPOCHS=1")
QUICK += ("DATASET_CONFIG.train.crops_per_image=1", "DATASET_CONFIG.train.crop=16")
OTHER = next((name for name in ROUTINES if name != FIRST), FIRST)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("project")


def run(project: Path, *command: object, code: int = 0) -> str:
    """What a script prints; errors, if it is to fail."""
    done = run_script(*map(str, command), root=project)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr if code else done.stdout


def rows(project: Path) -> list[dict]:
    return read_log(folder_of(project, "LOG_DIR") / "experiments.csv")


@pytest.fixture(scope="module")
def trained(project: Path) -> str:
    """A run on the built-in scenes; what it printed."""
    return run(project, "train.py", *QUICK, "SESSION_NAME=first run")


def test_training_prints_results_paths_and_next_steps(project, trained):
    row = rows(project)[0]
    assert (row["STATUS"], row["SESSION_NAME"]) == ("finished", "first run")
    assert f"f1 {row['test.f1']:.4f}" in trained
    starts = ("  weights", "  log", "  tr", "  pic")
    paths = [Path(line.split()[1]) for line in trained.splitlines() if line.startswith(starts)]
    assert len(paths) == 4 and all(path.exists() for path in paths)
    assert f"python run_prediction.py {row['NAME']} -i" in trained


@pytest.mark.parametrize("which", ["latest", "best", "a part of its name"])
def test_a_run_predicts_by_its_name(project, trained, which):
    images = sorted((folder_of(project, "DATA_DIR") / "scenes-1" / "test" / "x").iterdir())[:2]
    out_dir = project / f"predicted-{which}"
    which = rows(project)[0]["NAME"][3:] if "part" in which else which
    run(project, "run_prediction.py", which, "-i", *images, "-o", out_dir)
    for image in images:
        prediction = np.load(out_dir / image.name)
        assert prediction.shape == np.load(image, mmap_mode="r").shape[:2]
        assert prediction.dtype == np.uint8 and prediction.max() < 5


def test_the_explicit_config_predicts_the_same(project, trained):
    images, name = folder_of(project, "DATA_DIR") / "scenes-1" / "test" / "x", rows(project)[0]["NAME"]
    run(project, "run_prediction.py", name, "-i", images, "-o", project / "a", "--output", "probabilities")
    script, edited = (ROOT / "predict.py").read_text(), project / "my_predict.py"
    values = {"bulk_ch": (16, 8), "n_recursions": (3, 1), "OUTPUT": ("classes", "probabilities")}
    for old, new in values.items():
        script = re.sub(rf'("{old}": "?){new[0]}\b', rf"\g<1>{new[1]}", script)
    edited.write_text(script)
    weights = folder_of(project, "WEIGHT_DIR") / name / "best.pt"
    run(project, edited, "-i", images, "-o", project / "b", "--weights", weights)
    for file in images.iterdir():
        first, second = (np.load(project / folder / file.name) for folder in "ab")
        assert np.array_equal(first, second, equal_nan=True) and not np.isnan(first).all()


def test_a_run_is_prolonged_by_name_in_its_own_routine_and_reproduced(project, pairs_dir):
    run(project, "train.py", "--data", pairs_dir, "--routine", OTHER, *QUICK, "SESSION_NAME=own")
    row = rows(project)[-1]
    assert (row["MODEL_CONFIG.ch_in"], row["MODEL_CONFIG.ch_out"]) == (3, 3)
    record = json.loads((folder_of(project, "LOG_DIR") / row["NAME"] / "config.json").read_text())
    assert record["config"]["DATASET_CONFIG"]["train"]["x_dir"] == str(pairs_dir / "train" / "x")
    assert "identical" in run(project, "train.py", "--rerun", row["NAME"])
    run(project, "train.py", "--resume", row["NAME"], "EPOCHS=2")
    row = next(one for one in rows(project) if one["NAME"] == row["NAME"])
    assert (row["EPOCH"], row["EPOCHS"], row["STATUS"]) == (2, 2, "finished")
    assert row["ROUTINE_NAME"].endswith(f"{OTHER}_training")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["train.py", "--routine", "tensorflow"], "tensorflow"),
        (["train.py", "--variant", "tensorflow"], "tensorflow"),
        (["train.py", "EPOCH=3"], "did you mean EPOCHS?"),
        (["train.py", "DEVICE=cuda:99"], "DEVICE is 'cuda:99'"),
        (["train.py", "--data", "nowhere"], "nowhere"),
        (["train.py", "--resume", "nonsense"], "nonsense"),
        (["run_prediction.py", "nonsense", "-i", "x.npy", "-o", "out"], "nonsense"),
        (["predict.py", "-i", "x.npy", "-o", "out"], "x.npy: there is no such file"),
    ],
)
def test_mistakes_are_reported_in_a_sentence(project, trained, command, message):
    code = 2 if message == "tensorflow" else 1  # a usage error
    assert message in run(project, *command, code=code)


def test_all_mistakes_of_a_command_line_are_reported_at_once(project):
    wrong = ["EPOCH=3", "MODEL_CONFIG.dropot=0.1", "METRICS.f=nonsense", "ACCUMULATE=0", "CLIP_NORM"]
    reported = run(project, "train.py", *wrong, code=1)
    words = ("EPOCHS?", "dropout?", "nonsense", "ACCUMULATE is 0", "CLIP_NORM", "5 problems")
    assert all(word in reported for word in words)


@pytest.mark.parametrize("name", [name for name in ROUTINES if name != "pytorch"])
def test_a_missing_framework_is_reported_with_the_command_that_installs_it(project, monkeypatch, name):
    def missing(module: str, package: str | None = None) -> ModuleType:
        if module.endswith(f"{name}_training"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return original(module, package)

    original = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", missing)
    reported = run(project, "train.py", "--routine", name, "EPOCHS=1", code=1)
    assert f"--routine {name} needs {name}, which is not installed" in reported
    assert f'-m pip install -c constraints.txt -e ".[{name}]"' in reported


def test_warnings_can_be_suppressed(project, monkeypatch):
    def warn(_: object) -> None:
        warnings.warn("a strange warning", stacklevel=2)
        raise UserError("as far as here")

    monkeypatch.setattr(build, "build_datasets", warn)
    for options, expected in ([], ["a strange warning"]), (["-w"], []):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert "as far as here" in run(project, "train.py", *options, code=1)
        assert [str(one.message) for one in caught] == expected


SCRIPTS = ["train.py", "predict.py", "run_prediction.py", "runs.py", "hyperparameter.py"]


@pytest.mark.parametrize("script", [name for name in SCRIPTS if (ROOT / name).is_file()])
def test_help_teaches_and_needs_no_torch(script):
    code = f"import runpy, sys; sys.argv = [{script!r}, '--help']\n"
    code += "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
    code += "finally:\n    assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"python {script}" in done.stdout
