"""The lists of dependencies agree, and the Makefile does what it says."""

import ast
import os
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONDA_NAMES = {"pytorch": "torch", "matplotlib-base": "matplotlib", "ignite": "pytorch-ignite"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
FRAMEWORKS = [requirement for extra in EXTRAS if extra != "dev" for requirement in EXTRAS[extra]]
DEV = [requirement for requirement in EXTRAS["dev"] if not requirement.startswith("dida-tools")] + FRAMEWORKS

OPTIONAL = {"pandas"}  # read_frame works where it is there
LOADED_BY_NAME = {"onnxscript"}  # torch.onnx does


def name_of(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower()


def conda_names(file: str) -> set[str]:
    lines = (ROOT / file).read_text().split("dependencies:")[1].splitlines()
    names = {name_of(line.strip()[2:]) for line in lines if line.strip().startswith("- ")}
    return {CONDA_NAMES.get(name, name) for name in names - {"python", "pip"}}


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))


def test_conda_and_pip_install_the_same():
    assert conda_names("environment.yml") == {name_of(requirement) for requirement in PROJECT["dependencies"]}
    assert conda_names("dev.yml") == {name_of(requirement) for requirement in DEV}


def test_development_has_the_frameworks_of_all_routines():
    assert f"dida-tools[{','.join(extra for extra in EXTRAS if extra != 'dev')}]" in EXTRAS["dev"]


def test_every_dependency_has_a_tested_version():
    wanted = PROJECT["dependencies"] + DEV
    assert {name_of(requirement) for requirement in wanted} <= constraints().keys()


@pytest.mark.skipif("CONDA_PREFIX" in os.environ, reason="conda chooses versions itself")
def test_the_tested_versions_are_those_that_are_installed_here():
    from importlib.metadata import version

    pinned = constraints()
    for requirement in PROJECT["dependencies"]:
        assert version(name_of(requirement)).split("+")[0] == pinned[name_of(requirement)]


def imports_of(*files: Path) -> set[str]:
    found = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module)
    roots = {"tensorboard" if name == "torch.utils.tensorboard" else name.partition(".")[0] for name in found}
    known = {"PIL": "pillow", "ignite": "pytorch-ignite"}
    return {known.get(root, root) for root in roots - set(sys.stdlib_module_names)}


def files_of_extra(extra: str) -> list[Path]:
    """The files that alone may import what an extra installs: a project that deletes them deletes the extra."""
    routine = ROOT / f"dida_tools/training/{extra}_training.py"
    folders = {"search": ["dida_tools/search/*.py", "hyperparameter.py"], "export": ["dida_tools/prediction/export.py"]}
    return [file for pattern in folders.get(extra, []) for file in ROOT.glob(pattern)] or [routine]


def test_every_import_of_the_package_is_a_dependency_or_in_the_extra_of_its_part():
    dependencies = {name_of(requirement) for requirement in PROJECT["dependencies"]}
    extras = {extra: files_of_extra(extra) for extra in EXTRAS if extra not in ("dev", "docs")}
    parts = {extra: [file for file in files if file.is_file()] for extra, files in extras.items()}
    others = {*ROOT.glob("dida_tools/**/*.py"), *ROOT.glob("*.py")} - {file for part in parts.values() for file in part}
    assert imports_of(*others) - OPTIONAL - {"dida_tools"} == dependencies
    for extra, files in parts.items():
        if files:
            needed = {name_of(requirement) for requirement in EXTRAS[extra]} - LOADED_BY_NAME
            assert imports_of(*files) - dependencies - {"dida_tools"} == needed, extra
