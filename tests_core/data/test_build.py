"""A fingerprint tells what is in a folder; what it suggests can be trained; a config's datasets are built."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dida_core.config.keys import copy_config
from dida_core.config.project import project_of
from dida_core.data import build as module
from dida_core.data.build import build_datasets, splits_of, suggest, use_folder
from dida_core.data.images import DataError
from dida_core.data.pairs import Pairs
from dida_core.doctor.doctor import describe, fingerprint
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
    "mixed sizes": (lambda size: RNG.integers(0, 3, size, dtype=np.uint8), "multi-class", 3),
}


@pytest.fixture
def folder(tmp_path: Path, write: Any, request: pytest.FixtureRequest) -> Path:
    """A dataset of a kind: 6 images for training, 2 for testing."""
    kind = getattr(request, "param", "class numbers")
    for split, count in (("train", 6), ("test", 2)):
        for number in range(count):
            size = (20 + 9 * number, 44) if kind == "mixed sizes" else (40, 48)
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


def test_a_config_may_lack_what_the_folder_gives(
    folder: Path, tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    del tiny_config["MODEL_CONFIG"]
    monkeypatch.chdir(folder.parent)
    for config in (tiny_config, tiny_config | {"DATASET_CONFIG": None}):
        config = use_folder(config, Path("data"), PROJECT)
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


# ------------------------------------------------------------------------------------------------ fingerprint


def images_of(masks: list[np.ndarray], channels: int = 3, dtype: str = "uint8") -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [(rng.random((*mask.shape[:2], channels)) * 100).astype(dtype) for mask in masks]


def masks_with(values: Any, count: int = 4, size: tuple[int, ...] = (40, 48)) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [np.asarray(values)[rng.integers(0, len(values), size)] for _ in range(count)]


@pytest.fixture
def suggested(write_pairs: Any) -> Any:
    return lambda masks: suggest(Pairs(*write_pairs(images_of(masks), masks)))


def test_a_fingerprint_tells_what_is_there(write_pairs: Any) -> None:
    masks = [np.uint8([[0, 0, 0, 2]] * 6), np.uint8([[0, 1], [1, 1]])]
    images = images_of(masks, channels=2, dtype="uint16")
    facts = fingerprint(Pairs(*write_pairs(images, masks)))
    pixels = np.concatenate([image.reshape(-1, 2) for image in images]).astype(float)
    statistics = facts.pop("statistics")
    assert facts == {
        "images": 2,
        "sizes": {"6 x 4": 1, "2 x 2": 1},
        "channels": {2: 2},
        "dtypes": {"uint16": 2},
        "mask channels": {1: 2},
        "mask dtypes": {"uint8": 2},
        "mask values": {0: 19 / 28, 1: 3 / 28, 2: 6 / 28},
    }
    assert list(facts["mask values"]) == [0, 1, 2]
    for name in ("min", "max", "mean", "std"):
        np.testing.assert_allclose([row[name] for row in statistics], getattr(np, name)(pixels, 0), rtol=1e-9)


def test_mixed_data_are_described_too_and_long_lists_shortened(write_pairs: Any) -> None:
    masks = [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.uint8), np.zeros((9, 8), np.int16)]
    images = [np.zeros((*mask.shape[:2], n), np.uint8) for mask, n in zip(masks, (3, 3, 4), strict=True)]
    pairs = Pairs(*write_pairs(images, masks))
    facts = fingerprint(pairs)
    assert facts["channels"] == {3: 2, 4: 1} and facts["statistics"] == [] and len(facts["mask values"]) == 2
    rows = dict(describe(facts))
    assert (rows["channels"], rows["sizes"]) == ("3 (2), 4 (1)", "8 x 8 (2), 9 x 8 (1)")
    assert suggest(pairs)["MODEL_CONFIG"]["ch_in"] == 3
    masks = [(np.arange(100 + n).reshape(1, -1) % 40).astype(np.uint8) for n in range(6)]
    rows = dict(describe(fingerprint(Pairs(*write_pairs(images_of(masks), masks, folder="long")))))
    assert rows["sizes"].endswith(", and 2 more") and rows["mask values"].endswith(", and 24 more")


# ------------------------------------------------------------------------------------------------- suggestion


@pytest.mark.parametrize(
    ("values", "mask_values", "ch_out"),
    [
        (np.uint8([0, 1, 2, 255]), None, 3),
        (np.uint8([0, 1]), None, 2),
        (np.uint8([0, 255]), {255: 1}, 2),
        (np.uint8([255]), {255: 1}, 2),
        (np.uint8([0]), None, 2),
        (np.uint8([0, 1, 3]), None, 4),
        (np.uint8([1, 2]), None, 3),
        (np.uint8([10, 20, 30]), {10: 0, 20: 1, 30: 2}, 3),
        (np.uint8([0, 128]), {0: 0, 128: 1}, 2),
        (np.uint8([0, 128, 255]), {0: 0, 128: 1, 255: 2}, 3),
        (np.array([False, True]), None, 2),
        *[
            (np.uint8(colors), {color: number for number, color in enumerate(sorted(colors))}, len(colors))
            for colors in (
                [(0, 0, 0), (128, 0, 0), (0, 64, 9)],
                [(0, 0, 0), (255, 255, 255)],
                [(0, 0, 0), (0, 0, 255), (0, 255, 0), (255, 0, 0)],
                [(0, 0, 0), (1, 1, 1), (2, 2, 2)],
                [(0, 0, 0, 255), (255, 0, 0, 255)],
                [(0, 255), (255, 255)],
            )
        ],
    ],
)
def test_values_of_masks_suggest_classes(suggested: Any, values: Any, mask_values: Any, ch_out: int) -> None:
    suggestion = suggested(masks_with(values))
    assert suggestion["MODEL_CONFIG"] == {"ch_in": 3, "ch_out": ch_out}
    assert suggestion.get("MASK_VALUES") == mask_values and "LOSS" not in suggestion
    assert suggestion["DATASET_CONFIG"]["task"] == "multi-class"
    assert suggestion["METRICS"]["f1"] == ".utils.loss:f1"


@pytest.mark.parametrize(
    ("channels", "values", "mask_values"),
    [(2, (0, 1), None), (3, (0, 1), None), (5, (0, 1, 255), None), (2, (0, 255), {255: 1})],
)
def test_channels_of_0_and_1_are_labels(suggested: Any, channels: int, values: Any, mask_values: Any) -> None:
    suggestion = suggested(masks_with(np.uint8(values), size=(40, 48, channels)))
    assert suggestion["DATASET_CONFIG"]["task"] == "multi-label"
    assert suggestion["LOSS"] == ".utils.loss:dice_bce_sum" and suggestion.get("MASK_VALUES") == mask_values
    assert suggestion["MODEL_CONFIG"]["ch_out"] == channels


@pytest.mark.parametrize(("channels", "dtype"), [(1, "float32"), (2, "int32")])
def test_numbers_suggest_a_regression(suggested: Any, channels: int, dtype: str) -> None:
    rng = np.random.default_rng(0)
    suggestion = suggested([(rng.random((80, 90, channels)) * 1e6).astype(dtype) for _ in range(2)])
    assert suggestion["DATASET_CONFIG"]["task"] == "values"
    assert suggestion["MODEL_CONFIG"]["ch_out"] == channels and suggestion["MONITOR"] == "min loss"
    assert (suggestion["LOSS"], suggestion["METRICS"]) == ("torch.nn.functional:mse_loss", {})


def test_crops_fit_into_a_usual_image_and_large_images_give_more(
    suggested: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = {(1, 1): 1, (20, 90): 20, (32, 32): 32, (50, 50): 32, (128, 90): 64, (300, 260): 192}
    for size, crop in cases.items():
        sizes = [(33, 33), size, (300, 300)] if min(size) > 33 else [(1, 1), size, (300, 300)]
        data = suggested([np.zeros(one, np.uint8) for one in sizes])["DATASET_CONFIG"]
        assert data["crop"] == crop and 3 * data["crops_per_image"] >= 160
    monkeypatch.setattr(module, "_LARGEST_CROP", 32)
    assert suggested([np.zeros((320, 320), np.uint8)] * 3)["DATASET_CONFIG"]["crops_per_image"] == 100


@pytest.mark.parametrize(
    ("of_train", "of_test", "ending", "message"),
    [([0, 1], [0, 255], ".npy", r"4 masks hold 0 and 255 \(0.npy, .*\), the others 0 and 1: give"),
     ([0, 255], [0, 1], ".npy", "4 masks hold 0 and 255"), ([0, 90, 255], [0, 90], ".jpg", "masks are JPEG"),
     ([0, 255], [0, 255], ".npy", ""), ([0, 1, 255], [0, 255], ".npy", ""), ([0, 1], [0], ".npy", "")],
)  # fmt: skip
def test_masks_that_may_mean_several_things_are_asked_about(write_pairs, of_train, of_test, ending, message):
    for folder, values in (("d/train", of_train), ("d/test", of_test)):
        x_dir, _ = write_pairs(*[masks_with(np.uint8(values))] * 2, ending, folder)
    folder, said = x_dir.parents[1], list[str]()
    if message:
        with pytest.raises(DataError, match=message):
            use_folder({}, folder, PROJECT, say=said.append)
        use_folder({"MASK_VALUES": {255: 1}}, folder, PROJECT, say=said.append)
    else:
        use_folder({}, folder, PROJECT, say=said.append)
    mapped = "masks are read by MASK_VALUES={255: 1}"
    assert [mapped in one for one in said] == [True] * (bool(message) or of_train == [0, 255])


# ----------------------------------------------------------------------------------------------------- splits


def test_splits_are_found_and_a_folder_without_a_training_split_is_refused(tmp_path: Path) -> None:
    found: list[str] = []
    for split in ("notes", "test", "train", "validation"):
        if "train" not in found:
            with pytest.raises(DataError, match="put images and masks of the same names into train/x and tr"):
                splits_of(tmp_path)
        (tmp_path / split / "x").mkdir(parents=True)
        found.append(split)
    names = ("train", "test", "validation")
    with pytest.warns(UserWarning, match="notes left out, as splits are called train, test, validation"):
        splits_of(tmp_path)
    assert splits_of(tmp_path) == {name: (tmp_path / name / "x", tmp_path / name / "y") for name in names}
    (tmp_path / "notes" / "test" / "x").mkdir(parents=True)
    assert splits_of(tmp_path / "notes")["train"] == (tmp_path / "notes" / "x", tmp_path / "notes" / "y")


def test_splits_have_other_names_and_one_each(tmp_path: Path) -> None:
    for name in ("Training", "testing", "val"):
        (tmp_path / name / "x").mkdir(parents=True)
    found = {split: x_dir.parent.name for split, (x_dir, _) in splits_of(tmp_path).items()}
    assert found == {"train": "Training", "test": "testing", "validation": "val"}
    (tmp_path / "validation" / "x").mkdir(parents=True)
    with pytest.raises(DataError, match="val and validation are both the validation set: leave one of them"):
        splits_of(tmp_path)
