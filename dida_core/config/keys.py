"""
The vocabulary of a training config: every key, its default, what it may hold and what it is for.

This is the one place for defaults. Keys of your own are added in your project's training/config.py.
"""

import warnings
from collections.abc import Mapping
from typing import Any

from . import kinds
from .kinds import ARGUMENTS, FLAG, FUNCTION, NUMBER, PATH, REQUIRED, TEXT, WHOLE, Key, one_of

# What starts or watches a run, and is no part of it: in no record.
UNRECORDED = ("RESUME", "AFTER_EPOCH")
# What acts outside of a run: not taken from a record, which may be a stranger's, but from the user alone.
NOT_RESTORED = (*UNRECORDED, "RERUN_OF", "NOTIFY", "LOGFILE")
# Names of version 0.1, still understood in configs, overrides and records.
RENAMED = {"NORMALISE": "NORMALIZE"}
# Keys of 2021 whose values have another form now.
INSTEAD = {
    "LR": "OPTIMIZER_CONFIG.lr",
    "MIXED_PRECISION": "PRECISION, such as fp16",
    "ONE_CYCLE": "SCHEDULER=OneCycleLR",
    "WEIGHTS": "INIT_WEIGHTS",
}
RENAMED_ARGUMENTS = {".utils.data.scenes.SceneDataset": {"part": "split"}}

KEYS = {
    "DATE": Key(None, TEXT, "first part of the run's name; set when the run starts"),
    "SESSION_NAME": Key("training-run", TEXT, "second part of the run's name"),
    "ROUTINE_NAME": Key(None, kinds.ROUTINE, "the routine that trains; each one enters itself"),
    "__COMMENT": Key(None, TEXT, "a note for the tracker"),
    # the model
    "MODEL": Key(REQUIRED, kinds.MODEL, "class of the model"),
    "MODEL_CONFIG": Key({}, ARGUMENTS, "its arguments"),
    "INIT_WEIGHTS": Key(None, PATH, "weights file to start from"),
    # the data
    "DATASET": Key(None, kinds.DATASET, "class of the datasets; the package's own enter themselves"),
    "DATASET_CONFIG": Key(None, ARGUMENTS, "arguments of each dataset: {'train': {...}, 'test': {...}}"),
    "DATA_LOADER_CONFIG": Key({"batch_size": 8, "shuffle": True}, ARGUMENTS, "arguments of the DataLoader"),
    "UNPACK": Key(None, FUNCTION, "function of a batch that is no pair, returns (inputs, targets)"),
    "STEPS_PER_EPOCH": Key(None, WHOLE, "optimizer steps of an epoch of streaming data", 1),
    "VALIDATION_FRACTION": Key(0.2, NUMBER, "of the training set, kept for MONITOR; 0: select nothing", 0, 1),
    "MASK_VALUES": Key(None, kinds.MASK_VALUES, "class number of each value in the masks, such as {255: 1}"),
    "IGNORE_INDEX": Key(255, WHOLE, "target value of pixels that count nowhere", -(2**31)),
    "CHECK_VALUES": Key(True, FLAG, "refuse images whose values are unlike those of training"),
    "NORMALIZE": Key(True, FLAG, "fit mean and std of each channel on the training set, and apply them"),
    # the optimization
    "EPOCHS": Key(REQUIRED, WHOLE, "passes over the training set", 1),
    "LOSS": Key(REQUIRED, FUNCTION, "function of (prediction, target), or class of such a module"),
    "LOSS_CONFIG": Key({}, ARGUMENTS, "its further arguments"),
    "OPTIMIZER": Key(REQUIRED, kinds.OPTIMIZER, "class of the optimizer"),
    "OPTIMIZER_CONFIG": Key({}, ARGUMENTS, "its arguments"),
    "SCHEDULER": Key(None, kinds.SCHEDULER, "class of the schedule, or a list: one after the other"),
    "SCHEDULER_CONFIG": Key(
        {}, kinds.SCHEDULER_ARGUMENTS, "its arguments, or a list; length and max_lr are filled in if missing"
    ),
    "SCHEDULER_STEP": Key("step", one_of("step", "epoch"), "how often the schedule steps"),
    "WARMUP": Key(0, kinds.WARMUP, "optimizer steps until the full rate; below 1: a share of all", 0),
    "ACCUMULATE": Key(1, WHOLE, "batches whose gradients make one optimizer step", 1),
    "CLIP_NORM": Key(None, NUMBER, "largest norm of the gradient", 0, above_low=True),
    "EMA": Key(None, NUMBER, "decay of a moving average of the weights, such as 0.999", 0, 1, above_low=True),
    # evaluation and selection
    "METRICS": Key({}, kinds.METRICS, "functions of (prediction, target) by name"),
    "MONITOR": Key("min loss", kinds.GOAL, "which validation result selects the best weights"),
    "PATIENCE": Key(None, WHOLE, "epochs without improvement before training stops", 1),
    # the machine
    "SEED": Key(0, WHOLE, "start of all randomness", 0, 2**63),
    "DEVICE": Key("auto", kinds.DEVICE, "auto, cpu, cuda, mps"),
    "PRECISION": Key("auto", one_of("auto", "fp32", "bf16", "fp16"), "of the forward pass"),
    "CHANNELS_LAST": Key(True, FLAG, "memory format of images; faster with bf16 and on GPUs"),
    # the record
    "LOGFILE": Key("experiments.csv", kinds.FILE_NAME, "name of the tracker's file in LOG_DIR"),
    "CHECKPOINT_SECONDS": Key(300, NUMBER, "time between checkpoints; there is always one at the end", 0),
    "RESUME": Key(None, TEXT, "name of a run to resume (more EPOCHS prolong a finished one), or auto"),
    "NOTIFY": Key(None, kinds.ADDRESSES, "e-mail address, or a list, to notify of start and end"),
    "RERUN_OF": Key(None, TEXT, "name of the run that this one repeats, to be compared with"),
    "STUDY": Key(None, TEXT, "name of the search that this run is a trial of; see hyperparameter.py"),
    "TRIAL": Key(None, WHOLE, "its number there", 0),
    "AFTER_EPOCH": Key(None, FUNCTION, "called with the run after each epoch; True ends it as pruned"),
    "REQUIRE_RERUNNABLE": Key(True, FLAG, "False trains also with what no record holds, such as lambdas"),
}


def defaults(keys: Mapping[str, Key] = KEYS) -> dict[str, Any]:
    """Return the defaults of all keys that have one."""
    return {key: entry.default for key, entry in keys.items() if entry.default is not REQUIRED}


def complete(config: dict[str, Any], keys: Mapping[str, Key] = KEYS) -> dict[str, Any]:
    """Return a copy of a config with the defaults of missing keys; the caller's dicts stay as they are."""
    return copy_config(defaults(keys) | upgrade(config))


def copy_config(value: Any) -> Any:
    """Return a copy of all dicts, lists and tuples, all the way down, which shares the objects in them."""
    if isinstance(value, dict):
        return {key: copy_config(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(copy_config(item) for item in value)
    return value


def upgrade(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config, live or captured, as this version writes it; see RENAMED."""
    config = _renamed(config, RENAMED)
    if isinstance(config.get("METRICS"), dict):
        config["METRICS"] = {name: _unwrapped(name, metric) for name, metric in config["METRICS"].items()}
    dataset, splits = str(config.get("DATASET")).replace(":", "."), config.get("DATASET_CONFIG")
    for name, arguments in RENAMED_ARGUMENTS.items():
        if name in dataset and isinstance(splits, dict):
            config["DATASET_CONFIG"] = {split: _renamed(given, arguments) for split, given in splits.items()}
    return config


def _renamed(given: Any, names: dict[str, str]) -> Any:
    return {names.get(key, key): value for key, value in given.items()} if isinstance(given, dict) else given


def _unwrapped(name: Any, metric: Any) -> Any:
    """Return the function in ignite's Loss(function), as older configs have it."""
    if not (type(metric).__module__.startswith("ignite.") and hasattr(metric, "_loss_fn")):
        return metric
    text = f"METRICS.{name}: the function in ignite's Loss(...) is taken; write it without Loss."
    warnings.warn(text, stacklevel=4)
    return metric._loss_fn
