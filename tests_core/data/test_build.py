"""What a folder suggests can be trained, and a config's datasets are built as it says."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dida_core.config.keys import copy_config
from dida_core.config.project import project_of
from dida_core.data.build import build_datasets, use_folder
from dida_core.data.images import DataError
from dida_core.training.determinism import Samples
from dida_core.training.setup import prepare
from torch.utils.data import DataLoader

from dida_tools.utils.data import NpyDataset
from dida_tools.utils.data.transforms import GEOMETRY, STANDARD
from dida_tools.utils.loss import dice_bce_sum

PROJECT = project_of("dida_tools")
COLORS = np.array([[0, 0, 0], [255, 0, 0], [0, 100, 255]], np.uint8)
RNG = np.random.default_rng(0)
# Of each kind: how masks of a size are made, the task and the number of outputs that follow.
KINDS = {
    "class numbers": (lambda size: RNG.integers(0, 3, size, dtype=np.uint8), "multi-class", 3),
    "0 and 255": (lambda size: RNG.integers(0, 2, size, dtype=np.uint8) * 255, "multi-class", 2),
    "colors": (lambda size: COLORS[RNG.integers(0, 3, size)], "multi-class", 3),
    "labels": (lambda size: RNG.integers(0, 2, (*size, 4), dtype=np.uint8), "multi-label", 4),
    "labels of 0 and 255": (lambda size: RNG.integers(0, 2, (*size, 4), np.uint8) * 255, "multi-label", 4),
    "numbers": (lambda size: RNG.normal(size=size).astype(np.float32), "values", 1),
    "small": (lambda size: RNG.integers(0, 3, size, dtype=np.uint8), "multi-class", 3),
    "mixed sizes": (lambda size: RNG.integers(0, 3, size, dtype=np.uint8), "multi-class", 3),
}


@pytest.fixture
def folder(tmp_path: Path, write: Any, request: pytest.FixtureRequest) -> Path:
    """A dataset of a kind: 6 images for training, 2 for testing."""
    kind = getattr(request, "param", "class numbers")
    for split, count in (("train", 6), ("test", 2)):
        for number in range(count):
            size = {"small": (20, 24), "mixed sizes": (40 + 9 * number, 44)}.get(kind, (40, 48))
            image = RNG.integers(0, 255, (*size, 5)).astype(np.uint8)
            write(tmp_path / "data" / split / "x" / f"{number}.tif", image)
            write(tmp_path / "data" / split / "y" / f"{number}.npy", KINDS[kind][0](size))
    return tmp_path / "data"


@pytest.mark.parametrize(("folder", "kind"), [(kind, kind) for kind in KINDS], indirect=["folder"])
def test_what_a_folder_suggests_can_be_trained(
    folder: Path, kind: str, tiny_config: dict[str, Any], global_config: dict[str, str]
) -> None:
    tiny_config["DATASET_CONFIG"] = {"train": {"augment": STANDARD}}
    config = use_folder(tiny_config, folder, PROJECT)
    train, test, validation = build_datasets(config)
    assert (type(train), len(train.images), len(test.images), validation) == (NpyDataset, 6, 2, None)
    assert train.augment == STANDARD and test.augment == () and test.task == train.task
    setup = prepare(train, test, config, global_config, None, "dida_tools")
    for loader in (setup.loaders.train, setup.loaders.validation, setup.loaders.test):
        inputs, targets = next(iter(loader))
        with torch.no_grad():
            loss = setup.loss_fn(setup.model(inputs), targets)
        assert inputs.shape[1] == 5 and loss.isfinite()
    assert (setup.contract.task, setup.model.head.out_channels) == KINDS[kind][1:]
    assert kind != "labels" or config["LOSS"] is dice_bce_sum


def test_the_callers_config_stays_as_it_is(folder: Path, tiny_config: dict[str, Any], tmp_path: Path) -> None:
    tiny_config["DATASET_CONFIG"] = {"train": {"augment": GEOMETRY}}
    before = copy_config(tiny_config)
    config = use_folder(tiny_config, folder, PROJECT, tmp_path / "facts.json")
    assert config["OPTIMIZER_CONFIG"] is not tiny_config["OPTIMIZER_CONFIG"]
    assert tiny_config == before and config["DATASET_CONFIG"]["train"]["augment"] == GEOMETRY
    assert config["MODEL_CONFIG"]["bulk_ch"] == tiny_config["MODEL_CONFIG"]["bulk_ch"]
    assert (tmp_path / "facts.json").is_file()
    assert use_folder(tiny_config, folder, PROJECT, tmp_path / "facts.json") == config


@pytest.mark.parametrize(
    ("key", "value"), [("DATASET_CONFIG", ...), ("DATASET_CONFIG", None), ("MODEL_CONFIG", ...)]
)
def test_a_config_may_lack_what_the_folder_gives(
    folder: Path, tiny_config: dict[str, Any], key: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_config[key] = value
    if value is ...:
        del tiny_config[key]
    monkeypatch.chdir(folder.parent)
    config = use_folder(tiny_config, Path("data"), PROJECT)
    assert config["MODEL_CONFIG"]["ch_in"] == 5
    assert len(build_datasets(config)[0].images) == 6
    assert config["DATASET_CONFIG"]["test"]["x_dir"] == str((folder / "test" / "x").resolve())


@pytest.mark.parametrize("config", [{}, {"DATASET": None, "DATASET_CONFIG": None}, {"DATASET": NpyDataset}])
def test_a_config_or_folder_without_data_is_refused(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="names no training data"):
        build_datasets(config)
    with pytest.raises(DataError, match="holds no data"):
        use_folder(config, tmp_path / "missing", PROJECT)


def test_all_splits_are_built(folder: Path) -> None:
    arguments = {"x_dir": str(folder / "test" / "x"), "y_dir": str(folder / "test" / "y")}
    splits = {"train": arguments | {"crop": 8}, "validation": arguments}
    train, test, validation = build_datasets({"DATASET": NpyDataset, "DATASET_CONFIG": splits})
    assert (train.crop, test, validation.crop) == (8, None, None)
    assert next(iter(DataLoader(Samples(validation, 0), sampler=[(0, 0)])))[0].shape == (1, 5, 40, 48)
