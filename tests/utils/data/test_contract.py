import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dida_tools.utils.data.contract import TASKS, DataContract, default_scale

FULL = DataContract(
    channels=3,
    channel_names=("red", "green", "blue"),
    dtype="uint8",
    scale=1 / 255,
    mean=(0.1, 0.2, 0.3),
    std=(0.5, 0.25, 1 / 3),
    nodata=0.0,
    task="multi-label",
    minimum=(0.0, 1.0, 2.0),
    maximum=(255.0, 254.0, 100.0),
    tile_size=96,
    class_names=("road", "house"),
    class_colors=((255, 0, 0), (0, 0, 255)),
    threshold=(0.3, 0.6),
    temperature=1.5,
)
CONTRACTS = pytest.mark.parametrize(
    "contract", [FULL, DataContract(1), DataContract(12, dtype="uint16", nodata=-1.5)]
)


def invent(dtype: str, channels: int = 3, height: int = 8, width: int = 9) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.random((height, width, channels)) * 100).astype(dtype)


# ------------------------------------------------------------------------------------------------------------ storage


@CONTRACTS
def test_a_contract_survives_json(contract: DataContract) -> None:
    assert DataContract.from_dict(json.loads(json.dumps(contract.to_dict()))) == contract


@CONTRACTS
def test_a_contract_fits_into_a_weights_file(tmp_path: Path, contract: DataContract) -> None:
    torch.save({"contract": contract.to_dict()}, tmp_path / "weights.pt")
    stored = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert DataContract.from_dict(stored["contract"]) == contract


def test_a_nodata_value_of_nan_survives(tmp_path: Path) -> None:
    contract = DataContract(1, nodata=float("nan"))
    torch.save(contract.to_dict(), tmp_path / "weights.pt")
    for stored in (
        json.loads(json.dumps(contract.to_dict())),
        torch.load(tmp_path / "weights.pt", weights_only=True),
    ):
        assert np.isnan(DataContract.from_dict(stored).nodata)


@CONTRACTS
def test_a_stored_contract_is_plain_data(contract: DataContract) -> None:
    def plain(value: Any) -> bool:
        if isinstance(value, list):
            return all(map(plain, value))
        return value is None or type(value) in (str, int, float)

    stored = contract.to_dict()
    assert all(type(key) is str and plain(value) for key, value in stored.items())


def test_what_a_later_version_adds_is_ignored_and_what_it_lacks_is_filled_in() -> None:
    assert DataContract.from_dict({"channels": 2, "projection": "EPSG:4326"}) == DataContract(2)


def test_the_contract_of_a_data_set_survives_storage(tmp_path: Path, write_pairs: Any) -> None:
    from dida_tools.utils.data import NpyDataset

    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (8, 8, 5)).astype(np.uint8) for _ in range(3)]
    contract = NpyDataset(*write_pairs(images, [np.zeros((8, 8), np.uint8)] * 3), nodata=0).contract()
    torch.save(contract.to_dict(), tmp_path / "weights.pt")
    assert DataContract.from_dict(torch.load(tmp_path / "weights.pt", weights_only=True)) == contract


# ------------------------------------------------------------------------------------------------------------ checks


@CONTRACTS
def test_an_image_as_in_training_has_no_problems(contract: DataContract) -> None:
    assert contract.problems(invent(contract.dtype, contract.channels)) == []


def test_byte_order_is_no_problem() -> None:
    assert DataContract(3, dtype="uint16").problems(invent(">u2")) == []


def test_other_channels_are_named() -> None:
    assert FULL.problems(invent("uint8", 4)) == [
        "it has 4 channels, the model was trained on 3 (red, green, blue): give those, in this order"
    ]
    (problem,) = DataContract(2, dtype="uint8").problems(invent("uint8", 1))
    assert problem.startswith("it has 1 channels, the model was trained on 2:")


@pytest.mark.parametrize("dtype", ["uint16", "float32", "int8", "bool"])
def test_another_dtype_is_named_with_the_scale(dtype: str) -> None:
    (problem,) = FULL.problems(invent(dtype))
    assert (
        problem.startswith(f"it is {dtype}, the model was trained on uint8 files") and "0.00392157" in problem
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinite_values_are_counted(value: float) -> None:
    image = invent("float32")
    image[2, 3, 1] = image[4] = value
    (problem,) = DataContract(3).problems(image)
    assert problem.startswith("it has 28 NaN or infinite values")


def test_nan_is_no_problem_where_it_means_no_data() -> None:
    contract, image = DataContract(3, nodata=float("nan")), invent("float32")
    image[2:4] = np.nan
    assert contract.problems(image) == []
    image[6, 6, 0] = np.nan
    assert contract.problems(image)[0].startswith("it has 1 NaN")


def test_all_problems_are_listed_at_once() -> None:
    assert len(FULL.problems(invent("float64", 2))) == 2


# ------------------------------------------------------------------------------------------------ values of an image

REFLECTANCE = DataContract(
    3,
    ("B02", "B03", "B04"),
    dtype="float32",
    mean=(1500.0, 2000.0, 0.0),
    std=(900.0, 1000.0, 1.0),
    minimum=(0.0, 100.0, 7.0),
    maximum=(10000.0, 12000.0, 7.0),
)


def reflectance(height: int = 40, width: int = 40) -> np.ndarray:
    rng = np.random.default_rng(1)
    values = rng.normal((1500, 2000, 7), (900, 1000, 0), (height, width, 3))
    return np.clip(values, (0, 100, 7), (10000, 12000, 7)).astype(np.float32)


def test_values_as_in_training_are_no_problem_nor_those_of_a_dark_a_blank_or_a_small_image() -> None:
    image = reflectance()
    for one in (
        image,
        image[:20] * (0.2, 0.2, 1),
        np.full_like(image, 3),
        image[:3, :3] / 10000,
        image[:, :, :2],
    ):
        assert REFLECTANCE.value_problems(one) == []
    assert DataContract(3).value_problems(image / 1e9) == []  # nothing is known of training


@pytest.mark.parametrize("factor", [1e-4, 1 / 65535])
def test_values_that_were_divided_are_told(factor: float) -> None:
    (problem,) = REFLECTANCE.value_problems(reflectance() * factor)
    assert "its values go from 0 to" in problem and "those of the training data from 0 to 12000" in problem
    assert (
        "as if they had been divided" in problem and "bring them to the scale of the training data" in problem
    )


def test_values_that_were_multiplied_or_moved_are_told() -> None:
    (problem,) = REFLECTANCE.value_problems(reflectance() * 1e4)
    assert "as if they had been multiplied" in problem
    (problem, _) = REFLECTANCE.value_problems(reflectance() + np.array([30000, 0, 1], np.float32))
    assert "another offset in channel B02;" in problem


def test_a_band_that_is_constant_or_was_is_named() -> None:
    image = reflectance()
    image[..., 1] = 500
    (problem,) = REFLECTANCE.value_problems(image)
    assert problem.startswith("channel B03 is constant (500): is the band missing")
    image = reflectance()
    image[0, 0, 2] = 8
    (problem,) = REFLECTANCE.value_problems(image)
    assert problem.startswith("channel B04 was constant in the training data, and is not here")


def test_pixels_without_data_do_not_count_as_values() -> None:
    contract = dataclasses.replace(REFLECTANCE, nodata=-9999.0)
    image = reflectance()
    image[:20] = -9999
    assert contract.value_problems(image) == []
    assert REFLECTANCE.value_problems(image) != []


def test_scaled_training_statistics_are_compared_with_unscaled_values() -> None:
    contract = DataContract(
        1,
        dtype="uint16",
        scale=1 / 65535,
        mean=(0.005,),
        std=(100 / 65535,),
        minimum=(0.0,),
        maximum=(60000.0,),
    )  # with one hot pixel
    rng = np.random.default_rng(0)
    image = rng.normal(300, 100, (50, 50, 1)).clip(0, 65535).astype(np.uint16)
    assert contract.value_problems(image) == []
    assert contract.value_problems((image // 256).astype(np.uint16)) != []


# -------------------------------------------------------------------------------------------------------- preparation


def test_images_are_scaled_and_normalized_by_channel() -> None:
    image = invent("uint8")
    values, valid = FULL.prepare(image)
    expected = (image / 255 - np.array(FULL.mean)) / np.array(FULL.std)
    expected[(image == 0).all(-1)] = 0
    assert values.dtype == torch.float32 and values.shape == (3, 8, 9) and values.is_contiguous()
    torch.testing.assert_close(values, torch.from_numpy(np.moveaxis(expected, -1, 0)).float())
    assert np.array_equal(valid.numpy(), ~(image == 0).all(-1))


@pytest.mark.parametrize(
    "dtype", ["bool", "uint8", "int16", ">u2", "uint32", "int64", "float16", "float32", "float64"]
)
def test_without_statistics_images_are_only_scaled(dtype: str) -> None:
    image = invent(dtype)
    values, valid = DataContract(3, scale=0.5).prepare(image)
    torch.testing.assert_close(values, torch.from_numpy(np.moveaxis(image.astype(np.float32) / 2, -1, 0)))
    assert values.dtype == torch.float32 and valid.dtype == torch.bool and valid.all()


@pytest.mark.parametrize(("dtype", "nodata"), [("uint8", 0), ("int16", -9999), ("float32", float("nan"))])
def test_pixels_without_data_become_0(dtype: str, nodata: float) -> None:
    image = invent(dtype) + np.ones((), dtype)
    image[3:5, 2:4] = nodata
    contract = DataContract(3, dtype=dtype, mean=(7.0, 8.0, 9.0), std=(1.0, 2.0, 3.0), nodata=nodata)
    values, valid = contract.prepare(image)
    assert int((~valid).sum()) == 4 and not valid[3:5, 2:4].any()
    assert (values[:, ~valid] == 0).all() and values.isfinite().all()
    assert (values[:, valid] != 0).float().mean() > 0.9


@pytest.mark.parametrize(
    ("dtype", "offset"), [("float32", 1e6), ("float64", 1e9), ("uint32", 4e9), ("int64", 1e12)]
)
def test_large_means_do_not_drown_the_deviation(dtype: str, offset: float) -> None:
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (20, 20, 1))
    contract = DataContract(1, dtype=dtype, mean=(offset + 1 / 3,), std=(1.0,))
    values, _ = contract.prepare((offset + signs).astype(dtype))
    torch.testing.assert_close(
        values[0], torch.from_numpy(signs[..., 0] - 1 / 3).float(), rtol=1e-3, atol=1e-3
    )


def test_preparation_leaves_the_image_alone() -> None:
    image = invent("float32")
    kept = image.copy()
    DataContract(3, scale=2.0, mean=(1.0, 1.0, 1.0), std=(1.0, 1.0, 1.0), nodata=0).prepare(image)
    assert np.array_equal(image, kept)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        ("uint8", 1 / 255),
        ("uint16", 1 / 65535),
        ("int16", 1 / 32767),
        ("float32", 1.0),
        ("float64", 1.0),
        ("bool", 1.0),
    ],
)
def test_integers_are_divided_by_the_largest_value_of_their_type(dtype: str, scale: float) -> None:
    assert default_scale(dtype) == scale


# ------------------------------------------------------------------------------------------------------------ outputs


def test_probabilities_follow_the_task() -> None:
    logits = torch.randn(2, 3, 4, 5, dtype=torch.bfloat16)
    expected = {"multi-class": logits.float().softmax(1), "multi-label": logits.float().sigmoid()}
    for task in TASKS:
        found = DataContract(1, task=task).probabilities(logits)
        assert found.dtype == torch.float32 and torch.equal(found, expected.get(task, logits.float()))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_logits_are_divided_by_the_temperature(temperature: float) -> None:
    logits = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    for task in ("multi-class", "multi-label"):
        warm = DataContract(1, task=task, temperature=temperature).probabilities(logits)
        expected = logits.double().div(temperature)
        expected = expected.softmax(1) if task == "multi-class" else expected.sigmoid()
        assert torch.allclose(warm.double(), expected, atol=1e-6)
    contract = DataContract(1, temperature=temperature)  # the most probable class stays what it is
    assert torch.equal(contract.classes(contract.probabilities(logits)).long(), logits.argmax(1))
    assert torch.equal(DataContract(1, task="values", temperature=temperature).probabilities(logits), logits)


def test_classes_of_multi_class_are_the_most_probable() -> None:
    probabilities = torch.rand(2, 5, 4, 3)
    classes = DataContract(1).classes(probabilities)
    assert classes.dtype == torch.uint8 and torch.equal(classes.long(), probabilities.argmax(1))


@pytest.mark.parametrize("threshold", [0.25, 0.5])
def test_classes_of_multi_label_begin_at_the_threshold(threshold: float) -> None:
    probabilities = torch.tensor([0.0, 0.2, 0.25, 0.4, 0.5, 1.0]).reshape(1, 1, 2, 3)
    contract = DataContract(1, task="multi-label", threshold=threshold)
    expected = (probabilities >= threshold).to(torch.uint8)
    assert torch.equal(contract.classes(probabilities), expected[:, 0])
    assert torch.equal(contract.classes(probabilities.repeat(1, 2, 1, 1)), expected.repeat(1, 2, 1, 1))


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4, 5)])
def test_each_label_has_a_threshold_of_its_own(shape: tuple[int, ...]) -> None:
    probabilities = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    thresholds = (0.125, 0.5, 0.75)
    probabilities[0, 2] = 0.75
    classes = DataContract(1, task="multi-label", outputs=3, threshold=thresholds).classes(probabilities)
    assert classes.dtype == torch.uint8 and classes[0, 2].min() == 1
    for number, threshold in enumerate(thresholds):
        assert torch.equal(classes[:, number] == 1, probabilities[:, number] >= threshold)
