"""
Contains the names of live objects: "module:qualified.name", written from an object and resolved to the same object.

The project's own package is written relative (".models.unet:UNET"), so that a record survives a renamed package.
Resolving imports code, so only these are resolved: what the project itself defines, PyTorch's layers, losses,
optimizers and tensor functions, and what ALLOWED_ROOTS define. A record may call what it names, with arguments of its
own: so it must not name what imports, writes files or sends.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch.nn import functional

from .project import Project

_TORCH_MODULES = ("torch.nn", "torch.optim", "torch.utils.data")
_TORCH_HOMES = (
    "torch.nn",
    "torch.optim",
    "torch.optim.lr_scheduler",
    "torch",
    "torch.nn.functional",
    "torch.utils.data",
)
_TORCH_GADGETS = ("torch.utils.data.datapipes",)  # read and unpickle files
_PLAIN_TYPES = (bool, int, float, complex, str, list, tuple, dict, set)
# What the project itself needs to run: it imports, writes and sends.
_MACHINERY = (
    "config",
    "training",
    "prediction",
    "utils.logging",
    "utils.name",
    "utils.notify",
    "utils.path",
    "utils.weights",
)
_ONLY = "records may name models, losses, metrics, datasets, optimizers and tensor functions only"


class ReferenceProblem(ValueError):
    """An object that has no name, or a name that must not or cannot be resolved."""


def name_of(obj: Any, project: Project) -> str:
    """
    The name under which an object can be found again, verified by finding it.

    :raises ReferenceProblem: if there is none, or no record may hold it, with the reason and the remedy
    """
    if isinstance(obj, ModuleType):
        name = _relative(_script_name() if obj.__name__ == "__main__" else obj.__name__, project)
        if resolve(name, project) is not obj:
            raise ReferenceProblem(f"another module is found under the name {name!r}")
        return name
    module, qualname = getattr(obj, "__module__", None), getattr(obj, "__qualname__", None)
    if not isinstance(qualname, str) or (not isinstance(obj, type) and not callable(obj)):
        raise ReferenceProblem(
            f"an instance of {type(obj).__name__} cannot be recorded: give a plain value, or its class, "
            "and its arguments in the _CONFIG"
        )
    if module == "__main__":
        module = _script_name()
    places = [(module, qualname)] if module else []
    if str(module).partition(".")[0] == "torch":
        # The public name outlives the private module; and torch.relu calls itself torch:_VariableFunctionsClass.relu.
        places = [(place, obj.__name__) for place in _TORCH_HOMES] + places
        # Some names lie: logsigmoid calls itself log_sigmoid.
        places += [
            ("torch.nn.functional", alias) for alias, found in vars(functional).items() if found is obj
        ]
    refusal = None
    for place, name in places:
        try:
            if _find(place, name) is not obj:
                continue
        except (ImportError, AttributeError):
            continue
        relative = f"{_relative(place, project)}:{name}"
        root = place.partition(".")[0]
        try:
            # A library can still be added to ALLOWED_ROOTS; what is refused for good is refused here.
            if resolve(relative, project, () if _is_known(root, project) else (root,)) is obj:
                return relative
        except ReferenceProblem as problem:
            refusal = problem
    if refusal is not None:
        raise refusal
    if "<lambda>" in qualname:
        raise ReferenceProblem("a lambda has no name to record: define it with def at the top of a module")
    if "<locals>" in qualname:
        raise ReferenceProblem(f"{qualname} is defined inside a function: move it to the top of a module")
    if isinstance(obj, MethodType) or isinstance(getattr(obj, "__self__", None), type):
        raise ReferenceProblem(f"{qualname} is a bound method: give a function at the top of a module")
    raise ReferenceProblem(
        f"{module}.{qualname} is not found under its own name: define it at the top of a module"
    )


def resolve(name: str, project: Project, roots: Iterable[str] = ()) -> Any:
    """
    The object of a name, or the module, which must be the project's own.

    :param roots: libraries, or parts of them, that are allowed besides ALLOWED_ROOTS
    :raises ReferenceProblem: if the name must not be resolved, or if there is no such object
    """
    name = project.aliases.get(name, name)
    place, _, qualname = name.partition(":")
    if place.startswith("."):
        place = project.package + place
    roots = (*project.allowed, *roots)
    if not qualname and not is_project_module(place, project):
        raise ReferenceProblem(
            f"{name!r} is outside of what may be restored: only the project's own modules may"
        )
    if any(part.startswith("_") for part in qualname.split(".")):
        raise ReferenceProblem(
            f"{name!r} is outside of what may be restored: it is private, so give it another name"
        )
    if not _may_import(place, project, roots):
        raise ReferenceProblem(f"{name!r} is outside of what may be restored{_extend(place, project)}")
    try:
        if not qualname:
            return _module(place)
        obj = _find(place, qualname)
    except (Exception, SystemExit) as error:  # importing runs code, which may fail in any way
        raise ReferenceProblem(
            f"{name!r} is not found ({error or type(error).__name__}): install or restore it, or add it to ALIASES"
        ) from error
    if not _is_harmless(obj, project, roots):
        home = getattr(obj, "__module__", None)
        raise ReferenceProblem(
            f"{name!r} is outside of what may be restored{_extend(home if isinstance(home, str) else place, project)}"
        )
    return obj


def is_project_module(place: str, project: Project) -> bool:
    """Whether a module is the project's own: in its package, or a file beside it, such as train.py."""
    root = place.partition(".")[0]
    if root == project.package:
        return True
    places = [project.root / f"{root}.py", project.root / root / "__init__.py"]
    files = [file for file in places if file.is_file()]
    if not root.isidentifier() or not files:
        return False
    if root in sys.modules:
        imported = getattr(sys.modules[root], "__file__", None)
    else:
        spec = importlib.util.find_spec(root)
        if spec is None:
            return True  # importing it will say that it is not found
        imported = spec.origin
    # The file may merely bear the name of a library that is imported in its place.
    return imported is not None and any(
        Path(imported).is_file() and file.samefile(imported) for file in files
    )


def _may_import(place: str, project: Project, roots: tuple[str, ...]) -> bool:
    return (
        place in ("torch", "builtins")
        or _within(place, (*_TORCH_MODULES, *roots))
        or is_project_module(place, project)
    )


def _is_harmless(obj: Any, project: Project, roots: tuple[str, ...]) -> bool:
    # An object may be reached through a module that merely imports it (torch:os.system): its own module decides.
    place = getattr(obj, "__module__", None)
    if not isinstance(place, str) or not callable(obj):
        return False
    is_own_loss = (
        place.endswith("_training") and getattr(obj, "__name__", "train") != "train"
    )  # <- in a routine's file
    if _within(place, [f"{project.package}.{part}" for part in _MACHINERY]) and not is_own_loss:
        return False
    if is_project_module(_script_name() if place == "__main__" else place, project) or _within(place, roots):
        return True
    if isinstance(obj, type):
        return obj in _PLAIN_TYPES or (_within(place, _TORCH_MODULES) and not _within(place, _TORCH_GADGETS))
    if isinstance(obj, FunctionType):
        return place == "torch.nn.functional"
    if not isinstance(obj, BuiltinFunctionType):
        return False
    # PyTorch's C functions: only those that compute with tensors; torch.from_file and the like do not.
    name = obj.__name__
    if place == "torch" and getattr(torch, name, None) is obj and hasattr(torch.Tensor, name):
        return True
    return place in ("torch", "torch._C._nn") and any(found is obj for found in vars(functional).values())


def _within(place: str, prefixes: Iterable[str]) -> bool:
    return any(place == prefix or place.startswith(prefix + ".") for prefix in prefixes)


def _is_known(root: str, project: Project) -> bool:
    return root in ("", "torch", "builtins", project.package) or root in sys.stdlib_module_names


def _extend(place: str, project: Project) -> str:
    root = place.partition(".")[0]
    if root == project.package:
        return ": it belongs to what runs the project, so define what a config names elsewhere, such as in utils/loss.py"
    if _is_known(root, project):
        return f": {_ONLY}"
    return f": if you trust '{root}', add it to ALLOWED_ROOTS in {project.package}/config/config.py"


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
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return spec.name.removesuffix(".__main__")  # python -m module
    file = getattr(main, "__file__", None)
    return Path(file).stem if file else "__main__"


def _relative(place: str, project: Project) -> str:
    if place == "__main__":
        raise ReferenceProblem("it is defined in a notebook or at the prompt: move it to a module")
    return place.removeprefix(project.package) if _within(place, [project.package]) else place
