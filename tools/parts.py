"""
Remove parts and routines that this project does not need, with their tests, docs and dependencies.

    python tools/parts.py list                      parts and routines, with their files
    python tools/parts.py remove search ignite      what git then shows is yours to commit
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tomllib
from collections.abc import Collection, Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RECORD = ".template.json"


class Part(NamedTuple):
    """What a project can do without. Its extra in pyproject.toml, if any, has the part's name."""

    about: str  # for the project's README
    files: tuple[str, ...]  # * matches slashes too


# <- a new part: an entry here
PARTS = {
    "search": Part(
        "`python hyperparameter.py --help`: search over a config",
        (
            "hyperparameter.py",
            "dida_core/search/*",
            "tests/scripts/test_hyperparameter.py",
            "docs/how_to/search.md",
        ),
    ),
    "export": Part(
        "`python -m dida_core.export --help`: trained models as ONNX or safetensors",
        ("dida_core/export/*", "tools/predict_onnx.py", "docs/how_to/export.md"),
    ),
    "doctor": Part(
        "`python -m dida_core.doctor my_data`: what is wrong with a dataset, and what config it suggests",
        ("dida_core/doctor/*",),
    ),
    "slurm": Part("`slurm/`: a job for a cluster", ("slurm/*", "docs/how_to/slurm.md")),
    "docker": Part(
        "`Dockerfile`: a container", ("Dockerfile", ".dockerignore", "docker.mk", "docs/how_to/container.md")
    ),
    "docs": Part("`docs/`: documentation, built by `make doc`", ("docs/*",)),
    "benchmarks": Part("`benchmarks/`: measure speed", ("benchmarks/*",)),
}
ROUTINE_FILES = ("PACKAGE/training/{}_training.py", "tests/training/test_{}_training.py")
CONDA_NAMES = {"pytorch-ignite": "ignite"}  # where dev.yml has another name than pyproject.toml


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("list", "remove"))
    parser.add_argument("names", nargs="*", metavar="NAME", help="of a part or routine")
    arguments = parser.parse_args()
    routines = routines_of(ROOT)
    there = {name: found for name in [*PARTS, *routines] if (found := files_of(ROOT, name))}
    if arguments.command == "list":
        for name, files in there.items():
            print(f"{name}: {', '.join(files)}")
        return 0
    if unknown := [name for name in arguments.names if name not in there]:
        sys.exit(f"{', '.join(unknown)}: no such part or routine; there are {', '.join(there)}.")
    if not set(routines) - set(arguments.names):
        sys.exit("One routine must stay.")
    remove(ROOT, set(arguments.names))
    if (ROOT / RECORD).is_file():  # so that no update brings them back
        record = json.loads((ROOT / RECORD).read_text())
        record["without"] = sorted({*record["without"], *(PARTS.keys() & arguments.names)})
        if set(routines) & set(arguments.names):
            record["routines"] = routines_of(ROOT)
        (ROOT / RECORD).write_text(json.dumps(record, indent=4) + "\n")
    return 0


def package_of(folder: Path) -> str:
    """Return the name of the project's package."""
    return tomllib.loads((folder / "pyproject.toml").read_text())["project"]["name"].replace("-", "_")


def routines_of(folder: Path) -> list[str]:
    """Return the names of the training routines."""
    files = folder.glob(f"{package_of(folder)}/training/*_training.py")
    return sorted(file.stem.removesuffix("_training") for file in files)


def files_of(folder: Path, name: str) -> list[str]:
    """Return the files of a part or a routine."""
    patterns = PARTS[name].files if name in PARTS else [file.format(name) for file in ROUTINE_FILES]
    return matching(folder, [pattern.replace("PACKAGE", package_of(folder)) for pattern in patterns])


def matching(folder: Path, patterns: Iterable[str]) -> list[str]:
    """Return the files that match one of the patterns."""
    starts = {pattern.partition("/")[0] for pattern in patterns}
    inside = [file for start in starts for file in [folder / start, *(folder / start).rglob("*")]]
    paths = sorted(file.relative_to(folder).as_posix() for file in inside if file.is_file())
    return [path for path in paths if any(fnmatch(path, one) for one in patterns) and ".pyc" not in path]


def remove(folder: Path, names: set[str]) -> None:
    """Delete parts and routines, their dependencies, and what pages hold about them."""
    files = {file for name in names for file in files_of(folder, name)}
    delete(folder, sorted(files), [word for name in names for word in words_of(name)])
    remove_extras(folder, names)
    if "pytorch" in names:  # tests and pages about all routines name this one
        first = f"{routines_of(folder)[0]}_training"
        for file in [*folder.glob("tests/**/*.py"), *folder.glob("docs/**/*.md")]:
            file.write_text(re.sub(r"\bpytorch_training\b", first, file.read_text()))


def words_of(name: str) -> list[str]:
    """Return what names a part or a routine in a page: files, packages, options, rows of tables."""
    if name not in PARTS:
        return [f"--routine {name}", f"/{name}_training.py", f"| `{name}` |"]
    paths = [pattern.rstrip("*") for pattern in PARTS[name].files]
    return paths + [path.rstrip("/").replace("/", ".") for path in paths if path.startswith("dida_core/")]


def delete(folder: Path, files: list[str], words: Collection[str] = ()) -> None:
    """Delete files, folders that become empty, and in Markdown links to them and what has these words."""
    for path in files:
        file = folder / path
        file.unlink()
        for parent in file.parents:
            left = [] if parent == folder else [one for one in parent.iterdir() if one.name != "__pycache__"]
            if parent == folder or left:
                break
            for cache in parent.glob("__pycache__/*"):
                cache.unlink()
            for empty in [*parent.glob("__pycache__"), parent]:
                empty.rmdir()
    gone = {os.path.normpath(folder / path) for path in files if path.endswith(".md")}
    for page in [*folder.glob("*.md"), *folder.glob("docs/**/*.md")]:
        page.write_text(shortened(page, gone, words))


def shortened(page: Path, gone: set[str], words: Collection[str]) -> str:
    """
    Return a page's text without paragraphs, list items, table rows and lines of code that contain a word.

    Those that begin with a link to a page that is gone go, too; other links to it become text.
    """

    def is_gone(target: str) -> bool:
        return os.path.normpath(page.parent / target.partition("#")[0]) in gone

    kept: list[str] = []
    was_gone = False
    for unit in units_of(page.read_text()):
        first = re.match(r"(?:(?:[-*|]|\d\.)[^\[\n]*)?\[[^\]]*\]\(([^)\s]+)\)", unit)
        begins = first is not None and is_gone(first[1])
        if begins or is_gone(f"{unit.strip() or '.'}.md") or any(word in unit for word in words):
            was_gone = True
            continue
        if unit.strip() or not (was_gone and kept and not kept[-1].strip()):  # one blank line in its place
            kept.append(unit)
        was_gone = was_gone and not unit.strip()
    text = re.sub(r"^```\w+\n```\n\n?", "", "".join(kept), flags=re.MULTILINE)
    links = r"\[([^\]]*)\]\(([^)\s]+)\)"
    return re.sub(links, lambda link: link[1] if is_gone(link[2]) else link[0], text)


def units_of(text: str) -> Iterator[str]:
    """Yield paragraphs, list items, table rows, lines of code, and blank lines."""
    unit, in_code = "", False
    for line in text.splitlines(keepends=True):
        is_fence = line.startswith("```")
        if in_code or is_fence or not line.strip() or not unit.strip() or re.match(r"[-*] |\||#|\d\. ", line):
            yield unit
            unit = ""
        unit += line
        in_code ^= is_fence
    yield unit


def remove_extras(folder: Path, names: set[str]) -> None:
    """Remove extras from pyproject.toml, and what they alone need from dev.yml."""
    project = folder / "pyproject.toml"
    text = project.read_text()
    before, alternatives = requirements(text), "|".join(sorted(names))
    head, mark, extras = text.partition("[project.optional-dependencies]\n")
    extras, end, tail = extras.partition("\n[")
    line = rf'^(?:{alternatives}) = \[(?:"[^"]*"|[^"\]])*\].*\n'
    extras = re.sub(line, "", extras, flags=re.MULTILINE)
    kept = ",".join(name for name in tomllib.loads(extras) if name != "dev")
    own = package_of(folder).replace("_", "-")
    extras = re.sub(rf'    "{own}\[.*?\]",\n', f'    "{own}[{kept}]",\n' if kept else "", extras)
    project.write_text(head + mark + extras + end + tail)
    unneeded = {CONDA_NAMES.get(name, name) for name in before - requirements(project.read_text())}
    if (folder / "dev.yml").is_file():
        lines = (folder / "dev.yml").read_text().splitlines(keepends=True)
        wanted = [one for one in lines if one[:4] != "  - " or requirement_name(one[4:]) not in unneeded]
        (folder / "dev.yml").write_text("".join(wanted))


def requirements(text: str) -> set[str]:
    """Return the names of all packages in the text of a pyproject.toml."""
    project = tomllib.loads(text)["project"]
    lists = [project["dependencies"], *project.get("optional-dependencies", {}).values()]
    return {requirement_name(requirement) for one in lists for requirement in one}


def requirement_name(requirement: str) -> str:
    """Return the package of lightning!=2.6.2."""
    return re.match(r"[\w.-]*", requirement)[0]  # type: ignore[index]


if __name__ == "__main__":
    sys.exit(main())
