"""
Write a config of live objects as plain data, and read it back to the very same objects.

Reading a record imports the code that it names, so only what references.py allows is resolved, and only where
the key wants such an object.
"""

import math
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path, PurePath
from types import ModuleType
from typing import Any

from .errors import ConfigError
from .keys import KEYS, upgrade
from .project import Project
from .references import ReferenceProblem, name_of, resolve
from .tree import join

VERSION = 1
_PARTIAL = ("@partial", "args", "kwargs")


def capture(config: dict[str, Any], project: Project, problems: list[str] | None = None) -> dict[str, Any]:
    """
    Write a config as plain data that json can hold: {"version": ..., "config": ...}.

    Objects become tagged values: {"@ref": "package.module:Name"}, "@module", and those of _kinds. Each name
    has been resolved again to this object. Another library's object is recorded, too: restoring it needs
    ALLOWED_ROOTS.

    :param problems: takes what cannot be recorded, which stands as {"@unrecorded": reason} in the record
    :raises ConfigError: if something cannot be recorded and no such list is given
    """
    writer = _Writer(project, [] if problems is None else problems)
    record = {"version": VERSION, "config": writer.write(config, "")}
    if problems is None and writer.problems:
        raise ConfigError(writer.problems)
    return record


def restore(record: dict[str, Any], project: Project, roots: Iterable[str] = ()) -> dict[str, Any]:
    """
    Read a captured config back to the live objects.

    :param roots: libraries that may be named besides the project's ALLOWED_ROOTS
    :raises ConfigError: with everything that is damaged, not found, not allowed, or of another kind than its
        key wants
    """
    captured = record.get("config") if isinstance(record, dict) else None
    if not isinstance(captured, dict) or any(key.startswith("@") for key in captured):
        raise ConfigError("the record is no captured config: it must be {'version': ..., 'config': {...}}.")
    if record.get("version") != VERSION:
        raise ConfigError(f"the record has version {record.get('version')!r}, this code reads {VERSION}.")
    reader = _Reader(project, tuple(roots))
    try:
        config = reader.read(upgrade(captured), "")
    except RecursionError:
        raise ConfigError("the record is damaged: it is nested too deeply.") from None
    if reader.problems:
        raise ConfigError(reader.problems)
    return config


def short(value: Any) -> str:
    """Return the repr of a value on one line, cut to 80 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


@cache
def _kinds() -> dict[type, tuple[tuple[str, ...], Callable[[Any], list], Callable[..., Any]]]:
    """Return for each type of tagged values the keys, what is written under them, and how that is read."""
    import torch

    def dtype(name: Any) -> Any:
        return _of(torch.dtype, vars(torch).get(name))

    return {
        float: (("@float",), lambda value: [repr(value)], _read_float),
        tuple: (("@tuple",), lambda value: [list(value)], lambda items: tuple(_of(list, items))),
        dict: (("@dict",), lambda value: [[list(pair) for pair in value.items()]], _read_dict),
        PurePath: (("@path",), lambda value: [str(value)], lambda text: Path(_of(str, text))),
        torch.device: (("@device",), lambda value: [str(value)], lambda text: torch.device(_of(str, text))),
        torch.dtype: (("@dtype",), lambda value: [str(value)[len("torch.") :]], dtype),
        partial: (_PARTIAL, lambda value: [value.func, list(value.args), value.keywords], _read_partial),
    }


def _of(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{short(value)} is no {kind.__name__}")
    return value


def _read_float(text: Any) -> float:
    if text not in ("nan", "inf", "-inf"):
        raise ValueError("other numbers are written as such")
    return float(text)


def _read_dict(pairs: Any) -> dict:
    return dict(_of(list, pair) for pair in _of(list, pairs))


def _read_partial(function: Any, arguments: Any, keywords: Any) -> partial:
    if not callable(function) or not all(isinstance(keyword, str) for keyword in _of(dict, keywords)):
        raise ValueError("it must hold a function, a list and a dict with strings as keys")
    return partial(function, *_of(list, arguments), **keywords)


class _Writer:
    """The way from live values to plain data. Problems has what cannot be written."""

    def __init__(self, project: Project, problems: list[str]) -> None:
        self.project, self.problems = project, problems

    def write(self, value: Any, path: str, above: tuple[int, ...] = ()) -> Any:
        """Return a value as plain data; above are the ids of what it lies in."""
        is_plain = value is None or type(value) in (bool, int, str)
        if is_plain or (type(value) is float and math.isfinite(value)):
            return value
        if id(value) in above:
            self.problems.append(f"{path} contains itself: a record must end somewhere.")
            return {"@unrecorded": "contains itself"}
        above = (*above, id(value))
        if type(value) is list:
            return [self.write(item, f"{path}[{index}]", above) for index, item in enumerate(value)]
        if type(value) is dict and all(type(key) is str and not key.startswith("@") for key in value):
            return {key: self.write(item, join(path, key), above) for key, item in value.items()}
        kind = PurePath if isinstance(value, PurePath) else type(value)
        if kind in _kinds():
            keys, write, _ = _kinds()[kind]
            return {key: self.write(part, path, above) for key, part in zip(keys, write(value), strict=True)}
        try:
            name = name_of(value, self.project)
            return {"@module" if isinstance(value, ModuleType) else "@ref": name}
        except ReferenceProblem as problem:
            self.problems.append(f"{path} cannot be recorded: {problem}.")
            return {"@unrecorded": str(problem)}


class _Reader:
    """The way from plain data to live values. Problems has what cannot be read."""

    def __init__(self, project: Project, roots: tuple[str, ...]) -> None:
        self.project, self.roots, self.problems = project, roots, list[str]()
        self.readers = {frozenset(keys): (keys, read) for keys, _, read in _kinds().values()}

    def read(self, value: Any, path: str) -> Any:
        """Return the live value, or None where there is a problem."""
        if isinstance(value, list):
            return [self.read(item, f"{path}[{index}]") for index, item in enumerate(value)]
        if not isinstance(value, dict):
            return value
        tag = next((key for key in value if key.startswith("@")), None)
        if tag is None:
            return {key: self.read(item, join(path, key)) for key, item in value.items()}
        known = len(self.problems)
        parts = {key: self.read(part, path) for key, part in value.items()}
        if len(self.problems) > known:
            return None
        try:
            return self._read_tagged(tag, parts, path)
        except ReferenceProblem as problem:
            self.problems.append(f"{path}: {problem}.")
        except Exception as error:
            self.problems.append(f"{path} is damaged: {short(value)} is no {tag} ({error}).")
        return None

    def _read_tagged(self, tag: str, parts: dict[str, Any], path: str) -> Any:
        if frozenset(parts) in self.readers:
            keys, read = self.readers[frozenset(parts)]
            value = read(*(parts[key] for key in keys))
            return _in_its_place(value, "a partial", path) if tag == "@partial" else value
        if list(parts) != [tag] or tag not in ("@ref", "@module", "@unrecorded"):
            raise ValueError("there is no such tag, or it has other keys")
        name = _of(str, parts[tag])
        if tag == "@unrecorded":
            raise ReferenceProblem(f"it could not be recorded ({name}), so this run cannot be repeated")
        if bool(name.partition(":")[2]) != (tag == "@ref"):
            raise ValueError("an object is named module:name, and a module without a colon")
        if tag == "@module" and path != "ROUTINE_NAME":
            raise ReferenceProblem(f"a module ({name!r}) is only restored as ROUTINE_NAME")
        return _in_its_place(resolve(name, self.project, self.roots), repr(name), path)


def _in_its_place(obj: Any, name: str, path: str) -> Any:
    """Refuse an object where its key holds none, or one of another kind, as a hostile record may name it."""
    key = path.partition(".")[0].partition("[")[0]
    if key == path and key in KEYS:
        problem = KEYS[key].test(obj)
        if problem:
            raise ReferenceProblem(f"{name} does not belong here: {key} {problem}")
    elif key in KEYS and not (key.endswith("_CONFIG") or key in ("METRICS", "LOSS")):
        raise ReferenceProblem(f"{name} does not belong here: {key} holds no objects")
    return obj
