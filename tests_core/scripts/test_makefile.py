"""The Makefile, run for real with stand-ins for what it calls: Python, conda's three tools and docker."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers import ROOT

FILES = ("pyproject.toml", "constraints.txt", "environment.yml", "dev.yml", "README.md")
PARTS = ("Makefile", "docker.mk", "docs/docs.mk")
TEXT = "".join((ROOT / name).read_text() for name in PARTS)
PHONY = [name for names in re.findall(r"^\.PHONY: (.*)$", TEXT, re.MULTILINE) for name in names.split()]
PHONY.remove("conda-env")  # of conda alone

# Logs its arguments, and makes a .venv whose python does the same.
PYTHON = """
case "$1" in
    -c) exit "${TOO_OLD:-0}" ;;
    --version) echo Python 3.9.1 ;;
    -m) if [ "$2" = venv ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"
        else echo "python $*" >> "$LOG"; fi ;;
    *) echo "python $*" >> "$LOG" ;;
esac
"""
# The parts of conda, mamba and micromamba that the Makefile uses, as each documents them: other arguments are
# refused, and nothing is done that would prompt.
CONDA = """
tool=$(basename "$0"); place=$HOME/$tool
echo "$tool $*" >> "$LOG"
confirmed() { [ $tool = conda ] || [ "$MAMBA_ALWAYS_YES" = true ] || { echo "Aborted."; exit 1; }; }
case "$1 $2" in
    "env list")
        [ "$3" = --json ] || exit 2
        case $tool in micromamba) in="    " ;; *) in="  " ;; esac
        printf '{\\n%s"envs": [\\n%s%s"%s"' "$in" "$in" "$in" "$place"
        for env in $(ls -d "$place/envs"/* 2>/dev/null); do printf ',\\n%s%s"%s"' "$in" "$in" "$env"; done
        printf '\\n%s]' "$in"
        [ $tool != conda ] || printf ',\\n  "envs_details": {\\n    "%s": {"name": "base"}\\n  }' "$place"
        printf '\\n}\\n' ;;
    "env create")
        [ $# = 4 ] && [ "$3" = -f ] || exit 2
        name=$(sed -n 's/^name: //p' "$4"); confirmed
        [ ! -e "$place/envs/$name" ] || { echo "prefix already exists"; exit 1; }
        mkdir -p "$place/envs/$name/bin"; cp "$HOME/bin/python3" "$place/envs/$name/bin/python" ;;
    "env update")
        [ $# = 6 ] && [ "$3" = -n ] && [ "$5" = -f ] || exit 2
        confirmed; [ -d "$place/envs/$4" ] && [ -f "$6" ] || exit 1 ;;
    "env remove")
        [ $# = 4 ] && [ "$3" = -n ] || exit 2
        [ "$CONDA_ALWAYS_YES$MAMBA_ALWAYS_YES" = truetrue ] || exit 1
        rm -r "$place/envs/$4" ;;
    *) exit 2 ;;
esac
"""
DOCKER = 'echo "docker" >> "$LOG"; for one in "$@"; do echo "  $one" >> "$LOG"; done'


class Project:
    """A folder with the Makefile and what it reads, and a home with stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.path, self.home, self.log = folder / "a project", folder / "home", folder / "log"
        (self.home / "bin").mkdir(parents=True)
        for name in (*FILES, *PARTS):
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.path / name)
        shutil.copytree(ROOT / "tools", self.path / "tools", ignore=shutil.ignore_patterns("__pycache__"))
        for name, script in {"python3": PYTHON, "nvidia-smi": "exit 9", "docker": DOCKER}.items():
            self.add(name, script)

    def add(self, name: str, script: str) -> None:
        """Put a stand-in on the PATH."""
        (self.home / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.home / "bin" / name).chmod(0o755)

    def make(self, *arguments: str, ok: bool = True, **variables: str) -> tuple[list[str], str]:
        """Run make. Return the calls of stand-ins, and what was printed."""
        self.log.write_text("")
        environment = {"PATH": f"{self.home}/bin:/usr/bin:/bin", "HOME": str(self.home), "LOG": str(self.log)}
        done = subprocess.run(
            ["make", *arguments], cwd=self.path, env=environment | variables, capture_output=True, text=True,
            stdin=subprocess.DEVNULL, timeout=60, check=False,
        )  # fmt: skip
        assert (done.returncode == 0) == ok, done.stdout + done.stderr
        return self.log.read_text().splitlines(), done.stdout + done.stderr

    def docker(self, *arguments: str) -> list[list[str]]:
        """Run make. Return the arguments of each call of docker."""
        log = "\n".join(self.make(*arguments)[0])
        return [[word.strip() for word in call.splitlines()] for call in log.split("docker\n")[1:]]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_help_is_the_default_and_shows_all_targets(project):
    _, printed = project.make()
    assert sorted(re.findall(r"^  make (\S+) +\S", printed, re.MULTILINE)) == sorted(PHONY)


def test_environments_are_set_up_once_and_targets_call_their_tools(project):
    install = "python -m pip install --quiet"
    called, _ = project.make("train", "TORCH=cpu", "ARGS=EPOCHS=3 --data 'my data'")
    assert called[0].startswith(install) and called[0].endswith("download.pytorch.org/whl/cpu torch")
    assert called[1] == f"{install} --constraint constraints.txt -e ."
    assert called[2:] == ["python train.py EPOCHS=3 --data my data"]
    assert project.make("train")[0] == ["python train.py"]
    os.utime(project.path / ".venv" / ".ready-cpu", (1, 1))  # older than pyproject.toml
    assert len(project.make("train")[0]) == 3
    development = [f"{install} --constraint constraints.txt -e .[dev]", "python tools/check_torchvision.py"]
    assert project.make("env-dev")[0] == development
    assert project.make("test")[0] == ["python -m pytest"]
    assert project.make("test-all")[0] == ["python -m pytest -m slow or not slow"]
    assert project.make("format")[0] == ["python -m ruff check --fix .", "python -m ruff format ."]
    assert project.make("doc")[0] == ["python -m sphinx -W --keep-going -b html docs docs/_build"]
    project.make("env-remove")
    assert not (project.path / ".venv").exists()


def test_lint_checks_both_packages_and_all_scripts(project):
    paths = [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")]
    scripts = {path.relative_to(ROOT).as_posix() for path in paths}
    for name in scripts:
        (project.path / name).touch()
    (project.path / "dida_core").mkdir()
    project.make("env-dev")
    *others, pylint = project.make("lint")[0]
    assert others == ["python -m ruff check .", "python -m ruff format --check .", "python -m mypy"]
    assert set(pylint.removeprefix("python -m pylint ").split()) == {*scripts, "dida_tools", "dida_core"}


def test_a_gpu_decides_on_cuda_and_torch_can_be_changed(project):
    project.add("nvidia-smi", "exit 0")
    assert not [line for line in project.make("env")[0] if "index-url" in line]
    assert (project.path / ".venv" / ".ready-cuda").exists() and project.make("env")[0] == []
    called, _ = project.make("env", "TORCH=cpu")
    assert called[0] == "python -m pip uninstall -q -y torch" and "index-url" in called[1]
    assert not (project.path / ".venv" / ".ready-cuda").exists()
    assert project.make("env")[0] == []  # what is installed stays


def test_what_is_missing_is_named(project):
    assert "Python 3.9.1 is too old" in project.make("env", ok=False, TOO_OLD="1")[1]
    assert "There is no python9" in project.make("env", "PYTHON=python9", ok=False)[1]
    no_conda = project.make("env-dev", "ENV=conda", "CONDA=", ok=False)[1]
    assert "there is no conda, mamba or micromamba" in no_conda
    assert "There is no weights/a-run/best.pt" in project.make("docker-build", "RUN=a-run", ok=False)[1]
    assert not (project.path / ".venv").exists()


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["conda", "mamba", "micromamba"])
def test_conda_environments_are_made_filled_used_and_removed(project, tool):
    project.add(tool, CONDA)
    for other in ("other", "not-dida-tools", "dida-tools-2"):
        (project.home / tool / "envs" / other).mkdir(parents=True)
    used = project.home / tool / "envs" / "dida-tools" / "bin" / "python"

    def make(*arguments: str) -> list[str]:
        called, printed = project.make(*arguments, CONDA_DEFAULT_ENV="other")
        commands = [line for line in printed.splitlines() if "/bin/python" in line]
        assert all(str(used) in line for line in commands), commands
        return [line for line in called if not line.startswith(f"{tool} env list")]

    create, install = f"{tool} env create -f environment.yml", "python -m pip install --quiet --no-deps -e ."
    assert make("env") == [create, install]
    assert make("env") == [install]
    update = [f"{tool} env update -n dida-tools -f dev.yml", "python tools/check_torchvision.py"]
    assert make("env-dev")[-2:] == update
    assert make("train", "ARGS=EPOCHS=3")[-1] == "python train.py EPOCHS=3"
    assert make("test")[-3:] == [*update, "python -m pytest"]
    make("env-remove")
    assert sorted(os.listdir(project.home / tool / "envs")) == ["dida-tools-2", "not-dida-tools", "other"]
    assert not (project.path / ".venv").exists()
    assert make("env-dev")[0] == create  # env-dev runs env


@pytest.mark.slow
def test_conda_is_found_by_its_variable_and_base_is_not_used(project):
    project.add("conda", CONDA)
    project.make("env", CONDA_DEFAULT_ENV="base")
    assert (project.path / ".venv").exists()
    project.add("micromamba", CONDA)
    (project.home / "bin" / "conda").unlink()
    (project.home / "elsewhere").mkdir()
    tool = (project.home / "bin" / "micromamba").rename(project.home / "elsewhere" / "micromamba")
    for variable in ("MAMBA_EXE", "CONDA_EXE"):
        called, _ = project.make("env", "ENV=conda", **{variable: str(tool)})
        assert any("micromamba env list" in line for line in called)


def test_clean_removes_caches_and_nothing_else(project):
    caches = [".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis", "build", "dist", "docs/_build"]
    gone = [*caches, "dida_tools.egg-info", "dida_tools/__pycache__", "tests/a b/__pycache__"]
    stays = ["data", "logs/run", "weights/run", ".venv/lib/__pycache__", "dida_tools"]
    for name in gone + stays:
        (project.path / name).mkdir(parents=True, exist_ok=True)
        (project.path / name / "a.txt").touch()
    project.make("clean")
    left = {str(path.relative_to(project.path)) for path in project.path.rglob("*") if path.is_dir()}
    assert set(stays) <= left and not left & set(gone)


def options(call: list[str], name: str) -> list[str]:
    """All values that a call gives to an option."""
    return [call[index + 1] for index, word in enumerate(call) if word == name]


def test_docker_build_makes_images_for_prediction_and_training_and_one_with_a_run(project):
    images = project.docker("docker-build", "PACKAGES=monai torchvision", "BASE_IMAGE=python:3.13-slim")
    for call, target in zip(images, ("predict", "train"), strict=True):
        assert (call[0], call[-1]) == ("build", ".")
        assert (options(call, "--target"), options(call, "--tag")) == ([target], [f"dida-tools:{target}"])
        given = ["TORCH=cpu", "PACKAGES=monai torchvision", "BASE_IMAGE=python:3.13-slim"]
        assert options(call, "--build-arg") == given
    for file in ("weights/a-run/best.pt", "logs/a-run/config.json"):
        (project.path / file).parent.mkdir(parents=True)
        (project.path / file).touch()
    [call] = project.docker("docker-build", "RUN=a-run", "TORCH=cuda")
    assert (options(call, "--target"), options(call, "--tag")) == (["run"], ["dida-tools:a-run"])
    assert {"RUN=a-run", "TORCH=cuda"} <= set(options(call, "--build-arg"))


def test_docker_run_trains_and_predicts_as_oneself(project):
    [call] = project.docker("docker-run", "ARGS=EPOCHS=3 --w")
    assert call[:2] == ["run", "--rm"] and options(call, "--user") == [f"{os.getuid()}:{os.getgid()}"]
    folders = ["data", "logs", "predictions", "weights"]
    assert options(call, "--volume") == [f"{project.path}/{name}:/project/{name}" for name in folders]
    assert all((project.path / name).is_dir() for name in folders)  # docker would make them root's
    assert call[-3:] == ["dida-tools:train", "EPOCHS=3", "--w"] and not {"--gpus", "--tty"} & set(call)
    project.add("nvidia-smi", "exit 0")
    [call] = project.docker("docker-run", "RUN=a-run", "ARGS=-i data/new -o predictions")
    mounted = [volume.rpartition(":")[2] for volume in options(call, "--volume")]
    assert mounted == ["/project/data", "/project/predictions"] and options(call, "--gpus") == ["all"]
    assert call[-5:] == ["dida-tools:a-run", "-i", "data/new", "-o", "predictions"]
