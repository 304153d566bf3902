"""
Contains what is done with a config of live objects: check it, write it as plain data, read it back to the very same
objects, override single values, and tell two of them apart.

Reading a record imports the code that it names, so only what references.py allows is resolved, and only where the key
wants such an object.
"""

import ast
import difflib
import functools
import inspect
import math
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from types import ModuleType, SimpleNamespace, UnionType
from typing import Any

import torch

from .errors import UserError
from .keys import KEYS, REQUIRED, UNRECORDED, complete, copy_config
from .references import PACKAGE, ReferenceProblem, is_project_module, name_of, resolve

VERSION = 1
MISSING = "(missing)"

# What the routines themselves pass to these objects, and a config therefore must not.
_FILLED_IN = {
    "OPTIMIZER": ("params",),
    "SCHEDULER": ("optimizer",),
    "DATA_LOADER": ("dataset", "sampler", "batch_sampler", "collate_fn", "worker_init_fn", "generator"),
}
# What the routines fill in where it is missing: the length of the training, and the learning rate.
_FILLED_IN_WHERE_MISSING = ("total_steps", "T_max", "max_lr")
# Where override() looks for a bare name, as in OPTIMIZER=AdamW.
_HOMES = {
    "MODEL": ".models",
    "OPTIMIZER": "torch.optim",
    "SCHEDULER": "torch.optim.lr_scheduler",
    "LOSS": ".utils.loss",
    "METRICS": ".utils.loss",
    "DATASET": ".utils.data",
}


class ConfigError(UserError):
    """A config that cannot be used. Its message lists every problem."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        listed = (
            problems[0] if len(problems) == 1 else "\n" + "\n".join(f"  - {problem}" for problem in problems)
        )
        super().__init__(f"the config has {len(problems)} problem{'s' * (len(problems) > 1)}: {listed}")


# ---------------------------------------------------------------------------------------------------------------- check


def check(config: dict[str, Any], more: Sequence[str] = ()) -> None:
    """
    Checks a config before anything is made or written.

    :param more: problems that were found before, such as by override
    :raises ConfigError: with all problems: unknown keys, missing keys, values of the wrong type or range, arguments
        that their MODEL, OPTIMIZER, ... does not take, and objects that no record can hold
    """
    problems = [*more, *find_problems(config)]
    if problems:
        raise ConfigError(problems)


def find_problems(config: dict[str, Any]) -> list[str]:
    """The problems of a config, a sentence each; see check."""
    problems = [_unknown(key) for key in config if key not in KEYS]
    sound, unsound = {}, set()
    for key, entry in KEYS.items():
        if key not in config:
            if entry.default is REQUIRED:
                problems.append(f"{key} is missing: it is {entry.about}.")
        elif (problem := entry.test(config[key])) is not None:
            problems.append(f"{key} is {_short(config[key])}: it {problem}.")
            unsound.add(key)
        else:
            sound[key] = config[key]
    problems += _argument_problems(complete({}) | sound, unsound)
    if config.get("REQUIRE_RERUNNABLE", True):
        unrecordable: list[str] = []
        recorded = {key: value for key, value in config.items() if key in KEYS and key not in UNRECORDED}
        _encode(recorded, "", unrecordable)
        problems += unrecordable
    return problems


def _unknown(key: Any) -> str:
    near = difflib.get_close_matches(str(key).upper(), KEYS, n=1)
    return f"{key} is no key of a config: " + (
        f"did you mean {near[0]}?" if near else f"see {PACKAGE}/config/keys.py."
    )


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
            problems.append(f"{path}.{argument} is {_short(value)}: it must be {names}.")
    return problems


def _plain_types(hint: Any) -> tuple[type, ...]:
    """The types of a hint where it is made of these alone; () where we cannot judge."""
    plain = (bool, int, float, str, type(None))
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, UnionType) else (hint,)
    if not all(option in plain for option in options):
        return ()
    return (*options, int) if float in options and int not in options else tuple(options)


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


# -------------------------------------------------------------------------------------------------- capture and restore


def capture(config: dict[str, Any], problems: list[str] | None = None) -> dict[str, Any]:
    """
    Writes a config as plain data that json can hold: {"version": ..., "config": ...}.

    Objects become tagged values: {"@ref": "package.module:Name"}, "@module", "@partial", "@tuple", "@device", "@dtype",
    "@path", "@dict" (keys other than strings), "@float" (nan, inf). Each name has been resolved again to this object.
    The name of an object of another library is recorded too: restoring it needs the library in ALLOWED_ROOTS.

    :param problems: takes what cannot be recorded, which stands as {"@unrecorded": reason} in the record
    :raises ConfigError: if something cannot be recorded and no such list is given
    """
    found: list[str] = [] if problems is None else problems
    record = {"version": VERSION, "config": _encode(config, "", found)}
    if problems is None and found:
        raise ConfigError(found)
    return record


def restore(record: dict[str, Any], roots: Iterable[str] = ()) -> dict[str, Any]:
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
        config = _decode(record["config"], "", tuple(roots), problems)
    except RecursionError:
        raise ConfigError(["the record is damaged: it is nested too deeply."]) from None
    if not problems and not isinstance(config, dict):
        problems.append(f"the record is damaged: {_short(record['config'])} is no config.")
    if problems:
        raise ConfigError(problems)
    return config


def _encode(value: Any, path: str, problems: list[str], above: tuple[int, ...] = ()) -> Any:
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"@float": repr(value)}
    if id(value) in above:
        problems.append(f"{path} contains itself: a record must end somewhere.")
        return {"@unrecorded": "contains itself"}
    above = (*above, id(value))
    if type(value) is list:
        return [_encode(item, f"{path}[{index}]", problems, above) for index, item in enumerate(value)]
    if type(value) is tuple:
        return {
            "@tuple": [_encode(item, f"{path}[{index}]", problems, above) for index, item in enumerate(value)]
        }
    if type(value) is dict:
        if all(type(key) is str and not key.startswith("@") for key in value):
            return {key: _encode(item, _join(path, key), problems, above) for key, item in value.items()}
        pairs = [(key, item, _join(path, str(key))) for key, item in value.items()]
        return {
            "@dict": [[_encode(k, p, problems, above), _encode(v, p, problems, above)] for k, v, p in pairs]
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
            key: _encode(part, f"{path}.{key.strip('@')}", problems, above) for key, part in parts.items()
        }
    try:
        return {"@module" if isinstance(value, ModuleType) else "@ref": name_of(value)}
    except ReferenceProblem as problem:
        problems.append(f"{path} cannot be recorded: {problem}.")
        return {"@unrecorded": str(problem)}


def _decode(value: Any, path: str, roots: tuple[str, ...], problems: list[str]) -> Any:
    if isinstance(value, list):
        return [_decode(item, f"{path}[{index}]", roots, problems) for index, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    tags = [key for key in value if key.startswith("@")]
    if not tags:
        return {key: _decode(item, _join(path, key), roots, problems) for key, item in value.items()}
    try:
        return _decode_tagged(tags[0], value, path, roots, problems)
    except ReferenceProblem as problem:
        problems.append(f"{path}: {problem}.")
    except RecursionError:
        raise
    except Exception as error:
        problems.append(f"{path or 'the record'} is damaged: {_short(value)} is no {tags[0]} ({error}).")
    return None


def _decode_tagged(
    tag: str, value: dict[str, Any], path: str, roots: tuple[str, ...], problems: list[str]
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
            return tuple(_decode(content, path, roots, problems))
        return {
            _decode(k, path, roots, problems): _decode(v, _join(path, str(k)), roots, problems)
            for k, v in content
        }
    if tag == "@partial":
        function = _decode(content, path, roots, problems)
        arguments = _decode(value["args"], path, roots, problems)
        keywords = _decode(value["kwargs"], path, roots, problems)
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
        return _of_the_kind(resolve(content, roots), repr(content), path)
    if tag == "@module":
        if path != "ROUTINE_NAME":
            raise ReferenceProblem(f"a module ({content!r}) is only restored as ROUTINE_NAME")
        return resolve(content, roots)
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


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


# ------------------------------------------------------------------------------------------------------------- override


def override(
    config: dict[str, Any], overrides: Sequence[str], problems: list[str] | None = None
) -> dict[str, Any]:
    """
    A copy of a config with values from the command line: ``EPOCHS=3 MODEL_CONFIG.dropout=0.1 OPTIMIZER=AdamW``.

    A value is a Python literal, the dotted name of an object, or else a string.

    :param problems: takes what is malformed or unknown, so that check can tell it with all the rest
    :raises ConfigError: with all that is malformed or unknown, if no such list is given
    """
    config = copy_config(config)
    found: list[str] = [] if problems is None else problems
    for text in overrides:
        dotted, equals, value = text.partition("=")
        keys = dotted.split(".")
        if not equals or not all(keys):
            found.append(
                f"{text!r} is no override: write KEY=VALUE, such as EPOCHS=3 or MODEL_CONFIG.dropout=0.1."
            )
            continue
        if keys[0] not in KEYS:
            found.append(_unknown(keys[0]))
            continue
        try:
            problem = assign(config, dotted, _parse(keys, value))
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
            return f"{'.'.join(keys[:depth])} is {_short(inner)}, which has no keys"
    inner[keys[-1]] = value
    return None


def _parse(keys: list[str], text: str) -> Any:
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
            return resolve(f"{place}:{name}", roots=(root,))
        except ReferenceProblem:
            if wants_object or is_project_module(root) or root == "torch":
                raise
    if wants_object:
        raise ReferenceProblem(f"{key} wants an object: give its dotted name, such as {_HOMES[key]}.NAME")
    return text


# ----------------------------------------------------------------------------------------------------------- difference


def flatten(config: dict[str, Any]) -> dict[str, Any]:
    """A config (or a captured one) as one level of dotted keys, with objects as short text, for tables."""
    return {key: _as_text(value) for key, value in _leaves(config).items()}


def difference(one: dict[str, Any], other: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """
    What differs between two configs, live or captured.

    :return: {dotted key: (value in one, value in the other)}, as flatten gives them, MISSING where there is none
    """
    first, second = _leaves(one), _leaves(other)
    keys = [*first, *(key for key in second if key not in first)]
    pairs = {key: (first.get(key, MISSING), second.get(key, MISSING)) for key in keys}
    # repr tells 1 from 1.0 and True; as text, a path and a string would be the same
    return {key: (_as_text(a), _as_text(b)) for key, (a, b) in pairs.items() if repr(a) != repr(b)}


def _leaves(config: dict[str, Any]) -> dict[str, Any]:
    """The captured values by dotted key."""
    captured = config["config"] if set(config) == {"version", "config"} else _encode(config, "", [])
    leaves: dict[str, Any] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict) and (value or not path) and not any(key.startswith("@") for key in value):
            for key, item in value.items():
                walk(item, _join(path, key))
        else:
            leaves[path] = value

    walk(captured, "")
    return leaves


def _as_text(value: Any) -> Any:
    if isinstance(value, list):
        return "[" + ", ".join(str(_as_text(item)) for item in value) + "]"
    if not isinstance(value, dict):
        return value
    if not value:
        return "{}"
    if "@partial" in value:
        arguments = [str(_as_text(item)) for item in value["args"]]
        arguments += [f"{key}={_as_text(item)}" for key, item in value["kwargs"].items()]
        return f"partial({', '.join([_as_text(value['@partial']), *arguments])})"
    if "@dict" in value:
        return "{" + ", ".join(f"{_as_text(k)}: {_as_text(v)}" for k, v in value["@dict"]) + "}"
    if "@tuple" in value:
        return "(" + ", ".join(str(_as_text(item)) for item in value["@tuple"]) + ")"
    if "@unrecorded" in value:
        return f"(unrecorded: {value['@unrecorded']})"
    tags = [key for key in value if key.startswith("@")]
    return value[tags[0]] if tags else "{" + ", ".join(f"{k}: {_as_text(v)}" for k, v in value.items()) + "}"
