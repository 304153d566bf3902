"""
The documentation: it builds without a warning, and what it says can be done.

Of README and how-to pages, each command line is parsed by its own script, each config key is checked, and
Python blocks are executed, page by page, as a module; except below a comment "not run: REASON". The
tutorial's commands run as they stand, in one shell; but TEMPLATE is a clone of this repository with the
files as they are now, .venv is a stand-in with the python that runs the tests, and trainings are short.
"""

import argparse
import importlib
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser as torchrun_parser

from dida_tools.config.config import global_config

from tests.helpers import ROOT, run_script

DOCS, README = ROOT / "docs", ROOT / "README.md"
PAGES = [page for page in sorted([README, *DOCS.rglob("*.md")]) if "_build" not in page.parts]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
PACKAGES = ("dida_tools", "dida_core")
MAKEFILE = "".join((ROOT / name).read_text() for name in ("Makefile", "docker.mk", "docs/docs.mk"))
# What is no part of the project, and has to be believed.
FOREIGN = {"cd", "cp", "mkdir", "source", "git", "diff", "docker", "pip", "tensorboard", "optuna-dashboard"}
FOREIGN |= {"pre-commit"}


def blocks(page: Path, language: str) -> list[tuple[str, str]]:
    """Fenced blocks in that language, each with the line above it."""
    return re.findall(rf"^([^\n]*)\n```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """The words of each command line of a page."""
    lines = [line for _, text in blocks(page, "bash") for line in text.replace("\\\n", " ").splitlines()]
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


ALL_COMMANDS = [
    pytest.param(words, id=f"{name}: {' '.join(words)}"[:90])
    for page, name in zip(PAGES, NAMES, strict=True)
    if page.name != "tutorial.md"  # runs
    for words in commands(page)
]


@pytest.mark.slow
def test_the_documentation_builds_without_a_warning(tmp_path):
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-b",
        "html",
        "-d",
        tmp_path / "trees",
    ]
    command += [DOCS, tmp_path / "html"]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    html = "".join(file.read_text() for file in (tmp_path / "html").rglob("*.html"))
    for file in (file for package in PACKAGES for file in (ROOT / package).rglob("*.py")):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if module not in PACKAGES and file.stem != "__main__":
            assert f'id="module-{module}"' in html, f"{module} is missing in the API reference"
    assert "CHECKPOINT_SECONDS</span>" in html and "passes over the training set" in html
    assert (tmp_path / "html" / "_images" / "architecture.svg").exists()


# ------------------------------------------------------------------------------------------------- commands


class Parsed(Exception):
    """Ends a script when it has parsed its command line."""


def parse(monkeypatch: pytest.MonkeyPatch, words: list[str], module: bool = False) -> argparse.Namespace:
    """What a script makes of its command line; nothing of it runs."""

    def ending(original: Any) -> Any:
        def parse_and_end(self: argparse.ArgumentParser, *arguments: Any, **options: Any) -> None:
            raise Parsed(original(self, *arguments, **options))

        return parse_and_end

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, ending(getattr(argparse.ArgumentParser, name)))
    monkeypatch.setattr(sys, "argv", list(words))
    monkeypatch.syspath_prepend(str(ROOT))
    printed = io.StringIO()
    try:
        with redirect_stderr(printed), redirect_stdout(printed):
            if module:
                runpy.run_module(words[0], run_name="__main__", alter_sys=False)
            else:
                runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    except Parsed as parsed:
        return parsed.args[0]
    except SystemExit:
        pytest.fail(f"{shlex.join(words)}: {printed.getvalue()}")
    pytest.fail(f"{words[0]} reads no command line")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project's folder, with the built-in scenes after a while."""
    return tmp_path_factory.mktemp("project")


def check_script(monkeypatch: pytest.MonkeyPatch, words: list[str], folder: Path) -> None:
    """A script of the project, its options, and the config keys that it is given."""
    assert (ROOT / words[0]).is_file(), f"there is no {words[0]}"
    if words[0] == "tools/predict_onnx.py":
        assert len(words) == 4
        return
    with monkeypatch.context() as patched:
        overrides = getattr(parse(patched, words), "overrides", [])
    if overrides:  # a device that is not there is reported after all problems of the config
        wrong = run_script("train.py", *overrides, "DEVICE=cuda:99", root=folder).stderr
        assert "DEVICE" in wrong and "did you mean" not in wrong, wrong


def check_module(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    """python -m ..., of the project or pytest."""
    if words[0] != "pytest":
        assert words[0].partition(".")[0] in PACKAGES
        parse(monkeypatch, words, module=True)
        return
    known = (ROOT / "tests" / "conftest.py").read_text()
    for word in words[1:]:
        is_path = (ROOT / word).exists() or word.startswith("weights/")
        assert is_path or word in ("-n", "0", "latest") or f'addoption("{word}"' in known, word


def check_make(words: list[str]) -> None:
    """Targets and variables of the Makefile."""
    for word in words:
        name, given, _ = word.partition("=")
        pattern = rf"\$\({name}\)|^{name} " if given else rf"^{re.escape(name)}:"
        assert re.search(pattern, MAKEFILE, re.MULTILINE), word


@pytest.mark.parametrize("words", ALL_COMMANDS)
def test_every_command_is_parsed_by_its_script(monkeypatch, words, folder):
    program, *rest = words
    if program in ("python", "python3"):
        if rest[0] == "-m":
            check_module(monkeypatch, rest[1:])
        else:
            check_script(monkeypatch, rest, folder)
    elif program == "torchrun":
        launched = torchrun_parser().parse_args(rest)
        check_script(monkeypatch, [launched.training_script, *launched.training_script_args], folder)
    elif program == "sbatch":
        assert (ROOT / rest[0]).is_file()
        check_script(monkeypatch, ["train.py", *rest[1:]], folder)
    elif program == "make":
        check_make(rest)
    else:
        assert program in FOREIGN, f"{program} is not known: {shlex.join(words)}"
    project = (ROOT / "pyproject.toml").read_text()
    for extra in re.findall(r"\.\[(\w+)\]", " ".join(rest)):
        assert re.search(rf"^{extra} = ", project, re.MULTILINE), extra


def test_a_wrong_command_is_noticed(monkeypatch, folder):
    for wrong in ("train.py --dta my_data", "train.py EPOCH=3", "runs.py lst", "nothing.py"):
        with monkeypatch.context() as patched, pytest.raises((pytest.fail.Exception, AssertionError)):
            check_script(patched, wrong.split(), folder)


def test_no_block_escapes_these_tests():
    found = [" ".join(param.values[0]) for param in ALL_COMMANDS]
    assert sum(command.startswith(("python", "torchrun")) for command in found) > 25
    for page in PAGES:
        opened = re.findall(r"^```(\S*).*?^```$", page.read_text(), re.MULTILINE | re.DOTALL)
        assert set(opened) <= {"bash", "python", "text", "{toctree}"}, page


# ------------------------------------------------------------------------------------------ the Python code


WITH_PYTHON = [
    pytest.param(
        page, id=page.stem, marks=[pytest.mark.slow] if "result = train(" in page.read_text() else []
    )
    for page in PAGES
    if blocks(page, "python") and page.name != "tutorial.md"
]


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_code_runs(page, tmp_path, pairs_dir, monkeypatch):
    parts = blocks(page, "python")
    for _, text in parts:
        compile(text, str(page), "exec")
    for text in (text for above, text in parts if "not run:" in above):
        imports = [line for line in text.splitlines() if line.startswith(("import ", "from "))]
        exec("\n".join(imports), {})
    name = f"code_of_{page.stem.lower()}"
    (tmp_path / f"{name}.py").write_text("\n".join(text for above, text in parts if "not run:" not in above))
    (tmp_path / "my_data").symlink_to(pairs_dir)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for key, folder in {"LOG_DIR": "logs", "WEIGHT_DIR": "weights", "DATA_DIR": "data"}.items():
        monkeypatch.setitem(global_config, key, str(tmp_path / folder))
    try:
        module = importlib.import_module(name)
    finally:
        sys.modules.pop(name, None)
    if "result = train(" in page.read_text():
        assert module.result.metrics and list((tmp_path / "weights").glob("*/best.pt"))


# ------------------------------------------------------------------------------------------ links and names


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_and_named_files_exist(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith(("http:", "https:", "#")):
            assert (page.parent / link.partition("#")[0]).exists(), link
    invented = ("my_net", "gan_training", "history")  # what the reader writes
    for name in re.findall(r"`((?:dida_tools|dida_core|docs|tests|tools|slurm|benchmarks)/[\w./-]*)`", text):
        assert (ROOT / name).exists() or any(word in name for word in invented), name


def test_all_names_of_2021_are_there():
    text = (DOCS / "how_to" / "from_2021.md").read_text()
    rows = re.findall(r"^\| `([\w.]+)` \| `(dida_tools[\w.]+)` \|", text, re.MULTILINE)
    assert len(rows) > 35
    for old, new in rows:
        module, _, name = new.rpartition(".")
        assert old.rpartition(".")[2] == name
        if name.endswith("_training"):
            assert (ROOT / Path(*new.split("."))).with_suffix(".py").is_file(), new
        else:
            assert hasattr(importlib.import_module(module), name), new


# --------------------------------------------------------------------------------------------- the tutorial


def make_stand_in(folder: Path) -> None:
    """An environment that is there already."""
    (folder / ".venv" / "bin").mkdir(parents=True)
    python = folder / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (folder / ".venv" / "bin" / "activate").write_text(f'export PATH="{python.parent}:$PATH"\n')
    for name in ("pyproject.toml", "constraints.txt"):
        os.utime(folder / name, (1, 1))  # older than the environment
    for name in (".ready-cpu", ".ready-cuda"):
        (folder / ".venv" / name).touch()


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path):
    template, work = tmp_path / "origin", tmp_path / "work"
    work.mkdir()
    hidden = ("ROOT_PATH", "LOG_DIR", "WEIGHT_DIR", "DATA_DIR", "PYTHONPATH", "CONDA_DEFAULT_ENV")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    for who in ("AUTHOR", "COMMITTER"):
        environment |= {f"GIT_{who}_NAME": "me", f"GIT_{who}_EMAIL": "me@example.org"}
    environment |= {"GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull, "OMP_NUM_THREADS": "1"}
    quick = "EPOCHS=1 MODEL_CONFIG.n_recursions=1 MODEL_CONFIG.bulk_ch=8"
    environment["ARGS"] = f"{quick} DATASET_CONFIG.train.crops_per_image=1"
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    list_files = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(list_files, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in (name for name in listed.splitlines() if (ROOT / name).is_file()):
        (template / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, template / name)
    for command in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "-m", "The template"]):
        subprocess.run(["git", *command], cwd=template, env=environment, check=True)

    page = DOCS / "tutorial.md"
    [(_, script)] = blocks(page, "python")
    (tmp_path / "make_data.py").write_text(script)
    source = Path(__file__).read_text()
    function = source[source.index("def make_stand_in") : source.index("@pytest.mark.slow\ndef test_the_tut")]
    stand_in = f"import os, sys\nfrom pathlib import Path\n\n\n{function}make_stand_in(Path.cwd())\n"
    (tmp_path / "stand_in.py").write_text(stand_in)
    shell = ["set -e"]
    for line in (line for _, text in blocks(page, "bash") for line in text.splitlines()):
        line = line.replace("clone TEMPLATE ", f"clone --quiet {shlex.quote(str(template))} ")
        line = line.replace("EPOCHS=10", "EPOCHS=1").replace("EPOCHS=12", "EPOCHS=2")
        if line == "python make_data.py":
            shell.append(f"cp {shlex.quote(str(tmp_path / 'make_data.py'))} .")
        if line in ("make train", "make env"):
            shell.append(f"{shlex.quote(sys.executable)} {shlex.quote(str(tmp_path / 'stand_in.py'))}")
        shell.append(line)
    done = subprocess.run(
        ["bash", "-c", "\n".join(shell)],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test set" in done.stdout and "identical" in done.stdout
    project = work / "crop_yield"
    assert all((project / name / "scene_0.npy").exists() for name in ("predictions", "probabilities"))
    assert len(list((project / "weights").glob("*/best.pt"))) == 3  # two trainings, and one of them again
    assert list((work / "dida-tools" / "weights").glob("*/best.pt"))
