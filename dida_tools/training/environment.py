"""Contains what a run depends on besides its config: versions, code, machine."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def describe_environment(root_path: str | os.PathLike, device: torch.device) -> dict[str, Any]:
    """
    Describes code and machine as plain data.

    :param root_path: the project's folder; its git commit is recorded if it is a repository
    :param device: the run's device
    """
    versions = {
        dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions() if dist.metadata["Name"]
    }
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "git_commit": _git(root_path, "rev-parse", "HEAD"),
        "git_changed_files": (_git(root_path, "status", "--porcelain") or "").splitlines(),
        "packages": dict(sorted(versions.items(), key=lambda item: item[0].lower())),
        "executable": Path(sys.executable).name,
    }


def _git(folder: str | os.PathLike, *arguments: str) -> str | None:
    try:
        answer = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.rstrip()
