"""Folders of the project."""

import os
from pathlib import Path


def create_dirs(*paths: str | os.PathLike) -> None:
    """Create folders and what they lie in; existing ones stay as they are."""
    for path in paths:
        Path(path).mkdir(parents=True, exist_ok=True)
