"""Write a project's files from the template's last commit, for new_project.py and for updates."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tools.parts import PARTS, delete, files_of, matching, package_of, remove, routines_of
from tools.template import RECORD, git, refuse, try_git

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = "dida_core"
# What is about the template itself.
TEMPLATE_FILES = (
    "README.md",
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "UPGRADING.md",
    "new_project.py",
    "tools/render.py",
    "tools/project_readme.md",
    "docs/opinions.md",
    "docs/why_not.md",
    "docs/tutorial.md",
    "docs/how_to/from_2021.md",
    f"{LIBRARY}/pyproject.toml",
    "tests_core/*",
)


def make_record(
    folder: Path, name: str, routines: list[str] | None, without: list[str], core: str
) -> dict[str, Any]:
    """Return where a project comes from, and with which choices."""
    text = git("show", f"HEAD:{package_of(ROOT)}/__init__.py", folder=ROOT)
    return {
        "template": template_place(folder),
        "version": re.search(r'__version__ = "(.*)"', text)[1],  # type: ignore[index]
        "commit": git("rev-parse", "HEAD", folder=ROOT),
        "name": name,
        "core": core,
        "routines": routines,
        "without": without,
    }


def template_place(folder: Path) -> str | None:
    """
    Return where later versions come from: the URL of the template's origin, without user and password,
    or its place relative to the project, if they lie near each other.
    """
    url = try_git("remote", "get-url", "origin", folder=ROOT).stdout.strip()
    if re.match(r"[\w+]{2,}://|[\w.-]+@[\w.-]+:", url):
        return re.sub(r"^(https?://)[^/@]*@", r"\1", url)
    place = Path(ROOT, url) if url else ROOT
    relative = os.path.relpath(place.resolve(), folder.resolve())
    return relative if relative.count("..") <= 3 else None


def make_files(folder: Path, record: dict[str, Any]) -> None:
    """Write the project's files. Equal records and versions give equal files."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as index:
        options = {"GIT_INDEX_FILE": str(Path(index) / "index")}
        git("read-tree", "HEAD", folder=ROOT, **options)
        git("checkout-index", "--all", f"--prefix={folder.resolve()}/", folder=ROOT, **options)
    parts = set(record["without"]) & PARTS.keys()  # a later version may have fewer parts
    routines = set(routines_of(folder))
    dropped = set() if record["routines"] is None else routines - set(record["routines"])
    if dropped == routines:
        refuse(f"None of the routines {', '.join(record['routines'])} exists: edit routines in {RECORD}.")
    (folder / "LICENSE").rename(folder / "LICENSE.template")
    delete(folder, matching(folder, TEMPLATE_FILES))
    remove(folder, {"template", *parts, *dropped})
    if record["core"] == "installed":
        depend_on_library(folder)
    rename(folder, package_of(folder), record["name"])
    write_own_texts(folder, record)


def rename(folder: Path, old: str, new: str) -> None:
    """Rename the package, and its name in all files but the library's: crop_yield, crop-yield, crop yield."""
    (folder / old).rename(folder / new)
    first, *others = old.split("_")
    rest = r"(?:[_-]|\s+)".join(others)
    pattern = re.compile(rf"{first}([_-]|\s+){rest}", re.IGNORECASE)  # a line may end there

    def renamed(match: re.Match) -> str:
        between = match[1]
        if between.isspace():
            text = new.replace("_", between, 1).replace("_", " ")
        else:
            text = new.replace("_", between)
        return text.upper() if match[0].isupper() else text.capitalize() if match[0][0].isupper() else text

    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink() and file.relative_to(folder).parts[0] != LIBRARY:
            try:
                text = file.read_bytes().decode()
            except UnicodeDecodeError:
                continue  # an image
            file.write_bytes(pattern.sub(renamed, text).encode())


def depend_on_library(folder: Path) -> None:
    """Replace the library's source by a dependency on its package, of this version's first two numbers."""
    version = re.search(r"\d+\.(\d+)", (folder / LIBRARY / "__init__.py").read_text())
    assert version is not None
    shutil.rmtree(folder / LIBRARY)
    requirement = f"dida-core>={version[0]},<0.{int(version[1]) + 1}"
    replace(folder / "pyproject.toml", r"^dependencies = \[\n", rf'\g<0>    "{requirement}",\n')
    replace(folder / "pyproject.toml", rf', "{LIBRARY}\*?"', "")
    if (folder / "Dockerfile").is_file():
        replace(folder / "Dockerfile", rf"^COPY {LIBRARY} .*\n", "")
        replace(folder / "Dockerfile", r"^COPY constraints.txt \.$", "COPY constraints.txt wheel[s] ./")
        replace(folder / "Dockerfile", r"^( +)filelock numpy", r"\1--find-links . dida-core filelock numpy")
        replace(folder / ".dockerignore", rf"^!{LIBRARY}$", "!wheels")


def write_own_texts(folder: Path, record: dict[str, Any]) -> None:
    """Write what is the project's own from the beginning: README, version, description; and the record."""
    name, spoken = record["name"], record["name"].replace("_", " ")
    replace(folder / name / "__init__.py", r'__version__ = ".*"', '__version__ = "0.1.0"')
    replace(folder / "pyproject.toml", r"^description = .*", f'description = "{spoken}"')
    replace(folder / "pyproject.toml", r"^license = .*\n", "")
    there = "the library, as source" if record["core"] == "vendored" else "the library, an installed package"
    abouts = [part.about.replace("PACKAGE", name) for key, part in PARTS.items() if files_of(folder, key)]
    readme = (ROOT / "tools" / "project_readme.md").read_text()
    values = {"TITLE": spoken, "LIBRARY": there, "PACKAGE": name}
    values["PARTS\n"] = "".join(f"- {about}\n" for about in abouts)
    for key, value in values.items():
        readme = readme.replace(key, value)
    (folder / "README.md").write_text(readme)
    (folder / RECORD).write_text(json.dumps(record, indent=4) + "\n")


def replace(file: Path, pattern: str, text: str) -> None:
    """Replace what a pattern matches in a file."""
    file.write_text(re.sub(pattern, text, file.read_text(), flags=re.MULTILINE))
