import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dida_tools.config.config import global_config, make_global_config

CHECKOUT = Path(__file__).parents[2]
KEYS = ("ROOT_PATH", "WEIGHT_DIR", "LOG_DIR", "DATA_DIR")
PRINT_CONFIG = (
    "import json; from dida_tools.config.config import global_config; print(json.dumps(global_config))"
)
IMPORT_ALL = """
import importlib, json, logging, pkgutil, sys
import dida_tools

imported, lacking = [], []
for module in pkgutil.walk_packages(dida_tools.__path__, "dida_tools."):
    try:
        importlib.import_module(module.name)
        imported.append(module.name)
    except ModuleNotFoundError as error:
        assert error.name.partition(".")[0] != "dida_tools", error
        lacking.append(error.name)
import torch
root = logging.getLogger()
print(json.dumps({
    "imported": imported,
    "handlers": [repr(handler) for handler in root.handlers + logging.getLogger("dida_tools").handlers],
    "level": root.level,
    "cuda": torch.cuda.is_initialized(),
    "argv": sys.argv,
}))
"""


def run(code, cwd, python_path=CHECKOUT, **variables):
    kept = {key: value for key, value in os.environ.items() if key not in KEYS}
    env = (
        kept
        | {"PYTHONPATH": str(python_path), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        | variables
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def tree(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.fixture
def checkout(tmp_path):
    """A copy of the package, so that what happens in the real folder meanwhile does not matter."""
    folder = tmp_path / "checkout"
    shutil.copytree(
        CHECKOUT / "dida_tools", folder / "dida_tools", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(CHECKOUT / "pyproject.toml", folder)
    return folder


def test_the_keys_are_these_and_the_values_absolute_paths():
    assert tuple(global_config) == KEYS
    assert all(Path(path).is_absolute() for path in global_config.values())


def test_in_a_checkout_everything_lies_in_its_root(checkout, tmp_path):
    found = run(PRINT_CONFIG, tmp_path, checkout)
    assert found == {
        "ROOT_PATH": str(checkout),
        "WEIGHT_DIR": str(checkout / "weights"),
        "LOG_DIR": str(checkout / "logs"),
        "DATA_DIR": str(checkout / "data"),
    }


def test_an_installed_package_keeps_to_the_working_directory(checkout, tmp_path):
    (checkout / "pyproject.toml").unlink()
    cwd = tmp_path / "somewhere"
    cwd.mkdir()
    found = run(PRINT_CONFIG, cwd, checkout)
    assert found["ROOT_PATH"] == str(cwd)
    assert found["LOG_DIR"] == str(cwd / "logs")


@pytest.mark.parametrize("key", KEYS[1:])
def test_one_environment_variable_redirects_its_own_value_only(key, tmp_path):
    found = run(PRINT_CONFIG, tmp_path, **{key: str(tmp_path / "elsewhere")})
    plain = run(PRINT_CONFIG, tmp_path)
    assert found == plain | {key: str(tmp_path / "elsewhere")}


def test_the_variable_root_path_moves_all_that_are_not_set_themselves(tmp_path):
    found = run(PRINT_CONFIG, tmp_path, ROOT_PATH=str(tmp_path / "root"), DATA_DIR=str(tmp_path / "disk"))
    assert found == {
        "ROOT_PATH": str(tmp_path / "root"),
        "WEIGHT_DIR": str(tmp_path / "root" / "weights"),
        "LOG_DIR": str(tmp_path / "root" / "logs"),
        "DATA_DIR": str(tmp_path / "disk"),
    }


def test_a_relative_variable_is_taken_from_the_working_directory_and_an_empty_one_ignored(tmp_path):
    found = run(PRINT_CONFIG, tmp_path, LOG_DIR="runs/logs", DATA_DIR="")
    assert found["LOG_DIR"] == str(tmp_path / "runs" / "logs")
    assert found["DATA_DIR"] == run(PRINT_CONFIG, tmp_path)["DATA_DIR"]


def test_making_a_config_makes_no_folder(tmp_path, monkeypatch):
    for key in KEYS:
        monkeypatch.delenv(key, raising=False)
    config = make_global_config(tmp_path / "new")
    assert config["WEIGHT_DIR"] == str(tmp_path / "new" / "weights")
    assert tree(tmp_path) == []


def test_importing_every_module_has_no_side_effect(checkout, tmp_path):
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    before = tree(checkout)
    redirected = {key: str(tmp_path / "redirected" / key) for key in KEYS[1:]}
    found = run(IMPORT_ALL, cwd, checkout, **redirected)
    assert {"dida_tools.config.capture", "dida_tools.models.unet", "dida_tools.utils.loss"} <= set(
        found["imported"]
    )
    assert tree(checkout) == before
    assert tree(cwd) == []
    assert not (tmp_path / "redirected").exists()
    assert found["handlers"] == []
    assert found["level"] == 30
    assert not found["cuda"]
    assert found["argv"] == ["-c"]
