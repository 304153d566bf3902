"""The project that a run belongs to: the library learns its name from the module that trains."""

import contextlib
import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from ..errors import UserError


@dataclass(frozen=True)
class Project:
    """
    A project's package, and what it lets a record name.

    :param root: folder that holds the package
    :param allowed: libraries, or parts of them, that a record may name; see ALLOWED_ROOTS
    :param aliases: new names of objects that were renamed or moved; see ALIASES
    """

    package: str
    root: Path
    allowed: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict, hash=False)

    def module(self, name: str) -> ModuleType:
        """Import a module of the project, such as ".config.device"."""
        return importlib.import_module(self.package + name)


def project_of(module_name: str) -> Project:
    """
    Return the project that a module belongs to.

    :param module_name: such as a routine's __name__, or the package's
    :raises UserError: if it belongs to none
    """
    module_name = script_name() if module_name == "__main__" else module_name
    package = module_name.partition(".")[0]
    try:
        settings = importlib.import_module(f"{package}.config.config")
    except ModuleNotFoundError as error:
        if error.name not in (package, f"{package}.config", f"{package}.config.config"):
            raise
        message = f"{module_name} belongs to no project, for {package}.config.config is not found. "
        remedy = "Move what trains into your package, such as into training/my_training.py."
        raise UserError(message + remedy) from error
    root = Path(settings.__file__ or "").resolve().parents[2]
    return Project(package, root, tuple(settings.ALLOWED_ROOTS), settings.ALIASES)


def find_project(module_name: str = "") -> Project:
    """
    Return the project of a module; if it has none, the one in the working directory or beside the library.

    :raises UserError: if there is none, or more than one
    """
    if module_name not in ("", "__main__"):  # importing a script by its name would run it again
        with contextlib.suppress(UserError):
            return project_of(module_name)
    for folder in (Path.cwd(), Path(__file__).parents[2]):
        found = [file for file in folder.glob("*/config/config.py") if b"ALLOWED_ROOTS" in file.read_bytes()]
        if len(found) == 1:
            return project_of(found[0].parts[-3])
    raise UserError("No project is found: run this in the folder that holds your package.")


def script_name() -> str:
    """Return the name by which the running script can be imported, or "__main__" in a notebook."""
    main = sys.modules["__main__"]
    if spec := getattr(main, "__spec__", None):
        return spec.name.removesuffix(".__main__")  # python -m module
    return Path(getattr(main, "__file__", None) or "__main__").stem
