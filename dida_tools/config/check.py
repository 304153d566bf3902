"""Check a config before anything is made or written."""

import difflib
import inspect
import typing
from collections.abc import Sequence
from types import SimpleNamespace, UnionType
from typing import Any

import torch

from .capture import capture, encode, short
from .errors import ConfigError
from .keys import KEYS, REQUIRED, UNRECORDED, complete
from .project import Project

# What the routines themselves pass to these objects, and a config therefore must not.
_FILLED_IN = {
    "OPTIMIZER": ("params",),
    "SCHEDULER": ("optimizer",),
    "DATA_LOADER": ("dataset", "sampler", "batch_sampler", "collate_fn", "worker_init_fn", "generator"),
}
# What the routines fill in where it is missing: the length of the training, and the learning rate.
_FILLED_IN_WHERE_MISSING = ("total_steps", "T_max", "max_lr")


def check(config: dict[str, Any], project: Project, more: Sequence[str] = ()) -> dict[str, Any]:
    """
    Check a config and return it captured; see capture.

    :param more: problems that were found before, such as by override
    :raises ConfigError: with all problems: unknown keys, missing keys, values of the wrong type or range, arguments
        that their MODEL, OPTIMIZER, ... does not take, and objects that no record can hold
    """
    problems = [*more, *find_problems(config, project)]
    if problems:
        raise ConfigError(problems)
    return capture({key: value for key, value in config.items() if key not in UNRECORDED}, project, [])


def find_problems(config: dict[str, Any], project: Project) -> list[str]:
    """The problems of a config, a sentence each; see check."""
    problems = [unknown(key) for key in config if key not in KEYS]
    sound, unsound = {}, set()
    for key, entry in KEYS.items():
        if key not in config:
            if entry.default is REQUIRED:
                problems.append(f"{key} is missing: it is {entry.about}.")
        elif (problem := entry.test(config[key])) is not None:
            problems.append(f"{key} is {short(config[key])}: it {problem}.")
            unsound.add(key)
        else:
            sound[key] = config[key]
    problems += _argument_problems(complete({}) | sound, unsound)
    if config.get("REQUIRE_RERUNNABLE", True):
        unrecordable: list[str] = []
        recorded = {key: value for key, value in config.items() if key in KEYS and key not in UNRECORDED}
        encode(recorded, "", project, unrecordable)
        problems += unrecordable
    return problems


def unknown(key: Any) -> str:
    near = difflib.get_close_matches(str(key).upper(), KEYS, n=1)
    return f"{key} is no key of a config: " + (f"did you mean {near[0]}?" if near else "see config/keys.py.")


def _argument_problems(config: dict[str, Any], unsound: set[str]) -> list[str]:
    """The problems between keys that are sound by themselves; the unsound ones have their default in config."""
    problems = []
    for name in ("MODEL", "OPTIMIZER", "SCHEDULER", "LOSS"):
        if config.get(name) is not None and f"{name}_CONFIG" not in unsound:
            problems += _call_problems(config[name], config[f"{name}_CONFIG"], f"{name}_CONFIG", name)
    problems += _call_problems(
        torch.utils.data.DataLoader, config["DATA_LOADER_CONFIG"], "DATA_LOADER_CONFIG", "DATA_LOADER"
    )
    batch_size = config["DATA_LOADER_CONFIG"].get("batch_size", 1)
    if batch_size is None or (isinstance(batch_size, int) and batch_size < 1):
        problems.append(
            f"DATA_LOADER_CONFIG.batch_size is {batch_size!r}: it must be a whole number of at least 1."
        )
    for part, arguments in (config["DATASET_CONFIG"] or {}).items():
        if part not in ("train", "test", "validation") or not isinstance(arguments, dict):
            problems.append(
                f"DATASET_CONFIG.{part} must be one of train, test, validation, and a dict of arguments."
            )
        elif config["DATASET"] is not None:
            problems += _call_problems(config["DATASET"], arguments, f"DATASET_CONFIG.{part}", "DATASET")
    follows_results = issubclass(config["SCHEDULER"] or object, torch.optim.lr_scheduler.ReduceLROnPlateau)
    if follows_results and config["SCHEDULER_STEP"] != "epoch":
        problems.append(
            "SCHEDULER is ReduceLROnPlateau, which follows results of epochs: set SCHEDULER_STEP=epoch."
        )
    goal = config["MONITOR"].split()[1]
    results = ["loss", *config["METRICS"]]
    if "METRICS" not in unsound and goal.partition(".")[0].removesuffix("_sample_mean") not in results:
        problems.append(
            f"MONITOR is {config['MONITOR']!r}: {goal} is not among the results ({', '.join(results)})."
        )
    return problems


def _call_problems(target: Any, arguments: dict[str, Any], path: str, name: str) -> list[str]:
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):
        return []  # some C functions have none
    parameters = {
        argument: parameter
        for argument, parameter in signature.parameters.items()
        if parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    }
    called = getattr(target, "__name__", repr(target))
    takes_any = any(
        parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in signature.parameters.values()
    )
    filled_in = _FILLED_IN.get(name, ())
    if name == "LOSS" and not isinstance(target, type):
        filled_in = tuple(signature.parameters)[:2]  # the prediction and the target
    problems = []
    for argument in arguments:
        if argument in filled_in:
            problems.append(f"{path}.{argument} is set by the routine: leave it out.")
        elif argument not in parameters and not takes_any:
            near = difflib.get_close_matches(argument, parameters, n=1)
            hint = (
                f"did you mean {near[0]}?"
                if near
                else f"it takes {', '.join(p for p in parameters if p not in filled_in)}. {path}={{}} clears old ones."
            )
            problems.append(f"{path}.{argument} is no argument of {called}: {hint}")
    known = {argument: value for argument, value in arguments.items() if argument in parameters}
    for argument, parameter in parameters.items():
        given = argument in arguments or argument in filled_in
        given = given or (name == "SCHEDULER" and argument in _FILLED_IN_WHERE_MISSING)
        if parameter.default is parameter.empty and not given:
            problems.append(f"{path}.{argument} is missing: {called} needs it.")
    function = inspect.unwrap(
        inspect.getattr_static(target, "__init__") if isinstance(target, type) else target
    )
    names = getattr(function, "__globals__", {})
    hints = {argument: _hint(parameters[argument].annotation, names) for argument in known}
    return problems + _type_problems(hints, known, path)


def _hint(annotation: Any, names: dict[str, Any]) -> Any:
    """A hint as types, or None. They are read one by one: a single unknown name would take the others with it."""
    try:
        return typing.get_type_hints(SimpleNamespace(__annotations__={"hint": annotation}), names)["hint"]
    except (NameError, TypeError, AttributeError, SyntaxError):
        return None


def _type_problems(hints: dict[str, Any], arguments: dict[str, Any], path: str) -> list[str]:
    problems = []
    for argument, value in arguments.items():
        plain = _plain_types(hints[argument])
        if (plain and not isinstance(value, plain)) or (
            bool not in plain and plain and isinstance(value, bool)
        ):
            names = " or ".join("None" if kind is type(None) else kind.__name__ for kind in plain)
            problems.append(f"{path}.{argument} is {short(value)}: it must be {names}.")
    return problems


def _plain_types(hint: Any) -> tuple[type, ...]:
    """The types of a hint where it is made of these alone; () where we cannot judge."""
    plain = (bool, int, float, str, type(None))
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, UnionType) else (hint,)
    if not all(option in plain for option in options):
        return ()
    return (*options, int) if float in options and int not in options else tuple(options)
