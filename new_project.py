"""
Makes a project of your own from this template: its files, under your name, in a new git repository.

    python new_project.py ../crop_yield                              everything, as package crop_yield
    python new_project.py ../crop_yield --routines pytorch,ignite    of the training routines only these
    python new_project.py ../crop_yield --without search,docs        not these parts, nor their tests and dependencies

The last commit of the template is taken. Needs Python 3.11 and git, nothing else.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import keyword
import re
import shlex
import sys
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from tools.template import RECORD, commit_folder, git, refuse, try_git

try:
    import tomllib
except ModuleNotFoundError:  # before Python 3.11
    refuse(f"This is Python {sys.version.split()[0]}: take Python 3.11 or newer.")

ROOT = Path(__file__).resolve().parent


class Part(NamedTuple):
    """What a project can do without; the extra in pyproject.toml and targets in the Makefile bear the name."""

    about: str  # for the project's README
    files: tuple[str, ...]  # * stands for slashes too
    targets: tuple[str, ...] = ()  # in the Makefile, besides those that bear its name


# <- a new part: a line here
PARTS = {
    "search": Part(
        "`python hyperparameter.py --help`: search over a config",
        ("hyperparameter.py", "PACKAGE/search/*", "tests/search/*", "tests/scripts/test_hyperparameter.py"),
    ),
    "export": Part(
        "`PACKAGE/prediction/export.py`: trained models as ONNX or safetensors",
        ("PACKAGE/prediction/export.py", "tests/prediction/test_export.py"),
    ),
    "slurm": Part("`slurm/`: a job for a cluster", ("slurm/*", "tests/scripts/test_slurm.py")),
    "docker": Part(
        "`Dockerfile`: a container",
        ("Dockerfile", ".dockerignore", "docker.mk", "tests/scripts/test_docker.py"),
    ),
    "docs": Part(
        "`docs/`: documentation, built by `make doc`", ("docs/*", "tests/scripts/test_docs.py"), ("doc",)
    ),
    "benchmarks": Part("`benchmarks/`: measuring speed", ("benchmarks/*", "tests/benchmarks/*")),
}
ROUTINE_FILES = ("PACKAGE/training/{}_training.py", "tests/training/test_{}_training.py")
# What is about the template itself.
TEMPLATE_FILES = (
    "README.md",
    "CHANGELOG.md",
    "UPGRADING.md",
    "new_project.py",
    "tests/scripts/test_new_project.py",
)
CONDA_NAMES = {"pytorch-ignite": "ignite"}  # where dev.yml has another name than pyproject.toml


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", type=Path, help="the new project's folder, which is not there yet or is empty"
    )
    parser.add_argument("--name", help="the new package's name (default: that of the folder)")
    parser.add_argument("--routines", metavar="A,B", help=f"of {', '.join(routines_of(ROOT))} (default: all)")
    parser.add_argument("--without", metavar="A,B", default="", help=f"of {', '.join(PARTS)}")
    # What make template-update uses: the same project from this version of the template, without a repository.
    parser.add_argument("--like", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    check_template()
    if arguments.folder.exists() and (not arguments.folder.is_dir() or any(arguments.folder.iterdir())):
        refuse(f"{arguments.folder} is there already and not empty: name a new folder.")
    if ROOT in [arguments.folder.resolve(), *arguments.folder.resolve().parents]:
        refuse(f"{arguments.folder} lies in the template: name a folder outside it, such as ../crop_yield.")
    if arguments.like:
        old = json.loads(arguments.like.read_text())
        record = make_record(old["template"], old["command"], old["name"], old["routines"], old["without"])
        make_files(arguments.folder, record)
        return 0
    name = arguments.name or arguments.folder.resolve().name
    check_name(name)
    routines = chosen("--routines", arguments.routines, routines_of(ROOT)) if arguments.routines else None
    without = chosen("--without", arguments.without, PARTS)
    if try_git("var", "GIT_COMMITTER_IDENT", folder=ROOT).returncode:
        refuse(
            'git does not know who you are: git config --global user.name "..." and user.email, then again.'
        )
    if git("status", "--porcelain", "--untracked-files=no", folder=ROOT):
        print("The template has changes that are not committed: they are left out.", file=sys.stderr)
    command = shlex.join(["python", Path(__file__).name, *sys.argv[1:]])
    make_files(arguments.folder, make_record(template_place(), command, name, routines, without))
    git("init", "--quiet", folder=arguments.folder)
    git(
        "reset",
        "--quiet",
        "--hard",
        commit_folder(arguments.folder, arguments.folder),
        folder=arguments.folder,
    )
    print(
        f"{arguments.folder} holds the project {name}, in its first commit. Next: cd {arguments.folder} && make train"
    )
    return 0


# ---------------------------------------------------------------------------------------------- what the template holds


def check_template() -> None:
    """Refuses a template that is no git repository of its own: its files and its version come from git."""
    top = try_git("rev-parse", "--show-toplevel", folder=ROOT)
    if top.returncode or Path(top.stdout.strip()).resolve() != ROOT:
        refuse(f"{ROOT} is no git repository: get the template with git clone. {top.stderr.strip()}".rstrip())
    if try_git("rev-parse", "--verify", "--quiet", "HEAD", folder=ROOT).returncode:
        refuse(f"{ROOT} has no commit yet: commit the template first.")


def tracked_files() -> list[Path]:
    """The files of the template's last commit."""
    return [Path(line) for line in git("ls-tree", "-r", "--name-only", "HEAD", folder=ROOT).splitlines()]


def package_of(folder: Path) -> str:
    """The name of the one package."""
    return next(file.parent.name for file in folder.glob("*/__init__.py"))


def routines_of(folder: Path) -> list[str]:
    """The training routines that there are."""
    files = folder.glob(f"{package_of(folder)}/training/*_training.py")
    return sorted(file.stem.removesuffix("_training") for file in files)


def template_place() -> str:
    """Where later versions of the template come from: the URL that it was cloned from, or else its folder."""
    url = try_git("remote", "get-url", "origin", folder=ROOT).stdout.strip()
    if url and Path(ROOT, url).is_dir():
        url = str(Path(ROOT, url).resolve())
    return re.sub(r"^(https?://)[^/@]*@", r"\1", url) or str(ROOT)  # without user and password


# ---------------------------------------------------------------------------------------------------- what is asked for


def check_name(name: str) -> None:
    """Refuses a name that is no package's, or that would hide a module or be hidden by one."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or keyword.iskeyword(name):
        refuse(
            f"{name!r} cannot be the name of a package: take small letters, digits and single _, such as crop_yield."
        )
    other = "Choose another folder name, or --name."
    if name in sys.stdlib_module_names or name == "base":
        refuse(f"{name!r} is a module of Python's own, or conda's first environment. {other}")
    parts = {part.partition(".")[0] for file in tracked_files() for part in file.parts}
    ignored = {line.strip("/*\n") for line in (ROOT / ".gitignore").read_text().splitlines()}
    if name in parts | ignored:
        refuse(f"{name!r} is a file or folder of the template. {other}")
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    tested = {line.partition("==")[0].lower().replace("-", "_") for line in pinned}
    if importlib.util.find_spec(name) or name in tested | set(routines_of(ROOT)):
        refuse(f"{name!r} is a package that is installed here, or that the project needs. {other}")


def chosen(option: str, given: str, known: Any) -> list[str]:
    """The names in a list with commas."""
    names = [name.strip() for name in given.split(",") if name.strip()]
    if unknown := [name for name in names if name not in known]:
        refuse(f"{option} {', '.join(unknown)}: there are {', '.join(known)}.")
    return names


def make_record(
    template: str, command: str, name: str, routines: list[str] | None, without: list[str]
) -> dict[str, Any]:
    """Where a project comes from, and with which choices."""
    text = git("show", f"HEAD:{package_of(ROOT)}/__init__.py", folder=ROOT)
    return {
        "template": template,
        "version": re.search(r'__version__ = "(.*)"', text)[1],  # type: ignore[index]
        "commit": git("rev-parse", "HEAD", folder=ROOT),
        "command": command,
        "name": name,
        "routines": routines,
        "without": without,
    }


# ----------------------------------------------------------------------------------------------------- making the files


def make_files(folder: Path, record: dict[str, Any]) -> None:
    """Writes the project's files. From equal records and versions come equal files."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as index:
        options = {"GIT_INDEX_FILE": str(Path(index) / "index")}
        git("read-tree", "HEAD", folder=ROOT, **options)
        git("checkout-index", "--all", f"--prefix={folder.resolve()}/", folder=ROOT, **options)
    old = package_of(folder)
    dropped = set(record["without"]) & PARTS.keys()  # a later version may have parts no more
    if record["routines"] is not None:
        dropped |= set(routines_of(folder)) - set(record["routines"])
    leave_out(folder, dropped, old)
    if not routines_of(folder):
        refuse(f"No routine is left of {', '.join(record['routines'])}: set routines in {RECORD}.")
    rename(folder, old, record["name"])
    set_own_texts(folder, record)


def leave_out(folder: Path, dropped: set[str], package: str) -> None:
    """Removes the files of parts and routines, what only they need, and their targets in the Makefile."""
    patterns = [*TEMPLATE_FILES, *(file for name in dropped & PARTS.keys() for file in PARTS[name].files)]
    patterns += [file.format(name) for name in dropped - PARTS.keys() for file in ROUTINE_FILES]
    for file in tracked_files():
        if fnmatch_any([file.as_posix()], [pattern.replace("PACKAGE", package) for pattern in patterns]):
            (folder / file).unlink()
            for parent in list(file.parents)[:-1]:
                if not any((folder / parent).iterdir()):
                    (folder / parent).rmdir()
    if not dropped:
        return
    names = "|".join(sorted(dropped))

    project = folder / "pyproject.toml"
    text = project.read_text()
    before = requirements(text)
    head, mark, extras = text.partition("[project.optional-dependencies]\n")
    extras, end, tail = extras.partition("\n[")
    extras = re.sub(rf'^(?:{names}) = \[(?:"[^"]*"|[^"\]])*\].*\n', "", extras, flags=re.MULTILINE)
    kept = [name for name in tomllib.loads(extras) if name != "dev"]
    own = package.replace("_", "-")
    extras = re.sub(rf'"{own}\[.*?\]"', f'"{own}[{",".join(kept)}]"', extras)
    text = head + mark + extras + end + tail
    project.write_text(text)

    unneeded = {CONDA_NAMES.get(name, name) for name in before - requirements(text)}
    lines = (folder / "dev.yml").read_text().splitlines(keepends=True)
    wanted = [
        line for line in lines if not (line.startswith("  - ") and requirement_name(line[4:]) in unneeded)
    ]
    (folder / "dev.yml").write_text("".join(wanted))

    # A rule of the Makefile goes from its target to an empty line.
    names = "|".join(
        [names, *(target for name in sorted(dropped & PARTS.keys()) for target in PARTS[name].targets)]
    )
    text = re.sub(
        rf"^(?:{names})(?:-[a-z-]+)?:(?:.+\n)+\n?", "", (folder / "Makefile").read_text(), flags=re.MULTILINE
    )
    lines = text.splitlines(keepends=True)
    phony = re.compile(rf" (?:{names})(?:-[a-z-]+)?(?=\s)")
    (folder / "Makefile").write_text(
        "".join(phony.sub("", x) if x.startswith(".PHONY:") else x for x in lines)
    )


def fnmatch_any(files: list[str], patterns: list[str]) -> bool:
    """Whether one of the files fits one of the patterns."""
    return any(fnmatch(file, pattern) for file in files for pattern in patterns)


def requirements(text: str) -> set[str]:
    """The names of all packages in the text of a pyproject.toml."""
    project = tomllib.loads(text)["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    return {requirement_name(requirement) for one in lists for requirement in one}


def requirement_name(requirement: str) -> str:
    """The package of lightning!=2.6.2."""
    return re.match(r"[\w.-]*", requirement)[0]  # type: ignore[index]


def rename(folder: Path, old: str, new: str) -> None:
    """Renames the package folder, and its name in every file: crop_yield, crop-yield and "crop yield"."""
    (folder / old).rename(folder / new)
    first, *others = old.split("_")
    pattern = re.compile(
        rf"{first}([_-]|\s+)" + r"(?:[_-]|\s+)".join(others), re.IGNORECASE
    )  # a line may end there

    def renamed(match: re.Match) -> str:
        between = match[1]
        text = (
            new.replace("_", between, 1).replace("_", " ") if between.isspace() else new.replace("_", between)
        )
        return text.upper() if match[0].isupper() else text.capitalize() if match[0][0].isupper() else text

    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            try:
                text = file.read_bytes().decode()
            except UnicodeDecodeError:
                continue  # an image
            file.write_bytes(pattern.sub(renamed, text).encode())


def set_own_texts(folder: Path, record: dict[str, Any]) -> None:
    """What is the project's own from the beginning: README, version, description; and where it comes from."""
    name, spoken = record["name"], record["name"].replace("_", " ")
    routines = routines_of(folder)
    replace(folder / name / "__init__.py", r'__version__ = ".*"', '__version__ = "0.1.0"')
    replace(folder / "pyproject.toml", r"^description = .*", f'description = "{spoken}"')
    if "pytorch" not in routines:  # the tests of what all routines share take that one
        for file in folder.glob("tests/**/*.py"):
            replace(file, r"\bpytorch_training\b", f"{routines[0]}_training")
    files = [file.relative_to(folder).as_posix() for file in folder.rglob("*")]
    parts = {
        part.about: [pattern.replace("PACKAGE", name) for pattern in part.files] for part in PARTS.values()
    }
    there = [
        about.replace("PACKAGE", name) for about, patterns in parts.items() if fnmatch_any(files, patterns)
    ]
    readme = README.format(
        title=spoken,
        name=name,
        routines=", ".join(routines),
        parts="".join(f"- {about}\n" for about in there),
    )
    (folder / "README.md").write_text(readme)
    (folder / RECORD).write_text(json.dumps(record, indent=4) + "\n")


def replace(file: Path, pattern: str, text: str) -> None:
    """Replaces what a pattern finds in a file."""
    file.write_text(re.sub(pattern, text, file.read_text(), flags=re.MULTILINE))


README = """\
# {title}

What this project is for, in a sentence or two.

```bash
make train      # sets up .venv, trains a small U-Net on built-in scenes
make test       # sets up the development environment, runs the tests
make help       # everything else
```

With images and masks of your own, in my_data/train/{{x,y}} and my_data/test/{{x,y}}:

```bash
python -m {name}.utils.data.fingerprint my_data       # what is in it, and what config it suggests
python train.py --data my_data EPOCHS=50
python run_prediction.py latest -i new_images/ -o predictions/
```

- `{name}/training/`: the routines ({routines}), each with its config at the top
- `{name}/models/`, `{name}/utils/loss.py`: models, losses and metrics
- `python runs.py list`: what has been trained, from `logs/experiments.csv`
{parts}- `make template-diff`, `make template-update`: later versions of the template that this project was made from
  (`.template.json`), merged by git; your edits stay
"""


if __name__ == "__main__":
    sys.exit(main())
