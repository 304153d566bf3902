import functools
import json
import math
from pathlib import Path

import torch
from dida_core.config.tree import MISSING, difference, flatten
from hypothesis import given, settings
from torch import nn
from torch.nn import functional

from dida_tools.utils.loss import f1, precision, recall

from tests_core.config.configs import capture, make_config, record, same, values


def captured(value):
    return capture({"MODEL_CONFIG": {"x": value}}, [])


def test_a_flat_config_has_dotted_keys_and_objects_as_short_text():
    flat = flatten(capture(make_config(EMA=None)))
    expected = {
        **{"EPOCHS": 100, "EMA": None, "MODEL": ".models.unet:UNET", "MODEL_CONFIG.activ": "torch.nn:ELU"},
        **{"MODEL_CONFIG.dropout": 0.2, "METRICS.f1": ".utils.loss:f1", "ROUTINE_NAME": ".models.unet"},
    }
    assert flat | expected == flat and "MODEL_CONFIG" not in flat
    assert flatten(record()) == flatten({}) == {}


LAMBDA = "(unrecorded: a lambda has no name to record: define it with def at the top of a module)"
TEXTS = [
    *[({}, "{}"), ([], "[]"), ((), "()"), ([1, "a", None], "[1, a, None]"), ((0.9, 0.99), "(0.9, 0.99)")],
    *[({255: 1, 0: 0}, "{255: 1, 0: 0}"), ([{"a": nn.ELU}], "[{a: torch.nn:ELU}]"), (math.nan, "nan")],
    *[(torch.float16, "float16"), (Path("a/b"), "a/b"), (lambda: 0, LAMBDA), (torch.device("cpu"), "cpu")],
    (functools.partial(nn.ELU, 0.5), "partial(torch.nn:ELU, 0.5)"),
    (
        functools.partial(functional.gelu, approximate="tanh"),
        "partial(torch.nn.functional:gelu, approximate=tanh)",
    ),
]


def test_the_text_of_a_value():
    for value, text in TEXTS:
        assert flatten(captured(value)) == {"MODEL_CONFIG.x": text}


@settings(max_examples=100, deadline=None)
@given(value=values)
def test_any_value_becomes_plain_and_does_not_differ_from_itself(value):
    one = captured(value)
    other = json.loads(json.dumps(one))
    assert same(flatten(one), flatten(other)) and same(flatten(one), flatten(one["config"]))
    assert all(isinstance(item, (str, int, float, type(None))) for item in flatten(one).values())
    assert difference(one, other) == {}


def test_what_differs_is_given_with_both_values():
    loader = {"batch_size": 8, "shuffle": True, "pin_memory": True}
    metrics = {"f1": recall, "precision": precision, "recall": recall, "new": f1}
    changes = {"EPOCHS": 5, "OPTIMIZER": torch.optim.AdamW, "DATA_LOADER_CONFIG": loader, "METRICS": metrics}
    assert difference(capture(make_config(PATIENCE=3)), capture(make_config(**changes))) == {
        "OPTIMIZER": ("torch.optim:SGD", "torch.optim:AdamW"),
        "DATA_LOADER_CONFIG.num_workers": (2, MISSING),
        "EPOCHS": (100, 5),
        "METRICS.f1": (".utils.loss:f1", ".utils.loss:recall"),
        "PATIENCE": (3, MISSING),
        "METRICS.new": (MISSING, ".utils.loss:f1"),
    }
    assert difference({}, {"MODEL_CONFIG": {}}) == {"MODEL_CONFIG": (MISSING, "{}")}


LOOK_ALIKES = [
    *[(1, 1.0), (1, True), (0, False), (0.0, -0.0), (1, "1"), (None, "None"), ([1], (1,)), ([1], ["1"])],
    *[([True], ["True"]), (("a", "b"), ("a, b",)), (Path("a"), "a"), (torch.device("cpu"), "cpu")],
    *[(math.nan, "nan"), (nn.ELU, "torch.nn:ELU"), ({}, "{}"), ({1: 2}, {"1": 2}), ({1: 2}, {1: 2.0})],
    *[(nn.ELU, functools.partial(nn.ELU)), (functools.partial(nn.ELU, 1), functools.partial(nn.ELU, 1.0))],
]


def test_look_alikes_differ():
    for one, other in LOOK_ALIKES:
        found = difference(captured(one), captured(other))
        assert found and all(key.startswith("MODEL_CONFIG.x") for key in found), (one, other)


def test_a_record_of_an_earlier_version_differs_by_its_values_alone():
    scenes = {"@ref": ".utils.data.scenes:SceneDataset"}
    old = record(NORMALISE=True, DATASET=scenes, DATASET_CONFIG={"train": {"part": "train", "crop": 1}})
    new = record(NORMALIZE=True, DATASET=scenes, DATASET_CONFIG={"train": {"split": "train", "crop": 2}})
    assert difference(old, new) == {"DATASET_CONFIG.train.crop": (1, 2)}
    assert flatten(old)["DATASET_CONFIG.train.split"] == "train"
