"""Lists of dependencies, imports and tested versions agree; wheels hold their package; licenses and hooks."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import dida_core
import pytest
import yaml

import dida_tools

from tests.helpers import ROOT
from tests_core.scripts.projects import imports_of, make_template

CONDA_NAMES = {"pytorch": "torch", "matplotlib-base": "matplotlib", "ignite": "pytorch-ignite"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LIBRARY = tomllib.loads((ROOT / "dida_core" / "pyproject.toml").read_text())
DEPENDENCIES, EXTRAS = PROJECT["dependencies"], PROJECT["optional-dependencies"]
DEV = [one for extra in EXTRAS.values() for one in extra if not one.startswith("dida-tools")]
PACKAGES = ("dida_tools", "dida_core")
OPTIONAL = {"pandas"}  # read_frame works where it is there
LOADED_BY_NAME = {"onnx", "onnxscript"}  # torch.onnx does


def name_of(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower()


def conda_lines(file: str) -> dict[str, str]:
    """The dependencies of a conda file by pip's names."""
    content = yaml.safe_load((ROOT / file).read_text())
    assert (content["name"], content["channels"]) == (PROJECT["name"], ["conda-forge", "nodefaults"])
    lines = {CONDA_NAMES.get(name_of(line), name_of(line)): line for line in content["dependencies"]}
    assert len(lines) == len(content["dependencies"])
    return lines


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))


def test_conda_and_pip_install_the_same_at_tested_versions_which_are_here():
    base, dev = conda_lines("environment.yml").keys() - {"python", "pip"}, conda_lines("dev.yml").keys()
    assert base == {name_of(one) for one in DEPENDENCIES}
    assert dev == {name_of(one) for one in DEV} - base
    assert f"dida-tools[{','.join(extra for extra in EXTRAS if extra != 'dev')}]" in EXTRAS["dev"]
    pinned = constraints()
    assert {name_of(requirement) for requirement in DEPENDENCIES + DEV} <= pinned.keys()
    if "CONDA_PREFIX" not in os.environ:  # conda chooses versions itself
        for name in map(name_of, DEPENDENCIES):
            assert version(name).split("+")[0] == pinned[name]


@pytest.mark.slow
def test_conda_takes_the_tested_versions_and_refuses_what_pip_refuses():
    from rattler import MatchSpec, Version, VersionSpec

    lines = conda_lines("environment.yml") | conda_lines("dev.yml")
    specs, pinned = {name: MatchSpec(line, strict=True) for name, line in lines.items()}, constraints()
    for name in specs.keys() - {"python", "pip"}:
        spec = specs[name].version
        assert spec is None or VersionSpec(spec).matches(Version(pinned[name])), name
    limited = [one for one in DEPENDENCIES + DEV if name_of(one) != one]
    for requirement in [*limited, f"python{PROJECT['requires-python']}"]:
        for limit in requirement.removeprefix(name_of(requirement)).split(","):
            operator, limit_version = re.fullmatch(r"(>=|!=)([0-9.]+)", limit).groups()
            refused = Version(limit_version if operator == "!=" else f"{limit_version}a0")
            assert not VersionSpec(specs[name_of(requirement)].version).matches(refused), requirement


def files_of_extra(extra: str) -> list[Path]:
    """The files that alone may import what an extra installs."""
    patterns = {
        "search": ["dida_core/search/**/*.py", "hyperparameter.py"],
        "export": ["dida_core/export/**/*.py"],
    }.get(extra, [f"dida_tools/training/{extra}_training.py"])
    return [file for pattern in patterns for file in ROOT.glob(pattern)]


def test_every_import_is_a_dependency_or_in_the_extra_of_its_part():
    dependencies = {name_of(requirement) for requirement in DEPENDENCIES}
    parts = {extra: files_of_extra(extra) for extra in EXTRAS if extra not in ("dev", "docs", "template")}
    of_parts = {file for files in parts.values() for file in files}
    every = {*ROOT.glob("*.py"), *(file for name in PACKAGES for file in ROOT.glob(f"{name}/**/*.py"))}
    assert imports_of(*every - of_parts) - OPTIONAL == dependencies
    for extra, files in parts.items():
        needed, text = {name_of(one) for one in EXTRAS[extra]}, "".join(file.read_text() for file in files)
        by_name = {name for name in needed if f'("{name}' in text} | (needed & LOADED_BY_NAME)
        assert (imports_of(*files) - dependencies) | by_name == needed, extra


def test_the_library_states_what_the_project_states():
    assert LIBRARY["project"]["dependencies"] == DEPENDENCIES
    for extra, needed in LIBRARY["project"]["optional-dependencies"].items():
        assert needed == EXTRAS[extra]
    found = {init.parent.relative_to(ROOT) for init in ROOT.glob("dida_core/**/__init__.py")}
    assert set(LIBRARY["tool"]["setuptools"]["packages"]) == {".".join(path.parts) for path in found}


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "packages"), [(".", PACKAGES), ("dida_core", ("dida_core",))])
def test_a_wheel_contains_its_packages_and_nothing_else(tmp_path, folder, packages):
    # From a copy of what git knows, since setuptools leaves folders in what it builds from.
    shutil.copytree(make_template(tmp_path / "template") / folder, tmp_path / "copy")
    (tmp_path / "copy" / "weights").mkdir(exist_ok=True)
    (tmp_path / "copy" / "weights" / "best.pt").touch()
    options = [
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--wheel-dir",
        tmp_path / "wheels",
    ]
    command = [sys.executable, "-m", "pip", "wheel", *map(str, options), str(tmp_path / "copy")]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=300)
    [file] = (tmp_path / "wheels").iterdir()
    wheel = zipfile.ZipFile(file)
    info = f"{packages[0]}-{dida_tools.__version__}.dist-info/"
    code = {str(path.relative_to(ROOT)) for one in packages for path in ROOT.glob(f"{one}/**/*.py")}
    names = {one for one in wheel.namelist() if not one.endswith("/")}
    assert {one for one in names if not one.startswith(info)} == code
    assert f"{info}licenses/LICENSE" in names
    metadata = wheel.read(f"{info}METADATA").decode()
    assert f"\nVersion: {dida_tools.__version__}\nSummary" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    needed = re.findall(r"^Requires-Dist: ([\w-]+)", metadata, re.MULTILINE)
    assert {name_of(one) for one in DEPENDENCIES} <= set(needed)


def test_citation_license_and_version_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == dida_tools.__version__ == dida_core.__version__
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert all(author.keys() == {"name"} for author in citation["authors"])  # entities, no persons
    text = (ROOT / "LICENSE").read_text()
    assert text == (ROOT / "dida_core" / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text


def test_hooks_are_local_and_a_part_of_make_lint_and_ci_calls_make_test_alone():
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [one["repo"] for one in repositories] == ["local"]  # nothing is downloaded
    lint = (ROOT / "Makefile").read_text().split("\nlint:")[1].split("\n\n")[0]
    for hook in repositories[0]["hooks"]:
        assert hook["language"] == "system"
        assert f"-m {hook['entry'].removesuffix(' --force-exclude')}" in lint
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in lines if line.startswith("make")] == ["make test"]


@pytest.mark.slow
def test_a_broken_torchvision_is_removed_but_not_one_installed_by_name(tmp_path):
    """A stand-in whose import fails, in an environment of its own that sees the packages of this one."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python, where = tmp_path / "env" / "bin" / "python", "import site; print(site.getsitepackages()[0])"
    here, there = (subprocess.check_output([one, "-c", where], text=True) for one in (sys.executable, python))
    info = Path(there.strip()) / "torchvision-0.28.0.dist-info"
    (info.parent / "outer.pth").write_text(here)
    (info.parent / "torchvision").mkdir()
    info.mkdir()
    for name, text in {
        "../torchvision/__init__.py": "raise RuntimeError('operator torchvision::nms does not exist')",
        "METADATA": "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n",
        "INSTALLER": "pip\n",
        "REQUESTED": "",
        "RECORD": "torchvision/__init__.py,,\n" + f"{info.name}/METADATA,,\n{info.name}/RECORD,,\n",
    }.items():
        (info / name).write_text(text)
    check = [python, ROOT / "tools" / "check_torchvision.py"]
    failed = "torchvision 0.28.0 cannot be imported beside torch"
    kept = subprocess.check_output(check, text=True)
    assert failed in kept and "removed" not in kept and (info.parent / "torchvision").exists()
    fitting = (
        r"pip install --upgrade torch==\S+ torchvision( --index-url https://download.pytorch.org/whl/\w+)?\n"
    )
    assert re.search(fitting, kept)
    (info / "REQUESTED").unlink()
    needs = info.with_name("timm-1.0.dist-info")
    needs.mkdir()
    (needs / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: timm\nVersion: 1.0\nRequires-Dist: torchvision\n"
    )
    kept = subprocess.check_output(check, text=True)
    assert "It stays, for timm. Install" in kept and (info.parent / "torchvision" / "__init__.py").exists()
    shutil.rmtree(needs)
    assert failed in subprocess.check_output(check, text=True)
    assert not (info.parent / "torchvision" / "__init__.py").exists()
    assert subprocess.check_output(check, text=True) == ""


def test_the_configs_of_training_prediction_and_suite_are_of_one_model():
    from dida_tools.models import UNET
    from dida_tools.training.pytorch_training import small

    suite, script = (importlib.import_module(name) for name in ("tests.test_models.test_unet", "predict"))
    configs = (small()["MODEL_CONFIG"], script.predict_config()["MODEL_CONFIG"], suite.MODEL_CONFIG)
    shapes = [{name: one.shape for name, one in UNET(**config).state_dict().items()} for config in configs]
    assert shapes[0] == shapes[1] == shapes[2]
    assert suite.MODEL is UNET
