"""Values of a config from the command line."""

import ast
from collections.abc import Sequence
from typing import Any

from .capture import short
from .check import unknown
from .errors import ConfigError
from .keys import KEYS, copy_config
from .project import Project
from .references import ReferenceProblem, is_project_module, resolve

# Where override() looks for a bare name, as in OPTIMIZER=AdamW.
_HOMES = {
    "MODEL": ".models",
    "OPTIMIZER": "torch.optim",
    "SCHEDULER": "torch.optim.lr_scheduler",
    "LOSS": ".utils.loss",
    "METRICS": ".utils.loss",
    "DATASET": ".utils.data",
}


def override(
    config: dict[str, Any], arguments: Sequence[str], project: Project, problems: list[str] | None = None
) -> dict[str, Any]:
    """
    A copy of a config with values from the command line: ``EPOCHS=3 MODEL_CONFIG.dropout=0.1 OPTIMIZER=AdamW``.

    A value is a Python literal, the dotted name of an object, or else a string.

    :param problems: takes what is malformed or unknown, so that check can tell it with all the rest
    :raises ConfigError: with all that is malformed or unknown, if no such list is given
    """
    config = copy_config(config)
    found: list[str] = [] if problems is None else problems
    for text in arguments:
        dotted, equals, value = text.partition("=")
        keys = dotted.split(".")
        if not equals or not all(keys):
            found.append(
                f"{text!r} is no override: write KEY=VALUE, such as EPOCHS=3 or MODEL_CONFIG.dropout=0.1."
            )
            continue
        if keys[0] not in KEYS:
            found.append(unknown(keys[0]))
            continue
        try:
            problem = assign(config, dotted, _parse(keys, value, project))
        except ReferenceProblem as error:
            found.append(f"{dotted}={value}: {error}.")
            continue
        if problem is not None:
            found.append(f"{text!r} is no override: {problem}.")
    if problems is None and found:
        raise ConfigError(found)
    return config


def assign(config: dict[str, Any], dotted: str, value: Any) -> str | None:
    """
    Sets a value of a config, in place, with the dicts that it lies in.

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
    key = keys[0]
    wants_text = len(keys) == 1 and KEYS[key].test("some text") is None
    named = {"none": None, "true": True, "false": False}
    if text.lower() in named and not (wants_text and KEYS[key].test(named[text.lower()])):
        return named[text.lower()]
    if wants_text or (len(keys) == 1 and key in ("DEVICE", "PRECISION", "MONITOR", "SCHEDULER_STEP")):
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError):
        pass
    wants_object = key in _HOMES and (len(keys) == 1 or key == "METRICS")
    place, _, name = text.replace(":", ".").rpartition(".")
    if wants_object and not place:
        place = _HOMES[key]
    if place and name.isidentifier() and all(part.isidentifier() for part in place.strip(".").split(".")):
        # The caller's own command line is trusted, unlike a record: any library may be named.
        root = place.partition(".")[0]
        try:
            return resolve(f"{place}:{name}", project, roots=(root,))
        except ReferenceProblem:
            if wants_object or is_project_module(root, project) or root == "torch":
                raise
    if wants_object:
        raise ReferenceProblem(f"{key} wants an object: give its dotted name, such as {_HOMES[key]}.NAME")
    return text
