"""
The project that a run belongs to.

The library never imports the project by its name: it learns the name from the module that trains.
"""

import contextlib
import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from .errors import UserError


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
        raise UserError(
            f"{module_name} belongs to no project, for {package}.config.config is not found. "
            "Move what trains into your package, such as into training/my_training.py."
        ) from error
    root = Path(settings.__file__ or "").resolve().parents[2]
    return Project(package, root, tuple(settings.ALLOWED_ROOTS), settings.ALIASES)


def script_name() -> str:
    """Return the name by which the running script can be imported, or "__main__" in a notebook."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return spec.name.removesuffix(".__main__")  # python -m module
    file = getattr(main, "__file__", None)
    return Path(file).stem if file else "__main__"


def find_project(module_name: str = "") -> Project:
    """
    Return the project of a module or, where it belongs to none, the one that Python finds first.

    :raises UserError: if there is none
    """
    if module_name not in ("", "__main__"):  # importing a script by its name would run it again
        with contextlib.suppress(UserError):
            return project_of(module_name)
    for folder in sys.path:
        for settings in sorted(Path(folder).glob("*/config/config.py")):
            if "ALLOWED_ROOTS" in settings.read_text(encoding="utf-8", errors="replace"):
                return project_of(settings.parts[-3])
    raise UserError("No project is found: run this in the folder that holds your package.")
