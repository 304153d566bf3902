import functools
import json
import math
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from dida_tools.config.capture import (
    MISSING,
    ConfigError,
    capture,
    check,
    difference,
    find_problems,
    flatten,
    override,
    restore,
)
from dida_tools.config.keys import KEYS, REQUIRED, complete, copy_config
from dida_tools.layers import ConvLayer
from dida_tools.models import UNET, unet
from dida_tools.utils.loss import dice_bce_sum, f1, precision, recall, smooth_dice_loss


def make_config(**changes):
    return {
        "DATE": "2024-02-29_12-00-00",
        "SESSION_NAME": "training-run",
        "ROUTINE_NAME": unet,
        "MODEL": UNET,
        "MODEL_CONFIG": {
            "ch_in": 12,
            "ch_out": 2,
            "n_recursions": 5,
            "dropout": 0.2,
            "use_shuffle": True,
            "activ": nn.ELU,
        },
        "DATA_LOADER_CONFIG": {"batch_size": 8, "shuffle": True, "pin_memory": True, "num_workers": 2},
        "OPTIMIZER": torch.optim.SGD,
        "OPTIMIZER_CONFIG": {"lr": 1e-3},
        "EPOCHS": 100,
        "LOSS": smooth_dice_loss,
        "METRICS": {"f1": f1, "precision": precision, "recall": recall},
        "DEVICE": torch.device("cuda"),
        "LOGFILE": "experiments.csv",
        "__COMMENT": "Über die Grenze, 国境",
    } | changes


def same(one, other):
    """Equal, of equal types all the way down, floats by their bits, and objects identical."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return len(one) == len(other) and all(map(same, one.items(), other.items()))
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        return (math.isnan(one) and math.isnan(other)) or (
            one == other and math.copysign(1, one) == math.copysign(1, other)
        )
    if isinstance(one, functools.partial):
        return one.func is other.func and same(one.args, other.args) and same(one.keywords, other.keywords)
    if one is None or isinstance(one, (bool, int, str, Path, torch.device, torch.dtype)):
        return one == other
    return one is other


def round_trip(config):
    return restore(json.loads(json.dumps(capture(config), allow_nan=False)))


def record(**config):
    return {"version": 1, "config": config}


def problems_of(config):
    with pytest.raises(ConfigError) as caught:
        check(config)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


def has(problems, *fragments):
    return any(all(fragment in problem for fragment in fragments) for problem in problems)


# -------------------------------------------------------------------------------------------------- capture and restore

FUNCTIONS = [
    smooth_dice_loss,
    f1,
    torch.relu,
    functional.gelu,
    functional.max_pool2d,
    functional.cross_entropy,
]
CLASSES = [
    UNET,
    ConvLayer,
    nn.ELU,
    nn.BatchNorm2d,
    torch.optim.AdamW,
    torch.utils.data.TensorDataset,
    int,
    dict,
]
DEVICES = [torch.device(name) for name in ("cpu", "cuda", "cuda:0", "cuda:1", "mps", "meta")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, torch.complex64]

texts = st.text(max_size=8) | st.sampled_from(
    ["@ref", "@tuple", "@", "@unrecorded", "version", "", "a.b", "[0]", "ß😀"]
)
leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | texts
    | st.sampled_from([*FUNCTIONS, *CLASSES])
    | st.sampled_from(DEVICES)
    | st.sampled_from(DTYPES)
    | st.lists(st.text("abc. é国", min_size=1, max_size=4), max_size=3).map(lambda parts: Path(*parts))
)
keys = texts | st.integers() | st.booleans() | st.none() | st.tuples(st.integers(), texts)


def containers(inner):
    partials = st.builds(
        lambda function, arguments, keywords: functools.partial(function, *arguments, **keywords),
        st.sampled_from([*FUNCTIONS, *CLASSES]),
        st.lists(inner, max_size=2),
        st.dictionaries(texts, inner, max_size=2),
    )
    return (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
        | partials
    )


values = st.recursive(leaves, containers, max_leaves=12)


@settings(max_examples=400, deadline=None)
@given(value=values, key=st.sampled_from(["MODEL_CONFIG", "LOSS_CONFIG", "DATASET_CONFIG"]))
def test_any_value_comes_back_equal_of_equal_type_and_objects_identical(value, key):
    config = {key: {"value": value}}
    assert same(round_trip(config), config)


@settings(max_examples=100, deadline=None)
@given(values=st.dictionaries(texts, values, max_size=3))
def test_keys_that_look_like_tags_come_back_at_any_level(values):
    config = {"MODEL_CONFIG": values}
    assert same(round_trip(config), config)


@settings(max_examples=100, deadline=None)
@given(value=values)
def test_capturing_is_a_function_of_the_value_and_leaves_it_as_it_is(value):
    config = {"MODEL_CONFIG": {"value": value}}
    before = copy_config(config)
    once = json.dumps(capture(config))
    assert json.dumps(capture(round_trip(config))) == once
    assert same(config, before)


@pytest.mark.parametrize(
    "value", [1, 1.0, True, "1", -0.0, 0.0, math.nan, math.inf, -math.inf, 10**30, "", None, (), []]
)
def test_look_alikes_stay_apart(value):
    assert same(round_trip({"MODEL_CONFIG": {"x": value}})["MODEL_CONFIG"]["x"], value)


def test_the_usual_config_comes_back_with_the_same_objects():
    config = make_config()
    check(config)
    assert same(round_trip(config), config)


def test_a_record_names_the_objects_of_the_package_relative_to_it():
    written = capture(make_config())
    assert written["version"] == 1
    assert written["config"]["MODEL"] == {"@ref": ".models.unet:UNET"}
    assert written["config"]["MODEL_CONFIG"]["activ"] == {"@ref": "torch.nn:ELU"}
    assert written["config"]["METRICS"]["f1"] == {"@ref": ".utils.loss:f1"}
    assert written["config"]["ROUTINE_NAME"] == {"@module": ".models.unet"}
    assert written["config"]["DEVICE"] == {"@device": "cuda"}


def test_a_partial_as_loss_or_metric_comes_back():
    loss = functools.partial(functional.cross_entropy, reduction="sum", weight=(1.0, 2.0))
    with_objects = functools.partial(smooth_dice_loss, functional.relu, activ=nn.ELU)
    for config in (
        make_config(LOSS=loss),
        make_config(
            LOSS=with_objects, MODEL_CONFIG={"ch_in": 1, "ch_out": 1, "activ": functools.partial(nn.ELU, 0.5)}
        ),
        make_config(METRICS={"f1": functools.partial(f1, threshold=0.3)}),
    ):
        assert same(round_trip(config), config)


def test_every_default_and_an_empty_config_come_back():
    assert round_trip({}) == {}
    defaults = complete({})
    assert same(round_trip(defaults), defaults)


def test_what_cannot_be_recorded_is_listed_at_once():
    config = make_config(
        LOSS=lambda a, b: 0, MODEL=UNET(1, 1, bulk_ch=1, n_recursions=1), MASK_VALUES={1: {2, 3}}
    )
    with pytest.raises(ConfigError) as caught:
        capture(config)
    problems = caught.value.problems
    assert len(problems) == 3
    assert has(problems, "LOSS cannot be recorded: a lambda has no name")
    assert has(problems, "MODEL cannot be recorded: an instance of UNET")
    assert has(problems, "MASK_VALUES.1 cannot be recorded: an instance of set")


def test_what_cannot_be_recorded_is_noted_in_the_record_where_a_list_is_given():
    problems = []
    written = json.loads(json.dumps(capture(make_config(LOSS=lambda a, b: 0), problems)))
    assert len(problems) == 1
    assert "a lambda has no name to record" in written["config"]["LOSS"]["@unrecorded"]
    with pytest.raises(ConfigError, match=r"LOSS: it could not be recorded \(a lambda has no name"):
        restore(written)


def test_a_config_that_contains_itself_is_refused():
    config = make_config()
    config["MODEL_CONFIG"]["itself"] = config["MODEL_CONFIG"]
    with pytest.raises(ConfigError, match=r"MODEL_CONFIG\.itself contains itself"):
        capture(config)
    assert has(problems_of(config), "MODEL_CONFIG.itself contains itself")


def test_the_same_list_twice_is_no_circle():
    shared = [1, 2]
    config = {"MODEL_CONFIG": {"a": shared, "b": shared}}
    assert same(round_trip(config), config)


# ------------------------------------------------------------------------------------------------------ damaged records


@pytest.mark.parametrize(
    "damaged",
    [
        None,
        [],
        "{}",
        {},
        {"version": 1},
        {"config": {}},
        {"version": 1, "config": None},
        {"version": 1, "config": []},
        {"version": 0, "config": {}},
        {"version": 2, "config": {}},
        {"version": "1", "config": {}},
        {"version": None, "config": {}},
        {"version": 1, "config": {"@tuple": []}},
        {"version": 1, "config": {"@float": "nan"}},
        {"version": 1, "config": {"@ref": "torch.nn:ELU"}},
        {"version": 1, "config": {"@module": ".models"}},
        {"version": 1, "config": {"@partial": {"@ref": "torch:relu"}, "args": [], "kwargs": {}}},
    ],
)
def test_what_is_no_record_is_refused(damaged):
    with pytest.raises(ConfigError):
        restore(damaged)


TAGS = (
    "@ref",
    "@module",
    "@partial",
    "@tuple",
    "@dict",
    "@float",
    "@device",
    "@dtype",
    "@path",
    "@unrecorded",
)
WRONG_CONTENTS = [
    None,
    True,
    0,
    1.5,
    {},
    {"a": 1},
    {"@tuple": []},
    [1],
    [[1]],
    [[1, 2, 3]],
    "",
    "x",
    "\0",
    "a" * 5000,
]


@pytest.mark.parametrize(
    ("tag", "content"),
    [
        (tag, content)
        for tag in TAGS
        for content in WRONG_CONTENTS
        if not isinstance(content, {"@path": str, "@tuple": list}.get(tag, ()))
    ],
    ids=lambda content: repr(content)[:20],
)
def test_a_tag_with_content_of_the_wrong_kind_is_damaged(tag, content):
    with pytest.raises(ConfigError, match=r"MODEL_CONFIG\.x"):
        restore(record(MODEL_CONFIG={"x": {tag: content}}))


@pytest.mark.parametrize(
    "value",
    [
        {"@list": [1]},
        {"@": 1},
        {"@REF": "torch.nn:ELU"},
        {"@ref ": "torch.nn:ELU"},
        {"@eval": "1 + 1"},
        {"@ref": "torch.nn:ELU", "more": 1},
        {"@tuple": [], "@ref": "torch.nn:ELU"},
        {"more": 1, "@ref": "torch.nn:ELU"},
        {"@float": "1.5"},
        {"@float": "infinity"},
        {"@float": 1.5},
        {"@device": "gpu"},
        {"@device": "cuda:x"},
        {"@device": "cuda:99999999999999999999"},
        {"@dtype": "float33"},
        {"@dtype": "os"},
        {"@dtype": "nn"},
        {"@dtype": "__doc__"},
        {"@dtype": "torch.float32"},
        {"@dict": [["a"]]},
        {"@dict": ["ab"]},
        {"@dict": {"a": 1}},
        {"@dict": [[[1], 2]]},
        {"@dict": [[{"a": 1}, 2]]},
        {"@tuple": "abc"},
        {"@tuple": {"a": 1}},
        {"@partial": {"@ref": "torch:relu"}},
        {"@partial": {"@ref": "torch:relu"}, "args": []},
        {"@partial": {"@ref": "torch:relu"}, "args": "ab", "kwargs": {}},
        {"@partial": {"@ref": "torch:relu"}, "args": {"a": 1}, "kwargs": {}},
        {"@partial": {"@ref": "torch:relu"}, "args": [], "kwargs": []},
        {"@partial": {"@ref": "torch:relu"}, "args": [], "kwargs": [["a", 1]]},
        {"@partial": {"@ref": "torch:relu"}, "args": [], "kwargs": {"@dict": [[1, 2]]}},
        {"@partial": {"@ref": "torch:relu"}, "args": [], "kwargs": {}, "state": {}},
        {"@partial": 5, "args": [], "kwargs": {}},
        {"@partial": "torch:relu", "args": [], "kwargs": {}},
        {"@partial": {"@dtype": "float32"}, "args": [], "kwargs": {}},
        {"@partial": None, "args": [], "kwargs": {}},
        {"@ref": "torch.nn"},
        {"@ref": "torch.nn:"},
        {"@ref": ".models.unet"},
        {"@ref": ["torch.nn:ELU"]},
        {"@ref": {"@ref": "torch.nn:ELU"}},
    ],
    ids=lambda value: json.dumps(value)[:50],
)
def test_a_damaged_value_is_reported_with_its_place(value):
    for place, config in (
        (r"MODEL_CONFIG\.x", {"MODEL_CONFIG": {"x": value}}),
        (r"MODEL_CONFIG\[1\]", {"MODEL_CONFIG": [0, value]}),
        (r"METRICS\.f1", {"METRICS": {"f1": value}}),
    ):
        with pytest.raises(ConfigError, match=place):
            restore(record(**config))


def test_everything_that_is_wrong_with_a_record_is_reported_at_once():
    with pytest.raises(ConfigError) as caught:
        restore(
            record(
                MODEL={"@ref": "os:system"},
                OPTIMIZER={"@ref": "torch.nn:Linear"},
                EPOCHS={"@ref": "torch.nn:Linear"},
                DEVICE={"@device": "gpu"},
                METRICS={"a": {"@ref": ".utils.loss:nothing"}, "b": {"@what": 1}},
            )
        )
    places = ("MODEL", "OPTIMIZER", "EPOCHS", "DEVICE", "METRICS.a", "METRICS.b")
    assert [problem.split()[0].strip(":") for problem in caught.value.problems] == list(places)


def test_a_record_that_is_nested_too_deeply_is_damaged():
    value = 1
    for _ in range(3000):
        value = [value]
    with pytest.raises(ConfigError, match="nested too deeply"):
        restore(record(MODEL_CONFIG={"x": value}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL", {"@ref": ".utils.loss:f1"}),
        ("MODEL", {"@ref": "torch.optim:SGD"}),
        ("MODEL", {"@ref": "builtins:dict"}),
        ("MODEL", {"@partial": {"@ref": ".models.unet:UNET"}, "args": [1, 1], "kwargs": {}}),
        ("MODEL", [{"@ref": ".models.unet:UNET"}]),
        ("MODEL", {"x": {"@ref": ".models.unet:UNET"}}),
        ("OPTIMIZER", {"@ref": "torch.nn:Linear"}),
        ("OPTIMIZER", {"@ref": "torch:relu"}),
        ("OPTIMIZER", {"@partial": {"@ref": "torch.optim:SGD"}, "args": [], "kwargs": {"lr": 1}}),
        ("SCHEDULER", {"@ref": "torch.optim:SGD"}),
        ("DATASET", {"@ref": "torch.nn:Linear"}),
        ("DATASET", {"@ref": "torch:relu"}),
        ("EPOCHS", {"@ref": "torch.nn:Linear"}),
        ("SESSION_NAME", {"@ref": "torch.nn:Linear"}),
        ("INIT_WEIGHTS", {"@ref": "torch.nn:Linear"}),
        ("DEVICE", {"@ref": "torch.nn:Linear"}),
        ("SEED", {"@tuple": [{"@ref": "torch.nn:Linear"}]}),
        ("MASK_VALUES", {"@dict": [[1, {"@ref": "torch.nn:Linear"}]]}),
        ("ROUTINE_NAME", {"@ref": "torch.nn:Linear"}),
        ("ROUTINE_NAME", {"@ref": ".models.unet"}),
        ("ROUTINE_NAME", {"@module": ".models.unet:UNET"}),
        ("ROUTINE_NAME", {"@module": "torch.hub"}),
        ("ROUTINE_NAME", {"@module": "torch.nn"}),
        ("ROUTINE_NAME", {"@module": "torch:load"}),
        ("ROUTINE_NAME", {"@module": "builtins"}),
        ("ROUTINE_NAME", {"@module": "os"}),
        ("ROUTINE_NAME", {"@module": ".nowhere"}),
        ("ROUTINE_NAME", [{"@module": ".models.unet"}]),
        ("MODEL", {"@module": ".models.unet"}),
        ("LOSS", {"@module": ".utils.loss"}),
        ("MODEL_CONFIG", {"@module": ".utils.loss"}),
        ("MODEL_CONFIG", {"x": {"@module": ".utils.loss"}}),
        ("MODEL_CONFIG", {"@ref": "torch.nn:Linear"}),
        ("MODEL_CONFIG", {"@partial": {"@ref": "torch.nn:Linear"}, "args": [], "kwargs": {}}),
        ("METRICS", {"f1": {"@module": ".utils.loss"}}),
        ("METRICS", {"@ref": ".utils.loss:f1"}),
        ("UNKNOWN_KEY", {"@module": ".utils.loss"}),
        ("UNKNOWN_KEY", {"@ref": "os:system"}),
        ("LOSS", {"@ref": "torch:load"}),
        ("LOSS", {"@partial": {"@ref": "torch.hub:load"}, "args": ["a/b"], "kwargs": {}}),
    ],
)
def test_an_object_where_its_key_holds_none_or_another_kind_is_refused(key, value):
    with pytest.raises(ConfigError):
        restore(record(**{key: value}))


@pytest.mark.parametrize("key", [key for key, entry in KEYS.items() if entry.default is not REQUIRED])
@pytest.mark.parametrize("name", ["os:system", "torch:load", "builtins:eval", "torch.hub:load"])
def test_no_key_takes_a_hostile_object(key, name):
    for value in ({"@ref": name}, {"@module": name}, {"x": {"@ref": name}}, [{"@ref": name}]):
        with pytest.raises(ConfigError):
            restore(record(**{key: value}))


# ---------------------------------------------------------------------------------------------------------------- check


class Scheduled(nn.Module):
    def __init__(self, T_max: int, *layers: nn.Module):
        super().__init__()


def needs_more(pred, target, weight, *, power=1):
    return weight * power


def test_a_sound_config_has_no_problems():
    assert find_problems(make_config()) == []
    assert find_problems(complete(make_config())) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"LOSS": nn.BCEWithLogitsLoss, "LOSS_CONFIG": {"reduction": "mean"}},
        {"LOSS": functional.cross_entropy, "LOSS_CONFIG": {"label_smoothing": 0.1}},
        {"LOSS": functools.partial(dice_bce_sum, smooth=2.0), "LOSS_CONFIG": {"dice_weight": 0.3}},
        {"SCHEDULER": torch.optim.lr_scheduler.OneCycleLR, "SCHEDULER_CONFIG": {"max_lr": 0.1}},
        {"SCHEDULER": torch.optim.lr_scheduler.OneCycleLR},
        {"SCHEDULER": torch.optim.lr_scheduler.CosineAnnealingLR},
        {"MONITOR": "max f1.1", "PATIENCE": 3},
        {"METRICS": {"mine": f1}, "MONITOR": "max mine_sample_mean"},
        {"MASK_VALUES": {0: 0, 255: 1, 0.5: -100}},
        {"MASK_VALUES": {(255, 0, 0): 1, (0, 0, 0): 0}},
        {"DATASET": torch.utils.data.TensorDataset, "DATASET_CONFIG": {"train": {}, "test": {}}},
        {"DEVICE": "cuda:3"},
        {
            "DEVICE": "auto",
            "INIT_WEIGHTS": Path("a.pt"),
            "EMA": 0.999,
            "CLIP_NORM": 1,
            "VALIDATION_FRACTION": 0,
        },
        {"MODEL_CONFIG": {"ch_in": 3, "ch_out": 1, "dropout": 0, "norm": None}},
        {"DATE": None, "ROUTINE_NAME": "pytorch"},
    ],
)
def test_other_sound_configs_have_none_either(changes):
    assert find_problems(make_config(**changes)) == []


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"EPOCH": 3}, ["EPOCH is no key of a config: did you mean EPOCHS?"]),
        ({"epochs": 3}, ["epochs is no key of a config: did you mean EPOCHS?"]),
        ({"OPTIMISER": 3}, ["OPTIMISER is no key", "did you mean OPTIMIZER?"]),
        ({"METRIC": {}}, ["METRIC is no key", "did you mean METRICS?"]),
        ({"XYZZY": 3}, ["XYZZY is no key of a config: see"]),
        ({7: 3}, ["7 is no key of a config"]),
        (
            {"MODEL_CONFIG": {"ch_in": 1, "ch_out": 1, "args": []}},
            ["MODEL_CONFIG.args is no argument of UNET"],
        ),
        ({"MODEL_CONFIG": {"ch_in": True, "ch_out": 1}}, ["MODEL_CONFIG.ch_in is True: it must be int"]),
        ({"MODEL_CONFIG": {"ch_in": 1.0, "ch_out": 1}}, ["MODEL_CONFIG.ch_in is 1.0: it must be int"]),
        (
            {"MODEL_CONFIG": {"ch_in": 1, "ch_out": 1, "dropout": None}},
            ["MODEL_CONFIG.dropout is None", "float"],
        ),
        ({"EPOCHS": "100"}, ["EPOCHS is '100': it must be a whole number of at least 1"]),
        ({"EPOCHS": 1.0}, ["EPOCHS is 1.0: it must be a whole number"]),
        ({"EPOCHS": 0}, ["EPOCHS is 0", "at least 1"]),
        ({"EPOCHS": None}, ["EPOCHS is None"]),
        ({"VALIDATION_FRACTION": 1}, ["VALIDATION_FRACTION is 1", "below 1"]),
        ({"VALIDATION_FRACTION": -0.1}, ["VALIDATION_FRACTION is -0.1", "at least 0"]),
        ({"EMA": 0}, ["EMA is 0: it must be a number above 0 and below 1"]),
        ({"EMA": 1.0}, ["EMA is 1.0"]),
        ({"CLIP_NORM": 0}, ["CLIP_NORM is 0: it must be a number above 0"]),
        ({"PATIENCE": 0}, ["PATIENCE is 0"]),
        ({"SEED": -1}, ["SEED is -1"]),
        ({"SEED": 2**63}, ["SEED is 9223372036854775808"]),
        ({"ACCUMULATE": 0}, ["ACCUMULATE is 0"]),
        ({"CHECKPOINT_SECONDS": -1}, ["CHECKPOINT_SECONDS is -1"]),
        ({"NORMALISE": 1}, ["NORMALISE is 1: it must be True or False"]),
        ({"SESSION_NAME": None}, ["SESSION_NAME is None: it must be a string"]),
        ({"PRECISION": "fp64"}, ["PRECISION is 'fp64': it must be one of 'auto', 'fp32', 'bf16', 'fp16'"]),
        ({"SCHEDULER_STEP": "batch"}, ["SCHEDULER_STEP is 'batch'"]),
        ({"DEVICE": "gpu"}, ["DEVICE is 'gpu': it must be 'auto', 'cpu'"]),
        ({"DEVICE": 0}, ["DEVICE is 0"]),
        ({"DEVICE": ""}, ["DEVICE is ''"]),
        ({"MONITOR": "f1"}, ["MONITOR is 'f1'", "like 'max f1'"]),
        (
            {"MONITOR": "max iou"},
            ["MONITOR is 'max iou': iou is not among the results (loss, f1, precision, recall)"],
        ),
        ({"METRICS": [f1]}, ["METRICS", "must be a dict of name: function"]),
        ({"METRICS": {"f1": "f1", "recall": recall}}, ["must be a dict of name: function, which f1 is not"]),
        ({"MASK_VALUES": {255: "road"}}, ["MASK_VALUES", "must be a dict of mask value: class number"]),
        ({"MASK_VALUES": {"255": 1}}, ["MASK_VALUES", "must be a dict of mask value: class number"]),
        ({"MASK_VALUES": {255: True}}, ["MASK_VALUES", "must be a dict of mask value: class number"]),
        ({"MASK_VALUES": {("red",): 1}}, ["MASK_VALUES", "must be a dict of mask value: class number"]),
        ({"MASK_VALUES": [255]}, ["MASK_VALUES", "must be a dict of mask value: class number"]),
        (
            {"MODEL": UNET(1, 1, bulk_ch=1, n_recursions=1)},
            ["MODEL is UNET(", "must be the class UNET, not an instance"],
        ),
        ({"MODEL": f1}, ["MODEL is <function", "must be a class derived from torch.nn.Module"]),
        ({"MODEL": torch.optim.SGD}, ["MODEL", "must be a class derived from torch.nn.Module"]),
        ({"MODEL": "UNET"}, ["MODEL is 'UNET'"]),
        ({"OPTIMIZER": nn.Linear}, ["OPTIMIZER", "must be a class derived from torch.optim.Optimizer"]),
        (
            {"OPTIMIZER": torch.optim.SGD([torch.zeros(1)], lr=1)},
            ["OPTIMIZER", "must be the class SGD, not an instance"],
        ),
        ({"SCHEDULER": torch.optim.SGD}, ["SCHEDULER", "must be a class derived from an LRScheduler"]),
        ({"LOSS": nn.BCEWithLogitsLoss()}, ["LOSS", "must be the class BCEWithLogitsLoss, not an instance"]),
        ({"LOSS": "dice"}, ["LOSS is 'dice': it must be a function or a class"]),
        ({"DATASET": nn.Linear}, ["DATASET", "must be the class of a dataset"]),
        (
            {"DATASET": torch.utils.data.TensorDataset(torch.zeros(1))},
            ["DATASET", "must be the class of a dataset"],
        ),
        ({"MODEL_CONFIG": None}, ["MODEL_CONFIG is None: it must be a dict of keyword arguments"]),
        ({"MODEL_CONFIG": {1: 2}}, ["MODEL_CONFIG", "must have strings as keys, not 1"]),
        ({"MODEL_CONFIG": {"ch_in": 1}}, ["MODEL_CONFIG.ch_out is missing: UNET needs it"]),
        (
            {"OPTIMIZER_CONFIG": {"learning_rate": 1}},
            ["OPTIMIZER_CONFIG.learning_rate is no argument of SGD: it takes lr"],
        ),
        ({"OPTIMIZER_CONFIG": {"momentun": 1}}, ["momentun is no argument of SGD: did you mean momentum?"]),
        (
            {"OPTIMIZER_CONFIG": {"params": []}},
            ["OPTIMIZER_CONFIG.params is set by the routine: leave it out"],
        ),
        (
            {"LOSS_CONFIG": {"smoth": 1}},
            ["LOSS_CONFIG.smoth is no argument of smooth_dice_loss: did you mean smooth?"],
        ),
        ({"LOSS_CONFIG": {"target": 1}}, ["LOSS_CONFIG.target is set by the routine: leave it out"]),
        ({"LOSS_CONFIG": {"batch": 1}}, ["LOSS_CONFIG.batch is 1: it must be bool"]),
        (
            {"SCHEDULER": torch.optim.lr_scheduler.StepLR},
            ["SCHEDULER_CONFIG.step_size is missing: StepLR needs it"],
        ),
        (
            {
                "SCHEDULER": torch.optim.lr_scheduler.StepLR,
                "SCHEDULER_CONFIG": {"step_size": 1, "optimizer": 1},
            },
            ["SCHEDULER_CONFIG.optimizer is set by the routine"],
        ),
        (
            {"MODEL": nn.Sequential, "MODEL_CONFIG": {"args": [nn.ReLU]}},
            ["MODEL_CONFIG.args is no argument of Sequential"],
        ),
        (
            {"DATA_LOADER_CONFIG": {"batchsize": 8}},
            ["batchsize is no argument of DataLoader: did you mean batch_size?"],
        ),
        ({"DATA_LOADER_CONFIG": {"dataset": 8}}, ["DATA_LOADER_CONFIG.dataset is set by the routine"]),
        ({"DATA_LOADER_CONFIG": {"sampler": 8}}, ["DATA_LOADER_CONFIG.sampler is set by the routine"]),
        ({"DATA_LOADER_CONFIG": {"batch_size": 0}}, ["DATA_LOADER_CONFIG.batch_size is 0", "at least 1"]),
        (
            {"DATA_LOADER_CONFIG": {"batch_size": None}},
            ["DATA_LOADER_CONFIG.batch_size is None", "at least 1"],
        ),
        (
            {"DATA_LOADER_CONFIG": {"batch_size": "8"}},
            ["DATA_LOADER_CONFIG.batch_size is '8': it must be int"],
        ),
        (
            {"DATA_LOADER_CONFIG": {"num_workers": True}},
            ["DATA_LOADER_CONFIG.num_workers is True: it must be int"],
        ),
        (
            {"DATASET_CONFIG": {"training": {}}},
            ["DATASET_CONFIG.training must be one of train, test, validation"],
        ),
        ({"DATASET_CONFIG": {"train": 3}}, ["DATASET_CONFIG.train must be", "a dict of arguments"]),
        (
            {"DATASET": torch.utils.data.Subset, "DATASET_CONFIG": {"test": {"datasets": 1}}},
            ["DATASET_CONFIG.test.datasets is no argument of Subset: did you mean dataset?"],
        ),
        ({"LOSS": lambda a, b: 0}, ["LOSS cannot be recorded: a lambda has no name"]),
        ({"METRICS": {"f1": f1, "x": UNET.mro}}, ["METRICS.x cannot be recorded"]),
        (
            {"METRICS": {"f1": f1, "x": nn.ReLU().forward}},
            ["METRICS.x cannot be recorded: ReLU.forward is a bound method"],
        ),
        ({"METRICS": {"x": torch.load}}, ["METRICS.x cannot be recorded", "outside of what may be restored"]),
        ({"METRICS": {"x": math.hypot}}, ["METRICS.x cannot be recorded", "outside of what may be restored"]),
        (
            {"OPTIMIZER_CONFIG": {"lr": np.float64(0.1)}},
            ["OPTIMIZER_CONFIG.lr cannot be recorded: an instance of float64"],
        ),
        (
            {"OPTIMIZER_CONFIG": {"lr": torch.tensor(0.1)}},
            ["OPTIMIZER_CONFIG.lr cannot be recorded: an instance of Tensor"],
        ),
        (
            {"MODEL_CONFIG": OrderedDict(ch_in=1, ch_out=1)},
            ["MODEL_CONFIG cannot be recorded: an instance of OrderedDict"],
        ),
        ({"ROUTINE_NAME": torch.hub}, ["ROUTINE_NAME cannot be recorded", "only the project's own modules"]),
    ],
)
def test_each_problem_is_named(changes, fragments):
    problems = problems_of(make_config() | changes)
    assert has(problems, *fragments), problems
    assert all("\n" not in problem and problem.endswith((".", "?")) for problem in problems)


@pytest.mark.parametrize("key", ["MODEL", "OPTIMIZER", "LOSS", "EPOCHS"])
def test_a_missing_key_is_named_with_what_it_is(key):
    config = make_config()
    del config[key]
    assert problems_of(config) == [f"{key} is missing: it is {KEYS[key].about}."]


NUMBERS = [
    key
    for key, entry in KEYS.items()
    if entry.default is not REQUIRED and entry.test("no number") and "number" in entry.test("no number")
]


@pytest.mark.parametrize("key", [*NUMBERS, "EPOCHS"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, False, "1", 1j], ids=repr)
def test_what_is_no_proper_number_is_refused_where_one_is_wanted(key, value):
    assert has(problems_of(make_config(**{key: value})), f"{key} is ", "number")


def test_the_numbers_among_the_keys_were_found():
    assert {"VALIDATION_FRACTION", "SEED", "EMA", "CLIP_NORM", "PATIENCE", "ACCUMULATE"} <= set(NUMBERS)


@pytest.mark.parametrize("key", [key for key, entry in KEYS.items() if entry.default is not REQUIRED])
def test_every_default_passes_its_own_test(key):
    assert KEYS[key].test(KEYS[key].default) is None


@pytest.mark.parametrize("key", KEYS)
def test_every_key_refuses_an_arbitrary_object(key):
    assert KEYS[key].test(object()) is not None


def test_a_closure_is_named():
    def loss(pred, target): ...

    assert has(problems_of(make_config(LOSS=loss)), "LOSS cannot be recorded", "defined inside a function")


def test_a_required_argument_of_a_loss_function_is_missed():
    config = make_config(LOSS=needs_more, REQUIRE_RERUNNABLE=False)
    assert problems_of(config) == ["LOSS_CONFIG.weight is missing: needs_more needs it."]
    assert find_problems(config | {"LOSS_CONFIG": {"weight": 1, "power": 2}}) == []


def test_only_a_schedule_has_its_length_filled_in():
    config = make_config(MODEL=Scheduled, MODEL_CONFIG={}, REQUIRE_RERUNNABLE=False)
    assert problems_of(config) == ["MODEL_CONFIG.T_max is missing: Scheduled needs it."]


def test_one_mistake_is_not_reported_as_several():
    assert len(problems_of(make_config(MODEL_CONFIG=5))) == 1
    assert len(problems_of(make_config(METRICS=5, MONITOR="max f1"))) == 1
    assert len(problems_of(make_config(DATA_LOADER_CONFIG={"batch_size": "8"}))) == 1
    assert len(problems_of(make_config(EPOCHS=math.nan))) == 1


def test_all_problems_are_reported_at_once_and_nothing_is_written_or_changed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = make_config(
        EPOCH=3,
        OPTIMIZER=torch.optim.SGD([torch.zeros(1)], lr=1),
        LOSS=lambda a, b: 0,
        PRECISION="fp64",
        VALIDATION_FRACTION=2,
        MONITOR="max iou",
        MODEL_CONFIG={"ch_in": "12", "chout": 2},
        DATA_LOADER_CONFIG={"batch_size": -1, "suffle": True},
        METRICS={"f1": f1, "odd": nn.ReLU().forward},
        SCHEDULER=torch.optim.lr_scheduler.StepLR,
        MASK_VALUES={1: {1}},
    )
    del config["EPOCHS"]
    before = copy_config(config)
    problems = problems_of(config)
    for fragments in (
        ["EPOCH is no key"],
        ["EPOCHS is missing"],
        ["OPTIMIZER is", "not an instance"],
        ["LOSS cannot be recorded"],
        ["PRECISION is 'fp64'"],
        ["VALIDATION_FRACTION is 2"],
        ["MONITOR is 'max iou'"],
        ["MODEL_CONFIG.ch_in is '12': it must be int"],
        ["MODEL_CONFIG.chout is no argument of UNET: did you mean ch_out?"],
        ["MODEL_CONFIG.ch_out is missing"],
        ["DATA_LOADER_CONFIG.batch_size is -1"],
        ["DATA_LOADER_CONFIG.suffle is no argument of DataLoader: did you mean shuffle?"],
        ["METRICS.odd cannot be recorded"],
        ["SCHEDULER_CONFIG.step_size is missing"],
        ["MASK_VALUES is {1: {1}}"],
    ):
        assert has(problems, *fragments), fragments
    assert same(config, before)
    assert list(tmp_path.iterdir()) == []


def test_the_error_counts_its_problems():
    assert str(ConfigError(["A is wrong."])) == "the config has 1 problem: A is wrong."
    assert str(ConfigError(["A.", "B."])) == "the config has 2 problems: \n  - A.\n  - B."


def test_lambdas_and_closures_train_where_the_user_asks_for_it():
    config = make_config(
        LOSS=lambda pred, target: 0, METRICS={"x": lambda pred, target: 0}, REQUIRE_RERUNNABLE=False
    )
    assert find_problems(config) == []
    check(config)
    problems = []
    written = capture(config, problems)
    assert has(problems, "LOSS cannot be recorded: a lambda has no name to record")
    assert has(problems, "METRICS.x cannot be recorded: a lambda has no name to record")
    assert set(written["config"]["LOSS"]) == {"@unrecorded"}
    assert written["config"]["MODEL"] == {"@ref": ".models.unet:UNET"}


# ------------------------------------------------------------------------------------------------------------- complete


def test_completing_adds_the_defaults_and_leaves_the_callers_config_as_it_is():
    config = {"MODEL_CONFIG": {"ch_in": 1, "list": [1]}, "METRICS": OrderedDict(f1=f1)}
    before = copy_config(config)
    done = complete(config)
    done["MODEL_CONFIG"]["ch_in"] = 2
    done["MODEL_CONFIG"]["list"].append(2)
    done["METRICS"]["new"] = f1
    done["DATA_LOADER_CONFIG"]["batch_size"] = 999
    assert same(dict(config["METRICS"]), dict(before["METRICS"]))
    assert config["MODEL_CONFIG"] == before["MODEL_CONFIG"]
    assert list(config) == ["MODEL_CONFIG", "METRICS"]
    assert complete({})["DATA_LOADER_CONFIG"]["batch_size"] == 8
    assert set(complete({})) == {key for key, entry in KEYS.items() if entry.default is not REQUIRED}


@settings(max_examples=100, deadline=None)
@given(value=values)
def test_a_copy_shares_objects_but_no_containers(value):
    config = {"MODEL_CONFIG": {"value": value}}
    copied = copy_config(config)
    assert same(copied, config)
    assert copied["MODEL_CONFIG"] is not config["MODEL_CONFIG"]
    if isinstance(value, (dict, list)):
        assert copied["MODEL_CONFIG"]["value"] is not value


# ------------------------------------------------------------------------------------------------------------- override


def at(config, dotted):
    for key in dotted.split("."):
        config = config[key]
    return config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("EPOCHS=3", 3),
        ("OPTIMIZER_CONFIG.lr=1e-4", 1e-4),
        ("OPTIMIZER_CONFIG.lr=1", 1),
        ("OPTIMIZER_CONFIG.lr=1.0", 1.0),
        ("OPTIMIZER_CONFIG.betas=(0.9, 0.99)", (0.9, 0.99)),
        ("MODEL_CONFIG.dropout=0.1", 0.1),
        ("MODEL_CONFIG.use_shuffle=False", False),
        ("MODEL_CONFIG.use_shuffle=false", False),
        ("MODEL_CONFIG.use_shuffle=True", True),
        ("MODEL_CONFIG.norm=None", None),
        ("MODEL_CONFIG.norm=none", None),
        ("MODEL_CONFIG.activ=torch.nn.ReLU", nn.ReLU),
        ("MODEL_CONFIG.activ=torch.nn:ReLU", nn.ReLU),
        ("MODEL_CONFIG.sizes=[1, 2]", [1, 2]),
        ("MODEL_CONFIG.mode=nearest", "nearest"),
        ("MODEL_CONFIG.mode='3'", "3"),
        ("MODEL_CONFIG.file=tiles.v2", "tiles.v2"),
        ("MODEL_CONFIG.text=a=b", "a=b"),
        ("MODEL_CONFIG.odd={[]: 1}", "{[]: 1}"),
        ("MODEL_CONFIG.deep.er.est=1", 1),
        ("OPTIMIZER=AdamW", torch.optim.AdamW),
        ("OPTIMIZER=torch.optim.AdamW", torch.optim.AdamW),
        ("SCHEDULER=OneCycleLR", torch.optim.lr_scheduler.OneCycleLR),
        ("SCHEDULER=none", None),
        ("SCHEDULER_CONFIG.max_lr=0.1", 0.1),
        ("MODEL=UNET", UNET),
        ("MODEL=.models.unet.UNET", UNET),
        ("MODEL=dida_tools.models.unet.UNET", UNET),
        ("LOSS=dice_bce_sum", dice_bce_sum),
        ("LOSS=torch.nn.BCEWithLogitsLoss", nn.BCEWithLogitsLoss),
        ("LOSS=torch.nn.functional.cross_entropy", functional.cross_entropy),
        ("METRICS.recall=recall", recall),
        ("METRICS.mean=numpy.mean", np.mean),
        ("METRICS={}", {}),
        ("SESSION_NAME=2024", "2024"),
        ("SESSION_NAME=true", "true"),
        ("SESSION_NAME=none", "none"),
        ("SESSION_NAME=torch.nn.ReLU", "torch.nn.ReLU"),
        ("DATE=2024-02-29", "2024-02-29"),
        ("DATE=None", None),
        ("__COMMENT=", ""),
        ("__COMMENT=a lr of 1e-3 = good", "a lr of 1e-3 = good"),
        ("LOGFILE=mine.csv", "mine.csv"),
        ("ROUTINE_NAME=ignite", "ignite"),
        ("INIT_WEIGHTS=a/b.pt", "a/b.pt"),
        ("DEVICE=cuda:1", "cuda:1"),
        ("PRECISION=bf16", "bf16"),
        ("MONITOR=max f1", "max f1"),
        ("SCHEDULER_STEP=epoch", "epoch"),
        ("CHANNELS_LAST=false", False),
        ("PATIENCE=none", None),
        ("MASK_VALUES={255: 1}", {255: 1}),
        ("DATASET_CONFIG.train.x_dir=data/x", "data/x"),
    ],
)
def test_a_value_is_replaced(text, expected):
    config = make_config()
    before = copy_config(config)
    changed = override(config, [text])
    assert same(at(changed, text.partition("=")[0]), expected)
    assert same(config, before)


def test_the_other_values_stay_and_the_result_is_a_copy():
    config = make_config()
    changed = override(config, ["EPOCHS=3", "MODEL_CONFIG.dropout=0.1"])
    assert difference(config, changed) == {"EPOCHS": (100, 3), "MODEL_CONFIG.dropout": (0.2, 0.1)}
    changed["MODEL_CONFIG"]["ch_in"] = 1
    changed["METRICS"].clear()
    assert same(config, make_config())


def test_a_later_override_wins_and_none_is_fine_too():
    assert override(make_config(), ["EPOCHS=3", "EPOCHS=4"])["EPOCHS"] == 4
    assert same(override(make_config(), []), make_config())


def test_one_argument_of_a_missing_key_leaves_the_other_defaults():
    config = make_config()
    del config["DATA_LOADER_CONFIG"]
    changed = override(config, ["DATA_LOADER_CONFIG.num_workers=3"])
    assert changed["DATA_LOADER_CONFIG"] == {"batch_size": 8, "shuffle": True, "num_workers": 3}
    assert complete({})["DATA_LOADER_CONFIG"] == {"batch_size": 8, "shuffle": True}


def test_a_mapping_of_another_type_in_the_callers_config_is_not_written_to():
    config = make_config(MODEL_CONFIG=OrderedDict(ch_in=1, ch_out=1))
    changed = override(config, ["MODEL_CONFIG.ch_in=2"])
    assert changed["MODEL_CONFIG"]["ch_in"] == 2
    assert config["MODEL_CONFIG"]["ch_in"] == 1


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("EPOCHS", ["'EPOCHS' is no override: write KEY=VALUE"]),
        ("=3", ["'=3' is no override"]),
        ("", ["'' is no override"]),
        ("MODEL_CONFIG.=3", ["is no override"]),
        ("MODEL_CONFIG..dropout=3", ["is no override"]),
        ("EPOCH=3", ["EPOCH is no key of a config: did you mean EPOCHS?"]),
        ("epochs=3", ["epochs is no key of a config: did you mean EPOCHS?"]),
        ("EPOCHS.x=3", ["EPOCHS is 100, which has no keys"]),
        ("MODEL_CONFIG.dropout.x=3", ["MODEL_CONFIG.dropout is 0.2, which has no keys"]),
        ("OPTIMIZER=Nope", ["OPTIMIZER=Nope: 'torch.optim:Nope' is not found"]),
        ("OPTIMIZER=torch.optim.Nope", ["is not found"]),
        ("OPTIMIZER=two words", ["OPTIMIZER wants an object: give its dotted name"]),
        ("MODEL_CONFIG.activ=torch.nn.RELU", ["'torch.nn:RELU' is not found"]),
        ("MODEL=.models.nowhere.UNET", ["is not found"]),
        ("LOSS=os.system", ["outside of what may be restored"]),
        ("METRICS.x=not_installed_at_all.f1", ["is not found"]),
    ],
)
def test_a_malformed_override_is_named(text, fragments):
    with pytest.raises(ConfigError) as caught:
        override(make_config(), [text])
    assert len(caught.value.problems) == 1
    assert has(caught.value.problems, *fragments), caught.value.problems


def test_all_malformed_overrides_are_reported_at_once_and_nothing_is_changed():
    config = make_config()
    with pytest.raises(ConfigError) as caught:
        override(
            config,
            ["MODEL_CONFIG.ch_in=3", "EPOCH=3", "nonsense", "EPOCHS.x=1", "OPTIMIZER=Nope", "LOSS=a b"],
        )
    assert len(caught.value.problems) == 5
    assert same(config, make_config())


@settings(max_examples=100, deadline=None)
@given(value=st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False))
def test_the_repr_of_a_plain_value_is_read_as_this_value(value):
    changed = override(
        {}, [f"MODEL_CONFIG.x={value!r}", f"MODEL_CONFIG.y={[value]!r}", f"MODEL_CONFIG.z={(value,)!r}"]
    )
    assert same(changed, {"MODEL_CONFIG": {"x": value, "y": [value], "z": (value,)}})


# -------------------------------------------------------------------------------------------------- flatten, difference


def test_a_flat_config_has_dotted_keys_and_objects_as_short_text():
    flat = flatten(make_config(LOSS=functools.partial(functional.cross_entropy, reduction="sum"), EMA=None))
    assert flat["EPOCHS"] == 100
    assert flat["EMA"] is None
    assert flat["MODEL"] == ".models.unet:UNET"
    assert flat["MODEL_CONFIG.activ"] == "torch.nn:ELU"
    assert flat["MODEL_CONFIG.dropout"] == 0.2
    assert flat["METRICS.f1"] == ".utils.loss:f1"
    assert flat["ROUTINE_NAME"] == ".models.unet"
    assert flat["DEVICE"] == "cuda"
    assert flat["LOSS"] == "partial(torch.nn.functional:cross_entropy, reduction=sum)"
    assert "MODEL_CONFIG" not in flat


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({}, "{}"),
        ([], "[]"),
        ((), "()"),
        ([1, "a", None], "[1, a, None]"),
        ((0.9, 0.99), "(0.9, 0.99)"),
        ({255: 1, 0: 0}, "{255: 1, 0: 0}"),
        ([{"a": nn.ELU}], "[{a: torch.nn:ELU}]"),
        (math.nan, "nan"),
        (torch.float16, "float16"),
        (Path("a/b"), "a/b"),
        (functools.partial(nn.ELU, 0.5), "partial(torch.nn:ELU, 0.5)"),
        (
            lambda: 0,
            "(unrecorded: a lambda has no name to record: define it with def at the top of a module)",
        ),
    ],
)
def test_the_text_of_a_value(value, text):
    assert flatten({"MODEL_CONFIG": {"x": value}}) == {"MODEL_CONFIG.x": text}


@settings(max_examples=100, deadline=None)
@given(value=values)
def test_a_live_config_and_its_record_are_flat_in_the_same_way_and_do_not_differ(value):
    config = {"MODEL_CONFIG": {"value": value, "more": 1}}
    written = json.loads(json.dumps(capture(config)))
    assert same(flatten(config), flatten(written))
    assert all(isinstance(item, (str, int, float, type(None))) for item in flatten(config).values())
    assert difference(config, written) == {}
    assert difference(written, round_trip(config)) == {}


def test_what_differs_is_given_with_both_values():
    one = make_config(PATIENCE=3)
    other = make_config(
        EPOCHS=5,
        OPTIMIZER=torch.optim.AdamW,
        DATA_LOADER_CONFIG={"batch_size": 8, "shuffle": True, "pin_memory": True},
    )
    other["METRICS"] = {"f1": recall, "precision": precision, "recall": recall, "new": f1}
    expected = {
        "OPTIMIZER": ("torch.optim:SGD", "torch.optim:AdamW"),
        "DATA_LOADER_CONFIG.num_workers": (2, MISSING),
        "EPOCHS": (100, 5),
        "METRICS.f1": (".utils.loss:f1", ".utils.loss:recall"),
        "PATIENCE": (3, MISSING),
        "METRICS.new": (MISSING, ".utils.loss:f1"),
    }
    assert difference(one, other) == expected
    assert difference(capture(one), other) == expected
    assert difference(one, capture(other)) == expected
    assert difference(one, one) == {}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0),
        (1, True),
        (0, False),
        (0.0, -0.0),
        (1, "1"),
        (None, "None"),
        ([1], (1,)),
        ([1], ["1"]),
        ([True], ["True"]),
        (("a", "b"), ("a, b",)),
        (Path("a"), "a"),
        (torch.device("cpu"), "cpu"),
        (math.nan, "nan"),
        (nn.ELU, "torch.nn:ELU"),
        ({}, "{}"),
        ({1: 2}, {"1": 2}),
        ({1: 2}, {1: 2.0}),
        (nn.ELU, functools.partial(nn.ELU)),
        (functools.partial(nn.ELU, 1), functools.partial(nn.ELU, 1.0)),
    ],
    ids=repr,
)
def test_look_alikes_differ(one, other):
    found = difference({"MODEL_CONFIG": {"x": one}}, {"MODEL_CONFIG": {"x": other}})
    assert found
    assert all(key.startswith("MODEL_CONFIG.x") for key in found)


def test_nan_does_not_differ_from_nan():
    assert difference({"CLIP_NORM": math.nan}, {"CLIP_NORM": math.nan}) == {}


def test_an_empty_config_differs_by_every_key():
    assert flatten({}) == {}
    assert difference({}, {"EPOCHS": 1, "MODEL_CONFIG": {}}) == {
        "EPOCHS": (MISSING, 1),
        "MODEL_CONFIG": (MISSING, "{}"),
    }
