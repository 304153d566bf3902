"""
Contains the names of live objects: "module:qualified.name", written from an object and resolved to the same object.

The project's own package is written relative (".models.unet:UNET"), so that a record survives a renamed package.
Resolving imports code, so only these are resolved: what the project itself defines, PyTorch's layers, losses, optimizers
and tensor functions, and what ALLOWED_ROOTS define.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch

from .config import global_config

PACKAGE = __name__.partition(".")[0]

# Libraries whose models, losses, metrics and data sets may be restored from a record.  # <- your libraries here
ALLOWED_ROOTS = ("torchvision", "torchmetrics", "timm", "segmentation_models_pytorch", "monai")

# Old names of what was renamed or moved, so that old records can still be read.  # <- your renamed objects here
ALIASES = {
    "models.unet:UNET": ".models.unet:UNET",
    "utils.loss:smooth_dice_loss": ".utils.loss:smooth_dice_loss",
}

_TORCH_MODULES = ("torch.nn", "torch.optim", "torch.utils.data", "torch.special")
_TORCH_HOMES = (
    "torch.nn",
    "torch.optim",
    "torch.optim.lr_scheduler",
    "torch",
    "torch.nn.functional",
    "torch.utils.data",
)
_PLAIN_TYPES = (bool, int, float, complex, str, list, tuple, dict, set)


class ReferenceProblem(ValueError):
    """An object that has no name, or a name that must not or cannot be resolved."""


def name_of(obj: Any) -> str:
    """
    The name under which an object can be found again, verified by finding it.

    :raises ReferenceProblem: if there is none, with the reason and the remedy
    """
    if isinstance(obj, ModuleType):
        return _relative(_script_name() if obj.__name__ == "__main__" else obj.__name__)
    module, qualname = getattr(obj, "__module__", None), getattr(obj, "__qualname__", None)
    if not isinstance(qualname, str) or (not isinstance(obj, type) and not callable(obj)):
        raise ReferenceProblem(
            f"an instance of {type(obj).__name__} cannot be recorded: give its class, and its arguments in the _CONFIG"
        )
    if "<lambda>" in qualname:
        raise ReferenceProblem("a lambda has no name to record: define it with def at the top of a module")
    if "<locals>" in qualname:
        raise ReferenceProblem(f"{qualname} is defined inside a function: move it to the top of a module")
    if getattr(obj, "__self__", None) is not None and isinstance(obj.__self__, type):
        raise ReferenceProblem(f"{qualname} is a bound method: give a function at the top of a module")
    if module == "__main__":
        module = _script_name()
    places = [(module, qualname)] if module else []
    if str(module).partition(".")[0] == "torch":
        # The public name outlives the private module; and torch.relu calls itself torch:_VariableFunctionsClass.relu.
        places = [(place, obj.__name__) for place in _TORCH_HOMES] + places
    for place, name in places:
        try:
            if _find(place, name) is obj:
                return f"{_relative(place)}:{name}"
        except (ImportError, AttributeError):
            continue
    raise ReferenceProblem(f"{module}.{qualname} is not found under its own name: define it at the top of a module")


def resolve(name: str, roots: Iterable[str] = ()) -> Any:
    """
    The object, or the module, of a name.

    :param roots: libraries that are allowed besides ALLOWED_ROOTS
    :raises ReferenceProblem: if the name must not be resolved, or if there is no such object
    """
    name = ALIASES.get(name, name)
    place, _, qualname = name.partition(":")
    if place.startswith("."):
        place = PACKAGE + place
    roots = (*ALLOWED_ROOTS, *roots)
    if not _may_import(place, roots):
        raise ReferenceProblem(f"{name!r} is outside of what may be restored{_extend(place)}")
    try:
        if not qualname:
            return _module(place)
        obj = _find(place, qualname)
    except (ImportError, AttributeError) as error:
        raise ReferenceProblem(
            f"{name!r} is not found ({error}): install or restore it, or add it to ALIASES"
        ) from error
    if not _is_harmless(obj, roots):
        raise ReferenceProblem(
            f"{name!r} is outside of what may be restored{_extend(getattr(obj, '__module__', place))}"
        )
    return obj


def is_project_module(place: str) -> bool:
    """Whether a module is the project's own: in its package, or a file in ROOT_PATH itself, such as train.py."""
    root = place.partition(".")[0]
    if root == PACKAGE:
        return True
    folder = Path(global_config["ROOT_PATH"])
    return root.isidentifier() and ((folder / f"{root}.py").is_file() or (folder / root / "__init__.py").is_file())


def _may_import(place: str, roots: tuple[str, ...]) -> bool:
    root = place.partition(".")[0]
    return root in ("torch", "builtins", *roots) or is_project_module(place)


def _is_harmless(obj: Any, roots: tuple[str, ...]) -> bool:
    # An object may be reached through a module that merely imports it (torch:os.system): its own module decides.
    place = getattr(obj, "__module__", None) or ""
    if is_project_module(_script_name() if place == "__main__" else place):
        return True
    if place.partition(".")[0] in roots:
        return isinstance(obj, (type, FunctionType, BuiltinFunctionType))
    if isinstance(obj, type):
        return obj in _PLAIN_TYPES or any(
            place == prefix or place.startswith(prefix + ".") for prefix in _TORCH_MODULES
        )
    if isinstance(obj, FunctionType):
        return place == "torch.nn.functional"
    # PyTorch's C functions: only those that compute with tensors; torch.from_file and the like do not.
    name = getattr(obj, "__name__", "")
    is_torch = getattr(torch, name, None) is obj or getattr(torch.nn.functional, name, None) is obj
    return isinstance(obj, BuiltinFunctionType) and is_torch and (hasattr(torch.Tensor, name) or place != "torch")


def _extend(place: str) -> str:
    root = str(place).partition(".")[0]
    if root in ("", "torch", "builtins") or root in sys.stdlib_module_names:
        return ": records may name models, losses, optimizers and tensor functions only"
    return f": if you trust '{root}', add it to ALLOWED_ROOTS in {PACKAGE}/config/references.py"


def _find(place: str, qualname: str) -> Any:
    obj: Any = _module(place)
    for part in qualname.split("."):
        obj = getattr(obj, part)
        if isinstance(obj, ModuleType):
            raise AttributeError(f"{part} is a module")
    return obj


def _module(place: str) -> ModuleType:
    # The running script is known as __main__; importing it again would make a second copy of its classes.
    main = sys.modules["__main__"]
    return main if place == _script_name() and hasattr(main, "__file__") else importlib.import_module(place)


def _script_name() -> str:
    main = sys.modules["__main__"]
    if getattr(main, "__spec__", None) is not None:
        return main.__spec__.name.removesuffix(".__main__")  # python -m module
    file = getattr(main, "__file__", None)
    return Path(file).stem if file else "__main__"


def _relative(place: str) -> str:
    if place == "__main__":
        raise ReferenceProblem("it is defined in a notebook or at the prompt: move it to a module")
    return place.removeprefix(PACKAGE) if place == PACKAGE or place.startswith(PACKAGE + ".") else place
