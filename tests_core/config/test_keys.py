from collections import OrderedDict

import pytest
from dida_core.config.keys import KEYS, complete, copy_config, upgrade
from dida_core.config.kinds import REQUIRED
from hypothesis import given, settings

from dida_tools.utils.data.scenes import SceneDataset
from dida_tools.utils.loss import f1

from tests_core.config.configs import capture, same, values


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


@settings(max_examples=50, deadline=None)
@given(value=values)
def test_a_copy_shares_objects_but_no_containers(value):
    config = {"MODEL_CONFIG": {"value": value}}
    copied = copy_config(config)
    assert same(copied, config)
    assert copied["MODEL_CONFIG"] is not config["MODEL_CONFIG"]
    if isinstance(value, (dict, list)):
        assert copied["MODEL_CONFIG"]["value"] is not value


@pytest.mark.parametrize("as_record", [False, True])
def test_names_of_version_0_1_become_todays_in_a_config_and_in_its_record(as_record):
    def config(key, argument):
        made = {
            key: True,
            "DATASET": SceneDataset,
            "DATASET_CONFIG": {"train": {argument: "train", "crop": 9}},
        }
        return capture(made)["config"] if as_record else made

    old, new = config("NORMALISE", "part"), config("NORMALIZE", "split")
    assert upgrade(old) == upgrade(new) == new
    assert old == config("NORMALISE", "part")
    assert upgrade({"DATASET": dict, "DATASET_CONFIG": {"train": {"part": 1}}})["DATASET_CONFIG"][
        "train"
    ] == {"part": 1}


def test_the_function_in_ignites_loss_is_taken():
    metrics = pytest.importorskip("ignite.metrics")
    with pytest.warns(UserWarning, match=r"METRICS\.f1: the function in ignite's Loss\(\.\.\.\) is taken"):
        assert complete({"METRICS": {"f1": metrics.Loss(f1), "mine": f1}})["METRICS"] == {
            "f1": f1,
            "mine": f1,
        }
