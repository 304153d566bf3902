"""Values of a config from the command line."""

import ast
from collections.abc import Sequence
from typing import Any

from .capture import short
from .check import unknown
from .errors import ConfigError
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
    config, found = copy_config(config), [] if problems is None else problems
    for argument in arguments:
        dotted, equals, text = argument.partition("=")
        keys = dotted.split(".")
        keys[0] = RENAMED.get(keys[0], keys[0])
        if not equals or not all(keys):
            example = "write KEY=VALUE, such as EPOCHS=3 or MODEL_CONFIG.dropout=0.1."
            found.append(f"{argument!r} is no override: {example}")
        elif keys[0] not in KEYS:
            found.append(unknown(keys[0]))
        else:
            try:
                problem = assign(config, ".".join(keys), _parse(keys, text, project))
            except ReferenceProblem as error:
                found.append(f"{dotted}={text}: {error}.")
            else:
                found += [f"{argument!r} is no override: {problem}."] if problem else []
    if problems is None and found:
        raise ConfigError(found)
    return upgrade(config)


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
    named = text.lower() in _NAMED
    if named and not (wants_text and KEYS[key].test(_NAMED[text.lower()])):
        return _NAMED[text.lower()]
    if wants_text or (is_key_itself and key in ("DEVICE", "PRECISION", "MONITOR", "SCHEDULER_STEP")):
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError):
        pass
    wants_object = key in _HOMES and (is_key_itself or key == "METRICS")
    place, _, name = text.replace(":", ".").rpartition(".")
    if wants_object and not place:
        place = _HOMES[key]
    if place and name.isidentifier() and all(part.isidentifier() for part in place.strip(".").split(".")):
        # The caller's own command line is trusted, unlike a record: any library may be named.
        root = place.partition(".")[0]
        try:
            return resolve(f"{place}:{name}", project, roots=[root] if root else [])
        except ReferenceProblem:
            if wants_object or root in ("", "torch", project.package):
                raise
    if wants_object:
        raise ReferenceProblem(f"{key} wants an object: give its dotted name, such as {_HOMES[key]}.NAME")
    return text
