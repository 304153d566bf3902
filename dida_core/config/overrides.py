"""Values of a config from the command line."""

import ast
import contextlib
import inspect
from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError
from .capture import short
from .check import unknown
from .keys import KEYS, RENAMED, copy_config, upgrade
from .project import Project
from .references import ReferenceProblem, resolve

# Where a bare name is looked for, as in OPTIMIZER=AdamW; classes of torch.nn also in MODEL_CONFIG.activ=ReLU.
_HOMES = {
    "MODEL": (".models",),
    "OPTIMIZER": ("torch.optim",),
    "SCHEDULER": ("torch.optim.lr_scheduler",),
    "LOSS": (".utils.loss", "torch.nn", "torch.nn.functional"),
    "METRICS": (".utils.loss",),
    "DATASET": (".utils.data",),
}
_NAMED = {"none": None, "true": True, "false": False, "nan": float("nan")}


def override(
    config: dict[str, Any], arguments: Sequence[str], project: Project, problems: list[str] | None = None
) -> dict[str, Any]:
    """
    Return a copy of a config with other values: ``EPOCHS=3 MODEL_CONFIG.dropout=0.1 OPTIMIZER=AdamW``.

    A value is a Python literal, the dotted name of an object, or else a string.

    :param problems: takes what is malformed or unknown, so that check can report it with all the rest
    :raises ConfigError: with all that is malformed or unknown, if no such list is given
    """
    config = copy_config(config)
    found = [problem for argument in arguments if (problem := _apply(config, argument, project))]
    if problems is not None:
        problems += found
    elif found:
        raise ConfigError(found)
    return upgrade(config)


def _apply(config: dict[str, Any], argument: str, project: Project) -> str | None:
    """Set one value, in place, and return what is wrong with the argument."""
    dotted, equals, text = argument.partition("=")
    first, *rest = dotted.split(".")
    keys = [RENAMED.get(first, first), *rest]
    if not equals or not all(keys):
        return f"{argument!r} is no override: write KEY=VALUE, such as EPOCHS=3 or MODEL_CONFIG.dropout=0.1."
    if keys[0] not in KEYS:
        return unknown(keys[0], KEYS, config)
    try:
        problem = assign(config, ".".join(keys), _parse(keys, text, project, config))
    except ReferenceProblem as error:
        return f"{argument}: {error}."
    return f"{argument!r} is no override: {problem}." if problem else None


def assign(config: dict[str, Any], dotted: str, value: Any) -> str | None:
    """
    Set a value of a config, in place, with the dicts that it lies in.

    :param dotted: such as MODEL_CONFIG.dropout, or SCHEDULER_CONFIG.0.length in a list
    :return: why it cannot be set, or None
    """
    keys, inner = dotted.split("."), config
    for depth, key in enumerate(keys, start=1):
        place: Any = key
        if isinstance(inner, list) and key.isdecimal() and int(key) < len(inner):
            place = int(key)
        elif not isinstance(inner, dict):
            return f"{'.'.join(keys[: depth - 1])} is {short(inner)}, which has no keys"
        elif depth < len(keys) and inner.get(key) is None:
            default = KEYS[key].default if depth == 1 else None
            inner[key] = copy_config(default) if isinstance(default, dict) else {}
        if depth == len(keys):
            inner[place] = value
        inner = inner[place]
    return None


def _parse(keys: list[str], text: str, project: Project, config: dict[str, Any]) -> Any:
    key, is_key_itself = keys[0], len(keys) == 1
    if keys == ["SCHEDULER"] and text.startswith("[") and text.endswith("]"):
        return [_parse(keys, one.strip(), project, config) for one in text[1:-1].split(",")]
    wants_text = is_key_itself and KEYS[key].test("some text") is None
    if text.lower() in _NAMED and not (wants_text and KEYS[key].test(_NAMED[text.lower()])):
        return _NAMED[text.lower()]
    if wants_text:
        return text
    with contextlib.suppress(ValueError, TypeError, SyntaxError):
        return ast.literal_eval(text)
    wants_object = key in _HOMES and (is_key_itself or key == "METRICS")
    place, _, name = text.replace(":", ".").rpartition(".")
    places = (place,) if place else _HOMES[key] if wants_object else ()
    if len(keys) == 2 and key.endswith("_CONFIG") and text.isidentifier() and not _wants_text(config, *keys):
        with contextlib.suppress(ReferenceProblem):
            if isinstance(found := resolve(f"torch.nn:{text}", project), type):
                return found
    if all(part.isidentifier() for part in [*(places or ("",))[0].strip(".").split("."), name]):
        # The caller's own command line is trusted, unlike a record: any library may be named.
        root, problems = place.partition(".")[0], list[ReferenceProblem]()
        for home in places:
            try:
                return resolve(f"{home}:{name}", project, trusted=True)
            except ReferenceProblem as problem:
                problems.append(problem)
        if wants_object or root in ("", "torch", project.package):
            raise problems[0]
    if wants_object:
        raise ReferenceProblem(f"{key} wants an object: give its dotted name, such as {_HOMES[key][0]}.NAME")
    return text


def _wants_text(config: dict[str, Any], key: str, argument: str) -> bool:
    """Tell whether an argument holds text, by its value so far, or by its hint."""
    if isinstance((config.get(key) or {}).get(argument), str):
        return True
    with contextlib.suppress(KeyError, TypeError, ValueError):
        parameter = inspect.signature(config[key.removesuffix("_CONFIG")]).parameters.get(argument)
        return parameter is not None and "str" in str(parameter.annotation)
    return False
