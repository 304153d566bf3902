"""Contains global_config: where the project's files live."""

import os
from pathlib import Path


def _root_path() -> Path:
    """The checkout's root, or the working directory where the package is installed: nothing is written beside it."""
    checkout = Path(__file__).resolve().parents[2]
    return checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()


def make_global_config(root_path: str | os.PathLike | None = None) -> dict[str, str]:
    """
    Makes the global config. Folders are not created here, but by whatever first writes into them.

    Each value can be redirected by the environment variable of the same name (a relative one is taken from the working
    directory).

    :param root_path: the folder that holds the others by default
    """
    root = Path(os.environ.get("ROOT_PATH") or root_path or _root_path()).absolute()
    folders = {"WEIGHT_DIR": "weights", "LOG_DIR": "logs", "DATA_DIR": "data"}  # <- your folders here
    paths = {key: Path(os.environ.get(key) or root / folder).absolute() for key, folder in folders.items()}
    return {"ROOT_PATH": str(root)} | {key: str(path) for key, path in paths.items()}


CODE_PATH = _root_path()  # where the project's code is, wherever ROOT_PATH puts its files
global_config = make_global_config()
