import functools
import math
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from dida_core.config.check import check, check_keys, find_problems
from dida_core.config.keys import KEYS, complete, copy_config
from dida_core.config.kinds import FLAG, NUMBER, REQUIRED, WHOLE, Key
from dida_core.config.overrides import assign
from dida_core.errors import ConfigError
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import Subset, TensorDataset

from dida_tools.models import UNET
from dida_tools.utils.data.scenes import SceneDataset
from dida_tools.utils.loss import dice_bce_sum, f1

from tests_core.config.configs import PROJECT, capture, has, make_config, same


class Scheduled(nn.Module):
    def __init__(self, T_max: int, *layers: nn.Module):
        super().__init__()


def needs_more(pred, target, weight: list[int], *, power=1):
    return weight * power


def problems_of(config):
    with pytest.raises(ConfigError) as caught:
        check(config, PROJECT)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    assert caught.value.problems == find_problems(config, PROJECT)
    return caught.value.problems


# ------------------------------------------------------------------------------------------------------ valid

VALID = [
    {},
    {"LOSS": nn.BCEWithLogitsLoss, "LOSS_CONFIG": {"reduction": "mean"}},
    {"LOSS": functional.cross_entropy, "LOSS_CONFIG": {"label_smoothing": 0.1}},
    {"LOSS": functools.partial(dice_bce_sum, smooth=2.0), "LOSS_CONFIG": {"dice_weight": 0.3}},
    {"SCHEDULER": OneCycleLR, "SCHEDULER_CONFIG": {"max_lr": 0.1}},
    {"SCHEDULER": OneCycleLR},
    {"SCHEDULER": CosineAnnealingLR},
    {"SCHEDULER": ReduceLROnPlateau, "SCHEDULER_STEP": "epoch"},
    {"MONITOR": "max f1.1", "PATIENCE": 3},
    {"METRICS": {"mine": f1}, "MONITOR": "max mine_sample_mean"},
    {"MASK_VALUES": {0: 0, 255: 1, 0.5: -100}},
    {"MASK_VALUES": {(255, 0, 0): 1, (0, 0, 0): 0}},
    {"DATASET": TensorDataset, "DATASET_CONFIG": {"train": {}, "test": {}}},
    {"DATASET": SceneDataset, "DATASET_CONFIG": {"train": {"part": "train"}, "test": {"split": "test"}}},
    {"DEVICE": "cuda:3", "NORMALISE": False, "NOTIFY": ["a@b.org", "c@d.org"]},
    {"DEVICE": "auto", "INIT_WEIGHTS": Path("a.pt"), "EMA": 0.999, "CLIP_NORM": 1, "VALIDATION_FRACTION": 0},
    {"MODEL_CONFIG": {"ch_in": 3, "ch_out": 1, "dropout": 0, "norm": None}},
    {"DATE": None, "ROUTINE_NAME": "pytorch"},
]


@pytest.mark.parametrize("changes", VALID, ids=lambda changes: "-".join(changes))
def test_a_valid_config_has_no_problems(changes):
    assert find_problems(make_config(**changes), PROJECT) == []
    assert find_problems(complete(make_config(**changes)), PROJECT) == []


def test_checking_captures_what_belongs_into_the_record():
    config = make_config(RESUME="auto", AFTER_EPOCH=lambda run: None)
    assert check(config, PROJECT) == capture(make_config())
    assert check(complete(config), PROJECT)["config"].keys() == complete(config).keys() - {
        "RESUME",
        "AFTER_EPOCH",
    }


def test_lambdas_and_closures_train_where_the_user_asks_for_it():
    functions = {"LOSS": lambda pred, target: 0, "METRICS": {"x": lambda pred, target: 0}}
    captured = check(make_config(**functions, REQUIRE_RERUNNABLE=False), PROJECT)["config"]
    assert "a lambda has no name to record" in captured["LOSS"]["@unrecorded"]
    assert "a lambda has no name to record" in captured["METRICS"]["x"]["@unrecorded"]
    assert captured["MODEL"] == {"@ref": ".models.unet:UNET"}
    with pytest.raises(ConfigError):
        check(make_config(**functions), PROJECT)


# ------------------------------------------------------------------------------------------------------ wrong

A_UNET, AN_SGD = UNET(1, 1, bulk_ch=1, n_recursions=1), torch.optim.SGD([torch.zeros(1)], lr=1)
OUTSIDE = "outside of what may be restored"
UNKNOWN_KEYS = {
    "EPOCH": "did you mean EPOCHS?",
    "epochs": "did you mean EPOCHS?",
    "OPTIMISER": "did you mean OPTIMIZER?",
    "METRIC": "did you mean METRICS?",
    "XYZZY": "see config/keys.py.",
    7: "see config/keys.py.",
}
# What each key must be, and what it is not.
WRONG_VALUES = {
    "EPOCHS": ("a whole number of at least 1", ["100", 1.0, 0, None]),
    "VALIDATION_FRACTION": ("a number of at least 0 and below 1", [1, -0.1]),
    "EMA": ("a number above 0 and below 1 or None", [0, 1.0]),
    "CLIP_NORM": ("a number above 0 or None", [0]),
    "PATIENCE": ("a whole number of at least 1 or None", [0]),
    "SEED": ("a whole number of at least 0 and below 9.22337e+18", [-1, 2**63]),
    "ACCUMULATE": ("a whole number of at least 1", [0]),
    "CHECKPOINT_SECONDS": ("a number of at least 0", [-1]),
    "NORMALIZE": ("True or False", [1, None]),
    "SESSION_NAME": ("a string", [None, 1]),
    "PRECISION": ("one of 'auto', 'fp32', 'bf16', 'fp16'", ["fp64", ["fp32"]]),
    "SCHEDULER_STEP": ("one of 'step', 'epoch'", ["batch"]),
    "DEVICE": ("'auto', 'cpu', 'cuda', 'cuda:0', 'mps' or a torch.device", ["gpu", 0, "", None]),
    "NOTIFY": ("an e-mail address or a list of them or None", [[], "me", ["a@b.org", "me"]]),
    "MONITOR": ("'min NAME' or 'max NAME', like 'max f1'", ["f1", "max", "best f1", 1]),
    "METRICS": ("a dict of name: function, without 'loss'", [[f1], {"f1": "f1"}, {"loss": f1}, {1: f1}]),
    "MASK_VALUES": ("a dict of mask value: class number", [{255: "road"}, {"255": 1}, {255: True}, [255]]),
    "MODEL": ("a class derived from torch.nn.Module", [f1, torch.optim.SGD, "UNET"]),
    "OPTIMIZER": ("a class derived from torch.optim.Optimizer", [nn.Linear]),
    "SCHEDULER": ("a class derived from an LRScheduler or None", [torch.optim.SGD]),
    "LOSS": ("a function or a class", ["dice"]),
    "DATASET": ("the class of a dataset or None", [nn.Linear, f1]),
    "MODEL_CONFIG": ("a dict of keyword arguments, which has strings as keys", [None, {1: 2}]),
}
INSTANCES = {
    "MODEL": A_UNET,
    "OPTIMIZER": AN_SGD,
    "LOSS": nn.BCEWithLogitsLoss(),
    "DATASET": TensorDataset(torch.zeros(1)),
}
# Changes of a config, and what the problem says.
WRONG_ARGUMENTS = [
    ({"MODEL_CONFIG": {"ch_in": 1, "ch_out": 1, "args": []}}, "MODEL_CONFIG.args is no argument of UNET"),
    ({"MODEL_CONFIG": {"ch_in": True, "ch_out": 1}}, "MODEL_CONFIG.ch_in is True: it must be int"),
    ({"MODEL_CONFIG": {"ch_in": 1.0, "ch_out": 1}}, "MODEL_CONFIG.ch_in is 1.0: it must be int"),
    ({"MODEL_CONFIG": {"ch_in": 1, "ch_out": 1, "dropout": None}}, "MODEL_CONFIG.dropout is None", "float"),
    ({"MODEL_CONFIG": {"ch_in": 1}}, "MODEL_CONFIG.ch_out is missing: UNET needs it"),
    ({"MODEL": nn.Sequential, "MODEL_CONFIG": {"args": [nn.ReLU]}}, "args is no argument of Sequential"),
    ({"OPTIMIZER_CONFIG": {"learning_rate": 1}}, "learning_rate is no argument of SGD: it takes lr"),
    ({"OPTIMIZER_CONFIG": {"momentun": 1}}, "momentun is no argument of SGD: did you mean momentum?"),
    ({"OPTIMIZER_CONFIG": {"params": []}}, "OPTIMIZER_CONFIG.params is set by the routine: leave it out"),
    ({"LOSS_CONFIG": {"smoth": 1}}, "smoth is no argument of smooth_dice_loss: did you mean smooth?"),
    ({"LOSS_CONFIG": {"target": 1}}, "LOSS_CONFIG.target is set by the routine: leave it out"),
    ({"LOSS_CONFIG": {"batch": 1}}, "LOSS_CONFIG.batch is 1: it must be bool"),
    ({"SCHEDULER": StepLR}, "SCHEDULER_CONFIG.step_size is missing: StepLR needs it"),
    ({"SCHEDULER": StepLR, "SCHEDULER_CONFIG": {"step_size": 1, "optimizer": 1}}, "optimizer is set by the"),
    ({"SCHEDULER": ReduceLROnPlateau}, "ReduceLROnPlateau", "set SCHEDULER_STEP=epoch"),
    ({"MONITOR": "max iou"}, "'max iou': iou is not among the results (loss, f1, precision, recall)"),
    ({"NORMALISE": 1}, "NORMALIZE is 1: it must be True or False"),
    ({"DATA_LOADER_CONFIG": {"batchsize": 8}}, "no argument of DataLoader: did you mean batch_size?"),
    ({"DATA_LOADER_CONFIG": {"dataset": 8}}, "DATA_LOADER_CONFIG.dataset is set by the routine"),
    ({"DATA_LOADER_CONFIG": {"sampler": 8}}, "DATA_LOADER_CONFIG.sampler is set by the routine"),
    ({"DATA_LOADER_CONFIG": {"batch_size": 0}}, "DATA_LOADER_CONFIG.batch_size is 0", "at least 1"),
    ({"DATA_LOADER_CONFIG": {"batch_size": None}}, "DATA_LOADER_CONFIG.batch_size is None", "at least 1"),
    ({"DATA_LOADER_CONFIG": {"batch_size": "8"}}, "DATA_LOADER_CONFIG.batch_size is '8': it must be int"),
    ({"DATA_LOADER_CONFIG": {"num_workers": True}}, "DATA_LOADER_CONFIG.num_workers is True: it must be int"),
    ({"DATASET_CONFIG": {"training": {}}}, "DATASET_CONFIG.training must be one of train, test, validation"),
    ({"DATASET_CONFIG": {"train": 3}}, "DATASET_CONFIG.train must be", "a dict of arguments"),
    ({"DATASET": SceneDataset, "DATASET_CONFIG": {"train": 3}}, "DATASET_CONFIG.train must be"),
    ({"DATASET": Subset, "DATASET_CONFIG": {"test": {"datasets": 1}}}, "Subset: did you mean dataset?"),
]
UNRECORDABLE = [
    ({"LOSS": lambda a, b: 0}, "LOSS cannot be recorded: a lambda has no name"),
    ({"METRICS": {"f1": f1, "x": UNET.mro}}, "METRICS.x cannot be recorded"),
    (
        {"METRICS": {"f1": f1, "x": nn.ReLU().forward}},
        "METRICS.x cannot be",
        "ReLU.forward is a bound method",
    ),
    ({"METRICS": {"x": torch.load}}, "METRICS.x cannot be recorded", OUTSIDE),
    ({"METRICS": {"x": math.hypot}}, "METRICS.x cannot be recorded", OUTSIDE),
    ({"OPTIMIZER_CONFIG": {"lr": np.float64(0.1)}}, "OPTIMIZER_CONFIG.lr", "an instance of float64"),
    ({"OPTIMIZER_CONFIG": {"lr": torch.tensor(0.1)}}, "OPTIMIZER_CONFIG.lr", "an instance of Tensor"),
    ({"MODEL_CONFIG": OrderedDict(ch_in=1, ch_out=1)}, "MODEL_CONFIG cannot", "an instance of OrderedDict"),
    ({"ROUTINE_NAME": torch.hub}, "ROUTINE_NAME cannot be recorded", "only the project's own modules"),
]


@pytest.mark.parametrize("key", UNKNOWN_KEYS)
def test_an_unknown_key_is_named_with_the_nearest(key):
    assert f"{key} is no key of a config: {UNKNOWN_KEYS[key]}" in problems_of(make_config() | {key: 3})


@pytest.mark.parametrize("key", WRONG_VALUES)
def test_a_value_is_named_with_what_the_key_must_be(key):
    wanted, found = WRONG_VALUES[key]
    for value in found:
        problem = next(
            one for one in problems_of(make_config(**{key: value})) if one.startswith(f"{key} is ")
        )
        assert f": it must be {wanted}" in problem, problem


@pytest.mark.parametrize("key", INSTANCES)
def test_an_instance_is_told_from_its_class(key):
    name = type(INSTANCES[key]).__name__
    problems = problems_of(make_config(**{key: INSTANCES[key]}))
    assert has(problems, f"{key} is ", f"it must be the class {name}, not an instance of it")


@pytest.mark.parametrize("case", WRONG_ARGUMENTS + UNRECORDABLE, ids=lambda case: "-".join(case[0]))
def test_each_problem_is_named(case):
    changes, *fragments = case
    problems = problems_of(make_config() | changes)
    assert has(problems, *fragments), problems
    assert all("\n" not in problem and problem.endswith((".", "?")) for problem in problems)


@pytest.mark.parametrize("key", ["MODEL", "OPTIMIZER", "LOSS", "EPOCHS"])
def test_a_missing_key_is_named_with_what_it_is(key):
    config = make_config()
    del config[key]
    assert problems_of(config) == [f"{key} is missing: it is {KEYS[key].about}."]


def test_a_required_argument_of_a_loss_function_is_missed_and_only_a_schedule_has_its_length_filled_in():
    config = make_config(LOSS=needs_more, REQUIRE_RERUNNABLE=False)
    assert problems_of(config) == ["LOSS_CONFIG.weight is missing: needs_more needs it."]
    assert find_problems(config | {"LOSS_CONFIG": {"weight": [1], "power": 2}}, PROJECT) == []
    config = make_config(MODEL=Scheduled, MODEL_CONFIG={}, REQUIRE_RERUNNABLE=False)
    assert problems_of(config) == ["MODEL_CONFIG.T_max is missing: Scheduled needs it."]


@pytest.mark.parametrize(
    "changes",
    [
        {"MODEL_CONFIG": 5},
        {"METRICS": 5, "MONITOR": "max f1"},
        {"DATA_LOADER_CONFIG": {"batch_size": "8"}},
        {"EPOCHS": math.nan},
        {"MODEL": A_UNET},
    ],
)
def test_one_mistake_is_not_reported_as_several(changes):
    assert len(problems_of(make_config(**changes))) == 1


def test_all_problems_are_reported_at_once_and_nothing_is_written_or_changed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong = {
        "EPOCH": 3,
        "OPTIMIZER": AN_SGD,
        "LOSS": lambda a, b: 0,
        "PRECISION": "fp64",
        "MONITOR": "max iou",
        "MODEL_CONFIG.ch_in": "12",
        "MODEL_CONFIG.chout": 2,
        "SCHEDULER": StepLR,
        "DATA_LOADER_CONFIG.batch_size": -1,
        "METRICS.odd": nn.ReLU().forward,
        "MASK_VALUES": {1: {1}},
    }
    config = make_config()
    assert [problem for key, value in wrong.items() if (problem := assign(config, key, value))] == []
    del config["EPOCHS"], config["MODEL_CONFIG"]["ch_out"]
    before = copy_config(config)
    with pytest.raises(ConfigError) as caught:
        check(config, PROJECT, ["found before."])
    starts = [
        "EPOCHS is missing",
        "MODEL_CONFIG.ch_out is missing",
        "SCHEDULER_CONFIG.step_size",
        "found before.",
    ]
    del wrong["SCHEDULER"]  # whose argument is missing
    for start in [*starts, *wrong]:
        assert any(problem.startswith(start) for problem in caught.value.problems), start
    assert len(caught.value.problems) == len(starts) + len(wrong)
    assert same(config, before)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------- keys

OPTIONAL = [key for key, entry in KEYS.items() if entry.default is not REQUIRED]
NUMBERS = [key for key, entry in KEYS.items() if entry.kind in (WHOLE, NUMBER)]


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, False, "1", 1j], ids=repr)
def test_what_is_no_proper_number_is_refused_where_one_is_wanted(key, value):
    assert "number" in check_keys(make_config(**{key: value}))[key]


def test_every_default_fits_and_every_key_refuses_an_arbitrary_object():
    assert {"VALIDATION_FRACTION", "SEED", "EMA", "CLIP_NORM", "PATIENCE", "ACCUMULATE"} <= set(NUMBERS)
    assert all(KEYS[key].test(KEYS[key].default) is None for key in OPTIONAL)
    assert all(entry.test(object()) is not None for entry in KEYS.values())


def test_another_table_of_keys_is_checked_in_the_same_way():
    keys = {"TILE": Key(256, WHOLE, "size of a tile", 32), "FLIP": Key(REQUIRED, FLAG, "whether to flip")}
    assert check_keys({"TILE": 64, "FLIP": True}, keys) == {}
    assert check_keys({"TILE": 1, "TILES": 2}, keys) == {
        "TILES": "TILES is no key of a config: did you mean TILE?",
        "TILE": "TILE is 1: it must be a whole number of at least 32.",
        "FLIP": "FLIP is missing: it is whether to flip.",
    }
    assert complete({"FLIP": False}, keys) == {"TILE": 256, "FLIP": False}
