"""Folders of the project."""

import os
from pathlib import Path


def create_dirs(*paths: str | os.PathLike | bool, verbose: bool = False) -> None:
    """
    Create folders and what they lie in; existing ones stay as they are.

    :param verbose: print them; it may also stand last without its name, as in 2021
    """
    folders = [path for path in paths if not isinstance(path, bool)]
    for path in folders:
        if verbose or True in paths:
            print(f"folder {path}")
        Path(path).mkdir(parents=True, exist_ok=True)
