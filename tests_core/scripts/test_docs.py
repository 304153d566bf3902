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
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from dida_core.config.keys import KEYS
from torch.distributed.run import get_args_parser as torchrun_parser

from dida_tools.config.config import global_config

from tests.helpers import PACKAGE, ROOT, run_script
from tests_core.scripts.projects import make_template, missing_in_pages, python, run

DOCS = ROOT / "docs"
PAGES = [page for page in sorted([ROOT / "README.md", *DOCS.rglob("*.md")]) if "_build" not in page.parts]
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


@pytest.mark.slow
def test_the_documentation_builds_without_a_warning(tmp_path):
    options = ["-W", "--keep-going", "-q", "-b", "html", "-d", tmp_path / "trees"]
    python(ROOT, "-m", "sphinx", *options, DOCS, tmp_path / "html")
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


def parse(words: list[str]) -> argparse.Namespace:
    """What a script, or a module after -m, makes of its command line; nothing of it runs."""

    def ending(original: Any) -> Any:
        def parse_and_end(self: argparse.ArgumentParser, *arguments: Any, **options: Any) -> None:
            raise Parsed(original(self, *arguments, **options))

        return parse_and_end

    module = words[0] == "-m"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(printed), redirect_stdout(printed):
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, name, ending(getattr(argparse.ArgumentParser, name)))
        patch.setattr(sys, "argv", words[module:])
        patch.syspath_prepend(str(ROOT))
        try:
            (runpy.run_module if module else runpy.run_path)(
                words[1] if module else str(ROOT / words[0]), run_name="__main__"
            )
        except Parsed as parsed:
            return parsed.args[0]
        except SystemExit:
            pass
    pytest.fail(f"{shlex.join(words)}: {printed.getvalue()}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project's folder, with the built-in scenes after a while."""
    return tmp_path_factory.mktemp("project")


def check_python(words: list[str], folder: Path) -> None:
    """A script or module, its options, and the config keys that it is given."""
    if words[:2] == ["-m", "pytest"]:
        known = (ROOT / "tests" / "conftest.py").read_text()
        for word in words[2:]:
            is_path = (ROOT / word).exists() or word.startswith("weights/")
            assert is_path or word in ("-n", "0", "latest") or f'addoption("{word}"' in known, word
    elif words[0] == "tools/predict_onnx.py":
        assert len(words) == 4
    else:
        assert words[1].partition(".")[0] in PACKAGES if words[0] == "-m" else (ROOT / words[0]).is_file()
        overrides = getattr(parse(words), "overrides", [])
        if overrides:  # a device that is not there is reported after all problems of the config
            wrong = run_script("train.py", *overrides, "DEVICE=cuda:99", root=folder).stderr
            assert "DEVICE" in wrong and "did you mean" not in wrong, wrong


def check_make(words: list[str]) -> None:
    """Targets and variables of the Makefile."""
    for word in words:
        name, given, _ = word.partition("=")
        pattern = rf"\$\({name}\)|^{name} " if given else rf"^{re.escape(name)}:"
        assert re.search(pattern, MAKEFILE, re.MULTILINE), word


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_every_command_is_parsed_by_its_script(page, folder):
    project = (ROOT / "pyproject.toml").read_text()
    for program, *rest in commands(page) if page.name != "tutorial.md" else []:  # the tutorial runs
        if program in ("python", "python3"):
            check_python(rest, folder)
        elif program == "torchrun":
            launched = torchrun_parser().parse_args(rest)
            check_python([launched.training_script, *launched.training_script_args], folder)
        elif program == "sbatch":
            assert (ROOT / rest[0]).is_file()
            check_python(["train.py", *rest[1:]], folder)
        elif program == "make":
            check_make(rest)
        else:
            assert program in FOREIGN, f"{program} is not known: {shlex.join(rest)}"
        for extra in re.findall(r"\.\[(\w+)\]", " ".join(rest)):
            assert re.search(rf"^{extra} = ", project, re.MULTILINE), extra


@pytest.mark.parametrize("wrong", ["train.py --dta my_data", "train.py EPOCH=3", "runs.py lst", "nothing.py"])
def test_a_wrong_command_is_noticed(wrong, folder):
    with pytest.raises((pytest.fail.Exception, AssertionError)):
        check_python(wrong.split(), folder)


def test_no_block_escapes_these_tests_and_what_is_named_exists():
    found = [words[0] for page in PAGES for words in commands(page)]
    assert found.count("python") + found.count("torchrun") > 35
    for page in PAGES:
        opened = re.findall(r"^```(\S*).*?^```$", page.read_text(), re.MULTILINE | re.DOTALL)
        assert set(opened) <= {"bash", "python", "text", "{toctree}"}, page
    assert missing_in_pages(ROOT, "dida_tools") == []


# ------------------------------------------------------------------------------------------ the Python code


def python_pages() -> list[Any]:
    """Pages with Python code; those that train are slow."""
    pages = [page for page in PAGES if blocks(page, "python") and page.name != "tutorial.md"]
    slow = [[pytest.mark.slow] if "result = train(" in page.read_text() else [] for page in pages]
    return [pytest.param(page, id=page.stem, marks=marks) for page, marks in zip(pages, slow, strict=True)]


@pytest.mark.parametrize("page", python_pages())
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
    # As if it stood in the models of the project, whose classes and functions a record may name.
    models = importlib.import_module(f"{PACKAGE}.models")
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    name = f"{PACKAGE}.models.{name}"
    known = dict(KEYS)  # a page adds keys of its own
    for key, folder in {"LOG_DIR": "logs", "WEIGHT_DIR": "weights", "DATA_DIR": "data"}.items():
        monkeypatch.setitem(global_config, key, str(tmp_path / folder))
    try:
        module = importlib.import_module(name)
    finally:
        sys.modules.pop(name, None)
        for key in KEYS.keys() - known.keys():
            del KEYS[key]
    if "result = train(" in page.read_text():
        assert module.result.metrics and list((tmp_path / "weights").glob("*/best.pt"))


# --------------------------------------------------------------------------------------------- the tutorial


STAND_IN = f"""# An environment that is there already.
mkdir -p .venv/bin
printf '#!/bin/sh\\nexec "%s" "$@"\\n' {sys.executable} > .venv/bin/python
chmod +x .venv/bin/python
echo "export PATH=$PWD/.venv/bin:$PATH" > .venv/bin/activate
touch -d 2000-01-01 pyproject.toml constraints.txt
touch .venv/.ready-cpu .venv/.ready-cuda
"""


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path):
    template, work = make_template(tmp_path / "origin"), tmp_path / "work"
    work.mkdir()
    [(_, script)] = blocks(DOCS / "tutorial.md", "python")
    (tmp_path / "make_data.py").write_text(script)
    shell = ["set -e"]
    for line in (line for _, text in blocks(DOCS / "tutorial.md", "bash") for line in text.splitlines()):
        line = line.replace("clone TEMPLATE ", f"clone --quiet {shlex.quote(str(template))} ")
        line = line.replace("EPOCHS=10", "EPOCHS=1").replace("EPOCHS=12", "EPOCHS=2")
        if line == "python make_data.py":
            shell.append(f"cp {shlex.quote(str(tmp_path / 'make_data.py'))} .")
        if line in ("make train", "make env"):
            shell.append(STAND_IN)
        shell.append(line)
    quick = "EPOCHS=1 MODEL_CONFIG.n_recursions=1 MODEL_CONFIG.bulk_ch=8"
    variables = {"ARGS": f"{quick} DATASET_CONFIG.train.crops_per_image=1"}
    variables["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    printed = run(work, "bash", "-c", "\n".join(shell), **variables)
    assert "test set" in printed and "identical" in printed
    project = work / "crop_yield"
    assert all((project / name / "scene_0.npy").exists() for name in ("predictions", "probabilities"))
    assert len(list((project / "weights").glob("*/best.pt"))) == 3  # two trainings, and one of them again
    assert list((work / "dida-tools" / "weights").glob("*/best.pt"))
