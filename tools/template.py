"""
Merge later versions of the template into this project, as git merges a branch.

    python tools/template.py diff                    show what the template has changed since
    python tools/template.py update                  merge it
    python tools/template.py update v1.2.0           merge that version instead of the newest one
    python tools/template.py update --template PATH  another place of the template: folder or URL

A commit in this project's history holds exactly what the template gave; .template.json names its version,
and the project's name and parts. The new version is rendered with the same name and parts, as a child of
that commit, and merged: git keeps your edits, follows files and folders that you renamed, and leaves a
conflict where both changed the same lines. The library has one name everywhere. Imports of modules that you
moved are rewritten in new code. make template-update then runs the tests.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
RECORD = ".template.json"
TREE = "Template-Tree"  # the line in the message of a commit that the template made


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("diff", "update"))
    parser.add_argument(
        "version", nargs="?", help="a tag, branch or commit of the template (default: its newest version)"
    )
    parser.add_argument(
        "--template", metavar="PATH", help="folder or URL of the template (default: the recorded one)"
    )
    arguments = parser.parse_args()
    if not (ROOT / RECORD).is_file():
        refuse(
            f"There is no {RECORD} in {ROOT}: it was not made by new_project.py, or is the template itself."
        )
    if arguments.command == "update" and git("status", "--porcelain", "--untracked-files=no"):
        refuse("There are uncommitted changes: commit them, or put them aside with git stash.")
    record = json.loads((ROOT / RECORD).read_text())
    if arguments.template:
        record["template"] = place_of(arguments.template)
    if not record["template"]:
        refuse(f"{RECORD} names no place of the template: TEMPLATE=folder or URL, or --template.")
    with tempfile.TemporaryDirectory() as folder:
        template = clone(record["template"], Path(folder) / "template")
        version = arguments.version or newest_version(template)
        if (commit := commit_of(template, version)) is None:
            versions = ", ".join(git("tag", "--sort=version:refname", folder=template).split())
            refuse(f"The template has no version {version!r}: it has {versions or 'no tags'}.")
        if not try_git("merge-base", "--is-ancestor", commit, record["commit"], folder=template).returncode:
            print(f"This project already has version {version} of the template (commit {commit[:10]}).")
            if arguments.template and arguments.command == "update":
                remember(record)
            return 0
        base = find_rendered(record)
        joined = base is not None
        if base is None:
            print("This history lacks the commit of the template (squashed or copied): it is made again.")
            if commit_of(template, record["commit"]) is None:
                refuse(
                    f"The template has no commit {record['commit']} (version {record['version']}) that made "
                    "this project: name a clone that has it with TEMPLATE=..."
                )
            base = render(template, record, record["commit"], Path(folder) / "base")
        new = render(template, record, commit, Path(folder) / "new", base)
    if arguments.command == "diff":
        return subprocess.run(["git", "diff", base, new], cwd=ROOT, check=False).returncode
    if not joined:
        message = "Record what the template gave"
        git("merge", "--quiet", "--allow-unrelated-histories", "--strategy", "ours", "-m", message, base)
    return merge(base, new, version)


def remember(record: dict[str, Any]) -> None:
    """Commit a record where it has changed, such as the template's place."""
    (ROOT / RECORD).write_text(json.dumps(record, indent=4) + "\n")
    if git("status", "--porcelain", "--", RECORD):
        git("commit", "--quiet", "--message", "Record where the template is", "--", RECORD)


def refuse(sentence: str) -> NoReturn:
    """End the command with a sentence on what to do."""
    sys.exit(sentence)


def git(*arguments: str | Path, folder: Path = ROOT, **variables: str) -> str:
    """Return what a git command prints; where it fails, end the command with git's message."""
    done = try_git(*arguments, folder=folder, **variables)
    if done.returncode:
        refuse(f"git {arguments[0]} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()


def try_git(*arguments: str | Path, folder: Path = ROOT, **variables: str) -> subprocess.CompletedProcess:
    """Run a git command that may fail."""
    # What a hook or another git command sets would have git work elsewhere.
    ours = {
        key: value
        for key, value in os.environ.items()
        if key not in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")
    }
    command = ["git", "-c", "core.quotePath=false", *map(str, arguments)]
    try:
        return subprocess.run(
            command, cwd=folder, env=ours | variables, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        refuse("There is no git: install it.")


# ----------------------------------------------------------------------- the template's versions as commits


def place_of(template: str) -> str:
    """Return a template's place as the record names it: a URL, or a folder relative to this project."""
    return os.path.relpath(template, ROOT) if Path(template).is_dir() else template


def clone(template: str, folder: Path) -> Path:
    """Clone the template's repository, all versions."""
    git("clone", "--quiet", "--no-checkout", "--", template, folder)  # a relative place is relative to ROOT
    return folder


def commit_of(template: Path, version: str) -> str | None:
    """Return the commit of a tag, of a branch or of a shortened commit."""
    names = (version, f"origin/{version}")
    answers = (
        try_git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}", folder=template) for name in names
    )
    return next((answer.stdout.strip() for answer in answers if not answer.returncode), None)


def newest_version(template: Path) -> str:
    """Return the last tag of the form v1.2.3, or HEAD where there is none."""
    tags = git("tag", "--sort=version:refname", folder=template).split()
    return next((tag for tag in reversed(tags) if re.fullmatch(r"v\d+\.\d+\.\d+", tag)), "HEAD")


def find_rendered(record: dict[str, Any]) -> str | None:
    """Return the commit in this history that the recorded version of the template made."""
    form = f"--format=%H %T %(trailers:key={TREE},valueonly,separator=%x20)"
    for commit, tree, *noted in map(str.split, git("log", "--no-show-signature", form).splitlines()):
        if noted == [tree] and json.loads(git("show", f"{commit}:{RECORD}"))["commit"] == record["commit"]:
            return commit
    return None


def render(
    template: Path, record: dict[str, Any], commit: str, folder: Path, parent: str | None = None
) -> str:
    """Commit what a version of the template, by its own new_project.py, gives for this project."""
    git("checkout", "--quiet", "--detach", commit, folder=template)
    like = folder.with_suffix(".json")
    like.write_text(json.dumps({"command": "", **record}))  # version 0.1 copies a command
    command = [sys.executable, str(template / "new_project.py"), str(folder), "--like", str(like)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        refuse(f"The template's new_project.py failed at {commit}: {done.stderr.strip()}")
    return commit_folder(folder, ROOT, parent)


def commit_folder(folder: Path, repository: Path, parent: str | None = None) -> str:
    """Commit a folder that the template gave, in a repository, on no branch; return its hash."""
    record = json.loads((folder / RECORD).read_text())
    with tempfile.TemporaryDirectory() as index:
        options = {"GIT_INDEX_FILE": str(Path(index) / "index")}
        git_dir = git("rev-parse", "--absolute-git-dir", folder=repository)
        git(f"--git-dir={git_dir}", "--work-tree=.", "add", "--all", "--force", ".", folder=folder, **options)
        tree = git("write-tree", folder=repository, **options)
    message = f"The template, version {record['version']}\n\nCommit {record['commit']}.\n\n{TREE}: {tree}"
    return git("commit-tree", tree, "-m", message, *(("-p", parent) if parent else ()), folder=repository)


# -------------------------------------------------------------------------------------------------- merging


def merge(base: str, new: str, version: str) -> int:
    """Merge the new version; leave conflicts as git does."""
    moved = Moved(base, new)
    # A file that is new in the template goes where you have moved its folder.
    follow = ("-c", "merge.renames=true", "-c", "merge.directoryRenames=true")
    merged = try_git(*follow, "merge", "--no-ff", "--no-commit", new)
    if try_git("rev-parse", "--verify", "--quiet", "MERGE_HEAD").returncode:
        refuse(f"git merge failed: {merged.stderr.strip() or merged.stdout.strip()}")
    git("checkout", new, "--", RECORD)  # made from this project's, with all that has been edited there
    for path in deleted_here():
        git("rm", "--quiet", "--", path)
        print(f"stays deleted, although changed in the template: {path}")
    conflicts = git("diff", "--name-only", "--diff-filter=U").splitlines()
    for path in git("diff", "--name-only", "--diff-filter=d", "HEAD").splitlines():
        if path not in conflicts and rewrite_imports(ROOT / path, moved):
            git("add", "--", path)
            print(f"imports of moved modules rewritten: {path}")
    if conflicts:
        print(f"You and the template have changed the same lines: {', '.join(conflicts)}")
        print(
            "Fix these files, git add them, and git commit; or undo with git merge --abort. Then: make test"
        )
        return 1
    git("commit", "--quiet", "--message", f"Merge version {version} of the template")
    print(f"Merged version {version} of the template. Undo with: git reset --hard HEAD^")
    return 0


def deleted_here() -> list[str]:
    """Return the files in conflict that this project has deleted and the template has changed."""
    stages: dict[str, set[str]] = {}
    for line in git("ls-files", "--unmerged").splitlines():
        entry, _, path = line.partition("\t")
        stages.setdefault(path, set()).add(entry.split()[2])
    return [path for path, found in stages.items() if found == {"1", "3"}]  # no 2, which is this project's


class Moved:
    """
    Where this project has moved modules to, as git sees it.

    :param base: the commit with what the template gave, before anything was moved
    :param new: the commit with what it gives now
    """

    def __init__(self, base: str, new: str) -> None:
        """Ask git."""
        lines = git("diff", "--find-renames", "--diff-filter=R", "--name-status", base, "HEAD").splitlines()
        pairs = [(Path(old), Path(now)) for _, old, now in (line.split("\t") for line in lines)]
        self.given = set(git("ls-tree", "-r", "--name-only", new).splitlines())
        self.files = {now: old for old, now in pairs}
        self.modules: dict[tuple[str, ...], tuple[str, ...]] = {}
        for old, now in pairs:
            if old.suffix == now.suffix == ".py":
                self.modules[module_of(old)] = module_of(now)
                if old.name == now.name:  # what is beside it and not there yet goes with it
                    self.modules.setdefault(old.parent.parts, now.parent.parts)

    def now(self, module: tuple[str, ...]) -> tuple[str, ...]:
        """Return where a module of the template is found here; the same where that is not known."""
        for length in range(len(module), 0, -1):
            if module[:length] in self.modules:
                there = self.modules[module[:length]] + module[length:]
                return there if exists(there) else module
        return module

    def template_path(self, path: Path) -> Path:
        """Return where the template has a file of this project."""
        if path.as_posix() in self.given:
            return path
        if path in self.files:
            return self.files[path]
        folders = {now.parent: old.parent for now, old in self.files.items() if now.name == old.name}
        return folders.get(path.parent, path.parent) / path.name


def module_of(path: Path) -> tuple[str, ...]:
    """Return a.b.c for a/b/c.py, a.b for a/b/__init__.py."""
    return path.parent.parts if path.stem == "__init__" else (*path.parent.parts, path.stem)


def exists(module: tuple[str, ...]) -> bool:
    """Return True if this project has a module or package."""
    place = ROOT.joinpath(*module)
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()


def rewrite_imports(path: Path, moved: Moved) -> bool:
    """Let a file import moved modules from where they are; return True if it had to be changed."""
    if path.suffix != ".py" or not moved.modules or not path.is_file():
        return False
    text = path.read_text(encoding="utf-8")
    here = path.relative_to(ROOT)
    there = moved.template_path(here)
    lines = text.splitlines(keepends=True)
    for line, dots, name in relative_imports(text):
        wanted = absolute(here, dots, name)
        if not exists(wanted) and exists(target := moved.now(absolute(there, dots, name))):
            lines[line] = re.sub(r"from\s+[.\w]+", f"from {relative(here, target)}", lines[line], count=1)

    def renamed(match: re.Match) -> str:
        parts = tuple(match[0].split("."))
        for length in range(len(parts), 1, -1):
            if exists(parts[:length]):
                break
            if (target := moved.now(parts[:length])) != parts[:length]:
                return ".".join(target + parts[length:])
        return match[0]

    packages = {module[0] for module in moved.modules if len(module) > 1}
    pattern = rf"(?<![\w.])(?:{'|'.join(map(re.escape, packages))})(?:\.\w+)+"
    changed = re.sub(pattern, renamed, "".join(lines)) if packages else "".join(lines)
    if changed != text:
        path.write_text(changed, encoding="utf-8")
    return changed != text


def relative_imports(text: str) -> Iterator[tuple[int, int, tuple[str, ...]]]:
    """Yield line index, number of dots and name of each relative import."""
    try:
        nodes = list(ast.walk(ast.parse(text)))
    except SyntaxError:
        nodes = []
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.level:
            yield node.lineno - 1, node.level, tuple((node.module or "").split(".")) if node.module else ()


def absolute(path: Path, dots: int, name: tuple[str, ...]) -> tuple[str, ...]:
    """Return the module that a relative import in a file names."""
    package = path.parent.parts
    return package[: len(package) - dots + 1] + name


def relative(path: Path, module: tuple[str, ...]) -> str:
    """Return how a file names a module relatively: shared.py in a/b/c.py is ...shared."""
    package = path.parent.parts
    shared = 0
    while package[: shared + 1] == module[: shared + 1] and shared < len(package):
        shared += 1
    return "." * (len(package) - shared + 1) + ".".join(module[shared:])


if __name__ == "__main__":
    sys.exit(main())
