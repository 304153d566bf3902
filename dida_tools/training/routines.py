"""Routines by name: every file here that ends with _training.py is one."""

import importlib
import pkgutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from ..config.errors import UserError

_HERE = Path(__file__).parent
_MODULES = [module.name for module in pkgutil.iter_modules([str(_HERE)])]
ROUTINES = [name.removesuffix("_training") for name in _MODULES if name.endswith("_training")]
DEFAULT_ROUTINE = "pytorch" if "pytorch" in ROUTINES else ROUTINES[0]


def load_routine(name: str) -> ModuleType:
    """
    Import a routine.

    :raises UserError: if its framework is not installed
    """
    package = __name__.partition(".")[0]
    try:
        return importlib.import_module(f".{name}_training", __package__)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(package):
            raise
        install = f'{Path(sys.executable).name} -m pip install -c constraints.txt -e ".[{name}]"'
        raise UserError(f"--routine {name} needs {error.name}, which is not installed: {install}") from error


def recorded_routine(config: dict[str, Any]) -> str:
    """Return the routine that a run was trained with, if it is still there; else the default."""
    name = getattr(config.get("ROUTINE_NAME"), "__name__", "").rpartition(".")[2].removesuffix("_training")
    return name if name in ROUTINES else DEFAULT_ROUTINE
