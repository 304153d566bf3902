import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dida_tools.config.project import project_of
from dida_tools.training.determinism import Samples
from dida_tools.training.setup import prepare
from dida_tools.utils.data import NpyDataset
from dida_tools.utils.data.build import build_datasets, use_folder
from dida_tools.utils.data.images import DataError
from dida_tools.utils.data.transforms import GEOMETRY, STANDARD

PROJECT = project_of("dida_tools")
KINDS = [
    "class numbers",
    "0 and 255",
    "colors",
    "labels",
    "labels of 0 and 255",
    "numbers",
    "small",
    "mixed sizes",
]


def invent_mask(kind: str, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    if kind == "numbers":
        return rng.normal(size=size).astype(np.float32)
    if kind.startswith("labels"):
        return rng.integers(0, 2, (*size, 4), dtype=np.uint8) * (255 if "255" in kind else 1)
    if kind == "colors":
        return np.array([[0, 0, 0], [255, 0, 0], [0, 100, 255]], np.uint8)[rng.integers(0, 3, size)]
    return rng.integers(0, 2 if kind == "0 and 255" else 3, size, dtype=np.uint8) * (
        255 if "255" in kind else 1
    )


@pytest.fixture
def folder(tmp_path: Path, write: Any, request: pytest.FixtureRequest) -> Path:
    """A dataset of a kind: 6 images for training, 2 for testing."""
    kind = getattr(request, "param", "class numbers")
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 2)):
        for number in range(count):
            size = {"small": (20, 24), "mixed sizes": (40 + 9 * number, 44)}.get(kind, (40, 48))
            image = rng.integers(0, 255, (*size, 5)).astype(np.uint8)
            write(tmp_path / "data" / part / "x" / f"{number}.tif", image)
            write(tmp_path / "data" / part / "y" / f"{number}.npy", invent_mask(kind, size, rng))
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
    model = setup.model
    for loader in (setup.loaders.train, setup.loaders.validation, setup.loaders.test):
        inputs, targets = next(iter(loader))
        with torch.no_grad():
            loss = setup.loss_fn(model(inputs), targets)
        assert inputs.shape[1] == 5 and loss.isfinite()
    tasks = {"numbers": "values", "labels": "multi-label", "labels of 0 and 255": "multi-label"}
    assert setup.contract.task == tasks.get(kind, "multi-class")
    assert {"labels": 4, "labels of 0 and 255": 4, "numbers": 1, "0 and 255": 2}.get(
        kind, 3
    ) == model.head.out_channels


def test_the_callers_config_stays_as_it_is(folder: Path, tiny_config: dict[str, Any]) -> None:
    tiny_config["DATASET_CONFIG"] = {"train": {"augment": GEOMETRY}}
    before = copy.copy(tiny_config) | {
        key: dict(value) for key, value in tiny_config.items() if isinstance(value, dict)
    }
    config = use_folder(tiny_config, folder, PROJECT)
    assert config["OPTIMIZER_CONFIG"] is not tiny_config["OPTIMIZER_CONFIG"]
    assert tiny_config == before and config["DATASET_CONFIG"]["train"]["augment"] == GEOMETRY
    assert config["MODEL_CONFIG"]["bulk_ch"] == tiny_config["MODEL_CONFIG"]["bulk_ch"]


@pytest.mark.parametrize("lacking", ["DATASET_CONFIG", "MODEL_CONFIG"])
@pytest.mark.parametrize("by", ["missing", "None"])
def test_a_config_may_lack_what_the_folder_gives(
    folder: Path, tiny_config: dict[str, Any], lacking: str, by: str
) -> None:
    tiny_config.pop(lacking, None)
    if by == "None" and lacking == "DATASET_CONFIG":
        tiny_config[lacking] = None
    config = use_folder(tiny_config, folder, PROJECT)
    assert config["MODEL_CONFIG"]["ch_in"] == 5
    assert len(build_datasets(config)[0].images) == 6


def test_folders_are_recorded_whole(
    folder: Path, tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    config = use_folder(tiny_config, Path("data"), PROJECT)
    assert config["DATASET_CONFIG"]["test"]["x_dir"] == str((folder / "test" / "x").resolve())


def test_what_was_found_is_cached(folder: Path, tmp_path: Path, tiny_config: dict[str, Any]) -> None:
    first = use_folder(tiny_config, folder, PROJECT, tmp_path / "facts.json")
    assert (tmp_path / "facts.json").is_file() and use_folder(
        tiny_config, folder, PROJECT, tmp_path / "facts.json"
    ) == first


def test_a_folder_without_data_is_refused(tmp_path: Path, tiny_config: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="holds no data"):
        use_folder(tiny_config, tmp_path / "missing", PROJECT)


@pytest.mark.parametrize("config", [{}, {"DATASET": None, "DATASET_CONFIG": None}, {"DATASET": NpyDataset}])
def test_a_config_without_data_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="names no training data"):
        build_datasets(config)


def test_all_parts_are_built(folder: Path) -> None:
    arguments = {"x_dir": str(folder / "test" / "x"), "y_dir": str(folder / "test" / "y")}
    config = {
        "DATASET": NpyDataset,
        "DATASET_CONFIG": {"train": arguments | {"crop": 8}, "validation": arguments},
    }
    train, test, validation = build_datasets(config)
    assert (train.crop, test, validation.crop) == (8, None, None)
    assert next(iter(DataLoader(Samples(validation, 0), sampler=[(0, 0)])))[0].shape == (1, 5, 40, 48)
