"""Values of a config from the command line."""

import ast
import contextlib
from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError
from .capture import short
from .check import unknown
from .keys import KEYS, RENAMED, copy_config, upgrade
from .project import Project
from .references import ReferenceProblem, resolve

# Where a bare name is looked for, as in OPTIMIZER=AdamW.
_HOMES = {
    "MODEL": ".models",
    "OPTIMIZER": "torch.optim",
    "SCHEDULER": "torch.optim.lr_scheduler",
    "LOSS": ".utils.loss",
    "METRICS": ".utils.loss",
    "DATASET": ".utils.data",
}
_NAMED = {"none": None, "true": True, "false": False}


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
        return unknown(keys[0])
    try:
        problem = assign(config, ".".join(keys), _parse(keys, text, project))
    except ReferenceProblem as error:
        return f"{argument}: {error}."
    return f"{argument!r} is no override: {problem}." if problem else None


def assign(config: dict[str, Any], dotted: str, value: Any) -> str | None:
    """
    Set a value of a config, in place, with the dicts that it lies in.

    :param dotted: such as MODEL_CONFIG.dropout; its first part is a key of a config
    :return: why it cannot be set, or None
    """
    keys, inner = dotted.split("."), config
    for depth, key in enumerate(keys[:-1], start=1):
        if inner.get(key) is None:
            default = KEYS[key].default if depth == 1 else None
            inner[key] = copy_config(default) if isinstance(default, dict) else {}
        inner = inner[key]
        if not isinstance(inner, dict):
            return f"{'.'.join(keys[:depth])} is {short(inner)}, which has no keys"
    inner[keys[-1]] = value
    return None


def _parse(keys: list[str], text: str, project: Project) -> Any:
    key, is_key_itself = keys[0], len(keys) == 1
    wants_text = is_key_itself and KEYS[key].test("some text") is None
    if text.lower() in _NAMED and not (wants_text and KEYS[key].test(_NAMED[text.lower()])):
        return _NAMED[text.lower()]
    if wants_text:
        return text
    with contextlib.suppress(ValueError, TypeError, SyntaxError):
        return ast.literal_eval(text)
    wants_object = key in _HOMES and (is_key_itself or key == "METRICS")
    place, _, name = text.replace(":", ".").rpartition(".")
    place = place or (_HOMES[key] if wants_object else "")
    if all(part.isidentifier() for part in [*place.strip(".").split("."), name]):
        # The caller's own command line is trusted, unlike a record: any library may be named.
        root = place.partition(".")[0]
        try:
            return resolve(f"{place}:{name}", project, trusted=True)
        except ReferenceProblem:
            if wants_object or root in ("", "torch", project.package):
                raise
    if wants_object:
        raise ReferenceProblem(f"{key} wants an object: give its dotted name, such as {_HOMES[key]}.NAME")
    return text
