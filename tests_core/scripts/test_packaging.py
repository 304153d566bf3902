"""Wheels that contain only their package, one version, one license; and what hooks run."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import dida_core
import pytest
import yaml

import dida_tools

from tests.helpers import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
UNWANTED = shutil.ignore_patterns(
    ".*", "__pycache__", "data", "logs", "weights", "predictions", "build", "*.egg-info"
)


def build(folder: Path, out: Path) -> zipfile.ZipFile:
    """Build a wheel from a copy, since setuptools leaves folders in what it builds from."""
    copy = out / "copy"
    shutil.copytree(folder, copy, ignore=lambda at, names: UNWANTED(at, names) if Path(at) == ROOT else set())
    (copy / "weights").mkdir()
    (copy / "weights" / "best.pt").touch()
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", out / "wheels"]
    command = [sys.executable, "-m", "pip", "wheel", *map(str, options), str(copy)]
    subprocess.run(command, check=True, cwd=out, timeout=300)
    [file] = (out / "wheels").iterdir()
    return zipfile.ZipFile(file)


def check_wheel(wheel: zipfile.ZipFile, name: str, packages: tuple[str, ...]) -> None:
    """It contains the packages and nothing else, under our license, with the version and what it needs."""
    names = {one for one in wheel.namelist() if not one.endswith("/")}
    info = f"{name}-{dida_tools.__version__}.dist-info/"
    code = {str(path.relative_to(ROOT)) for one in packages for path in ROOT.glob(f"{one}/**/*.py")}
    assert {one for one in names if not one.startswith(info)} == code
    assert f"{info}licenses/LICENSE" in names
    metadata = wheel.read(f"{info}METADATA").decode()
    assert f"\nVersion: {dida_tools.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    needed = re.findall(r"^Requires-Dist: ([\w-]+)", metadata, re.MULTILINE)
    assert {re.match(r"[\w-]+", one)[0] for one in PROJECT["dependencies"]} <= set(needed)


@pytest.mark.slow
def test_wheels_contain_their_packages_and_nothing_else(tmp_path):
    (tmp_path / "library").mkdir()
    check_wheel(build(ROOT, tmp_path), "dida_tools", ("dida_tools", "dida_core"))
    check_wheel(build(ROOT / "dida_core", tmp_path / "library"), "dida_core", ("dida_core",))


def test_citation_license_and_version_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == dida_tools.__version__ == dida_core.__version__
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert all(author.keys() == {"name"} for author in citation["authors"])  # entities, no persons
    text = (ROOT / "LICENSE").read_text()
    assert text == (ROOT / "dida_core" / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_hooks_are_local_and_a_part_of_make_lint():
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [one["repo"] for one in repositories] == ["local"]  # nothing is downloaded
    lint = (ROOT / "Makefile").read_text().split("\nlint:")[1].split("\n\n")[0]
    for hook in repositories[0]["hooks"]:
        assert hook["language"] == "system"
        assert f"-m {hook['entry'].removesuffix(' --force-exclude')}" in lint
