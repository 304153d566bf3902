"""The lists of dependencies agree, and the Makefile does what it says."""

import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from rattler import MatchSpec, Version, VersionSpec

ROOT = Path(__file__).resolve().parents[2]
CONDA_NAMES = {"pytorch": "torch", "matplotlib-base": "matplotlib", "ignite": "pytorch-ignite"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
FRAMEWORKS = [requirement for extra in EXTRAS if extra != "dev" for requirement in EXTRAS[extra]]
DEV = [requirement for requirement in EXTRAS["dev"] if not requirement.startswith("dida-tools")] + FRAMEWORKS

OPTIONAL = {"pandas"}  # read_frame works where it is there
LOADED_BY_NAME = {"onnx", "onnxscript"}  # torch.onnx does


def name_of(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower()


def conda_specs(*files: str) -> dict[str, MatchSpec]:
    """The parsed dependencies by pip's names, as conda would read them."""
    lines = [line for file in files for line in yaml.safe_load((ROOT / file).read_text())["dependencies"]]
    specs = [MatchSpec(line, strict=True) for line in lines]
    return {CONDA_NAMES.get(spec.name.normalized, spec.name.normalized): spec for spec in specs}


def conda_names(file: str) -> set[str]:
    return conda_specs(file).keys() - {"python", "pip"}


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))


def test_conda_and_pip_install_the_same():
    assert conda_names("environment.yml") == {name_of(requirement) for requirement in PROJECT["dependencies"]}
    assert conda_names("dev.yml") == {name_of(requirement) for requirement in DEV}


@pytest.mark.parametrize("file", ["environment.yml", "dev.yml"])
def test_conda_files_are_of_one_environment_from_one_channel(file):
    content = yaml.safe_load((ROOT / file).read_text())
    assert content.keys() == {"name", "channels", "dependencies"}
    assert content["name"] == PROJECT["name"]
    assert content["channels"] == ["conda-forge", "nodefaults"]
    assert len(set(map(name_of, content["dependencies"]))) == len(content["dependencies"])


def test_conda_takes_the_tested_versions_and_refuses_what_pip_refuses():
    specs, pinned = conda_specs("environment.yml", "dev.yml"), constraints()
    for name in specs.keys() - {"python", "pip"}:
        tested = Version(pinned[name])
        assert specs[name].version is None or VersionSpec(specs[name].version).matches(tested), name
    limited = [one for one in PROJECT["dependencies"] + DEV if name_of(one) != one]
    for requirement in [*limited, f"python{PROJECT['requires-python']}"]:
        for limit in requirement.removeprefix(name_of(requirement)).split(","):
            operator, version = re.fullmatch(r"(>=|!=)([0-9.]+)", limit).groups()
            refused = Version(version if operator == "!=" else f"{version}a0")
            assert not VersionSpec(specs[name_of(requirement)].version).matches(refused), requirement


def test_development_has_the_frameworks_of_all_routines():
    assert f"dida-tools[{','.join(extra for extra in EXTRAS if extra != 'dev')}]" in EXTRAS["dev"]


def test_dev_yml_adds_to_environment_yml():
    assert not conda_names("environment.yml") & conda_names("dev.yml")


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
    own = {"dida_tools", "tools", *(file.stem for file in ROOT.glob("*.py"))}
    return {known.get(root, root) for root in roots - own - set(sys.stdlib_module_names)}


def files_of_extra(extra: str) -> list[Path]:
    """The files that alone may import what an extra installs: a project that deletes them deletes the extra."""
    routine = ROOT / f"dida_tools/training/{extra}_training.py"
    folders = {
        "search": ["dida_tools/search/*.py", "hyperparameter.py"],
        "export": ["dida_tools/prediction/export.py"],
    }
    return [file for pattern in folders.get(extra, []) for file in ROOT.glob(pattern)] or [routine]


def test_every_import_of_the_package_is_a_dependency_or_in_the_extra_of_its_part():
    dependencies = {name_of(requirement) for requirement in PROJECT["dependencies"]}
    extras = {extra: files_of_extra(extra) for extra in EXTRAS if extra not in ("dev", "docs")}
    parts = {extra: [file for file in files if file.is_file()] for extra, files in extras.items()}
    others = {*ROOT.glob("dida_tools/**/*.py"), *ROOT.glob("*.py")} - {
        file for part in parts.values() for file in part
    }
    assert imports_of(*others) - OPTIONAL == dependencies
    for extra, files in parts.items():
        if files:
            needed = {name_of(requirement) for requirement in EXTRAS[extra]}
            text = "".join(file.read_text() for file in files)
            by_name = {name for name in needed if f'("{name}' in text} | (needed & LOADED_BY_NAME)
            assert (imports_of(*files) - dependencies) | by_name == needed, extra


def test_ci_calls_make_test_alone():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in lines if line.startswith("make")] == ["make test"]


def test_a_broken_torchvision_is_removed_and_said(tmp_path):
    """A stand-in whose import fails, in an environment of its own that sees the packages of this one."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    site = Path(
        subprocess.check_output(
            [python, "-c", "import site; print(site.getsitepackages()[0])"], text=True
        ).strip()
    )
    here = subprocess.check_output(
        [sys.executable, "-c", "import site; print(site.getsitepackages()[0])"], text=True
    )
    (site / "outer.pth").write_text(here)
    (site / "torchvision").mkdir()
    (site / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    (site / "torchvision-0.28.0.dist-info").mkdir()
    (site / "torchvision-0.28.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n"
    )
    (site / "torchvision-0.28.0.dist-info" / "RECORD").write_text(
        "torchvision/__init__.py,,\ntorchvision-0.28.0.dist-info/METADATA,,\ntorchvision-0.28.0.dist-info/RECORD,,\n"
        "torchvision-0.28.0.dist-info/INSTALLER,,\n"
    )
    (site / "torchvision-0.28.0.dist-info" / "INSTALLER").write_text("pip\n")
    command = [python, ROOT / "tools" / "check_torchvision.py"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "torchvision 0.28.0 cannot be imported" in answer
    assert not (site / "torchvision" / "__init__.py").exists()
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == ""


def test_the_configs_of_training_prediction_and_suite_are_of_one_model():
    from dida_tools.models import UNET
    from dida_tools.training.pytorch_training import small

    trained = small()["MODEL_CONFIG"]
    script = importlib.import_module("predict")
    suite = importlib.import_module("tests.test_models.test_unet")
    shapes = [
        {name: tensor.shape for name, tensor in UNET(**config).state_dict().items()}
        for config in (trained, script.predict_config()["MODEL_CONFIG"], suite.MODEL_CONFIG)
    ]
    assert shapes[0] == shapes[1] == shapes[2]
    assert suite.MODEL is UNET
