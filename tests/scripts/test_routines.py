"""Any routine can be chosen, and any be deleted."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROUTINES = sorted(
    file.stem.removesuffix("_training") for file in ROOT.glob("dida_tools/training/*_training.py")
)
TINY = ["EPOCHS=1", "MODEL_CONFIG.bulk_ch=8", "MODEL_CONFIG.n_recursions=1", "DEVICE=cpu", "PRECISION=fp32"]


def run(folder: Path, *command: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "ROOT_PATH")}
    # The package is found beside the scripts, although another copy of it is installed.
    environment |= {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project."""
    folder = tmp_path / "project"
    folder.mkdir()
    for name in (
        "dida_tools",
        "train.py",
        "predict.py",
        "run_prediction.py",
        "pyproject.toml",
        "constraints.txt",
    ):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    return folder


# The last one cannot be deleted. In the slow tier, since each takes half a minute.
@pytest.mark.slow
@pytest.mark.parametrize("deleted", ROUTINES if ROUTINES[1:] else [])
def test_without_a_routine_all_else_works(project: Path, pairs_dir: Path, deleted: str) -> None:
    (project / "dida_tools" / "training" / f"{deleted}_training.py").unlink()
    imports = (
        "import pkgutil, importlib, dida_tools\n"
        "names = [m.name for m in pkgutil.walk_packages(dida_tools.__path__, 'dida_tools.')]\n"
        "for name in names: importlib.import_module(name)\n"
        "print(dida_tools.__file__, *names)"
    )
    listed = run(project, "-c", imports)
    assert listed.returncode == 0, listed.stderr
    assert str(project) in listed.stdout and f"{deleted}_training" not in listed.stdout
    refused = run(project, "train.py", "--routine", deleted)
    assert refused.returncode == 2 and "invalid choice" in refused.stderr
    # The one that takes its place, or the next in the alphabet.
    other = [] if deleted == "pytorch" else ["--routine", next(name for name in ROUTINES if name != deleted)]
    trained = run(project, "train.py", "--data", str(pairs_dir), *other, *TINY)
    assert trained.returncode == 0, trained.stderr
    predicted = run(project, "run_prediction.py", "latest", "-i", str(pairs_dir / "test" / "x"), "-o", "out")
    assert predicted.returncode == 0, predicted.stderr
    assert len(list((project / "out").glob("image_*"))) == 4


def test_a_run_goes_on_in_its_own_routine(project: Path, pairs_dir: Path) -> None:
    routine = next((name for name in ROUTINES if name != "pytorch"), "pytorch")
    trained = run(project, "train.py", "--data", str(pairs_dir), "--routine", routine, *TINY)
    assert trained.returncode == 0, trained.stderr
    again = run(project, "train.py", "--resume", "latest", "EPOCHS=2")
    assert again.returncode == 0, again.stderr
    log = (project / "logs" / "experiments.csv").read_text()
    assert log.count(f"{routine}_training") == 1 and "finished" in log


def test_a_framework_that_is_not_installed_is_said_with_the_command_that_installs_it(project: Path) -> None:
    frameworks = [name for name in ROUTINES if name != "pytorch"]
    for name in frameworks:
        # Found before the installed one, and as missing as can be.
        (project / f"{name}.py").write_text(f"raise ModuleNotFoundError('no {name}', name='{name}')\n")
        answer = run(project, "train.py", "--routine", name)
        assert answer.returncode == 1
        assert f"--routine {name} needs {name}, which is not installed" in answer.stderr
        assert f'-m pip install -c constraints.txt -e ".[{name}]"' in answer.stderr
        assert "Traceback" not in answer.stderr
