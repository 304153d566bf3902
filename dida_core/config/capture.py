"""
Write a config of live objects as plain data, and read it back to the very same objects.

Reading a record imports the code that it names, so only what references.py allows is resolved, and only where
the key wants such an object.
"""

import math
from functools import partial
from pathlib import Path, PurePath
from types import ModuleType
from typing import Any

from ..errors import ConfigError
from .keys import KEYS, NOT_RESTORED, upgrade
from .kinds import ARGUMENT_OBJECTS, ARGUMENTS, OBJECTS
from .project import Project
from .references import ReferenceProblem, name_of, resolve
from .tree import join

VERSION = 1


def capture(config: dict[str, Any], project: Project, problems: list[str] | None = None) -> dict[str, Any]:
    """
    Write a config as plain data that json can hold: {"version": ..., "config": ...}.

    Objects become tagged values: {"@ref": "package.module:Name"}, "@module", and those of _plain. Each name
    has been resolved again to this object.

    :param problems: takes what cannot be recorded, which stands as {"@unrecorded": reason} in the record, and
        what can, but could not be restored, such as an object of a library that is not in ALLOWED_ROOTS
    :raises ConfigError: if something cannot be recorded and no such list is given
    """
    found: list[str] = []
    record = {"version": VERSION, "config": _plain(config, project, found, "")}
    if problems is not None:
        problems += found
    elif found:
        raise ConfigError(found)
    return record


def restore(record: dict[str, Any], project: Project) -> dict[str, Any]:
    """
    Read a captured config back to the live objects, without the keys in NOT_RESTORED.

    :raises ConfigError: with everything that is damaged, not found, not allowed, or of another kind than its
        key wants
    """
    captured = record.get("config") if isinstance(record, dict) else None
    if not isinstance(captured, dict) or any(key.startswith("@") for key in captured):
        raise ConfigError("the record is no captured config: it must be {'version': ..., 'config': {...}}.")
    if record.get("version") != VERSION:
        raise ConfigError(f"the record has version {record.get('version')!r}, this code reads {VERSION}.")
    reader = _Reader(project)
    taken = {key: value for key, value in captured.items() if key not in NOT_RESTORED}
    try:
        config = reader.read(upgrade(taken), "")
    except RecursionError:
        raise ConfigError("the record is damaged: it is nested too deeply.") from None
    if reader.problems:
        raise ConfigError(reader.problems)
    return config


def short(value: Any) -> str:
    """Return the repr of a value on one line, cut to 80 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


def _plain(value: Any, project: Project, problems: list[str], path: str, above: tuple[int, ...] = ()) -> Any:
    """Return a value as plain data; above are the ids of what it lies in."""

    def inner(item: Any, path: str = path) -> Any:
        return _plain(item, project, problems, path, (*above, id(value)))

    kind = type(value)
    if value is None or kind in (bool, int, str) or (kind is float and math.isfinite(value)):
        return value
    if id(value) in above:
        problems.append(f"{path} contains itself: a record must end somewhere.")
        return {"@unrecorded": "contains itself"}
    if kind is list:
        return [inner(item, f"{path}[{index}]") for index, item in enumerate(value)]
    if kind is dict and all(type(key) is str and not key.startswith("@") for key in value):
        return {key: inner(item, join(path, key)) for key, item in value.items()}
    if kind is dict:
        return {"@dict": inner([[*pair] for pair in value.items()])}
    if kind is tuple:
        return {"@tuple": inner([*value])}
    if kind is partial:
        parts = {"@partial": value.func, "args": [*value.args], "kwargs": value.keywords}
        return {tag: inner(part) for tag, part in parts.items()}
    if kind is float:
        return {"@float": repr(value)}
    if isinstance(value, PurePath):
        return {"@path": str(value)}
    if kind.__module__ == "torch" and kind.__name__ in ("device", "dtype"):
        return {f"@{kind.__name__}": str(value).removeprefix("torch.")}
    tag, content = "@module" if isinstance(value, ModuleType) else "@ref", ""
    try:
        content = name_of(value, project)
        _in_its_place(resolve(content, project), repr(content), path)
    except ReferenceProblem as problem:
        problems.append(f"{path} cannot be recorded: {problem}.")
        return {tag: content} if content else {"@unrecorded": str(problem)}
    return {tag: content}


class _Reader:
    """The way from plain data to live values. Problems has what cannot be read."""

    def __init__(self, project: Project) -> None:
        self.project, self.problems = project, list[str]()

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
        import torch

        if parts.keys() != ({tag, "args", "kwargs"} if tag == "@partial" else {tag}):
            raise ValueError("it has other keys")
        match parts:
            case {"@float": "nan" | "inf" | "-inf" as text}:
                return float(text)
            case {"@tuple": list(items)}:
                return tuple(items)
            case {"@dict": list(pairs)} if all(isinstance(pair, list) for pair in pairs):
                return dict(pairs)
            case {"@path": str(text)}:
                return Path(text)
            case {"@device": str(text)}:
                return torch.device(text)
            case {"@dtype": str(text)} if isinstance(vars(torch).get(text), torch.dtype):
                return vars(torch)[text]
            case {"@partial": f, "args": list(args), "kwargs": dict(kwargs)} if {*map(type, kwargs)} <= {str}:
                return _in_its_place(partial(f, *args, **kwargs), "a partial", path)
            case {"@unrecorded": str(reason)}:
                raise ReferenceProblem(f"it could not be recorded ({reason}), so this run cannot be repeated")
            case {"@module": str(name)} if path != "ROUTINE_NAME":
                raise ReferenceProblem(f"a module ({name!r}) is only restored as ROUTINE_NAME")
            case {"@ref": str(name)} | {"@module": str(name)} if bool(name.partition(":")[2]) == (
                tag == "@ref"
            ):
                return _in_its_place(resolve(name, self.project), repr(name), path)
        raise ValueError("there is no such tag, or it holds something else")


def _in_its_place(obj: Any, name: str, path: str) -> Any:
    """Refuse an object where its key holds none, or one of another kind, as a hostile record may name it."""
    key = path.partition(".")[0].partition("[")[0]
    if key not in KEYS:
        return obj  # check refuses the key
    if key == path and (problem := KEYS[key].test(obj)):
        raise ReferenceProblem(f"{name} does not belong here: {key} {problem}")
    inside = ARGUMENT_OBJECTS if KEYS[key].kind is ARGUMENTS else ()
    kinds = OBJECTS.get(key, (KEYS[key].kind,) if key == path else inside)
    # A partial is made of what has been here before.
    if not (kinds and isinstance(obj, partial)) and not any(kind.fits(obj) for kind in kinds):
        wanted = " or ".join(kind.name for kind in kinds) or "no objects"
        raise ReferenceProblem(f"{name} does not belong here: {key} holds {wanted}")
    return obj
