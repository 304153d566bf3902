"""
Make a project of your own from this template: its files, under your name, in a new git repository.

    python new_project.py ../crop_yield                              everything, as package crop_yield
    python new_project.py ../crop_yield --routines pytorch,ignite    only these training routines
    python new_project.py ../crop_yield --without search,docs        without these parts and what they need
    python new_project.py ../crop_yield --core installed             the library as a dependency, not source

It takes the template's last commit. It needs Python 3.11 and git, nothing else.
"""

import argparse
import importlib.util
import json
import keyword
import re
import sys
from collections.abc import Collection
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(f"Python {sys.version.split()[0]} is too old: take Python 3.11 or newer.")

from tools.parts import PARTS, routines_of
from tools.render import ROOT, make_files, make_record
from tools.template import commit_folder, git, refuse, try_git


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the new project's folder: a new or an empty one")
    parser.add_argument("--name", help="the new package's name (default: that of the folder)")
    parser.add_argument("--routines", metavar="A,B", help=f"of {', '.join(routines_of(ROOT))} (default: all)")
    parser.add_argument("--without", metavar="A,B", default="", help=f"of {', '.join(PARTS)}")
    parser.add_argument(
        "--core",
        choices=("vendored", "installed"),
        default="vendored",
        help="the library (default: vendored)",
    )
    # For make template-update: the files of this record, from this version of the template, without git.
    parser.add_argument("--like", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.folder
    check_template()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        refuse(f"{folder} exists and is not empty: name a new folder.")
    if ROOT in [folder.resolve(), *folder.resolve().parents]:
        refuse(f"{folder} lies in the template: name a folder outside it, such as ../crop_yield.")
    if arguments.like:
        old = json.loads(arguments.like.read_text())
        record = make_record(
            folder, old["name"], old["routines"], old["without"], old.get("core", "vendored")
        )
        make_files(folder, record | {"template": old["template"]})
        return 0
    name = arguments.name or folder.resolve().name
    check_name(name)
    routines = chosen("--routines", arguments.routines, routines_of(ROOT)) if arguments.routines else None
    without = chosen("--without", arguments.without, PARTS)
    if try_git("var", "GIT_COMMITTER_IDENT", folder=ROOT).returncode:
        refuse('git has no committer: git config --global user.name "..." and user.email, then repeat.')
    if git("status", "--porcelain", "--untracked-files=no", folder=ROOT):
        print("The template has uncommitted changes: they are left out.", file=sys.stderr)
    make_files(folder, make_record(folder, name, routines, without, arguments.core))
    git("init", "--quiet", folder=folder)
    git("reset", "--quiet", "--hard", commit_folder(folder, folder), folder=folder)
    print(f"{folder} holds the project {name}, in its first commit. Next: cd {folder} && make train")
    if arguments.core == "installed":
        build = f"python -m pip wheel --no-deps --wheel-dir {folder}/wheels {ROOT / 'dida_core'}"
        print(f"Before, unless your package index has dida-core: {build}")
    return 0


def check_template() -> None:
    """Refuse a template that is no git repository of its own: its files and its version come from git."""
    top = try_git("rev-parse", "--show-toplevel", folder=ROOT)
    if top.returncode or Path(top.stdout.strip()).resolve() != ROOT:
        refuse(f"{ROOT} is no git repository: get the template with git clone. {top.stderr.strip()}".rstrip())
    if try_git("rev-parse", "--verify", "--quiet", "HEAD", folder=ROOT).returncode:
        refuse(f"{ROOT} has no commit yet: commit the template first.")


def check_name(name: str) -> None:
    """Refuse a name that is no package's, or that would hide a module or be hidden by one."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or keyword.iskeyword(name):
        rule = "take lower-case letters, digits and single _, such as crop_yield"
        refuse(f"{name!r} cannot be the name of a package: {rule}.")
    other = "Choose another folder name, or --name."
    if name in sys.stdlib_module_names or name == "base":
        refuse(f"{name!r} is a module of Python's own, or conda's first environment. {other}")
    files = git("ls-tree", "-r", "--name-only", "HEAD", folder=ROOT).splitlines()
    names = {part.partition(".")[0] for file in files for part in file.split("/")}
    ignored = {line.strip("/*\n") for line in (ROOT / ".gitignore").read_text().splitlines()}
    if name in names | ignored:
        refuse(f"{name!r} is a file or folder of the template. {other}")
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    tested = {line.partition("==")[0].lower().replace("-", "_") for line in pinned}
    if importlib.util.find_spec(name) or name in tested | set(routines_of(ROOT)):
        refuse(f"{name!r} is a package that is installed here, or that the project needs. {other}")


def chosen(option: str, given: str, known: Collection[str]) -> list[str]:
    """Return the names in a list with commas."""
    names = [name.strip() for name in given.split(",") if name.strip()]
    if unknown := [name for name in names if name not in known]:
        refuse(f"{option} {', '.join(unknown)}: there are {', '.join(known)}.")
    return names


if __name__ == "__main__":
    sys.exit(main())
