"""The Makefile, run for real with stand-ins for what it calls: Python, conda's three tools and docker."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = ("Makefile", "pyproject.toml", "constraints.txt", "environment.yml", "dev.yml", "README.md")
PARTS = [file.name for file in ROOT.glob("*.mk")]  # of the Makefile
TEXT = "".join((ROOT / name).read_text() for name in ("Makefile", *PARTS))
PHONY = [name for names in re.findall(r"^\.PHONY: (.*)$", TEXT, re.MULTILINE) for name in names.split()]
PHONY.remove("conda-env")  # of conda alone
needs_containers = pytest.mark.skipif("docker.mk" not in PARTS, reason="this project has no containers")

# Writes down what it is asked for, and makes a .venv whose python does the same.
PYTHON = """
case "$1" in
    -c) exit "${TOO_OLD:-0}" ;;
    --version) echo Python 3.9.1 ;;
    -m) if [ "$2" = venv ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; else echo "python $*" >> "$LOG"; fi ;;
    *) echo "python $*" >> "$LOG" ;;
esac
"""
# The parts of conda, mamba and micromamba that the Makefile uses, as each documents them: what is not known is refused,
# what is asked for without *_ALWAYS_YES is not done.
CONDA = """
tool=$(basename "$0"); place=$HOME/$tool
echo "$tool $*" >> "$LOG"
case "$1 $2" in
    "env list")
        envs=$(ls -d "$place/envs"/* 2>/dev/null)
        if [ "$3" = --json ]; then
            case $tool in micromamba) in="    " ;; *) in="  " ;; esac
            printf '{\\n%s"envs": [\\n%s%s"%s"' "$in" "$in" "$in" "$place"
            for env in $envs; do printf ',\\n%s%s"%s"' "$in" "$in" "$env"; done
            printf '\\n%s]' "$in"
            if [ $tool = conda ]; then  # newer ones say more of each
                printf ',\\n  "envs_details": {\\n    "%s": {\\n      "name": "base"\\n    }' "$place"
                for env in $envs; do printf ',\\n    "%s": {\\n      "name": "%s"\\n    }' "$env" "${env##*/}"; done
                printf '\\n  }'
            fi
            printf '\\n}\\n'
        elif [ $tool = conda ]; then
            printf '# conda environments:\\n#\\nbase                  *  %s\\n' "$place"
            for env in $envs; do printf '%-24s %s\\n' "${env##*/}" "$env"; done
        else
            printf '  Name        Active  Path\\n------------------\\n  base        *       %s\\n' "$place"
            for env in $envs; do printf '  %-20s%s\\n' "${env##*/}" "$env"; done
        fi ;;
    "env create")
        [ $# = 4 ] && [ "$3" = -f ] || exit 2
        name=$(sed -n 's/^name: //p' "$4")
        [ ! -e "$place/envs/$name" ] || { echo "prefix already exists"; exit 1; }
        [ $tool = conda ] || [ "$MAMBA_ALWAYS_YES" = true ] || { echo "Confirm changes: [Y/n] Aborted."; exit 1; }
        mkdir -p "$place/envs/$name/bin"; cp "$HOME/bin/python3" "$place/envs/$name/bin/python" ;;
    "env update")
        [ $# = 6 ] && [ "$3" = -n ] && [ "$5" = -f ] || { echo "unrecognized arguments"; exit 2; }
        [ $tool = conda ] || [ "$MAMBA_ALWAYS_YES" = true ] || { echo "Confirm changes: [Y/n] Aborted."; exit 1; }
        [ -d "$place/envs/$4" ] && [ -f "$6" ] || exit 1 ;;
    "env remove")
        [ $# = 4 ] && [ "$3" = -n ] || exit 2
        [ "$CONDA_ALWAYS_YES$MAMBA_ALWAYS_YES" = truetrue ] || { echo "Proceed ([y]/n)? Aborted."; exit 1; }
        rm -r "$place/envs/$4" ;;
    *) exit 2 ;;
esac
"""
DOCKER = 'echo "docker" >> "$LOG"; for one in "$@"; do echo "  $one" >> "$LOG"; done'


class Project:
    """A folder with the Makefile and what it reads, and a home with stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.path, self.home, self.log = folder / "a project", folder / "home", folder / "log"
        self.path.mkdir()
        (self.home / "bin").mkdir(parents=True)
        for name in (*FILES, *PARTS):
            shutil.copy(ROOT / name, self.path / name)
        shutil.copytree(ROOT / "tools", self.path / "tools", ignore=shutil.ignore_patterns("__pycache__"))
        self.add("python3", PYTHON)
        self.add("nvidia-smi", "exit 9")
        self.add("docker", DOCKER)

    def add(self, name: str, script: str) -> None:
        """A stand-in on the PATH."""
        (self.home / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.home / "bin" / name).chmod(0o755)

    def make(self, *arguments: str, ok: bool = True, **variables: str) -> tuple[list[str], str]:
        """Runs make; what the stand-ins were called with since, and what was printed."""
        self.log.write_text("")
        environment = {"PATH": f"{self.home}/bin:/usr/bin:/bin", "HOME": str(self.home), "LOG": str(self.log)}
        answer = subprocess.run(
            ["make", *arguments], cwd=self.path, env=environment | variables, capture_output=True, text=True,
            stdin=subprocess.DEVNULL, timeout=60, check=False,
        )  # fmt: skip
        assert (answer.returncode == 0) == ok, answer.stdout + answer.stderr
        return self.log.read_text().splitlines(), answer.stdout + answer.stderr


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_help_is_the_default_and_shows_all_targets(project):
    _, printed = project.make()
    assert sorted(re.findall(r"^  make (\S+) +\S", printed, re.MULTILINE)) == sorted(PHONY)


@pytest.mark.parametrize("target", ["template-diff", "template-update"])
def test_a_version_of_the_template_is_asked_for_only_if_told(project, target):
    command = f"tools/template.py {target.partition('-')[2]}"
    assert (
        next(line.split(maxsplit=1)[1] for line in project.make("-n", target)[1].splitlines()).strip()
        == command
    )
    assert f"{command} v1.2.0" in project.make("-n", target, "TAG=v1.2.0")[1]


@pytest.mark.parametrize("env", ["venv", "conda"])
@pytest.mark.parametrize("target", PHONY)
def test_every_target_is_understood(project, target, env):
    project.add("conda", CONDA)
    called, printed = project.make("-n", target, f"ENV={env}")
    assert printed
    assert all("env list" in line for line in called)  # nothing else is done


def test_train_sets_up_the_environment_once(project):
    called, _ = project.make("train", "TORCH=cpu", "ARGS=EPOCHS=3 --data 'my data'")
    assert [line.split()[:4] for line in called[:-1]] == [["python", "-m", "pip", "install"]] * 2
    assert called[0].endswith("--index-url https://download.pytorch.org/whl/cpu torch")
    assert called[1].endswith("--constraint constraints.txt -e .")
    assert called[2] == "python train.py EPOCHS=3 --data my data"
    assert project.make("train")[0] == ["python train.py"]
    (project.path / "pyproject.toml").touch()
    os.utime(project.path / ".venv" / ".ready-cpu", (1, 1))
    assert len(project.make("train")[0]) == 3


def test_development_needs_more(project):
    project.make("env")
    called, _ = project.make("env-dev")
    assert called == [
        "python -m pip install --quiet --constraint constraints.txt -e .[dev]", "python tools/check_torchvision.py"
    ]  # fmt: skip
    assert project.make("test")[0] == ["python -m pytest"]
    assert project.make("test-all")[0] == ["python -m pytest -m slow or not slow"]
    assert project.make("format")[0] == ["python -m ruff check --fix .", "python -m ruff format ."]


@pytest.mark.skipif("doc" not in PHONY, reason="this project has no documentation")
def test_doc_takes_warnings_for_errors(project):
    project.make("env-dev")
    assert project.make("doc")[0] == ["python -m sphinx -W --keep-going -b html docs docs/_build"]


def test_lint_checks_the_package_and_all_scripts(project):
    scripts = [path.name for path in ROOT.glob("*.py")]
    tools = [f"tools/{path.name}" for path in ROOT.glob("tools/*.py")]
    for name in scripts:
        (project.path / name).touch()
    project.make("env-dev")
    called, _ = project.make("lint")
    assert called[:3] == ["python -m ruff check .", "python -m ruff format --check .", "python -m mypy"]
    assert called[3].startswith("python -m pylint dida_tools ")
    assert sorted(called[3].split()[4:]) == sorted([*scripts, *tools])


def test_a_gpu_decides_on_cuda_and_torch_can_be_changed(project):
    project.add("nvidia-smi", "exit 0")
    assert [line for line in project.make("env")[0] if "index-url" in line] == []
    assert (project.path / ".venv" / ".ready-cuda").exists()
    assert project.make("env")[0] == []
    called, _ = project.make("env", "TORCH=cpu")
    assert called[0] == "python -m pip uninstall -q -y torch"
    assert len([line for line in called if "index-url" in line]) == 1
    assert not (project.path / ".venv" / ".ready-cuda").exists()
    assert project.make("env")[0] == []  # what is installed stays


def test_an_old_or_missing_python_is_named(project):
    assert "Python 3.9.1 is too old" in project.make("env", ok=False, TOO_OLD="1")[1]
    assert "There is no python9" in project.make("env", "PYTHON=python9", ok=False)[1]
    assert not (project.path / ".venv").exists()


def test_env_remove_removes_the_environment(project):
    project.make("env")
    project.make("env-remove")
    assert not (project.path / ".venv").exists()


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

    assert make("env") == [
        f"{tool} env create -f environment.yml",
        "python -m pip install --quiet --no-deps -e .",
    ]
    assert make("env") == ["python -m pip install --quiet --no-deps -e ."]
    update = [f"{tool} env update -n dida-tools -f dev.yml", "python tools/check_torchvision.py"]
    assert make("env-dev")[-2:] == update
    assert make("train", "ARGS=EPOCHS=3")[-1] == "python train.py EPOCHS=3"
    assert make("test")[-3:] == [*update, "python -m pytest"]
    make("env-remove")
    assert sorted(os.listdir(project.home / tool / "envs")) == ["dida-tools-2", "not-dida-tools", "other"]
    assert not (project.path / ".venv").exists()
    assert make("env-dev")[0] == f"{tool} env create -f environment.yml"  # env-dev runs env


def test_an_active_base_environment_is_not_used(project):
    project.add("conda", CONDA)
    project.make("env", CONDA_DEFAULT_ENV="base")
    assert (project.path / ".venv").exists()


@pytest.mark.parametrize("variable", ["MAMBA_EXE", "CONDA_EXE"])
def test_a_tool_that_is_only_a_function_of_the_shell_is_found(project, variable):
    project.add("micromamba", CONDA)
    elsewhere = project.home / "elsewhere" / "micromamba"
    elsewhere.parent.mkdir()
    (project.home / "bin" / "micromamba").rename(elsewhere)
    called, _ = project.make("env", "ENV=conda", **{variable: str(elsewhere)})
    assert "micromamba env create -f environment.yml" in called


def test_without_conda_it_says_so(project):
    assert (
        "there is no conda, mamba or micromamba"
        in project.make("env-dev", "ENV=conda", "CONDA=", ok=False)[1]
    )


def test_clean_removes_caches_and_nothing_else(project):
    gone = [
        ".pytest_cache/a", ".mypy_cache/a", ".ruff_cache/a", ".hypothesis/a", "build/a", "dist/a",
        "dida_tools.egg-info/a", "docs/_build/a", "dida_tools/__pycache__/a.pyc", "tests/a b/__pycache__/a.pyc",
    ]  # fmt: skip
    stays = [
        "data/a.npy",
        "logs/a/journal.jsonl",
        "weights/a/best.pt",
        ".venv/lib/__pycache__/a.pyc",
        "dida_tools/a.py",
    ]
    for name in gone + stays:
        (project.path / name).parent.mkdir(parents=True, exist_ok=True)
        (project.path / name).touch()
    project.make("clean")
    left = {str(path.relative_to(project.path)) for path in project.path.rglob("*") if path.is_file()}
    assert set(stays) <= left
    assert not left & set(gone)
    assert not (project.path / "build").exists()


def calls(log: list[str]) -> list[list[str]]:
    """The arguments of each call of docker."""
    return [[word.strip() for word in call.splitlines()] for call in "\n".join(log).split("docker\n")[1:]]


def option(name: str) -> Callable[[list[str]], list[str]]:
    """All values that a call gives to an option."""
    return lambda call: [call[index + 1] for index, word in enumerate(call) if word == name]


@needs_containers
def test_docker_build_makes_an_image_for_prediction_and_one_for_training(project):
    predict, train = calls(project.make("docker-build", "PACKAGES=monai torchvision")[0])
    assert (option("--target")(predict), option("--tag")(predict)) == (["predict"], ["dida-tools:predict"])
    assert (option("--target")(train), option("--tag")(train)) == (["train"], ["dida-tools:train"])
    assert (
        option("--build-arg")(predict)
        == option("--build-arg")(train)
        == ["TORCH=cpu", "PACKAGES=monai torchvision"]
    )
    assert predict[0] == train[0] == "build"
    assert predict[-1] == train[-1] == "."
    log, _ = project.make("docker-build", "TORCH=cuda", "BASE_IMAGE=python:3.13-slim")
    assert option("--build-arg")(calls(log)[0])[::2] == ["TORCH=cuda", "BASE_IMAGE=python:3.13-slim"]


@needs_containers
def test_docker_build_puts_a_run_into_an_image(project):
    name = "2026-01-02_03-04-05_some-run"
    log, printed = project.make("docker-build", f"RUN={name}", ok=False)
    assert log == []
    assert f"There is no weights/{name}/best.pt" in printed
    for file in (f"weights/{name}/best.pt", f"logs/{name}/config.json"):
        (project.path / file).parent.mkdir(parents=True)
        (project.path / file).touch()
    [call] = calls(project.make("docker-build", f"RUN={name}")[0])
    assert (option("--target")(call), option("--tag")(call)) == (["run"], [f"dida-tools:{name}"])
    assert f"RUN={name}" in option("--build-arg")(call)


@needs_containers
def test_docker_run_trains_with_data_logs_and_weights_as_oneself(project):
    [call] = calls(project.make("docker-run", "ARGS=EPOCHS=3 --w")[0])
    assert call[:2] == ["run", "--rm"]
    assert option("--user")(call) == [f"{os.getuid()}:{os.getgid()}"]
    folders = ["data", "logs", "predictions", "weights"]
    assert option("--volume")(call) == [f"{project.path}/{folder}:/project/{folder}" for folder in folders]
    assert all((project.path / folder).is_dir() for folder in folders)  # docker would make them root's
    assert call[-3:] == ["dida-tools:train", "EPOCHS=3", "--w"]
    assert not {"--gpus", "--tty"} & set(call)


@needs_containers
def test_docker_run_predicts_with_the_weights_in_the_image(project):
    [call] = calls(project.make("docker-run", "RUN=some-run", "ARGS=-i data/new -o predictions")[0])
    assert [volume.rpartition(":")[2] for volume in option("--volume")(call)] == [
        "/project/data",
        "/project/predictions",
    ]
    assert call[-5:] == ["dida-tools:some-run", "-i", "data/new", "-o", "predictions"]


@needs_containers
def test_docker_run_passes_the_gpu_where_there_is_one(project):
    project.add("nvidia-smi", "exit 0")
    [call] = calls(project.make("docker-run")[0])
    assert option("--gpus")(call) == ["all"]
    [call] = calls(project.make("docker-run", "GPUS=")[0])
    assert "--gpus" not in call


def test_no_recipe_takes_the_name_of_a_run_for_a_python():
    recipes = [line for line in TEXT.splitlines() if line.startswith("\t$(RUN)")]
    assert recipes == []
