"""Configs, and values that may stand in them, for the tests of the config."""

import functools
import json
import math
from pathlib import Path

import torch
from dida_core.config import capture as capturing
from dida_core.config.project import project_of
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from dida_tools.layers import ConvLayer
from dida_tools.models import UNET, unet
from dida_tools.utils.loss import f1, precision, recall, smooth_dice_loss

PROJECT = project_of("dida_tools")
MODEL_CONFIG = {"ch_in": 12, "ch_out": 2, "n_recursions": 5, "dropout": 0.2, "activ": nn.ELU}


def make_config(**changes):
    """Return a config as a user writes it."""
    return {
        "DATE": "2024-02-29_12-00-00",
        "SESSION_NAME": "training-run",
        "ROUTINE_NAME": unet,
        "MODEL": UNET,
        "MODEL_CONFIG": {**MODEL_CONFIG},
        "DATA_LOADER_CONFIG": {"batch_size": 8, "shuffle": True, "pin_memory": True, "num_workers": 2},
        "OPTIMIZER": torch.optim.SGD,
        "OPTIMIZER_CONFIG": {"lr": 1e-3},
        "EPOCHS": 100,
        "LOSS": smooth_dice_loss,
        "METRICS": {"f1": f1, "precision": precision, "recall": recall},
        "DEVICE": torch.device("cuda"),
        "__COMMENT": "Über die Grenze, 国境",
    } | changes


def same(one, other):
    """Tell whether two values are equal and of equal types, floats by their bits, and objects identical."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return len(one) == len(other) and all(map(same, one.items(), other.items()))
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        both_nan = math.isnan(one) and math.isnan(other)
        return both_nan or (one == other and math.copysign(1, one) == math.copysign(1, other))
    if isinstance(one, functools.partial):
        return one.func is other.func and same(one.args, other.args) and same(one.keywords, other.keywords)
    if one is None or isinstance(one, (bool, int, str, Path, torch.device, torch.dtype)):
        return one == other
    return one is other


def capture(config, problems=None):
    """Capture a config for the project of the tests."""
    return capturing.capture(config, PROJECT, problems)


def restore(record, project=PROJECT):
    """Restore a record for the project of the tests."""
    return capturing.restore(record, project)


def round_trip(config):
    """Return a config that was written as JSON and read again."""
    return restore(json.loads(json.dumps(capture(config), allow_nan=False)))


def record(**config):
    """Return a captured config."""
    return {"version": 1, "config": config}


def has(problems, *fragments):
    """Tell whether one of the problems has all these fragments."""
    return any(all(fragment in problem for fragment in fragments) for problem in problems)


# Any value that a record can hold.
_FUNCTIONS = [f1, torch.relu, functional.gelu, functional.max_pool2d, functional.cross_entropy]
_CLASSES = [UNET, ConvLayer, nn.ELU, nn.BatchNorm2d, int]
_DEVICES = [torch.device(name) for name in ("cpu", "cuda", "cuda:0", "cuda:1", "mps", "meta")]
_DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]
_LIKE_TAGS = ["@ref", "@tuple", "@", "@unrecorded", "version", "", "a.b", "[0]", "ß😀"]

texts = st.text(max_size=8) | st.sampled_from(_LIKE_TAGS)
_paths = st.lists(st.text("abc. é国", min_size=1, max_size=4), max_size=3).map(lambda parts: Path(*parts))
_objects = st.sampled_from([*_FUNCTIONS, *_CLASSES])
_plain = st.none() | st.booleans() | st.integers() | st.floats() | texts | st.sampled_from(_DEVICES + _DTYPES)
_keys = texts | st.integers() | st.booleans() | st.none() | st.tuples(st.integers(), texts)


def _containers(inner):
    lists, words = st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=2)
    partials = st.builds(lambda f, args, words: functools.partial(f, *args, **words), _objects, lists, words)
    return lists | lists.map(tuple) | st.dictionaries(_keys, inner, max_size=4) | partials


values = st.recursive(_plain | _objects | _paths, _containers, max_leaves=12)
