from collections import OrderedDict

import numpy as np
import pytest
import torch
from dida_core.config.keys import complete, copy_config
from dida_core.config.overrides import override
from dida_core.config.tree import difference
from dida_core.errors import ConfigError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import LinearLR, StepLR

from dida_tools.models import UNET
from dida_tools.utils.data.scenes import SceneDataset
from dida_tools.utils.loss import dice_bce_sum, recall

from tests_core.config.configs import PROJECT, capture, make_config, restore, same

BCE, CROSS_ENTROPY = nn.BCEWithLogitsLoss, functional.cross_entropy
# What a key gets from a text.
READ = {
    "EPOCHS": {"3": 3},
    "OPTIMIZER_CONFIG.lr": {"1e-4": 1e-4, "1": 1, "1.0": 1.0},
    "OPTIMIZER_CONFIG.betas": {"(0.9, 0.99)": (0.9, 0.99)},
    "MODEL_CONFIG.use_shuffle": {"False": False, "false": False, "True": True},
    "MODEL_CONFIG.norm": {"None": None, "none": None},
    "MODEL_CONFIG.activ": dict.fromkeys(("torch.nn.ReLU", "torch.nn:ReLU", "ReLU"), nn.ReLU),
    "MODEL_CONFIG.other": {"Nonesuch": "Nonesuch", "functional": "functional", "Linear": nn.Linear},
    "LOSS_CONFIG.reduction": {"Sum": "Sum"},
    "MODEL_CONFIG.sizes": {"[1, 2]": [1, 2], "{[]: 1}": "{[]: 1}"},
    "MODEL_CONFIG.mode": {"nearest": "nearest", "'3'": "3", "tiles.v2": "tiles.v2", "a=b": "a=b"},
    "MODEL_CONFIG.deep.er.est": {"1": 1},
    "OPTIMIZER": {"AdamW": torch.optim.AdamW, "torch.optim.AdamW": torch.optim.AdamW},
    "SCHEDULER": {
        "OneCycleLR": torch.optim.lr_scheduler.OneCycleLR,
        "none": None,
        "[LinearLR, StepLR]": [LinearLR, StepLR],
    },
    "SCHEDULER_CONFIG.max_lr": {"0.1": 0.1},
    "MODEL": {"UNET": UNET, ".models.unet.UNET": UNET, "dida_tools.models.unet.UNET": UNET},
    "LOSS": {"dice_bce_sum": dice_bce_sum, "torch.nn.BCEWithLogitsLoss": BCE, "BCEWithLogitsLoss": BCE},
    "LOSS_CONFIG.other": {"torch.nn.functional.cross_entropy": CROSS_ENTROPY},
    "METRICS.new": {"recall": recall, "numpy.mean": np.mean},
    "METRICS": {"{}": {}},
    "SESSION_NAME": {text: text for text in ("2024", "true", "none", "torch.nn.ReLU")},
    "DATE": {"2024-02-29": "2024-02-29", "None": None},
    "__COMMENT": {"": "", "a lr of 1e-3 = good": "a lr of 1e-3 = good"},
    "INIT_WEIGHTS": {"a/b.pt": "a/b.pt"},
    "CHANNELS_LAST": {"false": False},
    "PATIENCE": {"none": None},
    "MASK_VALUES": {"{255: 1}": {255: 1}},
    "DATASET_CONFIG.train.x_dir": {"data/x": "data/x"},
    **{key: {text: text} for key, text in [("LOGFILE", "mine.csv"), ("ROUTINE_NAME", "ignite")]},
    **{key: {text: text} for key, text in [("DEVICE", "cuda:1"), ("PRECISION", "bf16")]},
    **{key: {text: text} for key, text in [("MONITOR", "max f1"), ("SCHEDULER_STEP", "epoch")]},
}
MALFORMED = {
    "EPOCHS": "'EPOCHS' is no override: write KEY=VALUE",
    "=3": "'=3' is no override",
    "": "'' is no override",
    "MODEL_CONFIG.=3": "is no override",
    "MODEL_CONFIG..dropout=3": "is no override",
    "EPOCH=3": "EPOCH is no key of a config: did you mean EPOCHS?",
    "epochs=3": "epochs is no key of a config: did you mean EPOCHS?",
    "EPOCHS.x=3": "EPOCHS is 100, which has no keys",
    "MODEL_CONFIG.dropout.x=3": "MODEL_CONFIG.dropout is 0.2, which has no keys",
    "OPTIMIZER=Nope": "OPTIMIZER=Nope: 'torch.optim:Nope' is not found",
    "OPTIMIZER=torch.optim.Nope": "is not found",
    "OPTIMIZER=two words": "OPTIMIZER wants an object: give its dotted name",
    "MODEL_CONFIG.activ=torch.nn.RELU": "'torch.nn:RELU' is not found",
    "MODEL_CONFIG.activ=.layers.conv.Nope": "'.layers.conv:Nope' is not found",
    "MODEL=.models.nowhere.UNET": "is not found",
    "LOSS=os.system": "outside of what may be restored",
    "LOSS=.utils.path.create_dirs": "outside of what may be restored",
    "METRICS.x=not_installed_at_all.f1": "is not found",
}


def at(config, dotted):
    for key in dotted.split("."):
        config = config[key]
    return config


@pytest.mark.parametrize("key", READ)
def test_a_value_is_replaced_in_a_copy(key):
    config = make_config()
    before = copy_config(config)
    for text, value in READ[key].items():
        changed = override(config, [f"{key}={text}"], PROJECT)
        assert same(at(changed, key), value)
        changed["METRICS"].clear()
    assert same(config, before)


def test_a_later_override_wins_and_all_other_values_stay():
    config = make_config()
    changed = override(config, ["EPOCHS=4", "MODEL_CONFIG.dropout=0.1", "EPOCHS=3"], PROJECT)
    differing = {"EPOCHS": (100, 3), "MODEL_CONFIG.dropout": (0.2, 0.1)}
    assert difference(capture(config), capture(changed)) == differing
    assert same(override(config, [], PROJECT), config)


def test_names_of_version_0_1_are_understood():
    splits = {"train": {"split": "train"}, "test": {"split": "test"}}
    config = make_config(NORMALIZE=True, DATASET=SceneDataset, DATASET_CONFIG=splits)
    changed = override(config, ["NORMALISE=False", "DATASET_CONFIG.test.part=train"], PROJECT)
    assert changed["NORMALIZE"] is False and "NORMALISE" not in changed
    assert changed["DATASET_CONFIG"] == {"train": {"split": "train"}, "test": {"split": "train"}}


def test_one_argument_leaves_the_defaults_of_a_missing_key_and_a_mapping_of_another_type_as_they_are():
    changed = override({}, ["DATA_LOADER_CONFIG.num_workers=3"], PROJECT)
    assert changed["DATA_LOADER_CONFIG"] == {"batch_size": 8, "shuffle": True, "num_workers": 3}
    assert complete({})["DATA_LOADER_CONFIG"] == {"batch_size": 8, "shuffle": True}
    config = make_config(MODEL_CONFIG=OrderedDict(ch_in=1, ch_out=1))
    assert override(config, ["MODEL_CONFIG.ch_in=2"], PROJECT)["MODEL_CONFIG"]["ch_in"] == 2
    assert config["MODEL_CONFIG"]["ch_in"] == 1


def test_an_item_of_a_list_is_set_by_its_number():
    config = make_config(SCHEDULER=[LinearLR, StepLR], SCHEDULER_CONFIG=[{"length": 3}, {}])
    changed = override(config, ["SCHEDULER_CONFIG.0.length=0.5", "SCHEDULER_CONFIG.1.step_size=2"], PROJECT)
    assert changed["SCHEDULER_CONFIG"] == [{"length": 0.5}, {"step_size": 2}]
    with pytest.raises(ConfigError, match="which has no keys"):
        override(config, ["SCHEDULER_CONFIG.2.step_size=2"], PROJECT)
    assert same(restore(capture(changed)), changed)


def test_malformed_overrides_are_named_all_at_once_and_nothing_is_changed():
    config, noted = make_config(), []
    for text, problem in MALFORMED.items():
        with pytest.raises(ConfigError) as caught:
            override(config, [text], PROJECT)
        assert len(caught.value.problems) == 1 and problem in caught.value.problems[0], text
    texts = [*MALFORMED, "MODEL_CONFIG.ch_in=3"]
    with pytest.raises(ConfigError) as caught:
        override(config, texts, PROJECT)
    assert override(config, texts, PROJECT, noted)["MODEL_CONFIG"]["ch_in"] == 3
    assert noted == caught.value.problems and len(noted) == len(MALFORMED)
    assert same(config, make_config())


@settings(max_examples=100, deadline=None)
@given(value=st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False))
def test_the_repr_of_a_plain_value_is_read_as_this_value(value):
    wanted = {"x": value, "y": [value], "z": (value,)}
    changed = override({}, [f"MODEL_CONFIG.{key}={item!r}" for key, item in wanted.items()], PROJECT)
    assert same(changed, {"MODEL_CONFIG": wanted})
