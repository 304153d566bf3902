"""
The names of live objects: "module:qualified.name", written from an object and resolved to the same object.

The project's own package is written relative (".models.unet:UNET"), so that records survive its renaming.
Resolving imports code, and a record may call what it names with arguments of its own. So a record is not
trusted: it may name what is in the lists below and in the project's ALLOWED_ROOTS, where an object of its
kind belongs (OBJECTS in kinds.py), and all else is refused.
"""

import importlib
import sys
from collections.abc import Iterable, Iterator
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

from .kinds import PLAIN_TYPES
from .project import Project, script_name

# What a record may name, by the module in which it is defined, or one above it. Of the project classes of
OWN = (".layers", ".models", ".training", ".utils")
# but not of what imports, writes files or sends mail; and functions of
OWN_REFUSED = (".training.routines", ".utils.logging", ".utils.name", ".utils.notify", ".utils.path")
OWN_FUNCTIONS = (
    *(".layers", ".models", ".training.config", ".utils.loss", ".utils.metrics"),
    *(".utils.data.datasets", ".utils.data.transforms"),
)
REFUSED_NAMES = ("load_model", "main", "train")
# of torch, besides the functions in C that compute with tensors (see _computes):
TORCH_CLASSES = ("torch.nn", "torch.optim", "torch.utils.data.dataset", "torch.utils.data.sampler")
TORCH_FUNCTIONS = ("torch.nn.functional",)
# and of a module in ALLOWED_ROOTS the classes that it defines, and if it is the project's own, the functions.

# Torch's objects are named by its public modules, which outlive its private ones.
_OPTIM, _DATA = ("torch.optim", "torch.optim.lr_scheduler"), "torch.utils.data"
PUBLIC = ("torch", "torch.nn", "torch.nn.functional", *_OPTIM, _DATA)


class ReferenceProblem(ValueError):
    """An object that has no name, or a name that must not or cannot be resolved."""


def resolve(name: str, project: Project, trusted: bool = False) -> Any:
    """
    Return the object of a name, or the module, which must be the project's own.

    :param trusted: whether it may name any class or function of another library: the user's own command does
    :raises ReferenceProblem: if the name must not be resolved, or if there is no such object
    """
    place, _, qualname = project.aliases.get(name, name).partition(":")
    place = _absolute(place, project)
    own, root = [_absolute(home, project) for home in OWN], place.partition(".")[0]
    libraries = [root] if trusted and not _is_known(root, project) else []
    if any(part.startswith("_") for part in qualname.split(".")):
        raise _refused(name, "it is private, so give it another name")
    if not qualname and not _within(place, own):
        raise _refused(name, "only the project's own modules may, such as its routines")
    # What is refused is not even imported. Where an object was found says nothing, but where it is defined.
    is_listed = place in ("builtins", *PUBLIC) or _relative(place, project) in project.allowed
    if not is_listed and not _within(place, [*own, *TORCH_CLASSES, *libraries]):
        raise _refused(name, _remedy(place, project))
    try:
        obj = _find(place, qualname)
    except (Exception, SystemExit) as error:  # importing runs code, which may fail in any way
        reason = f"({error or type(error).__name__}): install or restore it, or add it to ALIASES"
        raise ReferenceProblem(f"{name!r} is not found {reason}") from error
    if qualname and not _is_allowed(obj, project, libraries):
        raise _refused(name, _remedy((_home(obj) or [place])[0], project, isinstance(obj, type)))
    return obj


def _is_allowed(obj: Any, project: Project, libraries: list[str]) -> bool:
    place, qualname = _home(obj) or ("", "")
    module, is_class = _relative(place, project), isinstance(obj, type)
    if _within(module, ["torch"]):
        if isinstance(obj, BuiltinFunctionType):
            return module in ("torch", "torch._C._nn") and _computes(obj)
        is_function = isinstance(obj, FunctionType) and module in TORCH_FUNCTIONS
        return is_function or (is_class and _within(module, TORCH_CLASSES))
    if not is_class and ("." in qualname or qualname in REFUSED_NAMES):
        return False  # a method may import, load or write
    if module.startswith("."):
        is_home = _within(module, OWN if is_class else OWN_FUNCTIONS) and not _within(module, OWN_REFUSED)
        return is_home or module in project.allowed
    return _within(place, libraries) or (is_class and (place in project.allowed or obj in PLAIN_TYPES))


def _computes(function: BuiltinFunctionType) -> bool:
    """Tell whether torch's function in C computes with tensors; torch.from_file and the like do not."""
    from torch import Tensor
    from torch.nn import functional

    return hasattr(Tensor, function.__name__) or function in vars(functional).values()


def _refused(name: str, reason: str) -> ReferenceProblem:
    return ReferenceProblem(f"{name!r} is outside of what may be restored: {reason}")


def _remedy(place: str, project: Project, is_class: bool = True) -> str:
    root, module = place.partition(".")[0], _relative(place, project)
    if root == project.package and (not _within(module, OWN) or _within(module, OWN_REFUSED)):
        return "it belongs to what runs the project, so define what a config names in models, utils, ..."
    if root != project.package and _is_known(root, project):
        return "records name models, losses, metrics, datasets, optimizers and tensor functions only"
    if root != project.package and not is_class:
        return "a library gives its classes alone, so call it in a function of your own, as in utils/loss.py"
    return f"if you trust '{module}', add it to ALLOWED_ROOTS in {project.package}/config/config.py"


def _is_known(root: str, project: Project) -> bool:
    ours = ("", "torch", "builtins", project.package, __name__.partition(".")[0])
    return root in ours or root in sys.stdlib_module_names


def _find(place: str, qualname: str) -> Any:
    # The running script is known as __main__; importing it again would make a second copy of its classes.
    main = sys.modules["__main__"]
    is_main = place == script_name() and hasattr(main, "__file__")
    obj: Any = main if is_main else importlib.import_module(place)
    for part in qualname.split(".") if qualname else ():
        obj = getattr(obj, part)
        if isinstance(obj, ModuleType):
            raise AttributeError(f"{part} is a module")
    return obj


def name_of(obj: Any, project: Project) -> str:
    """
    Return the name under which an object is found again, verified by finding it.

    :raises ReferenceProblem: if there is none, or no record may hold it, with the reason and the remedy
    """
    home, refusal = _home(obj), None
    if home is None:
        raise ReferenceProblem(
            f"an instance of {type(obj).__name__} cannot be recorded: give a plain value, or its class, "
            "and its arguments in the _CONFIG"
        )
    for place, qualname in (*_public_places(obj), home):
        name = f"{_relative(place, project)}{':' if qualname else ''}{qualname}"
        try:
            # A library can still be added to ALLOWED_ROOTS; what is refused for good is refused here.
            if _find(place, qualname) is obj and resolve(name, project, trusted=True) is obj:
                return name
        except ReferenceProblem as problem:
            refusal = problem
        except (ImportError, AttributeError, ValueError):
            continue
    raise refusal or ReferenceProblem(_why_unnamed(obj, *home))


def _home(obj: Any) -> tuple[str, str] | None:
    """Return the module that defines a class or function, wherever it was found, and its name in there."""
    module, qualname = getattr(obj, "__module__", None), getattr(obj, "__qualname__", None)
    if isinstance(obj, ModuleType):
        module, qualname = obj.__name__, ""
    elif not isinstance(qualname, str) or not isinstance(module, str | None) or not callable(obj):
        return None
    return script_name() if module == "__main__" else module or "", qualname


def _public_places(obj: Any) -> Iterator[tuple[str, str]]:
    # torch.relu calls itself torch:_VariableFunctionsClass.relu, and logsigmoid log_sigmoid.
    for place in PUBLIC if str(getattr(obj, "__module__", "")).startswith("torch") else ():
        for name, found in vars(importlib.import_module(place)).items():
            if found is obj:
                yield place, name


def _why_unnamed(obj: Any, module: str, qualname: str) -> str:
    if "<lambda>" in qualname:
        return "a lambda has no name to record: define it with def at the top of a module"
    if "<locals>" in qualname:
        return f"{qualname} is defined inside a function: move it to the top of a module"
    if isinstance(obj, MethodType) or isinstance(getattr(obj, "__self__", None), type):
        return f"{qualname} is a bound method: give a function at the top of a module"
    return f"{module}.{qualname} is not found under its own name: define it at the top of a module"


def _within(place: str, homes: Iterable[str]) -> bool:
    return any(place == home or place.startswith(f"{home}.") for home in homes)


def _absolute(place: str, project: Project) -> str:
    return project.package + place if place.startswith(".") else place


def _relative(place: str, project: Project) -> str:
    if place == "__main__":
        raise ReferenceProblem("it is defined in a notebook or at the prompt: move it to a module")
    return place.removeprefix(project.package) if _within(place, [project.package]) else place
