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
PRINT_CONFIG = "import json, dida_tools.config.config as c; print(json.dumps(c.global_config))"
IMPORT_ALL = """
import importlib, json, logging, pkgutil, sys
import dida_tools

for module in pkgutil.walk_packages(dida_tools.__path__, "dida_tools."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:  # an optional framework
        assert error.name.partition(".")[0] not in ("dida_tools", "dida_core"), error
import torch
assert {"dida_core.config.capture", "dida_tools.models.unet"} <= set(sys.modules)
root = logging.getLogger()
handlers = root.handlers + logging.getLogger("dida_tools").handlers
print(json.dumps([len(handlers), root.level, torch.cuda.is_initialized(), sys.argv]))
"""


@pytest.fixture
def clean(monkeypatch):
    """The environment without the variables that redirect."""
    for key in KEYS:
        monkeypatch.delenv(key, raising=False)
    return monkeypatch


@pytest.fixture
def checkout(tmp_path):
    """A copy of the package, so that what happens in the real folder meanwhile does not matter."""
    folder = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(CHECKOUT / "dida_tools", folder / "dida_tools", ignore=ignored)
    shutil.copy(CHECKOUT / "pyproject.toml", folder)
    return folder


def run(code, cwd, python_path, **variables):
    python_path = os.pathsep.join([str(python_path), *filter(None, sys.path)])  # the library is found as here
    variables |= {"PYTHONPATH": python_path, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=cwd, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def tree(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def config_in(root, **changes):
    """The project's own folders, below another root."""
    own = {key: Path(global_config[key]).relative_to(global_config["ROOT_PATH"]) for key in KEYS}
    return {key: str(changes.get(key, root / folder)) for key, folder in own.items()}


def test_a_checkout_keeps_all_in_its_root_and_an_installed_package_in_the_working_directory(checkout, clean):
    cwd = checkout.parent / "somewhere"
    cwd.mkdir()
    assert run(PRINT_CONFIG, cwd, checkout) == config_in(checkout)
    (checkout / "pyproject.toml").unlink()
    assert run(PRINT_CONFIG, cwd, checkout) == config_in(cwd)
    assert tree(cwd) == [] and tuple(global_config) == KEYS


def test_environment_variables_redirect(tmp_path, clean):
    plain = make_global_config()
    for key in KEYS[1:]:
        with clean.context() as one:
            one.setenv(key, str(tmp_path / "elsewhere"))
            assert make_global_config() == plain | {key: str(tmp_path / "elsewhere")}
    clean.chdir(tmp_path)
    clean.setenv("LOG_DIR", "runs/logs")  # taken from the working directory
    clean.setenv("DATA_DIR", "")  # as if it were not set
    assert make_global_config() == plain | {"LOG_DIR": str(tmp_path / "runs" / "logs")}
    clean.setenv("ROOT_PATH", str(tmp_path / "root"))  # moves all that are not set themselves
    assert make_global_config() == config_in(tmp_path / "root", LOG_DIR=tmp_path / "runs" / "logs")
    assert make_global_config(tmp_path / "new") == make_global_config() and tree(tmp_path) == []


@pytest.mark.slow  # imports every framework that is installed
def test_importing_every_module_has_no_side_effect(checkout, tmp_path):
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    before = tree(checkout)
    redirected = {key: str(tmp_path / "redirected" / key) for key in KEYS[1:]}
    assert run(IMPORT_ALL, cwd, checkout, **redirected) == [0, 30, False, ["-c"]]
    assert (tree(checkout), tree(cwd), (tmp_path / "redirected").exists()) == (before, [], False)
