import functools
import json
import math
from pathlib import Path

import pytest
from dida_core.config.check import check
from dida_core.config.keys import KEYS, NOT_RESTORED, complete, copy_config
from dida_core.config.tree import difference
from dida_core.errors import ConfigError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from dida_tools.models import UNET
from dida_tools.utils.loss import f1, smooth_dice_loss

from tests_core.config import configs
from tests_core.config.configs import PROJECT, capture, has, make_config, record, restore, round_trip, same

RUNS_0_1 = Path(__file__).parents[1] / "version_0_1" / "runs" / "logs"
SHARED = [1, 2]
MODULE, GPU = {"@module": ".utils.loss"}, {"@device": "gpu"}
UNET_REF, LINEAR, RELU = {"@ref": ".models.unet:UNET"}, {"@ref": "torch.nn:Linear"}, {"@ref": "torch:relu"}


def partial_of(function, args=(), kwargs=None, **more):
    return {"@partial": function, "args": list(args), "kwargs": kwargs or {}} | more


# --------------------------------------------------------------------------------------------- there and back


@settings(max_examples=200, deadline=None)
@given(
    value=configs.values,
    key=st.sampled_from(["MODEL_CONFIG", "LOSS_CONFIG", "DATASET_CONFIG"]),
    name=configs.texts,
)
def test_any_value_comes_back_equal_of_equal_type_and_objects_identical(value, key, name):
    config = {key: {"value": value, name: value}}
    before = copy_config(config)
    captured = json.dumps(capture(config), allow_nan=False)
    again = restore(json.loads(captured))
    assert same(again, config) and same(config, before)
    assert json.dumps(capture(again)) == captured


LOOK_ALIKES = [1, 1.0, True, "1", -0.0, 0.0, math.nan, math.inf, -math.inf, 10**30, "", None, (), []]
CHANGES = [
    {},
    {"LOSS": functools.partial(functional.cross_entropy, reduction="sum", weight=(1.0, 2.0))},
    {"LOSS": functools.partial(smooth_dice_loss, functional.relu, activ=nn.ELU)},
    {"MODEL_CONFIG": {"ch_in": 1, "ch_out": 1, "activ": functools.partial(nn.ELU, 0.5)}},
    {"METRICS": {"f1": functools.partial(f1, threshold=0.3)}},
    {"MODEL_CONFIG": {"a": SHARED, "b": SHARED}},  # the same list twice is no circle
    {"MODEL_CONFIG": {"x": LOOK_ALIKES}},
    {key: value for key, value in complete({}).items() if key not in NOT_RESTORED},
]


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: "-".join(changes))
def test_a_config_comes_back_with_the_same_objects(changes):
    assert same(round_trip(make_config(**changes)), make_config(**changes))
    assert same(round_trip(changes), changes)


def test_a_record_names_the_objects_of_the_package_relative_to_it():
    captured = capture(make_config())
    assert captured["version"] == 1
    assert captured["config"]["MODEL"] == UNET_REF
    assert captured["config"]["MODEL_CONFIG"]["activ"] == {"@ref": "torch.nn:ELU"}
    assert captured["config"]["ROUTINE_NAME"] == {"@module": ".models.unet"}
    assert captured["config"]["DEVICE"] == {"@device": "cuda"}


def test_what_cannot_be_recorded_is_listed_at_once_or_noted_in_the_record():
    config = make_config(LOSS=lambda a, b: 0, MODEL=UNET(1, 1, bulk_ch=1), MASK_VALUES={1: {2, 3}})
    config["MODEL_CONFIG"]["itself"] = config["MODEL_CONFIG"]
    with pytest.raises(ConfigError) as caught:
        capture(config)
    noted = []
    captured = json.loads(json.dumps(capture(config, noted)))
    assert caught.value.problems == noted and len(noted) == 4
    assert has(noted, "LOSS cannot be recorded: a lambda has no name")
    assert has(noted, "MODEL cannot be recorded: an instance of UNET")
    assert has(noted, "MODEL_CONFIG.itself contains itself")
    assert has(noted, "MASK_VALUES", "cannot be recorded: an instance of set")
    assert "a lambda has no name to record" in captured["config"]["LOSS"]["@unrecorded"]
    with pytest.raises(ConfigError, match=r"LOSS: it could not be recorded \(a lambda has no name"):
        restore(captured)


@pytest.mark.parametrize("of_fastai", [False, pytest.param(True, marks=pytest.mark.slow)])  # slow to import
def test_the_records_of_version_0_1_come_back_and_are_valid(of_fastai):
    files = [file for file in RUNS_0_1.glob("*/config.json") if ("fastai" in file.read_text()) == of_fastai]
    assert len(files) >= 1
    for file in files:
        stored = json.loads(file.read_bytes())
        config = restore(stored)
        captured = check(config, PROJECT)
        changes = difference(captured, {key: stored[key] for key in ("version", "config")})
        assert set(changes) <= set(NOT_RESTORED)
        assert config["MODEL"] is UNET and config["NORMALIZE"] is True and "NORMALISE" not in config


# -------------------------------------------------------------------------------------------- damaged records


def test_what_is_no_record_is_refused():
    wrong = [None, [], {"@tuple": []}, {"@float": "nan"}, UNET_REF, MODULE, partial_of(RELU)]
    records = [{"version": 1, "config": config} for config in wrong]
    versions = [{"version": version, "config": {}} for version in (0, 2, "1", None)]
    for damaged in (None, [], "{}", {}, {"version": 1}, {"config": {}}, *records, *versions):
        with pytest.raises(ConfigError):
            restore(damaged)


CONTENTS = [None, True, 0, 1.5, {}, {"a": 1}, {"@tuple": []}, [1], [[1, 2, 3]], "", "x", "\0", "a" * 5000]
TAGS = ("@ref", "@module", "@partial", "@dict", "@float", "@device", "@dtype", "@unrecorded")
DAMAGED = [
    *({tag: content} for tag in TAGS for content in CONTENTS),
    *({"@path": content} for content in CONTENTS if not isinstance(content, str)),
    *({"@tuple": content} for content in [*CONTENTS, "abc"] if not isinstance(content, list)),
    *({tag: 1} for tag in ("@list", "@", "@REF")),
    *({tag: "torch.nn:ELU"} for tag in ("@ref ", "@eval")),
    *({"@ref": "torch.nn:ELU"} | more for more in ({"more": 1}, {"@tuple": []})),
    {"more": 1, "@ref": "torch.nn:ELU"},
    *({"@float": content} for content in ("1.5", "infinity")),
    *({"@device": content} for content in ("cuda:x", "cuda:99999999999999999999")),
    *({"@dtype": content} for content in ("float33", "os", "nn", "__doc__", "torch.float32")),
    *({"@dict": content} for content in ([["a"]], ["ab"], [[[1], 2]], [[{"a": 1}, 2]])),
    *({"@partial": RELU} | more for more in ({}, {"args": []})),
    *(partial_of(RELU) | {"args": args} for args in ("ab", {"a": 1})),
    *(partial_of(RELU) | {"kwargs": kwargs} for kwargs in ([], [["a", 1]], {"@dict": [[1, 2]]})),
    partial_of(RELU, state={}),
    *(partial_of(function) for function in (5, "torch:relu", {"@dtype": "float32"}, None)),
    *({"@ref": content} for content in ("torch.nn", "torch.nn:", ".models.unet", ["torch.nn:ELU"], LINEAR)),
    functools.reduce(lambda inner, _: [inner], range(3000), 1),
]


def test_a_damaged_value_is_reported_with_its_place():
    for value in DAMAGED:
        places = {"MODEL_CONFIG.x": {"MODEL_CONFIG": {"x": value}}, "METRICS.f1": {"METRICS": {"f1": value}}}
        for place, config in (places | {"MODEL_CONFIG[1]": {"MODEL_CONFIG": [0, value]}}).items():
            with pytest.raises(ConfigError) as caught:
                restore(record(**config))
            assert place in str(caught.value) or "nested too deeply" in str(caught.value), value


def test_everything_that_is_wrong_with_a_record_is_reported_at_once():
    metrics = {"a": {"@ref": ".utils.loss:nothing"}, "b": {"@what": 1}}
    wrong = {"MODEL": {"@ref": "os:system"}, "OPTIMIZER": LINEAR, "EPOCHS": LINEAR, "DEVICE": GPU}
    with pytest.raises(ConfigError) as caught:
        restore(record(**wrong, METRICS=metrics))
    places = [problem.split()[0].strip(":") for problem in caught.value.problems]
    assert places == ["MODEL", "OPTIMIZER", "EPOCHS", "DEVICE", "METRICS.a", "METRICS.b"]


# --------------------------------------------------------------------------------- objects in the wrong place

MODULES = (".models.unet:UNET", "torch.hub", "torch.nn", "torch:load", "builtins", "os", ".nowhere")
MISPLACED = {
    "MODEL": [
        *({"@ref": name} for name in (".utils.loss:f1", "torch.optim:SGD", "builtins:dict")),
        *(partial_of(UNET_REF, [1, 1]), [UNET_REF], {"x": UNET_REF}, {"@module": ".models.unet"}),
    ],
    "OPTIMIZER": [LINEAR, RELU, partial_of({"@ref": "torch.optim:SGD"}, kwargs={"lr": 1})],
    "SCHEDULER": [{"@ref": "torch.optim:SGD"}],
    "DATASET": [LINEAR, RELU],
    "SEED": [{"@tuple": [LINEAR]}],
    "MASK_VALUES": [{"@dict": [[1, LINEAR]]}],
    **{key: [LINEAR] for key in ("EPOCHS", "SESSION_NAME", "INIT_WEIGHTS", "DEVICE")},
    "ROUTINE_NAME": [LINEAR, UNET_REF, [MODULE], *({"@module": name} for name in MODULES)],
    "LOSS": [MODULE, {"@ref": "torch:load"}, partial_of({"@ref": "torch.hub:load"}, ["a/b"])],
    "MODEL_CONFIG": [MODULE, {"x": MODULE}, LINEAR, partial_of(LINEAR)],
    "METRICS": [{"f1": MODULE}, {"@ref": ".utils.loss:f1"}],
    "UNKNOWN_KEY": [MODULE, {"@ref": "os:system"}],
}


@pytest.mark.parametrize("key", [*KEYS, "UNKNOWN_KEY"])
def test_an_object_that_is_hostile_or_of_another_kind_than_its_key_holds_is_refused(key):
    names = ("os:system", "torch:load", "builtins:eval", "torch.hub:load")
    hostile = [{tag: name} for tag in ("@ref", "@module") for name in names]
    for value in (
        *MISPLACED.get(key, ()),
        *hostile,
        *([one] for one in hostile),
        *({"x": one} for one in hostile),
    ):
        if key in NOT_RESTORED:
            assert restore(record(**{key: value})) == {}
            continue
        with pytest.raises(ConfigError):
            restore(record(**{key: value}))
