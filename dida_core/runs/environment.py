"""What a run depends on besides its config: versions, code, machine, data."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

_MAX_DIFF_CHARACTERS = 1_000_000
_VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUBLAS_WORKSPACE_CONFIG")
# Libraries that numbers depend on.  # <- what your data is read or changed with
_COMPUTING = ("torch", "numpy", "pillow", "rasterio", "scipy", "scikit-image", "opencv-python-headless")
# What else numbers depend on, and how it is called.
_CONDITIONS = {
    "git_commit": "code (commit)",
    "git_diff": "code (changes since the commit)",
    "python": "Python",
    "cpu_capability": "CPU capability",
    "threads": "number of threads",
    "device": "device",
    "device_name": "device",
    "precision": "precision",
}


def describe_environment(root_path: str | os.PathLike, device: torch.device) -> dict[str, Any]:
    """
    Describe code, versions and machine as plain data, in which there may be secrets.

    :param root_path: the project's folder; if it is a git repository, its commit and changes are recorded
    :param device: the run's device
    """
    packages = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    diff = _git(root_path, "diff", "HEAD") or ""
    is_gpu = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if is_gpu else platform.processor() or "cpu",
        "git_commit": _git(root_path, "rev-parse", "HEAD"),
        "git_changed_files": (_git(root_path, "status", "--porcelain") or "").splitlines(),
        "git_diff": diff[:_MAX_DIFF_CHARACTERS] + ("\n(cut off)" if len(diff) > _MAX_DIFF_CHARACTERS else ""),
        "executable": Path(sys.executable).name,
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "packages": {name: packages[name] for name in sorted(filter(None, packages), key=str.lower)},
    }


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
            is_long = name == _CONDITIONS["git_diff"]
            differences.append(
                f"{name}: " + ("not what they were" if is_long else f"{then} then, {here} now")
            )
    if changed := changed_files(before, now):
        differences.append(f"data: {len(changed)} files are not what they were, such as {changed[0]}")
    return differences


def changed_files(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the files of the data, masks too, that are others or missing; none where none was recorded."""
    hashes = before.get("data") or now.get("data", {}), now.get("data", {})
    return sorted(file for file in {*hashes[0], *hashes[1]} if hashes[0].get(file) != hashes[1].get(file))


def _git(folder: str | os.PathLike, *arguments: str) -> str | None:
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "timeout": 10}
    try:
        answer = subprocess.run(
            ["git", *arguments], cwd=folder, stdin=subprocess.DEVNULL, check=True, **options
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.decode(errors="replace").rstrip()
