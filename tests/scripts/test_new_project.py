"""Projects made from the template: their files, names, lists and tests; and later versions of the template in them."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = ["EPOCHS=1", "MODEL_CONFIG.bulk_ch=8", "MODEL_CONFIG.n_recursions=1", "DEVICE=cpu", "PRECISION=fp32"]
ALL_ROUTINES = sorted(
    file.stem.removesuffix("_training") for file in ROOT.glob("dida_tools/training/*_training.py")
)
# What the paths of a part's files have in them.
MARKS = {
    "search": r"(^|/)search/|hyperparameter",
    "export": r"/(test_)?export\.py$",
    "slurm": r"slurm",
    "docker": r"(?i)docker",
    "docs": r"^docs/|/test_docs\.py$",
    "benchmarks": r"benchmarks/",
}
OF_THE_TEMPLATE = {"CHANGELOG.md", "UPGRADING.md", "new_project.py", "tests/scripts/test_new_project.py"}
# Name, routines, parts left out.
OPTIONS = {
    "all": ("crop_yield", None, []),
    "some": ("crop_yield", ["pytorch", "ignite"], ["search"]),
    "least": ("harvest", ["pytorch"], list(MARKS)),
    "without-pytorch": ("ice_map", ["ignite"], ["docs", "docker"]),
}


def environment(**variables: str) -> dict[str, str]:
    """Without what would have git or Python work elsewhere."""
    hidden = (
        "PYTHONPATH",
        "ROOT_PATH",
        "LOG_DIR",
        "WEIGHT_DIR",
        "DATA_DIR",
        "GIT_DIR",
        "GIT_WORK_TREE",
        "GIT_INDEX_FILE",
    )
    author = {
        f"GIT_{who}_{what}": "me@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    # The settings of whoever runs the tests do not count.
    author |= {"GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull, "OMP_NUM_THREADS": "1"}
    kept = {
        name: text
        for name, text in os.environ.items()
        if name not in hidden and not name.startswith("PYTEST_")
    }
    return kept | author | variables


def run(folder: Path, *command: object, code: int = 0, **variables: str) -> str:
    """What a command prints; it must end with that code."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env=environment(**variables),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if code == 0 else done.stdout + done.stderr


def git(folder: Path, *arguments: object) -> str:
    return run(folder, "git", "-c", "core.quotePath=false", *arguments).strip()


def files_of(folder: Path) -> set[str]:
    return {
        file.relative_to(folder).as_posix()
        for file in folder.rglob("*")
        if file.is_file() and ".git" not in file.parts
    }


def commit(folder: Path, message: str) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "-m", message)


def new_project(template: Path, folder: Path, *options: str, code: int = 0) -> str:
    return run(template, sys.executable, "new_project.py", folder, *options, code=code)


def options_of(routines: list[str] | None, without: list[str]) -> list[str]:
    return [f"--routines={','.join(routines or ALL_ROUTINES)}"] * bool(routines) + [
        f"--without={','.join(without)}"
    ]


def edit(file: Path, *changes: tuple[str, str]) -> None:
    """Replaces texts, each of which must be there once."""
    text = file.read_text()
    for old, new in changes:
        assert text.count(old) == 1, (file, old, text.count(old))
        text = text.replace(old, new)
    file.write_text(text)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The template as it is now, in a repository of its own, as version 0.1.0."""
    # A folder whose name tells nothing, and is not that of a branch or package.
    folder = tmp_path_factory.mktemp("origin")
    listed = git(ROOT, "ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    for name in listed:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    git(folder, "init", "--quiet")
    commit(folder, "The template")
    git(folder, "tag", "v0.1.0")
    return folder


@pytest.fixture(scope="module", params=list(OPTIONS))
def made(request: pytest.FixtureRequest, template: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """A project's folder, its name, its routines, and what it is without."""
    name, routines, without = OPTIONS[request.param]
    folder = tmp_path_factory.mktemp("made") / name
    new_project(template, folder, *options_of(routines, without))
    return folder, name, routines or ALL_ROUTINES, without


# ------------------------------------------------------------------------------------------------ what a new project is


def test_it_has_exactly_the_files_that_are_wanted(template, made):
    folder, name, routines, without = made
    expected = {".template.json"}
    for path in files_of(template) - OF_THE_TEMPLATE:
        part_left_out = any(re.search(MARKS[part], path) for part in without)
        routine = re.search(r"/(?:test_)?([a-z]+)_training\.py$", path)
        if not part_left_out and not (routine and routine[1] in ALL_ROUTINES and routine[1] not in routines):
            expected.add(re.sub("^dida_tools/", f"{name}/", path))
    assert files_of(folder) == expected
    assert set(git(folder, "ls-files").splitlines()) == expected
    assert not git(folder, "status", "--porcelain")
    assert not [
        path
        for path in folder.rglob("*")
        if path.is_dir() and ".git" not in path.parts and not any(path.iterdir())
    ]


def test_nothing_of_the_old_name_is_left_but_in_the_record_of_the_origin(made):
    folder, _, _, _ = made
    paths = files_of(folder)
    old = re.compile(rb"(?<![a-z])dida", re.IGNORECASE)  # candidates are no name
    assert not [path for path in paths if old.search(path.encode())]
    assert not [path for path in paths - {".template.json"} if old.search((folder / path).read_bytes())]


def test_it_records_where_it_comes_from(template, made):
    folder, name, routines, without = made
    record = json.loads((folder / ".template.json").read_text())
    assert record["template"] == str(template) and record["commit"] == git(template, "rev-parse", "v0.1.0")
    assert (
        record["version"]
        == re.search('__version__ = "(.*)"', (template / "dida_tools/__init__.py").read_text())[1]
    )
    assert record["command"].startswith(f"python new_project.py {folder}")
    assert record["name"] == name and record["without"] == without
    assert record["routines"] == (routines if routines != ALL_ROUTINES else None)
    assert git(folder, "rev-list", "--count", "HEAD") == "1"


def test_its_lists_of_dependencies_are_those_of_its_parts(made):
    folder, name, routines, without = made
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert project["name"] == name.replace("_", "-")
    assert set(ALL_ROUTINES) & extras.keys() == set(routines) - {"pytorch"}
    assert not set(without) & extras.keys()
    yml = (folder / "dev.yml").read_text()
    assert ("optuna" in yml) == ("search" not in without) and ("fastai" in yml) == ("fastai" in routines)
    assert "ignite" in yml or "ignite" not in routines
    assert yml.startswith("#") and f"name: {name.replace('_', '-')}\n" in yml


def test_its_code_is_as_clean_as_the_templates(template, made):
    folder, name, routines, _ = made
    check = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format=concise", "--exit-zero"]
    found = re.findall(r"(.+?\.py):[\d:]+ (\S+)", run(folder, *check))
    known = re.findall(r"(.+?\.py):[\d:]+ (\S+)", run(template, *check))
    # Where tests take another routine for pytorch, their imports may be in another order.
    found = [(path, code) for path, code in found if code != "I001" or "pytorch" in routines]
    assert {*found} <= {(path.replace("dida_tools/", f"{name}/"), code) for path, code in known}
    run(folder, sys.executable, "-m", "ruff", "format", "--no-cache", "--check")


def test_its_makefile_has_its_own_names(made):
    folder, name, _, _ = made
    assert "template-update" in run(folder, "make", "help")
    planned = run(folder, "make", "-n", "template-update", "TAG=v1.2.0", "TEMPLATE=../there", "PYTHON=python")
    assert 'python tools/template.py update v1.2.0 --template "../there"' in planned
    assert f"-m pylint {name} " in run(folder, "make", "-n", "lint", "ENV=venv")


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("all", "some")]


@pytest.mark.parametrize("made", ["least", "without-pytorch", *SLOW], indirect=True)
def test_it_trains_and_predicts_under_its_own_name(made, pairs_dir):
    folder, name, routines, _ = made
    commands = [
        ["train.py", "--data", str(pairs_dir), *TINY],
        ["run_prediction.py", "latest", "-i", str(pairs_dir / "test" / "x"), "-o", "predictions"],
    ]
    # In one process: importing PyTorch takes most of the time.
    script = f"""
import runpy, sys
for sys.argv in {commands}:
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ended:
        assert not ended.code
import {name} as package
print(package.__file__, package.__version__, "dida_tools" in sys.modules)
"""
    printed = run(folder, sys.executable, "-c", script)
    assert printed.endswith(f"\n{folder / name / '__init__.py'} 0.1.0 False\n")
    assert len(list((folder / "predictions").glob("image_*"))) == 4
    log = (folder / "logs" / "experiments.csv").read_text()
    routine = "pytorch" if "pytorch" in routines else routines[0]
    assert ".models.unet:UNET" in log and f".training.{routine}_training" in log
    assert not git(folder, "status", "--porcelain")  # what it makes is ignored


@pytest.mark.parametrize(
    "made", ["without-pytorch", pytest.param("least", marks=pytest.mark.slow)], indirect=True
)
def test_a_part_of_its_tests_passes_here(made):
    folder, _, _, _ = made
    tests = ["tests/training/test_pictures.py", "tests/utils/test_name.py", "tests/config/test_device.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *tests]
    assert " passed" in run(folder, *command)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("options", ["least", "all"])
def test_its_tests_pass_in_an_environment_of_its_own(template, tmp_path, options):
    name, routines, without = OPTIONS[options]
    new_project(template, tmp_path / name, *options_of(routines, without))
    assert " passed" in run(tmp_path / name, "make", "test", "ENV=venv", f"PYTHON={sys.executable}")


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *(
            (name, "cannot be the name of a package")
            for name in ("2024_crops", "crop-yield", "Crop", "class", "_crop", "é")
        ),
        *((name, "a module of Python's own") for name in ("json", "email", "base")),
        *(
            (name, "a file or folder of the template")
            for name in ("dida_tools", "train", "tests", "loss", "weights")
        ),
        *(
            (name, "installed here, or that the project needs")
            for name in ("torch", "pytest", "ignite", "lightning")
        ),
    ],
)
def test_a_name_that_would_not_work_is_refused(template, tmp_path, name, reason):
    refused = new_project(template, tmp_path / name, code=1)
    assert reason in refused and repr(name) in refused
    assert not (tmp_path / name).exists()


def test_a_folder_may_have_another_name_than_the_package(template, tmp_path):
    new_project(template, tmp_path / "2024 Crops", "--name", "crops", "--routines", "pytorch")
    assert (tmp_path / "2024 Crops" / "crops" / "__init__.py").is_file()
    assert not git(tmp_path / "2024 Crops", "status", "--porcelain")


def test_an_existing_folder_is_left_alone(template, tmp_path):
    (tmp_path / "crops").mkdir()
    (tmp_path / "crops" / "mine.txt").write_text("mine")
    assert "is there already and not empty" in new_project(template, tmp_path / "crops", code=1)
    assert files_of(tmp_path / "crops") == {"mine.txt"}
    (tmp_path / "crops" / "mine.txt").unlink()
    new_project(template, tmp_path / "crops")
    assert (tmp_path / "crops" / "train.py").is_file()


def test_other_things_that_cannot_be_are_told(template, tmp_path):
    assert "lies in the template" in new_project(template, template / "crops", code=1)
    assert "there are " + ", ".join(ALL_ROUTINES) in new_project(
        template, tmp_path / "crops", "--routines=keras", code=1
    )
    assert "--without serach: there are search" in new_project(
        template, tmp_path / "crops", "--without=serach", code=1
    )
    shutil.copytree(template, tmp_path / "copy", ignore=shutil.ignore_patterns(".git"))
    assert "is no git repository" in new_project(tmp_path / "copy", tmp_path / "crops", code=1)
    no_git = run(template, sys.executable, "new_project.py", tmp_path / "crops", code=1, PATH=str(tmp_path))
    assert no_git == "There is no git: install it.\n"
    nobody = run(
        template, sys.executable, "new_project.py", tmp_path / "crops", code=1, GIT_COMMITTER_NAME=""
    )
    assert nobody.startswith("git does not know who you are: git config --global user.name")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "tomllib.py").write_text("raise ModuleNotFoundError\n")  # as in Python 3.10
    old_python = {"PYTHONPATH": str(tmp_path / "old")}
    told = run(template, sys.executable, "new_project.py", tmp_path / "crops", code=1, **old_python)
    assert told.endswith(": take Python 3.11 or newer.\n")
    assert not (tmp_path / "crops").exists()


# ---------------------------------------------------------------------------------- parts, as other templates have them


def copy_of(template: Path, folder: Path) -> Path:
    git(template, "clone", "--quiet", template, folder)
    git(folder, "remote", "remove", "origin")
    return folder


def test_parts_go_with_their_files_extras_and_targets(template, tmp_path):
    template = copy_of(template, tmp_path / "origin")
    for file in (
        "docs/index.md",
        "docs/deep/page.md",
        "Dockerfile",
        "tests/scripts/test_docs.py",
        "dida_tools/search/a.py",
    ):
        (template / file).parent.mkdir(parents=True, exist_ok=True)
        (template / file).write_text("Dida tools, dida-tools; DIDA_TOOLS are dida\ntools.\n")
    edit(
        template / "pyproject.toml",
        ("[tool.setuptools]", '[tool.other]\ndocs = ["stays"]\n\n[tool.setuptools]'),
    )
    text = re.sub(
        r"^docs = .*\n",
        'docs = [\n    "furo[all]>=1",  # a theme\n    "sphinx",\n]\n',
        (template / "pyproject.toml").read_text(),
        count=1,
        flags=re.M,
    )
    (template / "pyproject.toml").write_text(text)
    rules = "docs: env  ## make the documentation\n\tfirst\n\tsecond\n\ndocs-open: docs\n\topen\n\ndocker:\n\tbuild\n\n"
    edit(
        template / "Makefile",
        ("clean:  ##", rules + "clean:  ##"),
        (" lint format ", " lint docs docs-open format docker "),
    )
    commit(template, "Parts")

    new_project(template, tmp_path / "crop_yield", "--without", "docs,search")
    folder = tmp_path / "crop_yield"
    assert (folder / "Dockerfile").read_text() == "Crop yield, crop-yield; CROP_YIELD are crop\nyield.\n"
    assert not (folder / "docs").exists() and not (folder / "crop_yield/search").exists()
    assert not (folder / "tests/scripts/test_docs.py").exists()
    makefile = (folder / "Makefile").read_text()
    assert not re.search(r"^doc:|^\.PHONY:.* doc ", makefile, re.M)
    assert (
        "docs" not in makefile
        and "\ndocker:\n\tbuild\n\nclean:  ##" in makefile
        and " lint format docker " in makefile
    )
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    assert project["tool"]["other"] == {"docs": ["stays"]}
    extras = project["project"]["optional-dependencies"]
    assert not {"docs", "search"} & extras.keys() and "export" in extras
    assert f"crop-yield[{','.join(extra for extra in extras if extra != 'dev')}]" in extras["dev"]
    wanted = (folder / "dev.yml").read_text()
    assert "sphinx" not in wanted and "furo" not in wanted and "optuna" not in wanted and "onnx" in wanted
    assert (
        "`Dockerfile`" in (folder / "README.md").read_text()
        and "docs" not in (folder / "README.md").read_text()
    )


def test_changes_that_are_not_committed_are_left_out_and_told(template, tmp_path):
    template = copy_of(template, tmp_path / "origin")
    edit(template / "train.py", ("Trains a model.", "Trains two models."))
    done = subprocess.run(
        [sys.executable, "new_project.py", tmp_path / "crops"],
        cwd=template,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "not committed: they are left out" in done.stderr
    assert "Trains a model." in (tmp_path / "crops" / "train.py").read_text()


# --------------------------------------------------------------------------------------- later versions of the template


@pytest.fixture(scope="module")
def later(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The template with two further versions: fixes in old files, new files, a renamed file."""
    folder = copy_of(template, tmp_path_factory.mktemp("later") / "origin")
    package = folder / "dida_tools"
    edit(package / "__init__.py", ('__version__ = "', '__version__ = "9'))
    edit(package / "utils" / "loss.py", ("def _dice(", "# Fixed: the loss.\ndef _dice("))
    edit(
        package / "models" / "unet.py",
        ("        height, width =", "        # Fixed: the model.\n        height, width ="),
    )
    edit(package / "training" / "fastai_training.py", ("def train(", "# Fixed: the routine.\ndef train("))
    edit(package / "config" / "keys.py", ("def _instance(", "# Fixed: the keys.\ndef _instance("))
    edit(
        folder / "train.py",
        ('    """The command."""\n', '    """The command."""\n    import dida_tools.config.colors\n'),
    )
    edit(folder / "Makefile", ("clean:  ## remove caches;", "clean:  ## fixed: remove caches;"))
    (package / "config" / "colors.py").write_text(
        "from ..utils.path import shown\nfrom .errors import UserError\n"
    )
    fresh = "from ..config import keys\nfrom ..config.colors import UserError\nfrom ..layers.extra import ConvLayer\n"
    (package / "layers" / "extra.py").write_text(
        "from ..utils.path import shown\nfrom .conv import ConvLayer\n"
    )
    (package / "utils" / "fresh.py").write_text(fresh)
    (folder / "tests" / "utils" / "test_fresh.py").write_text(
        "import dida_tools.config.colors\nfrom dida_tools.utils.fresh import UserError\n\n\n"
        "def test_fresh():\n    assert dida_tools.config.colors.UserError is UserError\n"
    )
    git(folder, "mv", "dida_tools/utils/name.py", "dida_tools/utils/naming.py")
    for file in folder.rglob("*.py"):
        file.write_text(re.sub(r"\butils\.name\b", "utils.naming", file.read_text()))
    commit(folder, "Fixes")
    git(folder, "tag", "v0.10.0")
    edit(package / "utils" / "loss.py", ("# Fixed: the loss.", "# Fixed: the loss, better."))
    edit(package / "config" / "colors.py", ("import shown", "import create_dirs, shown"))
    commit(folder, "Further fixes")
    git(folder, "tag", "v0.11.0")
    git(folder, "tag", "v0.9.0", "v0.1.0")
    return folder


def edit_project(folder: Path) -> None:
    """What people do to their project: another loss, a renamed class, no fastai, config moved, and their own lines."""
    package = folder / "crop_yield"
    loss = package / "utils" / "loss.py"
    text = re.sub(
        r"(def multi_class_dice_ce_sum\(.*?dice_weight: float = )0.5",
        r"\g<1>0.8",
        loss.read_text(),
        flags=re.S,
    )
    loss.write_text(text + "\n\ndef our_loss(pred, target):\n    return (pred - target).abs().mean()\n")
    name = next(
        file for file in (package / "utils" / "name.py", package / "utils" / "naming.py") if file.is_file()
    )
    edit(name, ("def date_now(", "# Ours.\ndef date_now("))
    edit(folder / "Makefile", (".PHONY: help", "ours:\n\techo ours\n\n.PHONY: help"))
    git(folder, "rm", "--quiet", "crop_yield/training/fastai_training.py")
    git(folder, "mv", "crop_yield/config", "crop_yield/settings")
    git(folder, "mv", "tests/config", "tests/settings")
    for file in [*folder.glob("*.py"), *package.rglob("*.py"), *folder.glob("tests/**/*.py")]:
        text = re.sub(r"\bUNET\b", "CropNet", file.read_text())
        file.write_text(re.sub(r"(\.\.|crop_yield\.)config\b", r"\1settings", text))
    commit(folder, "Our project")


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the record, whose command differs."""
    paths = git(folder, "ls-files").splitlines()
    return {path: (folder / path).read_bytes() for path in paths if path != ".template.json"}


@pytest.fixture
def edited(template: Path, later: Path, tmp_path: Path) -> Path:
    """A project of version 0.1.0 that people have worked on; its template has moved to where the later versions are."""
    folder = tmp_path / "crop_yield"
    new_project(template, folder, "--without", "slurm")
    edit_project(folder)
    edit(folder / ".template.json", (f'"{template}"', f'"{later}"'))
    commit(folder, "The template has moved")
    return folder


@pytest.fixture(scope="module")
def expected(later: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """The files when the same is done to a project that is made from a later version."""
    files = {}
    for version in ("v0.10.0", "v0.11.0"):
        git(later, "checkout", "--quiet", version)
        folder = tmp_path_factory.mktemp("expected") / "crop_yield"
        new_project(later, folder, "--without", "slurm")
        edit_project(folder)
        files[version] = contents(folder)
    return files


def update(folder: Path, *arguments: object, code: int = 0) -> str:
    return run(folder, sys.executable, "tools/template.py", "update", *arguments, code=code)


def test_a_later_version_arrives_and_all_edits_stay(edited, later, expected):
    before = git(edited, "rev-parse", "HEAD")
    printed = update(edited, "v0.10.0")
    assert (
        "stays deleted, although the template has changed it: crop_yield/training/fastai_training.py"
        in printed
    )
    assert "Merged version v0.10.0" in printed
    assert contents(edited) == expected["v0.10.0"]
    # What is expected holds what is meant.
    text = (edited / "crop_yield/utils/loss.py").read_text()
    assert "dice_weight: float = 0.8" in text and "def our_loss" in text and "# Fixed: the loss." in text
    assert "# Fixed: the keys." in (edited / "crop_yield/settings/keys.py").read_text()
    assert "from ..settings.colors" in (edited / "crop_yield/utils/fresh.py").read_text()
    assert "    import crop_yield.settings.colors\n" in (edited / "train.py").read_text()
    assert "# Ours." in (edited / "crop_yield/utils/naming.py").read_text()
    assert '__version__ = "0.1.0"' in (edited / "crop_yield/__init__.py").read_text()
    record = json.loads((edited / ".template.json").read_text())
    assert record["commit"] == git(later, "rev-parse", "v0.10.0") and record["version"].startswith("9")
    assert record["template"] == str(later) and record["without"] == ["slurm"]
    assert git(edited, "rev-parse", "HEAD^1") == before and not git(edited, "status", "--porcelain")
    # It works.
    tests = ["tests/utils/test_fresh.py", "tests/settings/test_device.py", "tests/training/test_pictures.py"]
    assert " passed" in run(
        edited, sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *tests
    )
    # And again, with the newest version, which is not the last in the alphabet.
    assert "Merged version v0.11.0" in update(edited)
    assert contents(edited) == expected["v0.11.0"]
    assert "already" in update(edited) and "already" in update(edited, "v0.10.0")


def test_a_history_that_was_squashed_does_no_harm(edited, expected):
    update(edited, "v0.10.0")
    tree = git(edited, "rev-parse", "HEAD^{tree}")
    git(edited, "update-ref", "HEAD", git(edited, "commit-tree", tree, "-m", "All in one"))
    assert "it is made again" in update(edited, "v0.11.0")
    assert contents(edited) == expected["v0.11.0"]
    assert not git(edited, "status", "--porcelain")


def test_imports_are_right_where_a_folder_has_moved_deeper(edited):
    git(edited, "mv", "crop_yield/layers", "crop_yield/models/layers")
    for file in [*edited.glob("crop_yield/**/*.py"), *edited.glob("tests/**/*.py")]:
        text = file.read_text().replace("from ..layers.", "from .layers.")
        file.write_text(text.replace("crop_yield.layers", "crop_yield.models.layers"))
    commit(edited, "Layers belong to models")
    update(edited, "v0.10.0")
    extra = (edited / "crop_yield/models/layers/extra.py").read_text()
    assert extra == "from ...utils.path import shown\nfrom .conv import ConvLayer\n"
    assert (
        "from ..models.layers.extra import ConvLayer\n" in (edited / "crop_yield/utils/fresh.py").read_text()
    )


def test_a_conflict_is_left_where_both_have_changed_the_same_and_can_be_taken_back(edited, expected):
    edit(edited / "crop_yield/utils/loss.py", ("def _dice(", "# Mended by us.\ndef _dice("))
    commit(edited, "Mend the loss")
    before = contents(edited)
    told = update(edited, "v0.10.0", code=1)
    assert "You and the template have changed the same lines: crop_yield/utils/loss.py\n" in told
    assert "git merge --abort" in told
    conflict = (edited / "crop_yield/utils/loss.py").read_text()
    assert re.search(r"<<<<<<< HEAD\n# Mended by us.\n=======\n# Fixed: the loss.\n>>>>>>> ", conflict)
    others = {path: text for path, text in contents(edited).items() if path != "crop_yield/utils/loss.py"}
    assert others == {
        path: text for path, text in expected["v0.10.0"].items() if path != "crop_yield/utils/loss.py"
    }
    git(edited, "merge", "--abort")
    assert contents(edited) == before and not git(edited, "status", "--porcelain")


def test_the_difference_is_shown_as_it_would_arrive(edited):
    before = git(edited, "rev-parse", "HEAD")
    shown = run(edited, sys.executable, "tools/template.py", "diff", "v0.10.0")
    assert "+# Fixed: the loss." in shown and "rename to crop_yield/utils/naming.py" in shown
    assert "CropNet" not in shown and "slurm/" not in shown and "dida" not in shown.lower()
    assert git(edited, "rev-parse", "HEAD") == before and not git(edited, "status", "--porcelain")


def test_what_stands_in_the_way_of_an_update_is_told(edited, template, later, tmp_path):
    assert "this project was not made by new_project.py, or is the template itself" in update(
        template, code=1
    )
    versions = "it has v0.1.0, v0.9.0, v0.10.0, v0.11.0."
    assert f"The template has no version 'v7': {versions}" in update(edited, "v7", code=1)
    assert "git clone failed" in update(edited, "--template", tmp_path / "nowhere", code=1)
    assert "already" in update(edited, "--template", template)  # that one has no later version
    edit(edited / "train.py", ("Trains a model.", "Trains our model."))
    assert "not committed: commit them" in update(edited, code=1)
    git(edited, "checkout", "train.py")

    git(edited, "update-ref", "HEAD", git(edited, "commit-tree", "HEAD^{tree}", "-m", "All in one"))
    shutil.copytree(later, tmp_path / "shallow", ignore=shutil.ignore_patterns(".git"))
    git(tmp_path / "shallow", "init", "--quiet")
    commit(tmp_path / "shallow", "The template without its past")
    told = update(edited, "--template", tmp_path / "shallow", code=1)
    assert f"The template has no commit {git(template, 'rev-parse', 'HEAD')} (version " in told
    assert not git(edited, "status", "--porcelain")


def test_a_part_may_be_given_up_later_and_another_be_wanted_after_all(edited):
    git(edited, "rm", "--quiet", "-r", "benchmarks")
    edit(edited / ".template.json", ('"slurm"', '"benchmarks"'))
    commit(edited, "SLURM, but no benchmarks")
    assert "benchmarks" not in update(edited, "v0.10.0")
    assert not (edited / "benchmarks").exists()
    assert "--job-name=crop-yield" in (edited / "slurm" / "train.sbatch").read_text()
    assert json.loads((edited / ".template.json").read_text())["without"] == ["benchmarks"]
