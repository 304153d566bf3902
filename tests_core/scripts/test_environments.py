"""The lists of dependencies agree with each other, with the imports and with the tested versions."""

import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from tests.helpers import ROOT

CONDA_NAMES = {"pytorch": "torch", "matplotlib-base": "matplotlib", "ignite": "pytorch-ignite"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
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
    assert content.keys() == {"name", "channels", "dependencies"}
    assert (content["name"], content["channels"]) == (PROJECT["name"], ["conda-forge", "nodefaults"])
    lines = {CONDA_NAMES.get(name_of(line), name_of(line)): line for line in content["dependencies"]}
    assert len(lines) == len(content["dependencies"])
    return lines


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))


def test_conda_and_pip_install_the_same():
    base, dev = conda_lines("environment.yml").keys() - {"python", "pip"}, conda_lines("dev.yml").keys()
    assert base == {name_of(one) for one in DEPENDENCIES}
    assert dev == {name_of(one) for one in DEV} - base
    assert f"dida-tools[{','.join(extra for extra in EXTRAS if extra != 'dev')}]" in EXTRAS["dev"]


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


def test_the_library_states_what_the_project_states():
    library = tomllib.loads((ROOT / "dida_core" / "pyproject.toml").read_text())
    assert library["project"]["dependencies"] == DEPENDENCIES
    for extra, needed in library["project"]["optional-dependencies"].items():
        assert needed == EXTRAS[extra]
    found = {init.parent.relative_to(ROOT) for init in ROOT.glob("dida_core/**/__init__.py")}
    assert set(library["tool"]["setuptools"]["packages"]) == {".".join(path.parts) for path in found}


def test_every_dependency_has_a_tested_version_which_is_installed_here():
    pinned = constraints()
    assert {name_of(requirement) for requirement in DEPENDENCIES + DEV} <= pinned.keys()
    if "CONDA_PREFIX" not in os.environ:  # conda chooses versions itself
        for name in map(name_of, DEPENDENCIES):
            assert version(name).split("+")[0] == pinned[name]


def imports_of(*files: Path) -> set[str]:
    found = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module)
    roots = {"tensorboard" if name == "torch.utils.tensorboard" else name.partition(".")[0] for name in found}
    own = {*PACKAGES, "tools", *(file.stem for file in ROOT.glob("*.py")), *sys.stdlib_module_names}
    return {{"PIL": "pillow", "ignite": "pytorch-ignite"}.get(root, root) for root in roots - own}


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


def test_ci_calls_make_test_alone():
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
    files = {
        "../torchvision/__init__.py": "raise RuntimeError('operator torchvision::nms does not exist')",
        "METADATA": "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n",
        "INSTALLER": "pip\n",
        "REQUESTED": "",
        "RECORD": "torchvision/__init__.py,,\n" + f"{info.name}/METADATA,,\n{info.name}/RECORD,,\n",
    }
    (info.parent / "torchvision").mkdir()
    info.mkdir()
    for name, text in files.items():
        (info / name).write_text(text)
    check = [python, ROOT / "tools" / "check_torchvision.py"]
    failed = "torchvision 0.28.0 cannot be imported beside torch"
    kept = subprocess.check_output(check, text=True)
    assert failed in kept and "removed" not in kept and (info.parent / "torchvision").exists()
    (info / "REQUESTED").unlink()
    assert failed in subprocess.check_output(check, text=True)
    assert not (info.parent / "torchvision" / "__init__.py").exists()
    assert subprocess.check_output(check, text=True) == ""


def test_the_configs_of_training_prediction_and_suite_are_of_one_model():
    from dida_tools.models import UNET
    from dida_tools.training.pytorch_training import small

    suite, script = (importlib.import_module(name) for name in ("tests.test_models.test_unet", "predict"))
    trained, predicting, tested = (
        {name: tensor.shape for name, tensor in UNET(**config).state_dict().items()}
        for config in (
            small()["MODEL_CONFIG"],
            script.predict_config()["MODEL_CONFIG"],
            suite.MODEL_CONFIG,
        )
    )
    assert trained == predicting == tested
    assert suite.MODEL is UNET
