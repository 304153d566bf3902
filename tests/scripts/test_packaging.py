"""What is handed on: a wheel that contains only the package, one version, one license; and what hooks run."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import dida_tools

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy, since setuptools leaves folders in what it builds from."""
    copy, out = tmp_path_factory.mktemp("copy") / "project", tmp_path_factory.mktemp("wheel")
    unwanted = shutil.ignore_patterns(
        ".*", "__pycache__", "data", "logs", "weights", "predictions", "build", "*.egg-info"
    )
    shutil.copytree(
        ROOT, copy, ignore=lambda folder, names: unwanted(folder, names) if Path(folder) == ROOT else set()
    )
    (copy / "weights").mkdir()
    (copy / "weights" / "best.pt").touch()
    command = [
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        out,
        copy,
    ]
    subprocess.run([sys.executable, *map(str, command)], check=True, cwd=out, timeout=300)
    [file] = out.iterdir()
    return zipfile.ZipFile(file)


def test_a_wheel_contains_the_package_and_nothing_else(wheel):
    names = [name for name in wheel.namelist() if not name.endswith("/")]
    info = f"dida_tools-{dida_tools.__version__}.dist-info/"
    code = {str(path.relative_to(ROOT)) for path in ROOT.glob("dida_tools/**/*.py")}
    assert {name for name in names if not name.startswith(info)} == code
    assert f"{info}licenses/LICENSE" in names


def test_a_wheel_says_what_it_needs(wheel):
    metadata = wheel.read(f"dida_tools-{dida_tools.__version__}.dist-info/METADATA").decode()
    assert f"\nVersion: {dida_tools.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    needed = re.findall(r"^Requires-Dist: ([^;\n]+)$", metadata, re.MULTILINE)
    assert {re.sub(r"\s", "", one) for one in needed} == {
        re.sub(r"\s", "", one) for one in PROJECT["dependencies"]
    }


def test_citation_has_what_the_format_asks_for_and_the_version_of_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == dida_tools.__version__
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert all(author.keys() == {"name"} for author in citation["authors"])  # entities, no persons


def test_the_license_is_apache_2():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_hooks_are_local_and_a_part_of_make_lint():
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [one["repo"] for one in repositories] == ["local"]  # nothing is downloaded
    lint = (ROOT / "Makefile").read_text().split("\nlint:")[1].split("\n\n")[0]
    for hook in repositories[0]["hooks"]:
        assert hook["language"] == "system"
        assert f"-m {hook['entry'].removesuffix(' --force-exclude')}" in lint
