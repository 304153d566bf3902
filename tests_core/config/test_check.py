import functools
import math
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from dida_core.config.check import check, check_keys, find_problems
from dida_core.config.keys import KEYS, complete, copy_config, upgrade
from dida_core.config.kinds import ARGUMENTS, FLAG, NUMBER, REQUIRED, WHOLE, Key, Kind
from dida_core.config.overrides import assign, override
from dida_core.errors import ConfigError
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import Subset, TensorDataset

from dida_tools.models import UNET
from dida_tools.utils.data.scenes import SceneDataset
from dida_tools.utils.loss import dice_bce_sum, f1

from tests_core.config.configs import PROJECT, capture, has, make_config, restore, same


class Scheduled(nn.Module):
    def __init__(self, T_max: int, *layers: nn.Module):
        super().__init__()


def needs_more(pred, target, weight: list[int], *, power=1):
    return weight * power


class Sharp(torch.optim.SGD):
    def step(self, closure=None):
        assert closure is not None, "it makes two steps"


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
    {"SCHEDULER": CosineAnnealingLR, "WARMUP": 0.1},
    {"SCHEDULER": [LinearLR, OneCycleLR], "SCHEDULER_CONFIG": [{"length": 0.1}, {}], "WARMUP": 100},
    {"LOSS": nn.CrossEntropyLoss, "LOSS_CONFIG": {"weight": [1, 5.0]}},
    {"SCHEDULER": ReduceLROnPlateau, "SCHEDULER_STEP": "epoch"},
    {"MONITOR": "max f1.1", "PATIENCE": 3},
    {"METRICS": {"mine": f1}, "MONITOR": "max mine_sample_mean"},
    {"MASK_VALUES": {0: 0, 255: 1, 0.5: -100}},
    {"MASK_VALUES": {(255, 0, 0): 1, (0, 0, 0): 0}},
    {"DATASET": TensorDataset, "DATASET_CONFIG": {"train": {}, "test": {}}},
    {"DATASET": SceneDataset, "DATASET_CONFIG": {"train": {"part": "train"}, "test": {"split": "test"}}},
    {"DEVICE": "cuda:3", "NORMALISE": False, "NOTIFY": ["a@b.org", "c@d.org"]},
    {"DEVICE": "auto", "INIT_WEIGHTS": Path("a.pt"), "EMA": 0.999, "CLIP_NORM": 1, "VALIDATION_FRACTION": 0},
    {"MODEL_CONFIG": {"ch_in": 3, "ch_out": 1, "dropout": None, "norm": None}},
    {"DATE": None, "ROUTINE_NAME": "pytorch"},
]


@pytest.mark.parametrize("changes", VALID, ids=lambda changes: "-".join(changes))
def test_a_valid_config_has_no_problems(changes):
    assert find_problems(make_config(**changes), PROJECT) == []
    assert find_problems(complete(make_config(**changes)), PROJECT) == []


def test_checking_captures_what_belongs_into_the_record():
    config = make_config(RESUME="auto", AFTER_EPOCH=lambda run: None)
    assert check(config, PROJECT) == capture(make_config())
    left_out = {"RESUME", "AFTER_EPOCH"}
    assert check(complete(config), PROJECT)["config"].keys() == complete(config).keys() - left_out


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
UNKNOWN_KEYS = {
    **dict.fromkeys(("EPOCH", "epochs"), "did you mean EPOCHS?"),
    "OPTIMISER": "did you mean OPTIMIZER?",
    **dict.fromkeys(("XYZZY", 7), "see dida_core/config/keys.py."),
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
    "PRECISION": ("one of auto, fp32, bf16, fp16", ["fp64", ["fp32"]]),
    "SCHEDULER_STEP": ("one of step, epoch", ["batch"]),
    "DEVICE": ("'auto', 'cpu', 'cuda', 'cuda:0', 'mps' or a torch.device", ["gpu", 0, "", None]),
    "NOTIFY": ("an e-mail address or a list of them or None", [[], "me", ["a@b.org", "me"]]),
    "MONITOR": ("'min NAME' or 'max NAME', like 'max f1'", ["f1", "max", "best f1", 1]),
    "METRICS": ("a dict of name: function, without 'loss'", [[f1], {"f1": "f1"}, {"loss": f1}, {1: f1}]),
    "MASK_VALUES": ("a dict of mask value: class number", [{255: "road"}, {"255": 1}, {255: True}, [255]]),
    "MODEL": ("a class derived from torch.nn.Module", [f1, torch.optim.SGD, "UNET"]),
    "OPTIMIZER": ("a class derived from torch.optim.Optimizer", [nn.Linear]),
    "SCHEDULER": (
        "a class derived from torch.optim.lr_scheduler.LRScheduler, or a list of them or None",
        [torch.optim.SGD, [], [OneCycleLR, 3]],
    ),
    "LOSS": ("a function or a class", ["dice"]),
    "DATASET": ("the class of a dataset or None", [nn.Linear, f1]),
    "MODEL_CONFIG": ("a dict of keyword arguments, which has strings as keys", [None, {1: 2}]),
}
# Changes of a config, and what the problem says.
WRONG_ARGUMENTS = [
    ({"MODEL_CONFIG": {"ch_in": 1, "ch_out": 1, "args": []}}, "MODEL_CONFIG.args is no argument of UNET"),
    ({"MODEL_CONFIG": {"ch_in": True, "ch_out": 1}}, "MODEL_CONFIG.ch_in is True: it must be int"),
    ({"MODEL_CONFIG": {"ch_in": 1.0, "ch_out": 1}}, "MODEL_CONFIG.ch_in is 1.0: it must be int"),
    ({"MODEL_CONFIG": {"ch_in": 1, "ch_out": None}}, "MODEL_CONFIG.ch_out is None", "int"),
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
    ({"SCHEDULER": [LinearLR], "SCHEDULER_CONFIG": {"length": 1}}, "it must have a dict for each SCHEDULER"),
    ({"SCHEDULER": LinearLR, "SCHEDULER_CONFIG": [{}]}, "it must have a dict for each SCHEDULER"),
    ({"SCHEDULER": [LinearLR, StepLR], "SCHEDULER_CONFIG": [{}, {}]}, "CONFIG.1.step_size is missing"),
    ({"SCHEDULER": [LinearLR], "SCHEDULER_CONFIG": [{"length": 1.5}]}, "CONFIG.0.length is 1.5: it must be"),
    ({"SCHEDULER": [LinearLR, ReduceLROnPlateau]}, "ReduceLROnPlateau in a list"),
    ({"WARMUP": 1.5}, "WARMUP is 1.5: it must be a whole number, or one below 1 of at least 0"),
    ({"OPTIMIZER": torch.optim.LBFGS}, "OPTIMIZER is LBFGS, whose step needs a closure"),
    ({"OPTIMIZER": Sharp}, "OPTIMIZER is Sharp, whose step needs a closure"),
    ({"OPTIMIZER_CONFIG": {"lr": None}}, "OPTIMIZER_CONFIG.lr is None: it must be float."),
    ({"OPTIMIZER_CONFIG": {"lr": "0,001"}}, "lr is '0,001': it must be float. Write a decimal point."),
    ({"batch_size": 4}, "batch_size is no key", "did you mean DATA_LOADER_CONFIG.batch_size?"),
    ({"lr": 1e-3}, "lr is no key of a config: did you mean OPTIMIZER_CONFIG.lr?"),
    ({"dropout": 0.1}, "dropout is no key of a config: did you mean MODEL_CONFIG.dropout?"),
    ({"MONITOR": "max iou"}, "'max iou': iou is not among the results (loss, f1, precision, recall)"),
    ({"NORMALISE": 1}, "NORMALIZE is 1: it must be True or False"),
    ({"DATA_LOADER_CONFIG": {"batchsize": 8}}, "no argument of DataLoader: did you mean batch_size?"),
    ({"DATA_LOADER_CONFIG": {"dataset": 8}}, "DATA_LOADER_CONFIG.dataset is set by the routine"),
    ({"DATA_LOADER_CONFIG": {"batch_sampler": 8}}, "DATA_LOADER_CONFIG.batch_sampler is set by the routine"),
    ({"DATA_LOADER_CONFIG": {"sampler": 8}}, "DATA_LOADER_CONFIG.sampler is 8: it must be a function"),
    ({"DATA_LOADER_CONFIG": {"collate_fn": 8}}, "DATA_LOADER_CONFIG.collate_fn is 8: it must be a function"),
    ({"DATA_LOADER_CONFIG": {"batch_size": 0}}, "DATA_LOADER_CONFIG.batch_size is 0", "at least 1"),
    ({"DATA_LOADER_CONFIG": {"batch_size": None}}, "DATA_LOADER_CONFIG.batch_size is None", "at least 1"),
    ({"DATA_LOADER_CONFIG": {"batch_size": "8"}}, "DATA_LOADER_CONFIG.batch_size is '8': it must be int"),
    ({"DATA_LOADER_CONFIG": {"num_workers": True}}, "DATA_LOADER_CONFIG.num_workers is True: it must be int"),
    ({"DATASET_CONFIG": {"training": {}}}, "DATASET_CONFIG.training must be one of train, test, validation"),
    ({"DATASET_CONFIG": {"train": 3}}, "DATASET_CONFIG.train must be", "a dict of arguments"),
    ({"DATASET": SceneDataset, "DATASET_CONFIG": {"train": 3}}, "DATASET_CONFIG.train must be"),
    ({"DATASET": Subset, "DATASET_CONFIG": {"test": {"datasets": 1}}}, "Subset: did you mean dataset?"),
    ({"METRICS": {"f1": f1, "x": UNET.mro}}, "METRICS.x cannot be recorded"),
    ({"MODEL_CONFIG": OrderedDict(ch_in=1, ch_out=1)}, "MODEL_CONFIG cannot", "an instance of OrderedDict"),
]


def test_an_unknown_or_missing_key_is_named():
    for key, hint in UNKNOWN_KEYS.items():
        assert f"{key} is no key of a config: {hint}" in problems_of(make_config() | {key: 3})
    for key in ("MODEL", "OPTIMIZER", "LOSS", "EPOCHS"):
        config = {name: value for name, value in make_config().items() if name != key}
        assert problems_of(config) == [f"{key} is missing: it is {KEYS[key].about}."]


@pytest.mark.parametrize("key", WRONG_VALUES)
def test_a_value_is_named_with_what_the_key_must_be(key):
    wanted, found = WRONG_VALUES[key]
    for value in found:
        assert has(problems_of(make_config(**{key: value})), f"{key} is ", f": it must be {wanted}"), value


def test_an_instance_is_told_from_its_class():
    data = TensorDataset(torch.zeros(1))
    for key, value in {"MODEL": A_UNET, "OPTIMIZER": AN_SGD, "LOSS": nn.ReLU(), "DATASET": data}.items():
        wanted = f"it must be the class {type(value).__name__}, not an instance of it"
        hint = f"(its arguments go into {key}_CONFIG)."
        assert has(problems_of(make_config(**{key: value})), f"{key} is ", wanted, hint)
    (problem,) = problems_of(make_config(AFTER_EPOCH=nn.ReLU()))
    assert problem.endswith("not an instance of it or None.")  # there is no AFTER_EPOCH_CONFIG


@pytest.mark.parametrize("case", WRONG_ARGUMENTS, ids=lambda case: "-".join(case[0]))
def test_each_problem_is_named(case):
    changes, *fragments = case
    problems = problems_of(make_config() | changes)
    assert has(problems, *fragments), problems
    assert all("\n" not in problem and problem.endswith((".", "?")) for problem in problems)


def test_a_required_argument_of_a_loss_function_is_missed_and_only_a_schedule_has_its_length_filled_in():
    config = make_config(LOSS=needs_more, REQUIRE_RERUNNABLE=False)
    assert problems_of(config) == ["LOSS_CONFIG.weight is missing: needs_more needs it."]
    assert find_problems(config | {"LOSS_CONFIG": {"weight": [1], "power": 2}}, PROJECT) == []
    config = make_config(MODEL=Scheduled, MODEL_CONFIG={}, REQUIRE_RERUNNABLE=False)
    assert problems_of(config) == ["MODEL_CONFIG.T_max is missing: Scheduled needs it."]


def test_one_mistake_is_not_reported_as_several():
    mistakes = [{"MODEL_CONFIG": 5}, {"MODEL": A_UNET}, {"DATA_LOADER_CONFIG": {"batch_size": "8"}}]
    for changes in [*mistakes, {"METRICS": 5, "MONITOR": "max f1"}, {"EPOCHS": math.nan}]:
        assert len(problems_of(make_config(**changes))) == 1


def test_all_problems_are_reported_at_once_and_nothing_is_written_or_changed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong = {"EPOCH": 3, "OPTIMIZER": AN_SGD, "LOSS": lambda a, b: 0, "PRECISION": "x", "SCHEDULER": StepLR}
    wrong |= {"MONITOR": "max iou", "MODEL_CONFIG.ch_in": "12", "MODEL_CONFIG.chout": 2}
    wrong |= {"DATA_LOADER_CONFIG.batch_size": -1, "METRICS.odd": nn.ReLU().forward, "MASK_VALUES": {1: {1}}}
    config = make_config()
    assert [problem for key, value in wrong.items() if (problem := assign(config, key, value))] == []
    del config["EPOCHS"], config["MODEL_CONFIG"]["ch_out"]
    before = copy_config(config)
    with pytest.raises(ConfigError) as caught:
        check(config, PROJECT, ["found before."])
    missing = ["EPOCHS is missing", "MODEL_CONFIG.ch_out is missing", "SCHEDULER_CONFIG.step_size is missing"]
    starts = [*missing, "found before."]
    del wrong["SCHEDULER"]  # whose argument is missing
    for start in [*starts, *wrong]:
        assert any(problem.startswith(start) for problem in caught.value.problems), start
    assert len(caught.value.problems) == len(starts) + len(wrong)
    assert same(config, before)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------- keys


def test_every_default_fits_and_every_key_refuses_what_is_no_proper_value():
    for key, entry in KEYS.items():
        assert entry.default is REQUIRED or entry.test(entry.default) is None
        assert entry.test(object()) is not None
        for value in [math.nan, math.inf, -math.inf, True, False, "1", 1j] * (entry.kind in (WHOLE, NUMBER)):
            assert "number" in check_keys(make_config(**{key: value}))[key]


def test_another_table_of_keys_is_checked_in_the_same_way():
    keys = {"TILE": Key(256, WHOLE, "size of a tile", 32), "FLIP": Key(REQUIRED, FLAG, "whether to flip")}
    assert check_keys({"TILE": 64, "FLIP": True}, keys) == {}
    assert check_keys({"TILE": 1, "TILES": 2}, keys) == {
        "TILES": "TILES is no key of a config: did you mean TILE?",
        "TILE": "TILE is 1: it must be a whole number of at least 32.",
        "FLIP": "FLIP is missing: it is whether to flip.",
    }
    assert complete({"FLIP": False}, keys) == {"TILE": 256, "FLIP": False}


def test_a_key_of_ones_own_is_checked_completed_overridden_and_recorded_like_all_others(monkeypatch):
    monkeypatch.setitem(KEYS, "MY_WEIGHT", Key(0.5, NUMBER, "weight of my second loss", 0))
    monkeypatch.setitem(KEYS, "MY_SIZE", Key(None, Kind("2 or 4", lambda value: value in (2, 4)), "my size"))
    monkeypatch.setitem(KEYS, "MY_LAYERS", Key({}, ARGUMENTS, "what my model adds"))
    config = override(make_config(MY_SIZE=4, MY_LAYERS={"norm": nn.GroupNorm}), ["MY_WEIGHT=0.25"], PROJECT)
    assert restore(check(config, PROJECT)) == config and config["MY_WEIGHT"] == 0.25
    assert complete(make_config())["MY_WEIGHT"] == 0.5
    assert problems_of(make_config(MY_WEIGHT=-1, MY_SIZE=3, MY_WIEGHT=1)) == [
        "MY_WIEGHT is no key of a config: did you mean MY_WEIGHT?",
        "MY_WEIGHT is -1: it must be a number of at least 0.",
        "MY_SIZE is 3: it must be 2 or 4 or None.",
    ]


def test_completing_and_copying_share_objects_but_no_containers():
    config = {"MODEL_CONFIG": {"ch_in": 1, "list": [[1]], "tuple": ([1],)}, "METRICS": OrderedDict(f1=f1)}
    before, copied, done = copy_config(config), copy_config(config), complete(config)
    assert same(before | {"METRICS": {"f1": f1}}, config | {"METRICS": {"f1": f1}})
    for other in (copied, done):
        other["MODEL_CONFIG"]["list"][0].append(2)
        other["MODEL_CONFIG"]["tuple"][0].append(2)
        other["METRICS"]["new"] = f1
    done["DATA_LOADER_CONFIG"]["batch_size"] = 999
    assert config == before and list(config) == ["MODEL_CONFIG", "METRICS"]
    assert complete({})["DATA_LOADER_CONFIG"]["batch_size"] == 8
    assert set(complete({})) == {key for key, entry in KEYS.items() if entry.default is not REQUIRED}


@pytest.mark.parametrize("as_record", [False, True])
def test_names_of_version_0_1_become_todays_in_a_config_and_in_its_record(as_record):
    def config(key, argument, dataset=SceneDataset):
        splits = {"train": {argument: "train", "crop": 9}}
        made = {key: True, "DATASET": dataset, "DATASET_CONFIG": splits}
        return capture(made)["config"] if as_record else made

    old, new = config("NORMALISE", "part"), config("NORMALIZE", "split")
    assert upgrade(old) == upgrade(new) == new
    assert old == config("NORMALISE", "part")
    assert upgrade(config("NORMALIZE", "part", dict)) == config("NORMALIZE", "part", dict)


def test_the_function_in_ignites_loss_is_taken():
    metrics = pytest.importorskip("ignite.metrics")
    with pytest.warns(UserWarning, match=r"METRICS\.f1: the function in ignite's Loss\(\.\.\.\) is taken"):
        done = complete({"METRICS": {"f1": metrics.Loss(f1), "mine": f1}})
    assert done["METRICS"] == {"f1": f1, "mine": f1}


def test_a_model_that_is_not_found_is_one_problem():
    problems, arguments = ([], ["MODEL=.models.nowhere.Net", "MODEL_CONFIG={'a': 3}", "MODEL_CONFIG.b=4"])
    config = override(make_config(), arguments, PROJECT, problems)
    with pytest.raises(ConfigError) as caught:
        check(config, PROJECT, problems)
    assert len(caught.value.problems) == 1 and "nowhere" in caught.value.problems[0]
