"""Check a config, all problems at once, before anything is made or written."""

import contextlib
import difflib
import inspect
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType, NoneType, SimpleNamespace, UnionType
from typing import Any

from ..errors import ConfigError
from .capture import capture, short
from .keys import INSTEAD, KEYS, UNRECORDED, defaults, upgrade
from .kinds import FUNCTION, REQUIRED, Key, as_list, is_of
from .project import Project

# What the routines themselves pass to these objects, and a config therefore must not.
_FILLED_IN = {
    "OPTIMIZER": ("params",),
    "SCHEDULER": ("optimizer",),
    "DATA_LOADER": ("dataset", "batch_sampler", "worker_init_fn", "generator"),
}
# How schedules call the step that they end at, and their length, which is filled in where it is missing.
ENDS = ("T_max", "total_iters", "total_steps")
LENGTHS = (*ENDS, "T_0")
_FILLED_IN_WHERE_MISSING = (*LENGTHS, "max_lr")
_PLAIN = frozenset({bool, int, float, str, NoneType})
_SPLITS = ("train", "test", "validation")


def check(config: dict[str, Any], project: Project, more: Sequence[str] = ()) -> dict[str, Any]:
    """
    Check a config and capture it.

    :param more: problems that were found before, such as by override
    :return: the captured config, with {"@unrecorded": reason} where REQUIRE_RERUNNABLE=False admits it
    :raises ConfigError: with all problems: unknown keys, missing keys, values of the wrong type or range,
        arguments that their MODEL, OPTIMIZER, ... does not take, and objects that no record can hold
    """
    config = upgrade(config)
    wrong, unrecordable = check_keys(config), list[str]()
    failed = {problem.partition("=")[0] for problem in more}  # overrides: what was there before is not meant
    wrong |= dict.fromkeys(failed & KEYS.keys() - wrong.keys(), "")
    right = {key: value for key, value in config.items() if key not in wrong}
    problems = [*more, *filter(None, wrong.values()), *_argument_problems(defaults() | right, wrong)]
    recorded = {key: value for key, value in right.items() if key not in UNRECORDED}
    captured = capture(recorded, project, unrecordable)
    if config.get("REQUIRE_RERUNNABLE", True):
        problems += [f"{one} REQUIRE_RERUNNABLE=False trains all the same." for one in unrecordable]
    if problems:
        raise ConfigError(problems)
    return captured


def find_problems(config: dict[str, Any], project: Project) -> list[str]:
    """Return the problems of a config, a sentence each; see check."""
    try:
        check(config, project)
    except ConfigError as error:
        return error.problems
    return []


def check_keys(config: dict[str, Any], keys: Mapping[str, Key] = KEYS) -> dict[Any, str]:
    """Return a sentence for each key that is unknown, missing, or holds what it must not."""
    problems = {key: unknown(key, keys, config) for key in config if key not in keys}
    for key, entry in keys.items():
        if key not in config:
            if entry.default is REQUIRED:
                problems[key] = f"{key} is missing: it is {entry.about}."
        elif problem := entry.test(config[key]):
            is_instance = "not an instance" in problem and f"{key}_CONFIG" in keys
            hint = f" (its arguments go into {key}_CONFIG)" if is_instance else ""
            problems[key] = f"{key} is {short(config[key])}: it {problem}{hint}."
    return problems


def unknown(key: Any, keys: Iterable[str] = KEYS, config: Mapping[str, Any] = MappingProxyType({})) -> str:
    """Return the sentence about a key that is none; config has the objects that may take it."""
    from torch.utils.data import DataLoader

    targets = {"DATA_LOADER": [DataLoader]} | {
        name: as_list(config.get(name)) for name in ("OPTIMIZER", "MODEL", "LOSS", "SCHEDULER")
    }
    near = difflib.get_close_matches(str(key).upper(), keys, n=1)
    taking = [name for name, all_ in targets.items() if any(takes(one, str(key), True) for one in all_)]
    near = near or [f"{name}_CONFIG.{key}" for name in taking if f"{name}_CONFIG" in keys]
    hint = f"did you mean {' or '.join(near)}?" if near else "see dida_core/config/keys.py."
    hint = f"it is {INSTEAD[key]} now." if key in INSTEAD else hint
    return f"{key} is no key of a config: {hint}"


def _argument_problems(config: dict[str, Any], wrong: Mapping[Any, str]) -> Iterable[str]:
    """Yield the problems between keys that are right by themselves; the wrong ones have their default."""
    from torch.utils.data import DataLoader

    for name in ("MODEL", "OPTIMIZER", "LOSS", "DATA_LOADER"):
        target, path = DataLoader if name == "DATA_LOADER" else config.get(name), f"{name}_CONFIG"
        if target is not None and path not in wrong:
            yield from _call_problems(target, config[path], path, name)
    yield from _schedule_problems(config) if "SCHEDULER_CONFIG" not in wrong else ()
    if "OPTIMIZER" in config and _needs_closure(config["OPTIMIZER"].step):
        name = config["OPTIMIZER"].__name__
        yield f"OPTIMIZER is {name}, whose step needs a closure, which no routine gives: take AdamW or SGD."
    size = config["DATA_LOADER_CONFIG"].get("batch_size", 1)
    if size is None or (isinstance(size, int) and size < 1):
        yield f"DATA_LOADER_CONFIG.batch_size is {size!r}: it must be a whole number of at least 1."
    for name in ("sampler", "collate_fn"):
        value = config["DATA_LOADER_CONFIG"].get(name)
        if value is not None and not FUNCTION.fits(value):
            yield f"DATA_LOADER_CONFIG.{name} is {short(value)}: it must be {FUNCTION.name}."
    for split, arguments in (config["DATASET_CONFIG"] or {}).items():
        path = f"DATASET_CONFIG.{split}"
        if split not in _SPLITS or not isinstance(arguments, dict):
            yield f"{path} must be one of {', '.join(_SPLITS)}, and a dict of arguments."
        elif config["DATASET"] is not None:
            yield from _call_problems(config["DATASET"], arguments, path, "DATASET")
    monitor, results = config["MONITOR"], ["loss", *config["METRICS"]]
    goal = monitor.split()[1]
    if "METRICS" not in wrong and goal.partition(".")[0].removesuffix("_sample_mean") not in results:
        yield f"MONITOR is {monitor!r}: {goal} is not among the results ({', '.join(results)})."


def schedules(config: dict[str, Any]) -> list[tuple[str, type, dict[str, Any]]]:
    """Return path, class and arguments of each schedule, one after the other."""
    classes, arguments = as_list(config["SCHEDULER"] or []), config["SCHEDULER_CONFIG"]
    if isinstance(arguments, dict):  # of the only one, or none for all
        arguments = [arguments] * len(classes)
        return [("SCHEDULER_CONFIG", *both) for both in zip(classes, arguments, strict=True)]
    numbered = enumerate(zip(classes, arguments, strict=True))
    return [(f"SCHEDULER_CONFIG.{number}", *both) for number, both in numbered]


def _schedule_problems(config: dict[str, Any]) -> Iterable[str]:
    from torch.optim.lr_scheduler import ReduceLROnPlateau

    classes, arguments = as_list(config["SCHEDULER"] or []), config["SCHEDULER_CONFIG"]
    is_list = isinstance(config["SCHEDULER"], list | tuple)
    is_of_all = isinstance(arguments, dict)
    if is_list and arguments if is_of_all else not is_list or len(classes) != len(arguments):
        yield f"SCHEDULER_CONFIG is {short(arguments)}: it must have a dict for each SCHEDULER."
        return
    for path, schedule, options in schedules(config):
        length = options.get("length", 1) if is_list else 1
        if not (is_of(length, int) and length >= 1) and not (is_of(length, float) and 0 < length < 1):
            yield f"{path}.length is {short(length)}: it must be steps, or a share of all below 1."
        own = {key: value for key, value in options.items() if key != "length" or not is_list}
        yield from _call_problems(schedule, own, path, "SCHEDULER")
        if issubclass(schedule, ReduceLROnPlateau) and is_list:
            yield "SCHEDULER has ReduceLROnPlateau in a list: it can only stand alone, with a WARMUP."
        elif issubclass(schedule, ReduceLROnPlateau) and config["SCHEDULER_STEP"] != "epoch":
            yield "SCHEDULER is ReduceLROnPlateau, which follows results of epochs: set SCHEDULER_STEP=epoch."


def _needs_closure(step: Callable) -> bool:
    """Tell whether an optimizer's step computes the loss itself, also where it refuses its default."""
    parameter = inspect.signature(step).parameters.get("closure")
    if parameter is None or parameter.default is parameter.empty:
        return parameter is not None
    with contextlib.suppress(OSError, TypeError):  # there is no source
        return bool(re.search(r"assert closure|closure is None:\s+raise", inspect.getsource(step)))
    return False


def takes(target: Any, argument: str, by_name: bool = False) -> bool:
    """Tell whether a class or function has an argument of this name, or also takes any unless by_name."""
    with contextlib.suppress(TypeError, ValueError):  # None, and some C functions, have none
        for name, parameter in inspect.signature(target).parameters.items():
            if name == argument or (parameter.kind is inspect.Parameter.VAR_KEYWORD and not by_name):
                return True
    return False


def _call_problems(target: Callable, arguments: dict[str, Any], path: str, name: str) -> Iterable[str]:
    """Yield why a class or function cannot be called with these arguments."""
    try:
        signature = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return  # some C functions have none
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = {key: parameter for key, parameter in signature.items() if parameter.kind in by_name}
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in signature.values())
    called = getattr(target, "__name__", repr(target))
    filled_in = _FILLED_IN.get(name, ())
    if name == "LOSS" and not isinstance(target, type):
        filled_in = tuple(signature)[:2]  # the prediction and the target
    for key in arguments:
        if key in filled_in:
            yield f"{path}.{key} is set by the routine: leave it out."
        elif key not in parameters and not takes_any:
            near = difflib.get_close_matches(key, parameters, n=1)
            taken = ", ".join(parameter for parameter in parameters if parameter not in filled_in)
            hint = f"did you mean {near[0]}?" if near else f"it takes {taken}. {path}={{}} clears old ones."
            yield f"{path}.{key} is no argument of {called}: {hint}"
    may_lack = (*filled_in, *(_FILLED_IN_WHERE_MISSING if name == "SCHEDULER" else ()))
    for key, parameter in parameters.items():
        if key not in arguments:
            if parameter.default is parameter.empty and key not in may_lack:
                yield f"{path}.{key} is missing: {called} needs it."
            continue
        types = _plain_types(parameter.annotation, target)
        if types and not any(is_of(arguments[key], kind) for kind in types):
            plain = [kind for kind in types if kind in _PLAIN]
            names = " or ".join("None" if kind is NoneType else kind.__name__ for kind in plain)
            hint = " Write a decimal point." if float in types and "," in str(arguments[key]) else ""
            yield f"{path}.{key} is {short(arguments[key])}: it must be {names}.{hint}"


def _plain_types(annotation: Any, target: Callable) -> tuple[type, ...]:
    """Return the types of a hint of plain ones, and tensors beside them; () where we cannot judge."""
    from torch import Tensor

    function = inspect.getattr_static(target, "__init__") if isinstance(target, type) else target
    names = getattr(inspect.unwrap(function), "__globals__", {})
    try:  # one by one: a single unknown name would take the others with it
        hint = typing.get_type_hints(SimpleNamespace(__annotations__={"hint": annotation}), names)["hint"]
    except (NameError, TypeError, AttributeError, SyntaxError):
        return ()
    types = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, UnionType) else (hint,)
    return types if _PLAIN & {*types} - {NoneType} and {*types} <= _PLAIN | {Tensor} else ()
