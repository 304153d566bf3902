"""What a search tries is checked before the first trial."""

from functools import partial

import pytest
import torch
from dida_core.config.project import project_of
from dida_core.errors import ConfigError, UserError
from dida_core.search.space import Space, choice, integer, log_uniform, uniform, with_values
from optuna.trial import FixedTrial
from torch.nn import ELU, BatchNorm2d, GroupNorm, Module
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import OneCycleLR

from dida_tools.utils.loss import multi_class_dice_ce_sum

from tests.helpers import PACKAGE


def check(space: dict, config: dict, *problems: str) -> None:
    Space(space, project_of(PACKAGE)).check(config, [*problems])


@pytest.mark.parametrize(
    ("space", "told"),
    [
        ({"OPTIMISER": choice(SGD, AdamW)}, "did you mean OPTIMIZER?"),
        ({"OPTIMIZER_CONFIG.lrr": uniform(0, 1)}, "did you mean lr?"),
        (
            {"OPTIMIZER": choice(AdamW, SGD), "OPTIMIZER_CONFIG.momentun": uniform(0, 1)},
            "no argument of AdamW",
        ),
        ({"OPTIMIZER_CONFIG.momentum": uniform(0, 1)}, "no argument of AdamW"),
        ({"OPTIMIZER": choice(AdamW, torch.nn.ReLU)}, "must be a class derived from torch.optim.Optimizer"),
        ({"EPOCHS": uniform(1, 3)}, "EPOCHS is 1.0: it must be a whole number"),
        ({"ACCUMULATE": integer(0, 3)}, "ACCUMULATE is 0"),
        ({"MODEL_CONFIG.bulk_ch.half": integer(1, 2)}, "MODEL_CONFIG.bulk_ch is 4, which has no keys"),
        ({"MONITOR": choice("max f1", "min loss")}, "MONITOR cannot be searched"),
        ({"METRICS.f1": choice(torch.relu, torch.tanh)}, "METRICS.f1 cannot be searched"),
        ({"VALIDATION_FRACTION": uniform(0.1, 0.3)}, "VALIDATION_FRACTION cannot be searched"),
        ({"EPOCHS": [1, 2]}, "EPOCHS is [1, 2] in the search space: it must be a range or a choice"),
        ({}, "the search space is empty"),
    ],
)
def test_impossible_keys_are_refused(tiny_config, space, told):
    with pytest.raises(ConfigError) as refused:
        check(space, tiny_config)
    assert told in str(refused.value)


def test_all_problems_are_told_at_once(tiny_config):
    space = {"OPTIMIZER_CONFIG.lrr": uniform(0, 1), "ACCUMULATE": integer(0, 3)}
    for more, number in ((["one more."], 1), ([], 3)):  # what was found before comes first
        with pytest.raises(ConfigError) as refused:
            check(space, tiny_config | {"EPOCHS": 0}, *more)
        assert len(refused.value.problems) == number


def test_two_values_that_do_not_go_together_are_found(tiny_config):
    options = choice({"lr": 0.1}, {"lr": 0.1, "momentum": 0.9})
    space = {"OPTIMIZER": choice(SGD, AdamW), "MODEL_CONFIG.dropout": uniform(0, 1)}
    with pytest.raises(ConfigError, match=r"OPTIMIZER_CONFIG\.momentum is no argument of AdamW") as refused:
        check(space | {"OPTIMIZER_CONFIG": options}, tiny_config)
    assert len(refused.value.problems) == 1


def test_the_loss_is_not_searched_where_it_is_the_objective(tiny_config):
    space = {"LOSS": choice(multi_class_dice_ce_sum, torch.nn.CrossEntropyLoss)}
    check(space, tiny_config)
    with pytest.raises(ConfigError, match="LOSS cannot be searched while MONITOR is 'min loss'"):
        check(space, tiny_config | {"MONITOR": "min loss"})


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: log_uniform(0, 1), "from above 0"),
        (lambda: uniform(2, 1), "it must rise"),
        (lambda: integer(float("nan"), 3), "it must rise"),
        (lambda: choice(), "at least one option"),
        (lambda: choice(1, 2, 1), "each one once"),
        (lambda: choice(ELU, lambda: 0), "lambda"),
    ],
)
def test_ranges_and_choices_that_make_no_sense_are_refused(make, told):
    with pytest.raises(UserError, match=told):
        Space({"MODEL_CONFIG.activ": make()}, project_of(PACKAGE))


def test_live_objects_are_stored_by_name_and_come_back_as_the_same_objects():
    norm = partial(GroupNorm, 4)
    stored = {
        "torch.optim:SGD": SGD,
        "partial(torch.nn:GroupNorm, 4)": norm,
        None: None,
        3: 3,
        "text": "text",
        "(1, 2)": (1, 2),
        "lr=0.1, nesterov=True": {"lr": 0.1, "nesterov": True},
    }
    space = Space({"MODEL_CONFIG.norm": choice(*stored.values())}, project_of(PACKAGE))
    for label, option in stored.items():
        trial = FixedTrial({"MODEL_CONFIG.norm": label})
        space.suggest(trial)
        assert space.values(trial.params) == {"MODEL_CONFIG.norm": option}


def test_values_take_their_places_and_the_config_stays_as_it_was(tiny_config):
    before = dict(tiny_config["MODEL_CONFIG"])
    changed = with_values(
        tiny_config, {"MODEL_CONFIG.norm": BatchNorm2d, "SCHEDULER_CONFIG.pct_start": 0.3, "EMA": 0.9}
    )
    assert changed["MODEL_CONFIG"] == before | {"norm": BatchNorm2d}
    assert changed["SCHEDULER_CONFIG"] == {"pct_start": 0.3} and changed["EMA"] == 0.9
    assert tiny_config["MODEL_CONFIG"] == before and "EMA" not in tiny_config


def test_an_argument_is_searched_only_with_the_options_that_take_it(tiny_config):
    parts = {"OPTIMIZER_CONFIG.momentum": uniform(0.5, 0.9), "OPTIMIZER_CONFIG.lr": log_uniform(1e-4, 1e-1)}
    parts |= {"OPTIMIZER": choice(AdamW, SGD), "OPTIMIZER_CONFIG.amsgrad": choice(True, False)}
    parts |= {"SCHEDULER": choice(None, OneCycleLR), "SCHEDULER_CONFIG.pct_start": uniform(0.1, 0.3)}
    check(parts, tiny_config)
    space, stored = Space(parts, project_of(PACKAGE)), {"OPTIMIZER_CONFIG.lr": 0.01}
    assert "OPTIMIZER_CONFIG.momentum" not in space.first_values()
    config = tiny_config | {"OPTIMIZER_CONFIG": {"lr": 1.0, "momentum": 0.7}}
    for given, expected in (
        ({"OPTIMIZER": "torch.optim:AdamW", "OPTIMIZER_CONFIG.amsgrad": True}, {"lr": 0.01, "amsgrad": True}),
        ({"OPTIMIZER": "torch.optim:SGD", "OPTIMIZER_CONFIG.momentum": 0.6}, {"lr": 0.01, "momentum": 0.6}),
    ):
        trial = FixedTrial(stored | given | {"SCHEDULER": None})
        space.suggest(trial)
        changed = with_values(config, space.values(trial.params), space.left_out(trial.params))
        assert changed["OPTIMIZER_CONFIG"] == expected and "SCHEDULER_CONFIG" not in changed


class OwnNet(Module):
    def __init__(self, ch_in: int, width: int = 8) -> None:
        super().__init__()


def test_a_space_for_another_model_is_refused_with_advice_that_helps(tiny_config):
    parts = {"MODEL_CONFIG.dropout": uniform(0, 0.4), "MODEL_CONFIG.n_recursions": integer(2, 4)}
    config = tiny_config | {"MODEL": OwnNet, "MODEL_CONFIG": {"ch_in": 3}, "REQUIRE_RERUNNABLE": False}
    with pytest.raises(ConfigError) as refused:
        Space(parts, project_of(PACKAGE)).check(config, [])
    expected = (
        "{0} is no argument of OwnNet: it takes ch_in, width. Change or remove {0} in search_space, in "
    )
    expected += "hyperparameter.py."
    assert sorted(refused.value.problems) == [expected.format(key) for key in parts]
    Space({"MODEL_CONFIG.width": integer(4, 8)}, project_of(PACKAGE)).check(config, [])
