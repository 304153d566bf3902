"""What the value of a key may be, in words and as a test. torch is imported only where a test needs it."""

import importlib
import os
import typing
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, UnionType
from typing import Any, NamedTuple

REQUIRED = object()
PLAIN_TYPES = (bool, int, float, complex, str, list, tuple, dict, set)


class Kind(NamedTuple):
    """Plain types, or what passes a test; and its name in words that follow "must be"."""

    name: str
    what: type | UnionType | Callable[[Any], bool]

    def fits(self, value: Any) -> bool:
        """Tell whether a value is of this kind."""
        return is_of(value, self.what) if isinstance(self.what, type | UnionType) else self.what(value)


@dataclass(frozen=True)
class Key:
    """One key of a config. None is allowed where it is the default, and numbers from low on, below high."""

    default: Any
    kind: Kind
    about: str
    low: float | None = None
    high: float = float("inf")
    above_low: bool = False  # low itself is too low

    def test(self, value: Any) -> str | None:
        """Return what a value must be instead ("must be ..."), or None where it fits."""
        if (value is None and self.default is None) or (self.kind.fits(value) and self._is_within(value)):
            return None
        wanted = self.kind.name
        if type(value).__module__ != "builtins" and self.kind.fits(type(value)):
            name = type(value).__name__
            wanted = f"the class {name}, not an instance of it"
        elif self.low is not None:
            wanted += f" {'above' if self.above_low else 'of at least'} {self.low:g}"
            wanted += f" and below {self.high:g}" if self.high < float("inf") else ""
        return f"must be {wanted}" + (" or None" if self.default is None else "")

    def _is_within(self, value: Any) -> bool:
        if self.low is None:
            return True
        return self.low <= value < self.high and not (self.above_low and value == self.low)  # NaN never is


def is_of(value: Any, hint: Any) -> bool:
    """Tell whether a value is of plain types: True is no number, and a whole number is a float as well."""
    types = typing.get_args(hint) or (hint,)
    if isinstance(value, bool):
        return bool in types
    return isinstance(value, types) or (isinstance(value, int) and float in types)


def as_list(value: Any) -> list[Any]:
    """Return what is given as one value or several as a list."""
    return list(value) if isinstance(value, list | tuple) else [value]


def one_of(*choices: str) -> Kind:
    """Return the kind of a string among some."""
    name = f"one of {', '.join(choices)}"
    return Kind(name, lambda value: isinstance(value, str) and value in choices)


def _class_of(module: str, base: str) -> Kind:
    def is_derived(value: Any) -> bool:
        return isinstance(value, type) and issubclass(value, getattr(importlib.import_module(module), base))

    return Kind(f"a class derived from {module}.{base}", is_derived)


def _is_device(value: Any) -> bool:
    import torch

    try:
        return value == "auto" or (isinstance(value, torch.device | str) and bool(torch.device(value)))
    except RuntimeError:
        return False


def _is_file_name(value: Any) -> bool:
    is_one = isinstance(value, str) and value.isprintable() and os.path.basename(value) == value
    return is_one and 0 < len(value) <= 100 and value[0] != "." and not set(value) & set('/\\:*?"<>|')


def _are_arguments(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)


def _are_metrics(value: Any) -> bool:
    return _are_arguments(value) and all(map(callable, value.values())) and "loss" not in value


def _are_mask_values(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    parts = [part for key in value for part in (key if isinstance(key, tuple) else (key,))]
    return all(is_of(part, float) for part in parts) and all(is_of(number, int) for number in value.values())


TEXT, FLAG = Kind("a string", str), Kind("True or False", bool)
WHOLE, NUMBER = Kind("a whole number", int), Kind("a number", float)
PATH = Kind("a path", str | os.PathLike)
FILE_NAME = Kind("the name of a file, such as experiments.csv, without a folder", _is_file_name)
ROUTINE = Kind("a routine's module or name", str | ModuleType)
MODEL, OPTIMIZER = _class_of("torch.nn", "Module"), _class_of("torch.optim", "Optimizer")
_SCHEDULE = _class_of("torch.optim.lr_scheduler", "LRScheduler")
SCHEDULER = Kind(
    f"{_SCHEDULE.name}, or a list of them", lambda value: all(map(_SCHEDULE.fits, as_list(value) or [None]))
)
DATASET = Kind(
    "the class of a dataset",
    lambda value: isinstance(value, type) and (hasattr(value, "__getitem__") or hasattr(value, "__iter__")),
)
# An instance of a module can be called, too, but a config holds its class.
FUNCTION = Kind("a function or a class", lambda value: callable(value) and not hasattr(value, "_parameters"))
ARGUMENTS = Kind("a dict of keyword arguments, which has strings as keys", _are_arguments)
SCHEDULER_ARGUMENTS = Kind(
    "a dict of keyword arguments, or a list of them", lambda value: all(map(_are_arguments, as_list(value)))
)
WARMUP = Kind(
    "a whole number, or one below 1", lambda value: is_of(value, int) or (is_of(value, float) and value < 1)
)
METRICS = Kind("a dict of name: function, without 'loss', which is the mean of LOSS", _are_metrics)
GOAL = Kind(
    "'min NAME' or 'max NAME', like 'max f1'",
    lambda value: isinstance(value, str) and value.split()[:-1] in (["min"], ["max"]),
)
DEVICE = Kind("'auto', 'cpu', 'cuda', 'cuda:0', 'mps' or a torch.device", _is_device)
MASK_VALUES = Kind("a dict of mask value: class number", _are_mask_values)
ADDRESSES = Kind(
    "an e-mail address or a list of them",
    lambda value: all(isinstance(one, str) and "@" in one for one in as_list(value) or [None]),
)

SAMPLER = _class_of("torch.utils.data", "Sampler")
PLAIN_TYPE = Kind("a plain type", lambda value: value in PLAIN_TYPES)
JUST_FUNCTION = Kind("a function", lambda value: callable(value) and not isinstance(value, type))

# The objects that a record may name within the value of a key, in lists, arguments and partials, too; each is
# called by whoever gets it. A key that is not listed holds what its own kind says, and as arguments these.
ARGUMENT_OBJECTS = (MODEL, JUST_FUNCTION, PLAIN_TYPE)
OBJECTS: dict[str, tuple[Kind, ...]] = {
    "DATASET_CONFIG": (*ARGUMENT_OBJECTS, DATASET),
    "DATA_LOADER_CONFIG": (JUST_FUNCTION, SAMPLER),
    "LOSS": (JUST_FUNCTION, MODEL),
    "METRICS": (JUST_FUNCTION, MODEL),
    "OPTIMIZER_CONFIG": (OPTIMIZER,),
    "SCHEDULER": (_SCHEDULE,),
    "SCHEDULER_CONFIG": (JUST_FUNCTION, _SCHEDULE),
}
