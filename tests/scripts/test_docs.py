"""
The documentation: it builds without a warning, and what it says can be done.

The tutorial's commands run as they stand, in one shell, with these substitutions:

- TEMPLATE is a clone of this repository with the files as they are now.
- The environment is not installed again: .venv is a stand-in whose python is the one that runs the tests, and make
  finds it ready. ARGS, which make train hands on, makes the first run short.
- EPOCHS=10 and EPOCHS=12 are EPOCHS=1 and EPOCHS=2.

Of README and how-to pages, each command line is parsed by its own script, each config key is checked, and Python blocks
are executed, page by page, as a module; only those below a comment "not run: REASON" are not.
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

from dida_tools.config.check import check
from dida_tools.config.config import global_config
from dida_tools.config.overrides import override
from dida_tools.config.project import project_of
from dida_tools.training.routines import DEFAULT_ROUTINE, load_routine

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = sorted([README, *DOCS.rglob("*.md")])
PAGES = [page for page in PAGES if "_build" not in page.parts]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
# A project made from the template has not all that the pages tell of: parts and routines may have been left out.
IS_TEMPLATE = not (ROOT / ".template.json").exists()
MAKEFILE = "".join(file.read_text() for file in [ROOT / "Makefile", *ROOT.glob("*.mk")])
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


# ------------------------------------------------------------------------------------------------------------ the build


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
    built = subprocess.run(
        [*command, DOCS, tmp_path / "html"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    html = "".join(file.read_text() for file in (tmp_path / "html").rglob("*.html"))
    package = ROOT / "dida_tools"
    for file in package.rglob("*.py"):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if module != package.name:
            assert f'id="module-{module}"' in html, f"{module} is missing in the API reference"
    assert "CHECKPOINT_SECONDS</span>" in html and "passes over the training set" in html
    assert (tmp_path / "html" / "_images" / "architecture.svg").exists()


# ------------------------------------------------------------------------------------------------------------- commands


class Parsed(Exception):
    """Ends a script when it has understood its command line."""


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
    told = io.StringIO()
    try:
        with redirect_stderr(told), redirect_stdout(told):
            if module:
                runpy.run_module(words[0], run_name="__main__", alter_sys=False)
            else:
                runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    except Parsed as parsed:
        return parsed.args[0]
    except SystemExit:
        pytest.fail(f"{shlex.join(words)}: {told.getvalue()}")
    pytest.fail(f"{words[0]} reads no command line")


def check_script(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    """A script of the project, its options, and the config keys that it is given."""
    if not (ROOT / words[0]).is_file() and not IS_TEMPLATE:
        pytest.skip(f"{words[0]} has been left out of this project")
    assert (ROOT / words[0]).is_file(), f"there is no {words[0]}"
    if words[0] == "tools/predict_onnx.py":
        assert len(words) == 4
        return
    if "--routine" in words and not IS_TEMPLATE:
        words = [word for word in words if word not in (words[words.index("--routine") + 1], "--routine")]
    arguments = parse(monkeypatch, words)
    overrides = getattr(arguments, "overrides", [])
    problems: list[str] = []
    project = project_of("dida_tools")
    check(
        override(load_routine(DEFAULT_ROUTINE).train_config, overrides, project, problems), project, problems
    )


def check_module(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    """python -m ..., of the project or pytest."""
    if words[0] == "pytest":
        options = (ROOT / "tests" / "conftest.py").read_text()
        for word in words[1:]:
            assert (
                word in ("-n", "0", "latest")
                or word.startswith("weights/")
                or (ROOT / word).exists()
                or (f'addoption("{word}"' in options)
            ), word
        return
    package, *_ = words[0].split(".")
    assert package == "dida_tools"
    if not (ROOT / Path(*words[0].split("."))).with_suffix(".py").is_file() and not IS_TEMPLATE:
        pytest.skip(f"{words[0]} has been left out of this project")
    parse(monkeypatch, words, module=True)


def check_make(words: list[str]) -> None:
    """Targets and variables of the Makefile."""
    for word in words:
        name, given, _ = word.partition("=")
        if given:
            assert re.search(rf"\$\({name}\)|^{name} ", MAKEFILE, re.MULTILINE), word
        elif name.startswith("docker-") and not (ROOT / "docker.mk").exists():
            pytest.skip("this project has no containers")
        else:
            assert re.search(rf"^{re.escape(name)}:", MAKEFILE, re.MULTILINE), word


@pytest.mark.parametrize("words", ALL_COMMANDS)
def test_every_command_is_understood_by_its_script(monkeypatch, words):
    program, *rest = words
    if program in ("python", "python3"):
        if rest[0] == "-m":
            check_module(monkeypatch, rest[1:])
        else:
            check_script(monkeypatch, rest)
    elif program == "torchrun":
        launched = torchrun_parser().parse_args(rest)
        check_script(monkeypatch, [launched.training_script, *launched.training_script_args])
    elif program == "sbatch":
        if not (ROOT / rest[0]).is_file() and not IS_TEMPLATE:
            pytest.skip("this project has no SLURM job")
        assert (ROOT / rest[0]).is_file()
        check_script(monkeypatch, ["train.py", *rest[1:]])
    elif program == "make":
        check_make(rest)
    else:
        assert program in FOREIGN, f"{program} is not known: {shlex.join(words)}"
    extras = re.findall(r"\.\[(\w+)\]", " ".join(rest))
    project = (ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = ", project, re.MULTILINE) for extra in extras) or not IS_TEMPLATE


def test_a_command_that_is_wrong_is_noticed(monkeypatch):
    wrongs = ["train.py --dta my_data", "train.py EPOCH=3", "runs.py lst", *["nothing.py"] * IS_TEMPLATE]
    for wrong in wrongs:
        with (
            monkeypatch.context() as patched,
            pytest.raises((pytest.fail.Exception, AssertionError, ValueError)),
        ):
            check_script(patched, wrong.split())


def test_no_block_escapes_these_tests():
    found = [" ".join(param.values[0]) for param in ALL_COMMANDS]
    assert sum(command.startswith(("python", "torchrun")) for command in found) > 25
    for page in PAGES:
        if page != README or IS_TEMPLATE:
            opened = re.findall(r"^```(\S*).*?^```$", page.read_text(), re.MULTILINE | re.DOTALL)
            assert set(opened) <= {"bash", "python", "text", "{toctree}"}, page


# ------------------------------------------------------------------------------------------------------ the Python code


WITH_PYTHON = [page for page in PAGES if blocks(page, "python") and page.name != "tutorial.md"]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.stem)
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
    except ImportError as error:  # the package, or of the package's folder a module
        if IS_TEMPLATE or not (error.name or "").startswith("dida_tools"):
            raise
        pytest.skip(f"a part of this project has been left out: {error}")
    finally:
        sys.modules.pop(name, None)
    if "result = train(" in page.read_text():
        assert module.result.metrics and list((tmp_path / "weights").glob("*/best.pt"))


# ----------------------------------------------------------------------------------------------------- links and names


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_and_named_files_exist(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith(("http:", "https:", "#")):
            assert (page.parent / link.partition("#")[0]).exists(), link
    if IS_TEMPLATE:
        named = re.findall(r"`((?:dida_tools|docs|tests|tools|slurm|benchmarks)/[\w./-]*)`", text)
        invented = ("my_net", "gan_training")  # what the reader writes
        for name in named:
            assert (ROOT / name).exists() or any(word in name for word in invented), name


def test_all_names_of_2021_are_there():
    text = (DOCS / "how_to" / "from_2021.md").read_text()
    rows = re.findall(r"^\| `([\w.]+)` \| `(dida_tools[\w.]+)` \|", text, re.MULTILINE)
    assert len(rows) > 35
    for old, new in rows:
        module, _, name = new.rpartition(".")
        assert old.rpartition(".")[2] == name
        if name.endswith("_training"):
            assert (ROOT / Path(*new.split("."))).with_suffix(".py").is_file() or not IS_TEMPLATE, new
        else:
            assert hasattr(importlib.import_module(module), name), new


# --------------------------------------------------------------------------------------------------------- the tutorial


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
@pytest.mark.skipif(not IS_TEMPLATE, reason="the tutorial begins with a clone of the template")
def test_the_tutorial_runs(tmp_path):
    template, work = tmp_path / "origin", tmp_path / "work"
    work.mkdir()
    author = {
        f"GIT_{who}_{what}": "me@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    hidden = ("ROOT_PATH", "LOG_DIR", "WEIGHT_DIR", "DATA_DIR", "PYTHONPATH", "CONDA_DEFAULT_ENV")
    environment = {key: value for key, value in os.environ.items() if key not in hidden} | author
    environment |= {"GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull, "OMP_NUM_THREADS": "1"}
    environment["ARGS"] = (
        "EPOCHS=1 MODEL_CONFIG.n_recursions=1 MODEL_CONFIG.bulk_ch=8 DATASET_CONFIG.train.crops_per_image=1"
    )
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in (name for name in listed if (ROOT / name).is_file()):
        (template / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, template / name)
    for command in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "-m", "The template"]):
        subprocess.run(["git", *command], cwd=template, env=environment, check=True)

    page = DOCS / "tutorial.md"
    [(_, script)] = blocks(page, "python")
    lines = [line for _, text in blocks(page, "bash") for line in text.splitlines()]
    shell = ["set -e"]
    for line in lines:
        line = line.replace("clone TEMPLATE ", f"clone --quiet {shlex.quote(str(template))} ")
        line = line.replace("EPOCHS=10", "EPOCHS=1").replace("EPOCHS=12", "EPOCHS=2")
        if line == "python make_data.py":
            (tmp_path / "make_data.py").write_text(script)
            shell.append(f"cp {shlex.quote(str(tmp_path / 'make_data.py'))} .")
        if line in ("make train", "make env"):
            shell.append(f"{shlex.quote(sys.executable)} {shlex.quote(str(tmp_path / 'stand_in.py'))}")
        shell.append(line)
    source = Path(__file__).read_text()
    function = source[source.index("def make_stand_in") : source.index("@pytest.mark.slow")]
    (tmp_path / "stand_in.py").write_text(
        f"import os, sys\nfrom pathlib import Path\n\n\n{function}make_stand_in(Path.cwd())\n"
    )
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
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
    assert (project / "predictions" / "scene_0.npy").exists() and (
        project / "probabilities" / "scene_0.npy"
    ).exists()
    assert len(list((project / "weights").glob("*/best.pt"))) == 3  # two trainings, and one of them again
    assert list((work / "dida-tools" / "weights").glob("*/best.pt"))
