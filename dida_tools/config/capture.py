"""Write a config of live objects as plain data, and read it back to the very same objects."""

import functools
import math
from collections.abc import Iterable
from pathlib import Path, PurePath
from types import ModuleType
from typing import Any

import torch

from .errors import ConfigError
from .keys import KEYS
from .project import Project
from .references import ReferenceProblem, name_of, resolve
from .tree import join

VERSION = 1


def capture(config: dict[str, Any], project: Project, problems: list[str] | None = None) -> dict[str, Any]:
    """
    Writes a config as plain data that json can hold: {"version": ..., "config": ...}.

    Objects become tagged values: {"@ref": "package.module:Name"}, "@module", "@partial", "@tuple", "@device", "@dtype",
    "@path", "@dict" (keys other than strings), "@float" (nan, inf). Each name has been resolved again to this object.
    The name of an object of another library is recorded too: restoring it needs the library in ALLOWED_ROOTS.

    :param problems: takes what cannot be recorded, which stands as {"@unrecorded": reason} in the record
    :raises ConfigError: if something cannot be recorded and no such list is given
    """
    found: list[str] = [] if problems is None else problems
    record = {"version": VERSION, "config": encode(config, "", project, found)}
    if problems is None and found:
        raise ConfigError(found)
    return record


def restore(record: dict[str, Any], project: Project, roots: Iterable[str] = ()) -> dict[str, Any]:
    """
    Reads a captured config back to the live objects.

    :param roots: libraries that may be named besides references.ALLOWED_ROOTS
    :raises ConfigError: with everything that is damaged, not found, not allowed, or of another kind than its key wants
    """
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        raise ConfigError(["the record is no captured config: it must be {'version': ..., 'config': {...}}."])
    if record.get("version") != VERSION:
        raise ConfigError([f"the record has version {record.get('version')!r}, this code reads {VERSION}."])
    problems: list[str] = []
    try:
        config = _decode(record["config"], "", project, tuple(roots), problems)
    except RecursionError:
        raise ConfigError(["the record is damaged: it is nested too deeply."]) from None
    if not problems and not isinstance(config, dict):
        problems.append(f"the record is damaged: {short(record['config'])} is no config.")
    if problems:
        raise ConfigError(problems)
    return config


def encode(value: Any, path: str, project: Project, problems: list[str], above: tuple[int, ...] = ()) -> Any:
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"@float": repr(value)}
    if id(value) in above:
        problems.append(f"{path} contains itself: a record must end somewhere.")
        return {"@unrecorded": "contains itself"}
    above = (*above, id(value))
    if type(value) is list:
        return [
            encode(item, f"{path}[{index}]", project, problems, above) for index, item in enumerate(value)
        ]
    if type(value) is tuple:
        return {
            "@tuple": [
                encode(item, f"{path}[{index}]", project, problems, above) for index, item in enumerate(value)
            ]
        }
    if type(value) is dict:
        if all(type(key) is str and not key.startswith("@") for key in value):
            return {
                key: encode(item, join(path, key), project, problems, above) for key, item in value.items()
            }
        pairs = [(key, item, join(path, str(key))) for key, item in value.items()]
        return {
            "@dict": [
                [encode(k, p, project, problems, above), encode(v, p, project, problems, above)]
                for k, v, p in pairs
            ]
        }
    if isinstance(value, torch.device):
        return {"@device": str(value)}
    if isinstance(value, torch.dtype):
        return {"@dtype": str(value).removeprefix("torch.")}
    if isinstance(value, PurePath):
        return {"@path": str(value)}
    if type(value) is functools.partial:
        parts = {"@partial": value.func, "args": list(value.args), "kwargs": dict(value.keywords)}
        return {
            key: encode(part, f"{path}.{key.strip('@')}", project, problems, above)
            for key, part in parts.items()
        }
    try:
        return {"@module" if isinstance(value, ModuleType) else "@ref": name_of(value, project)}
    except ReferenceProblem as problem:
        problems.append(f"{path} cannot be recorded: {problem}.")
        return {"@unrecorded": str(problem)}


def _decode(value: Any, path: str, project: Project, roots: tuple[str, ...], problems: list[str]) -> Any:
    if isinstance(value, list):
        return [
            _decode(item, f"{path}[{index}]", project, roots, problems) for index, item in enumerate(value)
        ]
    if not isinstance(value, dict):
        return value
    tags = [key for key in value if key.startswith("@")]
    if not tags:
        return {key: _decode(item, join(path, key), project, roots, problems) for key, item in value.items()}
    try:
        return _decode_tagged(tags[0], value, path, project, roots, problems)
    except ReferenceProblem as problem:
        problems.append(f"{path}: {problem}.")
    except RecursionError:
        raise
    except Exception as error:
        problems.append(f"{path or 'the record'} is damaged: {short(value)} is no {tags[0]} ({error}).")
    return None


def _decode_tagged(
    tag: str, value: dict[str, Any], path: str, project: Project, roots: tuple[str, ...], problems: list[str]
) -> Any:
    content = value[tag]
    if set(value) != ({"@partial", "args", "kwargs"} if tag == "@partial" else {tag}):
        raise ValueError("it has other keys")
    if tag in ("@tuple", "@dict"):
        if not isinstance(content, list) or (
            tag == "@dict" and not all(isinstance(pair, list) for pair in content)
        ):
            raise ValueError("it must hold a list")
        if tag == "@tuple":
            return tuple(_decode(content, path, project, roots, problems))
        return {
            _decode(k, path, project, roots, problems): _decode(
                v, join(path, str(k)), project, roots, problems
            )
            for k, v in content
        }
    if tag == "@partial":
        function = _decode(content, path, project, roots, problems)
        arguments = _decode(value["args"], path, project, roots, problems)
        keywords = _decode(value["kwargs"], path, project, roots, problems)
        if function is None and content is not None:
            return None  # its problem has been noted
        if not callable(function) or not isinstance(arguments, list) or not isinstance(keywords, dict):
            raise ValueError("it must hold a function, a list and a dict")
        if not all(isinstance(keyword, str) for keyword in keywords):
            raise ValueError("its keywords must be strings")
        return _of_the_kind(functools.partial(function, *arguments, **keywords), "a partial", path)
    if not isinstance(content, str):
        raise ValueError("it must hold a string")
    if tag == "@float":
        if content not in ("nan", "inf", "-inf"):
            raise ValueError("other numbers are written as such")
        return float(content)
    if tag == "@device":
        return torch.device(content)
    if tag == "@path":
        return Path(content)
    if tag == "@dtype":
        dtype = vars(torch).get(content)
        if not isinstance(dtype, torch.dtype):
            raise ValueError("torch has no such dtype")
        return dtype
    if tag in ("@ref", "@module") and bool(content.partition(":")[2]) != (tag == "@ref"):
        raise ValueError("an object is named module:name, and a module without a colon")
    if tag == "@ref":
        return _of_the_kind(resolve(content, project, roots), repr(content), path)
    if tag == "@module":
        if path != "ROUTINE_NAME":
            raise ReferenceProblem(f"a module ({content!r}) is only restored as ROUTINE_NAME")
        return resolve(content, project, roots)
    if tag == "@unrecorded":
        raise ReferenceProblem(
            f"it could not be recorded ({content}), so this run cannot be done again from its record"
        )
    raise ValueError("there is no such tag")


def _of_the_kind(obj: Any, name: str, path: str) -> Any:
    """Refuses an object where its key holds none, or one of another kind: hostile records name what is merely there."""
    key = path.partition(".")[0].partition("[")[0]
    if key == path and key in KEYS:
        problem = KEYS[key].test(obj)
        if problem:
            raise ReferenceProblem(f"{name} does not belong here: {key} {problem}")
    elif key in KEYS and not (key.endswith("_CONFIG") or key in ("METRICS", "LOSS")):
        raise ReferenceProblem(f"{name} does not belong here: {key} holds no objects")
    return obj


def short(value: Any) -> str:
    """Return the repr of a value on one line, cut to 80 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."
