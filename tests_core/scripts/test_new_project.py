"""Projects made from the template: files, names, lists and tests; and their updates."""

import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.helpers import ROOT, ROUTINES
from tests_core.scripts.projects import commit, git, make_template, missing_in_pages, python, run

TINY = ["EPOCHS=1", "MODEL_CONFIG.bulk_ch=8", "MODEL_CONFIG.n_recursions=1", "DEVICE=cpu", "PRECISION=fp32"]
FIRST_RELEASE = "bc95658"  # the last commit of version 0.1
# What the paths of a part's files contain.
MARKS = {
    "search": r"/search/|hyperparameter|/search\.md$",
    "export": r"/export/|/export\.md$|predict_onnx",
    "doctor": r"/doctor/",
    "slurm": r"slurm",
    "docker": r"(?i)docker|/container\.md$",
    "docs": r"^docs/",
    "benchmarks": r"^benchmarks/",
}
OF_THE_TEMPLATE = (
    r"^(CHANGELOG|CONTRIBUTING|UPGRADING)\.md$|^CITATION|^new_project|^tools/(render\.py|project_readme)|"
    r"^docs/(opinions|why_not|tutorial)\.md|from_2021|^tests_core/|^dida_core/pyproject\.toml$"
)
ITS_AFFAIRS = (
    r"\bdida[\s_-]+tools|tests_core|(?i:citation\.cff|(changelog|upgrading|contributing)\.md)|"
    r"(opinions|why_not|from_2021)\.md|why you might not|a test compares"
)
# Name, routines, parts left out. Names before and after the template's in the alphabet.
OPTIONS = {
    "all": ("roads", None, []),
    "some": ("alpha", ["ignite"], ["doctor", "docker"]),
    "least": ("zebra", ["pytorch"], list(MARKS)),
}


def files_of(folder: Path) -> set[str]:
    files = [file.relative_to(folder) for file in folder.rglob("*") if file.is_file()]
    return {file.as_posix() for file in files if not {".git", "__pycache__"} & set(file.parts)}


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the record."""
    paths = git(folder, "ls-files").splitlines()
    return {path: (folder / path).read_bytes() for path in paths if path != ".template.json"}


def record_of(folder: Path, **changes: object) -> dict:
    """The record; changed, where there are changes."""
    file = folder / ".template.json"
    record = json.loads(file.read_text()) | changes
    if changes:
        file.write_text(json.dumps(record, indent=4) + "\n")
    return record


def clone(template: Path, folder: Path) -> Path:
    git(template, "clone", "--quiet", template, folder)
    git(folder, "remote", "remove", "origin")
    return folder


def new_project(template: Path, folder: Path, *options: str, code: int = 0, **variables: str) -> str:
    return python(template, "new_project.py", folder, *options, code=code, **variables)


def options_of(routines: list[str] | None, without: list[str]) -> list[str]:
    chosen = [f"--routines={','.join(routines)}"] if routines else []
    return [*chosen, f"--without={','.join(without)}"]


def edit(file: Path, *changes: tuple[str, str]) -> None:
    """Replace texts, each of which must be there once."""
    text = file.read_text()
    for old, new in changes:
        assert text.count(old) == 1, (file, old, text.count(old))
        text = text.replace(old, new)
    file.write_text(text)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The template as it is now, in a repository of its own, as version 0.2.0."""
    folder = make_template(tmp_path_factory.mktemp("origin"))  # a name that is no branch's and no package's
    git(folder, "tag", "v0.2.0")
    return folder


@pytest.fixture(scope="module", params=list(OPTIONS))
def made(request: pytest.FixtureRequest, template: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """A project's folder, its name, its routines, and what it is without."""
    name, routines, without = OPTIONS[request.param]
    folder = tmp_path_factory.mktemp("made") / name
    new_project(template, folder, *options_of(routines, without))
    return folder, name, routines or ROUTINES, without


# ------------------------------------------------------------------------------------ what a new project is


def test_it_has_exactly_the_files_that_are_wanted_and_the_librarys_as_they_are(template, made):
    folder, name, routines, without = made
    expected = {".template.json", "LICENSE.template"}
    for path in files_of(template) - {"LICENSE"}:
        routine = re.search(r"/(?:test_)?([a-z]+)_training\.py$", path)
        if routine and routine[1] in ROUTINES and routine[1] not in routines:
            continue
        if not any(re.search(MARKS[part], path) for part in without) and not re.search(OF_THE_TEMPLATE, path):
            expected.add(re.sub("^dida_tools/", f"{name}/", path))
            if path.startswith("dida_core/"):
                assert (folder / path).read_bytes() == (template / path).read_bytes(), path
    assert files_of(folder) == expected == set(git(folder, "ls-files").splitlines())
    assert not git(folder, "status", "--porcelain") and git(folder, "rev-list", "--count", "HEAD") == "1"
    empty = [path for path in folder.rglob("*") if path.is_dir() and not any(path.iterdir())]
    assert not [path for path in empty if ".git" not in path.parts]


def test_nothing_is_left_of_the_templates_affairs_and_pages_name_what_is_there(template, made):
    folder, name, _, _ = made
    for path in files_of(folder):
        text = (folder / path).read_bytes().decode(errors="replace")
        assert not re.search(ITS_AFFAIRS, path) and not re.search(ITS_AFFAIRS, text), path
        assert str(template) not in text and str(ROOT) not in text, path
    assert "license" not in tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert missing_in_pages(folder, name) == []


def test_its_record_lists_and_makefile_are_its_own(template, made):
    folder, name, routines, without = made
    record, version = (
        record_of(folder),
        re.search('= "(.*)"', (template / "dida_core/__init__.py").read_text()),
    )
    assert (folder / record["template"]).resolve() == template.resolve()
    assert (record["commit"], record["version"]) == (git(template, "rev-parse", "v0.2.0"), version[1])
    assert (record["name"], record["without"]) == (name, without)
    assert record["routines"] == (routines if routines != ROUTINES else None)
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    extras, yml = project["optional-dependencies"], (folder / "dev.yml").read_text()
    assert project["name"] == name and f"name: {name}\n" in yml
    assert set(ROUTINES) & extras.keys() == set(routines) - {"pytorch"}
    assert not {*without, "template"} & extras.keys()
    for package, there in {"optuna": "search" not in without, "fastai": "fastai" in routines}.items():
        assert (package in yml) == there
    joined = ",".join(extra for extra in extras if extra != "dev")
    assert (f"{name}[{joined}]" in extras["dev"]) == bool(joined)
    update = run(folder, "make", "-n", "template-update", "TAG=v1.2.0", "TEMPLATE=../there", "PYTHON=python")
    assert 'python tools/template.py update v1.2.0 --template "../there"' in update
    assert f"-m pylint {name} dida_core " in run(folder, "make", "-n", "lint", "ENV=venv")


def test_its_code_is_as_clean_as_the_templates(template, made):
    folder, name, _, _ = made
    check = ["-m", "ruff", "check", "--no-cache", "--output-format=concise", "--exit-zero"]
    found, known = (
        set(re.findall(r"(.+?\.py):[\d:]+ (\S+)", python(one, *check).replace("dida_tools", name)))
        for one in (folder, template)
    )
    assert not found - known


def test_the_library_may_be_installed_instead(template, tmp_path):
    folder = tmp_path / "crop_yield"
    assert "wheel --no-deps" in new_project(template, folder, "--core=installed")
    assert not (folder / "dida_core").exists() and record_of(folder)["core"] == "installed"
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    assert "dida-core>=0.2,<0.3" in project["project"]["dependencies"]
    assert project["tool"]["setuptools"]["packages"]["find"]["include"] == ["crop_yield*"]
    docker = (folder / "Dockerfile").read_text()
    assert "COPY dida_core" not in docker and "--find-links . dida-core filelock" in docker
    assert "dida_core" not in (folder / ".dockerignore").read_text()
    (folder / "wheels").mkdir()
    assert "--find-links wheels" in run(folder, "make", "-n", "env", "ENV=venv", "PYTHON=python3")


@pytest.mark.slow
def test_the_templates_url_is_recorded_without_password_and_a_distant_folder_not(template, tmp_path):
    far = tmp_path / "a" / "b" / "c" / "d" / "crops"
    new_project(template, far, "--routines=pytorch")
    assert record_of(far)["template"] is None
    assert "names no place of the template: TEMPLATE=" in update(far, code=1)
    assert "already" in update(far, "--template", template)
    assert (far / record_of(far)["template"]).resolve() == template.resolve()
    assert not git(far, "status", "--porcelain") and "already" in update(far)
    origin = clone(template, tmp_path / "origin")
    git(origin, "remote", "add", "origin", "https://me:secret@example.org/template.git")
    (origin / "train.py").write_text("print('not committed')\n")
    new_project(origin, tmp_path / "crops", "--routines=pytorch")
    assert record_of(tmp_path / "crops")["template"] == "https://example.org/template.git"
    assert "not committed" not in (tmp_path / "crops" / "train.py").read_text()


def train_and_predict(
    folder: Path, name: str, pairs_dir: Path, *options: str, path: Path | None = None
) -> str:
    """Call two scripts in one process: importing PyTorch takes most of the time. Return their rows."""
    commands = [
        ["train.py", "--data", str(pairs_dir), *TINY, *options],
        ["run_prediction.py", "latest", "-i", str(pairs_dir / "test" / "x"), "-o", "predictions"],
    ]
    script = (
        f"import runpy, sys\nfor sys.argv in {commands}:\n    try:\n"
        "        runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "    except SystemExit as ended:\n        assert not ended.code, ended.code\n"
        f"import dida_core, {name} as package\n"
        "print(dida_core.__file__)\n"
        "print(package.__file__, package.__version__, 'dida_tools' in sys.modules)\n"
    )
    printed = python(folder, "-c", script, PYTHONPATH=f"{folder}{os.pathsep}{path}" if path else str(folder))
    library = (path or folder) / "dida_core" / "__init__.py"
    assert printed.endswith(f"\n{library}\n{folder / name / '__init__.py'} 0.1.0 False\n")
    assert len(list((folder / "predictions").glob("image_*"))) == 4
    return (folder / "logs" / "experiments.csv").read_text()


@pytest.mark.parametrize("made", ["least"], indirect=True)
def test_it_trains_and_predicts_under_its_own_name(made, pairs_dir):
    folder, name, _, _ = made
    log = train_and_predict(folder, name, pairs_dir)
    assert ".models.unet:UNET" in log and ".training.pytorch_training" in log
    assert not git(folder, "status", "--porcelain")  # what it makes is ignored


@pytest.mark.slow
def test_it_trains_and_predicts_with_the_library_from_a_wheel(template, tmp_path, pairs_dir):
    source = shutil.copytree(template / "dida_core", tmp_path / "source")  # pip leaves folders there
    pip = ["-m", "pip", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--no-index"]
    python(tmp_path, *pip, "wheel", *options, "--wheel-dir", "wheels", source)
    [wheel] = (tmp_path / "wheels").glob("dida_core-*.whl")
    python(tmp_path, *pip, "install", *options, "--target", tmp_path / "site", wheel)
    new_project(template, tmp_path / "zebra", "--core=installed")
    assert "finished" in train_and_predict(tmp_path / "zebra", "zebra", pairs_dir, path=tmp_path / "site")


@pytest.mark.slow
def test_its_documentation_builds_without_the_parts_that_it_does_not_have(template, tmp_path):
    folder = tmp_path / "zebra"
    without = ",".join(part for part in MARKS if part != "docs")
    new_project(template, folder, "--routines=ignite", f"--without={without}")
    build = ["-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", tmp_path / "html"]
    python(folder, *build, PYTHONPATH=str(folder))
    assert "zebra" in (tmp_path / "html" / "index.html").read_text()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("options", list(OPTIONS))
def test_its_own_tests_pass(template, tmp_path, options):
    name, routines, without = OPTIONS[options]
    new_project(template, tmp_path / name, *options_of(routines, without))
    command = ["-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
    assert " passed" in python(tmp_path / name, *command, PYTHONPATH=str(tmp_path / name))


# ------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("reason", "names"),
    [
        ("cannot be the name of a package", ["2024_crops", "crop-yield", "Crop", "class", "é"]),
        ("a module of Python's own", ["json", "base"]),
        ("a file or folder of the template", ["dida_tools", "train", "loss", "weights"]),
        ("installed here, or that the project needs", ["torch", "ignite", "lightning"]),
    ],
)
def test_a_name_that_would_not_work_is_refused(template, tmp_path, reason, names):
    for name in names:
        refused = new_project(template, tmp_path / name, code=1)
        assert reason in refused and repr(name) in refused
        assert not (tmp_path / name).exists()


def test_what_else_is_wrong_is_reported(template, tmp_path):
    folder, crops = tmp_path / "2024 Crops", ("--name", "crops")
    assert "lies in the template" in new_project(template, template / "crops", code=1)
    assert "there are " + ", ".join(ROUTINES) in new_project(
        template, folder, *crops, "--routines=keras", code=1
    )
    assert "--without serach: there are search" in new_project(
        template, folder, *crops, "--without=serach", code=1
    )
    shutil.copytree(template, tmp_path / "copy", ignore=shutil.ignore_patterns(".git"))
    assert "is no git repository" in new_project(tmp_path / "copy", folder, code=1)
    assert new_project(template, folder, code=1, PATH=str(tmp_path)) == "There is no git: install it.\n"
    assert "git has no committer" in new_project(template, folder, *crops, code=1, GIT_COMMITTER_NAME="")
    old = "import runpy, sys; sys.version_info = (3, 10); runpy.run_path('new_project.py')"
    assert "take Python 3.11 or newer" in python(template, "-c", old, code=1)
    assert not folder.exists()
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    assert "exists and is not empty" in new_project(template, folder, *crops, code=1)
    assert files_of(folder) == {"mine.txt"}
    (folder / "mine.txt").unlink()
    new_project(template, folder, *crops, "--routines", "pytorch")  # a folder may have another name
    assert (folder / "crops" / "__init__.py").is_file() and not git(folder, "status", "--porcelain")


# ----------------------------------------------------------------------------------- parts that are removed


def test_parts_and_routines_are_removed_with_tests_docs_and_dependencies(template, tmp_path):
    folder, again = tmp_path / "crop_yield", tmp_path / "again" / "crop_yield"
    new_project(template, folder)

    def parts(*arguments: str, code: int = 0) -> str:
        return python(folder, "tools/parts.py", *arguments, code=code)

    listed = parts("list")
    assert "\nfastai: crop_yield/training/fastai_training.py" in listed and "hyperparameter.py" in listed
    assert "no such part or routine" in parts("remove", "serach", code=1)
    removed = ["search", "doctor", "slurm", "pytorch", "fastai"]
    parts("remove", *removed)
    assert not re.search("|".join(f"(?m:^{name}:)" for name in removed), parts("list"))
    assert "One routine must stay" in parts("remove", "ignite", "lightning", code=1)
    commit(folder, "Without search, doctor, slurm and two routines")
    record = record_of(folder)
    assert record["routines"] == ["ignite", "lightning"]
    assert record["without"] == ["doctor", "search", "slurm"]
    # Equal to a project that never had them.
    new_project(template, again, *options_of(record["routines"], record["without"]))
    assert contents(folder) == contents(again)


@pytest.mark.slow
@pytest.mark.parametrize("removed", ["pytorch", "ignite"])
def test_without_a_routine_all_else_works(template, tmp_path, pairs_dir, removed):
    folder = tmp_path / "zebra"
    new_project(template, folder)
    python(folder, "tools/parts.py", "remove", removed)
    refused = python(folder, "train.py", "--routine", removed, code=2, PYTHONPATH=str(folder))
    assert "invalid choice" in refused
    # The one that takes its place, or the next in the alphabet.
    other = [] if removed == "pytorch" else ["--routine", next(name for name in ROUTINES if name != removed)]
    assert "finished" in train_and_predict(folder, "zebra", pairs_dir, *other)


# --------------------------------------------------------------------------- later versions of the template


@pytest.fixture(scope="module")
def later(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The template with two further versions: fixes in old files, new files, a renamed file."""
    folder = clone(template, tmp_path_factory.mktemp("later") / "origin")
    package = folder / "dida_tools"
    edit(package / "__init__.py", ('__version__ = "', '__version__ = "9'))
    for path, line in {
        "utils/loss.py": "def smooth_dice_loss(",
        "models/unet.py": "from torch import ",
        "training/fastai_training.py": "def train(",
        "config/device.py": "def get_device(",
    }.items():
        edit(package / path, (line, f"# Fixed: {path}.\n{line}"))
    edit(folder / "train.py", ("import argparse\n", "import argparse\nimport dida_tools.config.colors\n"))
    edit(folder / "Makefile", ("clean:  ## remove caches;", "clean:  ## fixed: remove caches;"))
    red, layer = "from ..config.colors import RED\n", "import ConvLayer\n"
    test = "from dida_tools.utils.fresh import RED\n\n\ndef test_fresh():\n"
    for path, text in {
        "dida_core/fixed.py": "# Fixed: the library.\n",
        "dida_tools/config/colors.py": f"from ..layers.conv {layer}RED = ConvLayer\n",
        "dida_tools/layers/extra.py": f"from ..utils.loss import f1\nfrom .conv {layer}",
        "dida_tools/utils/fresh.py": f"from ..config import device\n{red}from ..layers.extra {layer}",
        "tests/test_fresh.py": f"import dida_tools.config.colors\n{test}    assert RED\n",
    }.items():
        (folder / path).write_text(text)
    git(folder, "mv", "dida_tools/utils/name.py", "dida_tools/utils/naming.py")
    for file in folder.rglob("*.py"):
        file.write_text(re.sub(r"\butils\.name\b", "utils.naming", file.read_text()))
    commit(folder, "Fixes")
    git(folder, "tag", "v0.10.0")
    edit(package / "utils/loss.py", ("# Fixed: utils/loss.py.", "# Fixed: the loss, better."))
    edit(package / "config/colors.py", ("RED =", "BLUE = RED ="))
    commit(folder, "Further fixes")
    git(folder, "tag", "v0.11.0")
    git(folder, "tag", "v0.9.0", "v0.2.0")
    return folder


def edit_project(folder: Path) -> None:
    """What people do to a project: own lines, a loss, a renamed class, no fastai, config moved."""
    package = folder / "crop_yield"
    with open(package / "utils" / "loss.py", "a") as file:
        file.write("\n\ndef our_loss(pred, target):\n    return (pred - target).abs().mean()\n")
    [name] = [*package.glob("utils/name.py"), *package.glob("utils/naming.py")]
    edit(name, ("def date_now(", "# Ours.\ndef date_now("))
    edit(folder / "Makefile", (".PHONY: help", "ours:\n\techo ours\n\n.PHONY: help"))
    git(folder, "rm", "--quiet", "crop_yield/training/fastai_training.py")
    git(folder, "mv", "crop_yield/config", "crop_yield/settings")
    for file in [*folder.glob("*.py"), *package.rglob("*.py"), *folder.glob("tests/**/*.py")]:
        text = re.sub(r"\bUNET\b", "CropNet", file.read_text())
        file.write_text(re.sub(r"(\.\.|crop_yield\.)config\b", r"\1settings", text))
    commit(folder, "Our project")


@pytest.fixture
def edited(template: Path, later: Path, tmp_path: Path) -> Path:
    """A project that people have worked on; its template has moved to where the later versions are."""
    folder = tmp_path / "crop_yield"
    new_project(template, folder, "--without", "slurm")
    edit_project(folder)
    record_of(folder, template=os.path.relpath(later, folder))
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
    return python(folder, "tools/template.py", "update", *arguments, code=code)


def test_a_later_version_arrives_and_all_edits_stay(edited, later, expected):
    before = git(edited, "rev-parse", "HEAD")
    shown = python(edited, "tools/template.py", "diff", "v0.10.0")
    assert "+# Fixed: utils/loss.py." in shown and "rename to crop_yield/utils/naming.py" in shown
    assert "CropNet" not in shown and "slurm/" not in shown and "dida_tools" not in shown
    assert git(edited, "rev-parse", "HEAD") == before and not git(edited, "status", "--porcelain")

    printed = update(edited, "v0.10.0")
    deleted = "crop_yield/training/fastai_training.py"
    assert f"stays deleted, although changed in the template: {deleted}" in printed
    assert "Merged version v0.10.0" in printed
    assert contents(edited) == expected["v0.10.0"]
    for path, text in {  # what is expected holds what is meant
        "crop_yield/utils/loss.py": "# Fixed: utils/loss.py.",
        "crop_yield/settings/device.py": "# Fixed: config/device.py.",
        "dida_core/fixed.py": "# Fixed: the library.\n",
        "crop_yield/utils/fresh.py": "from ..settings.colors",
        "train.py": "import crop_yield.settings.colors\n",
        "crop_yield/utils/naming.py": "# Ours.",
        "crop_yield/__init__.py": '__version__ = "0.1.0"',
    }.items():
        assert text in (edited / path).read_text(), path
    assert "def our_loss" in (edited / "crop_yield/utils/loss.py").read_text()
    record = record_of(edited)
    assert record["commit"] == git(later, "rev-parse", "v0.10.0") and record["version"].startswith("9")
    assert (edited / record["template"]).resolve() == later and record["without"] == ["slurm"]
    assert git(edited, "rev-parse", "HEAD^1") == before and not git(edited, "status", "--porcelain")
    # And again, with the newest version, which is not the last in the alphabet.
    assert "Merged version v0.11.0" in update(edited)
    assert contents(edited) == expected["v0.11.0"]
    assert "already" in update(edited) and "already" in update(edited, "v0.10.0")


@pytest.mark.slow
def test_a_squashed_history_does_no_harm(edited, expected):
    update(edited, "v0.10.0")
    tree = git(edited, "rev-parse", "HEAD^{tree}")
    git(edited, "update-ref", "HEAD", git(edited, "commit-tree", tree, "-m", "All in one"))
    assert "it is made again" in update(edited, "v0.11.0")
    assert contents(edited) == expected["v0.11.0"]
    assert not git(edited, "status", "--porcelain")


@pytest.mark.slow
def test_imports_are_right_where_a_folder_has_moved_deeper(edited):
    git(edited, "mv", "crop_yield/layers", "crop_yield/models/layers")
    for file in [*edited.glob("crop_yield/**/*.py"), *edited.glob("tests/**/*.py")]:
        text = file.read_text().replace("from ..layers.", "from .layers.")
        file.write_text(text.replace("crop_yield.layers", "crop_yield.models.layers"))
    commit(edited, "Layers belong to models")
    update(edited, "v0.10.0")
    package = edited / "crop_yield"
    extra = (package / "models/layers/extra.py").read_text()
    assert extra == "from ...utils.loss import f1\nfrom .conv import ConvLayer\n"
    assert "from ..models.layers.extra import ConvLayer\n" in (package / "utils/fresh.py").read_text()


def test_a_conflict_is_left_where_both_have_changed_the_same_and_can_be_undone(edited, expected):
    path = "crop_yield/utils/loss.py"
    edit(edited / path, ("def smooth_dice_loss(", "# Fixed by us.\ndef smooth_dice_loss("))
    commit(edited, "Fix the loss")
    before = contents(edited)
    reported = update(edited, "v0.10.0", code=1)
    assert f"You and the template have changed the same lines: {path}\n" in reported
    assert "git merge --abort" in reported
    conflict = r"<<<<<<< HEAD\n# Fixed by us.\n=======\n# Fixed: utils/loss.py.\n>>>>>>> "
    assert re.search(conflict, (edited / path).read_text())
    assert contents(edited) == expected["v0.10.0"] | {path: (edited / path).read_bytes()}
    git(edited, "merge", "--abort")
    assert contents(edited) == before and not git(edited, "status", "--porcelain")


@pytest.mark.slow
def test_what_prevents_an_update_is_reported(edited, template, later, tmp_path):
    assert "not made by new_project.py, or is the template itself" in update(template, code=1)
    versions = "it has v0.2.0, v0.9.0, v0.10.0, v0.11.0."
    assert f"The template has no version 'v7': {versions}" in update(edited, "v7", code=1)
    assert "git clone failed" in update(edited, "--template", tmp_path / "nowhere", code=1)
    assert "already" in update(edited, "--template", template)  # that one has no later version
    (edited / "train.py").write_text("# Ours.\n")
    assert "uncommitted changes: commit them" in update(edited, code=1)
    git(edited, "checkout", "train.py")

    git(edited, "update-ref", "HEAD", git(edited, "commit-tree", "HEAD^{tree}", "-m", "All in one"))
    shallow = shutil.copytree(later, tmp_path / "shallow", ignore=shutil.ignore_patterns(".git"))
    git(shallow, "init", "--quiet")
    commit(shallow, "The template without its past")
    missing = f"The template has no commit {git(template, 'rev-parse', 'HEAD')} (version "
    assert missing in update(edited, "--template", shallow, code=1)
    assert not git(edited, "status", "--porcelain")


@pytest.mark.slow
def test_a_part_may_be_removed_later_and_another_be_wanted_after_all(edited, later):
    python(edited, "tools/parts.py", "remove", "benchmarks")
    record_of(edited, without=["benchmarks"])
    commit(edited, "SLURM, but no benchmarks")
    assert "benchmarks" not in update(edited, "v0.10.0", "--template", later)
    assert not (edited / "benchmarks").exists()
    assert "--job-name=crop-yield" in (edited / "slurm" / "train.sbatch").read_text()
    record = record_of(edited)
    assert record["without"] == ["benchmarks"] and (edited / record["template"]).resolve() == later.resolve()


CONFLICTS = {  # edits of what version 0.2 has rewritten, or moved into the library
    "training/pytorch_training.py": ('"EPOCHS": 100', '"EPOCHS": 200'),
    "config/keys.py": ("def complete(", "# Ours.\ndef complete("),
}


@pytest.mark.slow
@pytest.mark.parametrize("conflicts", [{}, CONFLICTS], ids=["merged", "conflicts"])
def test_a_project_of_version_0_1_is_updated(template, tmp_path, pairs_dir, conflicts):
    """Edits of the project's half stay; those of rewritten or moved files conflict, and are named."""
    origin, folder = tmp_path / "origin", tmp_path / "crop_yield"
    if subprocess.run(["git", "cat-file", "-e", FIRST_RELEASE], cwd=ROOT, check=False).returncode:
        pytest.skip(f"this clone has no commit {FIRST_RELEASE}")
    git(ROOT, "archive", "--output", tmp_path / "first.tar", FIRST_RELEASE)
    shutil.unpack_archive(tmp_path / "first.tar", origin, filter="data")
    git(origin, "init", "--quiet")
    commit(origin, "Version 0.1")
    new_project(origin, folder)
    git(origin, "rm", "-r", "--quiet", ".")
    shutil.copytree(template, origin, ignore=shutil.ignore_patterns(".git"), dirs_exist_ok=True)
    commit(origin, "Version 0.2")
    git(origin, "tag", "v0.2.0")
    package = folder / "crop_yield"
    with open(package / "models" / "unet.py", "a") as file:
        file.write("\n\nclass OurNet(UNET):\n    pass\n")
    (package / "models" / "our_net.py").write_text("from .unet import UNET as OurBase\n")
    (package / "training" / "gan_training.py").write_text("from .pytorch_training import train\n")
    git(folder, "rm", "--quiet", "crop_yield/training/fastai_training.py")
    for name, change in conflicts.items():
        edit(package / name, change)
    commit(folder, "Our project")
    printed = update(folder, code=1 if conflicts else 0)  # by the tools of version 0.1
    unmerged = git(folder, "diff", "--name-only", "--diff-filter=U").splitlines()
    assert sorted(unmerged) == sorted(f"crop_yield/{name}" for name in conflicts), printed
    assert "class OurNet" in (package / "models" / "unet.py").read_text()
    assert all((package / name).is_file() for name in ("models/our_net.py", "training/gan_training.py"))
    assert not (package / "training" / "fastai_training.py").exists()
    assert record_of(folder)["version"] >= "0.2"
    assert conflicts or "finished" in train_and_predict(folder, "crop_yield", pairs_dir)
