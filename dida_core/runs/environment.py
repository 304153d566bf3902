"""What a run depends on besides its config: versions, code, machine, data."""

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .redaction import DROPPED, Redactor, is_secret_name

_MAX_FILE_BYTES, _MAX_CHARACTERS, _MAX_FILES = 200_000, 1_000_000, 1_000  # of what is in no commit
_NO_COMMIT = "all: the project is in no commit of git"
_SECRET_FILES = (
    ".env", ".netrc", ".pgpass", ".pypirc", ".npmrc", ".htpasswd", "id_rsa", "id_ed25519", "id_ecdsa",
)  # fmt: skip
_SECRET_ENDINGS = (".pem", ".key", ".p12", ".pfx", ".tfvars", ".keystore", ".jks", ".kdbx", ".ppk")
_DIFF = (
    "-c", "core.quotepath=off", "-c", f"core.bigFileThreshold={_MAX_FILE_BYTES}", "diff", "HEAD",
    "--no-ext-diff", "--no-textconv", "--no-color", "--no-renames", "--src-prefix=a/", "--dst-prefix=b/",
)  # fmt: skip
_QUESTIONS = (
    ("rev-parse", "HEAD"),
    ("status", "--porcelain"),
    (*_DIFF, "-U3"),
    (*_DIFF, "-U1000000"),  # whether a line is a part of a secret may be seen far away only
    ("ls-files", "--others", "--exclude-standard", "-z"),
)
_VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUBLAS_WORKSPACE_CONFIG")
# Libraries that numbers depend on.  # <- what your data is read or changed with
_COMPUTING = ("torch", "numpy", "pillow", "rasterio", "scipy", "scikit-image", "opencv-python-headless")
# What else numbers depend on, and how it is called.
_CONDITIONS = {
    "git_commit": "code (commit)",
    "git_diff": "code (changes since the commit)",
    "untracked_files": "code (files that are in no commit)",
    "python": "Python",
    "cpu_capability": "CPU capability",
    "threads": "number of threads",
    "device": "device",
    "device_name": "device",
    "precision": "precision",
}


def describe_environment(
    root_path: str | os.PathLike,
    device: torch.device,
    redactor: Redactor | None = None,
    is_known: Callable[[str], bool] = lambda path: False,
) -> dict[str, Any]:
    """
    Describe code, versions and machine as plain data, without secrets.

    :param root_path: the project's folder; if it is in git, its commit and all that is in none are recorded
    :param device: the run's device
    :param is_known: whether a file that is in no commit need not be recorded
    """
    redactor = redactor or Redactor()
    packages = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    is_gpu = device.type == "cuda"
    with ThreadPoolExecutor() as pool:  # each takes a while in a large repository
        answers = pool.map(partial(_git, os.path.realpath(root_path)), _QUESTIONS)
    commit, changed, short, full, untracked = answers
    lost: dict[str, str] = {}
    code = {
        "git_diff": _describe_changes(_sections(short), _sections(full), redactor, lost),
        "untracked_files": _describe_untracked(root_path, untracked, redactor, is_known, lost),
    }
    commit = (commit or "").strip() or None
    described = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if is_gpu else platform.processor() or "cpu",
        "git_commit": commit,
        "git_changed_files": (changed or "").splitlines(),
        "unrecorded_files": [f"{name} ({why})" for name, why in lost.items()] if commit else [_NO_COMMIT],
        "executable": Path(sys.executable).name,
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "packages": {name: packages[name] for name in sorted(filter(None, packages), key=str.lower)},
    }
    return redactor.data(described) | code


def _describe_changes(
    short: list[list[str]] | None, full: list[list[str]] | None, redactor: Redactor, lost: dict[str, str]
) -> str:
    """Return the changes of files in git, as git apply takes them; enter in lost which are not all there."""
    if short is None or full is None or len(short) != len(full):
        lost["changes"] = "git did not answer"
        return ""
    kept, num_characters = [], 0
    for section, whole in zip(short, full, strict=True):
        name = section[0].rpartition(" b/")[2].strip('"')
        num_characters += sum(map(len, whole))
        if why := _why_not(name, redactor, num_characters):
            lost[name] = why
        elif any(line.startswith(("Binary files ", "+Subproject ")) or "\ufffd" in line for line in section):
            lost[name] = "binary, large, not in UTF-8, or another repository"
        else:
            secret = set()
            for sign in "+-":
                lines = [line[1:] for line in whole[_head(whole) + 1 :] if line[:1] in (" ", sign)]
                found = redactor.secret_lines("\n".join(lines), name.endswith(".py"))
                secret |= {lines[number] for number in found if lines[number].strip()}
            dropped = {i for i in range(_head(section), len(section)) if section[i][1:] in secret}
            lines = [line[0] + DROPPED if i in dropped else line for i, line in enumerate(section)]
            # After the second @@ there is a line of what is around, which may be a secret.
            kept += [re.sub(r"^(@@ [^@]* @@).*", r"\1", line) for line in lines]
            lost |= {name: f"{len(dropped)} lines that look like secrets"} if dropped else {}
    return "\n".join([*kept, ""] if kept else kept)


def _describe_untracked(
    root: str | os.PathLike,
    listed: str | None,
    redactor: Redactor,
    is_known: Callable[[str], bool],
    lost: dict[str, str],
) -> dict[str, dict[str, str]]:
    """Return text and SHA-256 of files that git neither has nor ignores; enter in lost which are not."""
    found: dict[str, dict[str, str]] = {}
    lost |= {"untracked files": "git did not answer"} if listed is None else {}
    folder = os.path.realpath(root)
    names = [name for name in (listed or "").split("\0")[:-1] if not is_known(os.path.join(folder, name))]
    num_bytes = 0
    for name in names[:_MAX_FILES]:
        path = Path(folder, name)
        is_file = path.is_file() and not path.is_symlink()
        size = path.stat().st_size if is_file else 0
        why = _why_not(name, redactor, max(num_bytes + size, size * (_MAX_CHARACTERS // _MAX_FILE_BYTES)))
        try:
            text = "\0" if why or not is_file else path.read_bytes().decode()
        except (OSError, ValueError):
            text = "\0"
        if "\0" in text:
            lost[name] = why or "no text"
            continue
        num_bytes += size
        lines, secret = text.split("\n"), redactor.secret_lines(text, name.endswith(".py"))
        lost |= {name: f"{len(secret)} lines that look like secrets"} if secret else {}
        text = "\n".join(DROPPED if number in secret else line for number, line in enumerate(lines))
        found[name] = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "text": text}
    if len(names) > _MAX_FILES:
        lost[f"{len(names) - _MAX_FILES} more"] = "too many"
    return found


def _why_not(name: str, redactor: Redactor, num_characters: int) -> str:
    """Return why a file in no commit is not recorded at all, if so."""
    path = Path(name.lower())
    is_secret = is_secret_name(path.name.partition(".")[0]) and path.suffix not in (".py", ".md", ".ipynb")
    if is_secret or path.name.startswith(_SECRET_FILES) or path.suffix in _SECRET_ENDINGS:
        return "its name is that of secrets"
    if redactor.text(name) != name:
        return "its name holds a secret"
    return "large" if num_characters > _MAX_CHARACTERS else ""


def _sections(diff: str | None) -> list[list[str]] | None:
    """Return the lines of a diff, for each file."""
    if diff is None:
        return None
    sections = re.split(r"^(?=diff --git )", diff, flags=re.MULTILINE)[1:]
    return [section.removesuffix("\n").split("\n") for section in sections]


def _head(section: list[str]) -> int:
    """Return the number of lines before the changes."""
    return next((number for number, line in enumerate(section) if line.startswith("@@")), len(section))


def find_differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """
    Return what differs between two environments and may lead to other numbers, a sentence each.

    What an older version did not record is not known to differ.
    """
    versions = before.get("packages", now.get("packages", {})), now.get("packages", {})
    conditions = [(name, before[key], now.get(key)) for key, name in _CONDITIONS.items() if key in before]
    conditions += [(name, versions[0].get(name), versions[1].get(name)) for name in _COMPUTING]
    differences = []
    for name, then, here in conditions:
        if then != here:
            is_long = name in (_CONDITIONS["git_diff"], _CONDITIONS["untracked_files"])
            change = "not what they were" if is_long else f"{then} then, {here} now"
            differences.append(f"{name}: {change}")
    if changed := changed_files(before, now):
        differences.append(f"data: {len(changed)} files are not what they were, such as {changed[0]}")
    return differences


def changed_files(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the files of the data, masks too, that are others or missing; none where none was recorded."""
    hashes = before.get("data") or now.get("data", {}), now.get("data", {})
    return sorted(file for file in {*hashes[0], *hashes[1]} if hashes[0].get(file) != hashes[1].get(file))


def _git(folder: str, arguments: Sequence[str]) -> str | None:
    command = ["git", "--no-optional-locks", *arguments]
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "timeout": 10}
    try:
        answer = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, check=True, **options)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.decode(errors="replace")
