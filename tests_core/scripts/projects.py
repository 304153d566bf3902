"""Commands as someone else would run them, repositories made from this one's files, and what pages name."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.helpers import ROOT


def environment(**variables: str) -> dict[str, str]:
    """Without what would have git or Python work elsewhere, or the settings of whoever runs the tests."""
    hidden = {"PYTHONPATH", "ROOT_PATH", "LOG_DIR", "WEIGHT_DIR", "DATA_DIR", "CONDA_DEFAULT_ENV"}
    hidden |= {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"}
    kept = {name: text for name, text in os.environ.items() if name not in hidden}
    kept = {name: text for name, text in kept.items() if not name.startswith("PYTEST_")}
    kept |= {f"GIT_{who}_{what}": "me@x.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    kept |= {"GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull, "OMP_NUM_THREADS": "1"}
    return kept | variables


def run(folder: Path, *command: object, code: int = 0, **variables: str) -> str:
    """What a command prints; it must end with that code."""
    words, env = list(map(str, command)), environment(**variables)
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + (done.stderr if code else "")


def python(folder: Path, *arguments: object, code: int = 0, **variables: str) -> str:
    return run(folder, sys.executable, *arguments, code=code, **variables)


def git(folder: Path, *arguments: object) -> str:
    return run(folder, "git", "-c", "core.quotePath=false", *arguments).strip()


def commit(folder: Path, message: str) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "-m", message)


def make_template(folder: Path) -> Path:
    """A repository with the files of this one as they are now, in one commit."""
    for name in git(ROOT, "ls-files", "--cached", "--others", "--exclude-standard").splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    git(folder, "init", "--quiet")
    commit(folder, "The template")
    return folder


def imports_of(*files: Path) -> set[str]:
    """The packages that files import, also later, by pip's names."""
    found = set()
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text()))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module)
    roots = {"tensorboard" if name == "torch.utils.tensorboard" else name.partition(".")[0] for name in found}
    own = {
        "dida_tools",
        "dida_core",
        "tools",
        *(file.stem for file in ROOT.glob("*.py")),
        *sys.stdlib_module_names,
    }
    return {{"PIL": "pillow", "ignite": "pytorch-ignite"}.get(root, root) for root in roots - own}


def missing_in_pages(folder: Path, package: str) -> list[str]:
    """Files, modules and routines that pages name, or link to, and that are not there."""
    invented = ("my_net", "gan_training", "history", "NAME", "make_data")  # what the reader writes
    missing = []
    for page in [*folder.glob("*.md"), *folder.glob("docs/**/*.md")]:
        text = page.read_text()
        named = re.findall(rf"`((?:{package}|dida_core|docs|tests|tools|slurm|benchmarks)/[\w./-]*)`", text)
        named += re.findall(r"python3? ([\w/]+\.py)\b", text)
        named += [name.replace(".", "/") for name in re.findall(r"python -m (dida_core\.\w+)", text)]
        named += [f"{package}/training/{name}_training.py" for name in re.findall(r"--routine (\w+)", text)]
        links = re.findall(r"\]\(([^)\s#]+)", re.sub(r"(?ms)^```.*?^```$", "", text))
        paths = {name: folder / name for name in named}
        paths |= {link: page.parent / link for link in links if not link.startswith(("http:", "https:"))}
        absent = [name for name, path in paths.items() if not path.exists()]
        missing += [f"{page}: {name}" for name in absent if not any(word in name for word in invented)]
    return missing
