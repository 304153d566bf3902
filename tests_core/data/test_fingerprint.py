"""A fingerprint tells what is there, and suggests a config that fits it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dida_core.data.build import fingerprint, splits_of, suggest
from dida_core.data.images import DataError
from dida_core.data.pairs import Pairs
from dida_core.doctor.doctor import describe

NAMES = ("min", "max", "mean", "std")


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
    for name in NAMES:
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


def test_unreadable_files_are_all_named(write_pairs: Any) -> None:
    masks = masks_with(np.uint8([0, 1]))
    x_dir, y_dir = write_pairs(images_of(masks), masks)
    (x_dir / "1.npy").write_bytes(b"")
    (y_dir / "2.npy").write_bytes(b"nothing")
    with pytest.raises(DataError) as caught:
        fingerprint(Pairs(x_dir, y_dir))
    named = [problem.split(": ")[0] for problem in caught.value.problems]
    assert named == [str(x_dir / "1.npy"), str(y_dir / "2.npy")]


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
        (np.array([False, True]), None, 2),
        *[
            (np.uint8(colors), {color: number for number, color in enumerate(sorted(colors))}, len(colors))
            for colors in (
                [(0, 0, 0), (128, 0, 0), (0, 64, 9)],
                [(0, 0, 0), (255, 255, 255)],
                [(0, 0, 0), (0, 0, 255), (0, 255, 0), (255, 0, 0)],
            )
        ],
    ],
)
def test_values_of_masks_suggest_classes(suggested: Any, values: Any, mask_values: Any, ch_out: int) -> None:
    suggestion = suggested(masks_with(values))
    assert suggestion["MODEL_CONFIG"] == {"ch_in": 3, "ch_out": ch_out}
    assert suggestion.get("MASK_VALUES") == mask_values and "LOSS" not in suggestion
    assert suggestion["DATASET_CONFIG"]["task"] == "multi-class" and suggestion["METRICS"]["f1"].endswith(
        ":f1"
    )


@pytest.mark.parametrize(
    ("channels", "values", "mask_values"),
    [
        (2, (0, 1), None),
        (3, (0, 1), None),
        (5, (0, 1, 255), None),
        (2, (0, 255), {255: 1}),
        (6, (0, 255), {255: 1}),
    ],
)
def test_channels_of_0_and_1_are_labels(suggested: Any, channels: int, values: Any, mask_values: Any) -> None:
    suggestion = suggested(masks_with(np.uint8(values), size=(40, 48, channels)))
    assert suggestion["DATASET_CONFIG"]["task"] == "multi-label"
    assert suggestion["LOSS"] == ".utils.loss:dice_bce_sum" and suggestion.get("MASK_VALUES") == mask_values
    assert suggestion["MODEL_CONFIG"]["ch_out"] == channels


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_numbers_suggest_a_regression(suggested: Any, channels: int, dtype: str) -> None:
    rng = np.random.default_rng(0)
    suggestion = suggested([(rng.random((80, 90, channels)) * 1e6).astype(dtype) for _ in range(2)])
    assert (
        suggestion["DATASET_CONFIG"]["task"] == "values" and suggestion["MODEL_CONFIG"]["ch_out"] == channels
    )
    assert (suggestion["LOSS"], suggestion["METRICS"]) == ("torch.nn.functional:mse_loss", {})
    assert suggestion["MONITOR"] == "min loss"


@pytest.mark.parametrize(
    ("size", "crop"),
    [((1, 1), 1), ((20, 90), 20), ((32, 32), 32), ((50, 50), 32), ((128, 90), 64), ((400, 500), 192)],
)
def test_crops_fit_into_the_smallest_image(suggested: Any, size: tuple[int, int], crop: int) -> None:
    suggestion = suggested([np.zeros(size, np.uint8), np.zeros((600, 700), np.uint8)])
    assert suggestion["DATASET_CONFIG"]["crop"] == crop
    assert 2 * suggestion["DATASET_CONFIG"]["crops_per_image"] >= 160


def test_large_images_give_more_crops(suggested: Any) -> None:
    suggestion = suggested([np.zeros((1920, 1920), np.uint8)] * 2)
    assert suggestion["DATASET_CONFIG"]["crops_per_image"] == 100


# ----------------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize(
    "splits", [["train"], ["train", "test"], ["train", "test", "validation"], [".", "test"]]
)
def test_splits_are_found(tmp_path: Path, splits: list[str]) -> None:
    for split in (*splits, "notes"):
        (tmp_path / split / "x").mkdir(parents=True)
    folders = {
        split.replace(".", "train"): (tmp_path / split / "x", tmp_path / split / "y") for split in splits
    }
    assert splits_of(tmp_path) == folders


@pytest.mark.parametrize("splits", [[], ["test"], ["images"]])
def test_a_folder_without_a_training_split_is_refused(tmp_path: Path, splits: list[str]) -> None:
    for split in splits:
        (tmp_path / split / "x").mkdir(parents=True)
    with pytest.raises(DataError, match="put images and masks of the same names into train/x and train/y"):
        splits_of(tmp_path)
