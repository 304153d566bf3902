"""
Contains the vocabulary of a training config: every key, its default, what it may hold and what it is for.

This is the one place for defaults. A new key of your own goes here (``# <- your keys here``), so that a typo in it is
noticed too.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

REQUIRED = object()
# What starts or watches a run, and is no part of it: in no record.
UNRECORDED = ("RESUME", "AFTER_EPOCH")

# A test says what is wrong with a value ("must be ..."), or returns None.
Test = Callable[[Any], str | None]


@dataclass(frozen=True)
class Key:
    """One key of the config."""

    default: Any
    test: Test
    about: str


def _instance(types: type | tuple[type, ...], name: str) -> Test:
    return lambda value: None if isinstance(value, types) else f"must be {name}"


def _optional(test: Test) -> Test:
    def check(value: Any) -> str | None:
        problem = None if value is None else test(value)
        return problem and f"{problem} or None"

    return check


def _subclass(base: type, name: str) -> Test:
    def check(value: Any) -> str | None:
        if isinstance(value, type):
            return None if issubclass(value, base) else f"must be a class derived from {name}"
        if isinstance(value, base):
            return f"must be the class {type(value).__name__}, not an instance of it (its arguments go into the _CONFIG)"
        return f"must be a class derived from {name}"

    return check


def _number(low: float, high: float = float("inf"), whole: bool = False, open_low: bool = False) -> Test:
    kind = "a whole number" if whole else "a number"
    bounds = f"{'above' if open_low else 'of at least'} {low:g}" + (
        f" and below {high:g}" if high < float("inf") else ""
    )

    def check(value: Any) -> str | None:
        fits = (
            _is_number(value, whole) and (low < value if open_low else low <= value) and value < high
        )  # NaN never is
        return None if fits else f"must be {kind} {bounds}"

    return check


def _is_number(value: Any, whole: bool = False) -> bool:
    return isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)


def _choice(*choices: str) -> Test:
    return lambda value: None if value in choices else f"must be one of {', '.join(map(repr, choices))}"


def _callable(value: Any) -> str | None:
    if isinstance(value, nn.Module):
        return f"must be the class {type(value).__name__}, not an instance of it (its arguments go into LOSS_CONFIG)"
    return None if callable(value) else "must be a function or a class"


def _metrics(value: Any) -> str | None:
    if not isinstance(value, dict):
        return "must be a dict of name: function"
    if "loss" in value:
        return "must not call a metric 'loss': that is the mean of LOSS"
    wrong = [
        str(name) for name, function in value.items() if not isinstance(name, str) or not callable(function)
    ]
    return f"must be a dict of name: function, which {', '.join(wrong)} is not" if wrong else None


def _kwargs(value: Any) -> str | None:
    if not isinstance(value, dict):
        return "must be a dict of keyword arguments"
    wrong = [name for name in value if not isinstance(name, str)]
    return f"must have strings as keys, not {wrong[0]!r}" if wrong else None


def _monitor(value: Any) -> str | None:
    words = value.split() if isinstance(value, str) else []
    return (
        None
        if len(words) == 2 and words[0] in ("min", "max")
        else "must be 'min NAME' or 'max NAME', like 'max f1'"
    )


def _device(value: Any) -> str | None:
    try:
        if (
            isinstance(value, torch.device)
            or value == "auto"
            or (isinstance(value, str) and torch.device(value))
        ):
            return None
    except RuntimeError:
        pass
    return "must be 'auto', 'cpu', 'cuda', 'cuda:0', 'mps' or a torch.device"


def _dataset(value: Any) -> str | None:
    gives_samples = isinstance(value, type) and (hasattr(value, "__getitem__") or hasattr(value, "__iter__"))
    return None if gives_samples else "must be the class of a dataset"


def _mask_values(value: Any) -> str | None:
    if isinstance(value, dict):
        parts = [part for key in value for part in (key if isinstance(key, tuple) else (key,))]
        if all(map(_is_number, parts)) and all(_is_number(number, whole=True) for number in value.values()):
            return None
    return "must be a dict of mask value: class number"


def _addresses(value: Any) -> str | None:
    listed = [value] if isinstance(value, str) else value
    fits = (
        isinstance(listed, list | tuple)
        and listed
        and all(isinstance(one, str) and "@" in one for one in listed)
    )
    return None if fits else "must be an e-mail address or a list of them"


_text = _instance(str, "a string")
_flag = _instance(bool, "True or False")
_file = _instance((str, Path), "the path of a file")
_routine = _instance((str, ModuleType), "a routine's module or name")

KEYS = {
    "DATE": Key(None, _optional(_text), "first part of the run's name; set when the run starts"),
    "SESSION_NAME": Key("training-run", _text, "second part of the run's name"),
    "ROUTINE_NAME": Key(None, _optional(_routine), "the routine that trains; each one enters itself"),
    "__COMMENT": Key(None, _optional(_text), "a note for the tracker"),
    # the model
    "MODEL": Key(REQUIRED, _subclass(nn.Module, "torch.nn.Module"), "class of the model"),
    "MODEL_CONFIG": Key({}, _kwargs, "its arguments"),
    "INIT_WEIGHTS": Key(None, _optional(_file), "weights file to start from"),
    # the data
    "DATASET": Key(None, _optional(_dataset), "class of the datasets; the package's own enter themselves"),
    "DATASET_CONFIG": Key(
        None, _optional(_kwargs), "{'train': {...}, 'test': {...}}: the arguments of each dataset"
    ),
    "DATA_LOADER_CONFIG": Key({"batch_size": 8, "shuffle": True}, _kwargs, "arguments of torch's DataLoader"),
    "VALIDATION_FRACTION": Key(
        0.2, _number(0, 1), "part of the training set kept for MONITOR; 0: select nothing"
    ),
    "MASK_VALUES": Key(
        None, _optional(_mask_values), "class number of each value in the masks, such as {255: 1}"
    ),
    "IGNORE_INDEX": Key(255, _number(-(2**31), whole=True), "target value of pixels that count nowhere"),
    "NORMALISE": Key(
        True, _flag, "fit mean and deviation of each channel on the training set, and apply them"
    ),
    # the optimization
    "EPOCHS": Key(REQUIRED, _number(1, whole=True), "passes over the training set"),
    "LOSS": Key(REQUIRED, _callable, "function of (prediction, target), or class of such a module"),
    "LOSS_CONFIG": Key({}, _kwargs, "its further arguments"),
    "OPTIMIZER": Key(
        REQUIRED, _subclass(torch.optim.Optimizer, "torch.optim.Optimizer"), "class of the optimizer"
    ),
    "OPTIMIZER_CONFIG": Key({}, _kwargs, "its arguments"),
    "SCHEDULER": Key(
        None,
        _optional(_subclass(torch.optim.lr_scheduler.LRScheduler, "an LRScheduler")),
        "class of the schedule",
    ),
    "SCHEDULER_CONFIG": Key(
        {}, _kwargs, "its arguments; total_steps, T_max and max_lr are filled in where missing"
    ),
    "SCHEDULER_STEP": Key(
        "step", _choice("step", "epoch"), "when the schedule steps: every optimizer step or epoch"
    ),
    "ACCUMULATE": Key(1, _number(1, whole=True), "batches whose gradients make one optimizer step"),
    "CLIP_NORM": Key(None, _optional(_number(0, open_low=True)), "largest norm of the gradient"),
    "EMA": Key(
        None,
        _optional(_number(0, 1, open_low=True)),
        "decay of a moving average of the weights, such as 0.999",
    ),
    # evaluation and selection
    "METRICS": Key({}, _metrics, "functions of (prediction, target) by name"),
    "MONITOR": Key("min loss", _monitor, "which validation result selects the best weights"),
    "PATIENCE": Key(
        None, _optional(_number(1, whole=True)), "epochs without improvement before training stops"
    ),
    # the machine
    "SEED": Key(0, _number(0, 2**63, whole=True), "start of all randomness"),
    "DEVICE": Key("auto", _optional(_device), "auto, cpu, cuda, mps"),
    "PRECISION": Key("auto", _choice("auto", "fp32", "bf16", "fp16"), "number format of the forward pass"),
    "CHANNELS_LAST": Key(True, _flag, "memory format of images; faster with bf16 and on GPUs"),
    # the record
    "LOGFILE": Key("experiments.csv", _text, "name of the tracker's file in LOG_DIR"),
    "CHECKPOINT_SECONDS": Key(300, _number(0), "time between checkpoints; there is always one at the end"),
    "RESUME": Key(
        None, _optional(_text), "name of a run to go on with (more EPOCHS prolong a finished one), or auto"
    ),
    "NOTIFY": Key(
        None, _optional(_addresses), "e-mail address, or a list, told of start and end; see utils/notify"
    ),
    "RERUN_OF": Key(None, _optional(_text), "name of the run that this one repeats, to be compared with"),
    "STUDY": Key(
        None, _optional(_text), "name of the search that this run is a trial of; see hyperparameter.py"
    ),
    "TRIAL": Key(None, _optional(_number(0, whole=True)), "its number there"),
    "AFTER_EPOCH": Key(
        None, _optional(_callable), "called with the run after each epoch; True ends it as pruned"
    ),
    "REQUIRE_RERUNNABLE": Key(
        True, _flag, "False trains with lambdas and notebook objects too, which no record can hold"
    ),
    # <- your keys here
}


def complete(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of a config with the defaults of all missing keys. The caller's dicts stay as they are."""
    known = {key: config.get(key, entry.default) for key, entry in KEYS.items()}
    completed = copy_config({key: value for key, value in known.items() if value is not REQUIRED} | config)
    if isinstance(completed["METRICS"], dict):
        completed["METRICS"] = {
            name: _bare_metric(name, metric) for name, metric in completed["METRICS"].items()
        }
    return completed


def _bare_metric(name: str, metric: Any) -> Any:
    """The function in ignite's Loss(function), as older configs have it: a config holds functions, not instances."""
    if not (type(metric).__module__.startswith("ignite.") and hasattr(metric, "_loss_fn")):
        return metric
    warnings.warn(
        f"METRICS.{name}: the function in ignite's Loss(...) is taken; write it without Loss.", stacklevel=4
    )
    return metric._loss_fn


def copy_config(value: Any) -> Any:
    """Copies dicts, lists and tuples all the way down, and shares the objects in them."""
    if isinstance(value, dict):
        return {key: copy_config(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(copy_config(item) for item in value)
    return value
