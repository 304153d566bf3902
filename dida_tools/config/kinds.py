"""What the value of a key may be, in words and as a test. torch is imported only where a test needs it."""

import importlib
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, UnionType
from typing import Any, NamedTuple

REQUIRED = object()


class Kind(NamedTuple):
    """Plain types, some strings, the classes derived from "module:Class", or what a test accepts."""

    name: str
    what: type | UnionType | tuple[str, ...] | str | Callable[[Any], bool]

    def fits(self, value: Any) -> bool:
        """Tell whether a value is of this kind."""
        if isinstance(self.what, type | UnionType):
            return is_of(value, self.what)
        if isinstance(self.what, tuple):
            return isinstance(value, str) and value in self.what
        if isinstance(self.what, str):
            module, _, name = self.what.partition(":")
            base = getattr(importlib.import_module(module), name)
            return isinstance(value, type) and issubclass(value, base)
        return self.what(value)


def is_of(value: Any, hint: Any) -> bool:
    """Tell whether a value is of plain types: True is no number, and a whole number is a float as well."""
    types = typing.get_args(hint) or (hint,)
    if isinstance(value, bool):
        return bool in types
    return isinstance(value, types) or (isinstance(value, int) and float in types)


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
            wanted = f"the class {name}, not an instance of it (its arguments go into the _CONFIG)"
        elif self.low is not None:
            wanted += f" {'above' if self.above_low else 'of at least'} {self.low:g}"
            wanted += f" and below {self.high:g}" if self.high < float("inf") else ""
        return f"must be {wanted}" + (" or None" if self.default is None else "")

    def _is_within(self, value: Any) -> bool:
        if self.low is None:
            return True
        return self.low <= value < self.high and not (self.above_low and value == self.low)  # NaN never is


def _is_device(value: Any) -> bool:
    import torch

    try:
        return value == "auto" or (isinstance(value, torch.device | str) and bool(torch.device(value)))
    except RuntimeError:
        return False


def _are_arguments(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)


def _are_mask_values(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    parts = [one for key in value for one in (key if isinstance(key, tuple) else (key,))]
    return all(is_of(one, float) for one in parts) and all(is_of(one, int) for one in value.values())


def _are_addresses(value: Any) -> bool:
    listed = value if isinstance(value, list | tuple) and value else [value]
    return all(isinstance(one, str) and "@" in one for one in listed)


TEXT, FLAG = Kind("a string", str), Kind("True or False", bool)
WHOLE, NUMBER = Kind("a whole number", int), Kind("a number", float)
FILE = Kind("the path of a file", str | Path)
ROUTINE = Kind("a routine's module or name", str | ModuleType)
MODEL = Kind("a class derived from torch.nn.Module", "torch.nn:Module")
OPTIMIZER = Kind("a class derived from torch.optim.Optimizer", "torch.optim:Optimizer")
SCHEDULER = Kind("a class derived from an LRScheduler", "torch.optim.lr_scheduler:LRScheduler")
DATASET = Kind(
    "the class of a dataset",
    lambda value: isinstance(value, type) and (hasattr(value, "__getitem__") or hasattr(value, "__iter__")),
)
# An instance of a module can be called, too, but a config holds its class.
FUNCTION = Kind("a function or a class", lambda value: callable(value) and not hasattr(value, "_parameters"))
ARGUMENTS = Kind("a dict of keyword arguments, which has strings as keys", _are_arguments)
METRICS = Kind(
    "a dict of name: function, without 'loss', which is the mean of LOSS",
    lambda value: _are_arguments(value) and all(map(callable, value.values())) and "loss" not in value,
)
GOAL = Kind(
    "'min NAME' or 'max NAME', like 'max f1'",
    lambda value: isinstance(value, str) and value.split()[:-1] in (["min"], ["max"]),
)
DEVICE = Kind("'auto', 'cpu', 'cuda', 'cuda:0', 'mps' or a torch.device", _is_device)
MASK_VALUES = Kind("a dict of mask value: class number", _are_mask_values)
ADDRESSES = Kind("an e-mail address or a list of them", _are_addresses)
STEP = Kind("one of 'step', 'epoch'", ("step", "epoch"))
PRECISION = Kind("one of 'auto', 'fp32', 'bf16', 'fp16'", ("auto", "fp32", "bf16", "fp16"))
