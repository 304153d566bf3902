"""A contract survives storage, refuses what is not as in training, and prepares images exactly."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dida_core.data.contract import TASKS, DataContract, default_scale
from dida_core.data.images import ImageInfo

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
NAN = float("nan")


def invent(dtype: str, channels: int = 3, height: int = 8, width: int = 9) -> np.ndarray:
    return (np.random.default_rng(0).random((height, width, channels)) * 100).astype(dtype)


@pytest.mark.parametrize("contract", [FULL, DataContract(1), DataContract(12, dtype="uint16", nodata=-1.5)])
def test_a_contract_survives_storage_as_plain_data(tmp_path: Path, contract: DataContract) -> None:
    def is_plain(value: Any) -> bool:
        return (
            all(map(is_plain, value)) if type(value) is list else type(value) in (str, int, float, type(None))
        )

    stored = contract.to_dict()
    assert all(type(key) is str and is_plain(value) for key, value in stored.items())
    torch.save(stored, tmp_path / "weights.pt")
    for again in (json.loads(json.dumps(stored)), torch.load(tmp_path / "weights.pt", weights_only=True)):
        assert DataContract.from_dict(again | {"projection": "of a later version"}) == contract
        assert np.isnan(DataContract.from_dict(again | {"nodata": NAN}).nodata)
    assert DataContract.from_dict({"channels": 2}) == DataContract(2)
    assert contract.problems(invent(contract.dtype, contract.channels)) == []


def test_an_image_suggests_a_contract() -> None:
    info = ImageInfo((8, 9, 3), "uint16", 7.0)
    assert DataContract.of(info) == DataContract(3, dtype="uint16", scale=1 / 65535, nodata=7.0)
    given = DataContract.of(info, scale=0.5, nodata=0, class_names=("a", "b"))
    assert given == DataContract(3, dtype="uint16", scale=0.5, nodata=0, class_names=("a", "b"))


# ----------------------------------------------------------------------------------------------------- checks

WITH_NAN = invent("float32")
WITH_NAN[2, 3, 1] = WITH_NAN[4] = np.nan
WITHOUT_DATA = invent("float32")
WITHOUT_DATA[2:4] = np.nan


@pytest.mark.parametrize(
    ("contract", "image", "expected"),
    [
        (DataContract(3, dtype="uint16"), invent(">u2"), []),  # byte order is no problem
        (FULL, invent("uint8", 4), ["it has 4 channels, the model was trained on 3 (red, green, "]),
        (DataContract(2, dtype="uint8"), invent("uint8", 1), ["it has 1 channels, the model was trained"]),
        *[(FULL, invent(dtype), [f"it is {dtype}, the model was trained on uint8 files, whose values were "])
          for dtype in ("uint16", "float32", "int8", "bool")],
        (DataContract(3), WITH_NAN, ["it has 28 NaN or infinite values"]),
        (DataContract(3), np.where(np.isnan(WITH_NAN), np.float32(-np.inf), WITH_NAN), ["it has 28 NaN"]),
        (DataContract(3, nodata=NAN), WITHOUT_DATA, []),
        (DataContract(3, nodata=NAN), WITH_NAN, []),
        (DataContract(3, nodata=-1), WITH_NAN, ["it has 28 NaN"]),
        (FULL, invent("float64", 2), ["it has 2 channels", "it is float64"]),
    ],
)  # fmt: skip
def test_problems_of_an_image_are_named(
    contract: DataContract, image: np.ndarray, expected: list[str]
) -> None:
    found = contract.problems(image)
    assert len(found) == len(expected)
    assert all(problem.startswith(text) for problem, text in zip(found, expected, strict=True))


REFLECTANCE = DataContract(
    3,
    ("B02", "B03", "B04"),
    dtype="float32",
    mean=(1500.0, 2000.0, 0.0),
    std=(900.0, 1000.0, 1.0),
    minimum=(0.0, 100.0, 7.0),
    maximum=(10000.0, 12000.0, 7.0),
)


def reflectance() -> np.ndarray:
    values = np.random.default_rng(1).normal((1500, 2000, 7), (900, 1000, 0), (40, 40, 3))
    return np.clip(values, (0, 100, 7), (10000, 12000, 7)).astype(np.float32)


def changed(place: Any, value: float) -> np.ndarray:
    image = reflectance()
    image[place] = value
    return image


DIVIDED = "from 0 to 12000: as if they had been divided by a number; bring them to the scale of the training"


@pytest.mark.parametrize(
    ("image", "text"),
    [
        (reflectance(), None),
        (reflectance()[:20] * (0.2, 0.2, 1), None),  # dark
        (np.full((40, 40, 3), 3), None),  # blank
        (reflectance()[:3, :3] / 10000, None),  # too few
        (reflectance()[:, :, :2], None),  # another problem
        (reflectance() * 1e-4, DIVIDED),
        (reflectance() / 65535, DIVIDED),
        (reflectance() * 1e4, "as if they had been multiplied"),
        (reflectance() + np.float32([30000, 0, 1]), "another offset in channel B02;"),
        (changed(np.s_[..., 1], 500), "channel B03 is constant (500): is the band missing"),
        (changed((0, 0, 2), 8), "channel B04 was constant in the training data, and is not here"),
        (changed(np.s_[:20], -9999), "channel B04 was constant in the training data"),
    ],
)
def test_values_are_compared_with_those_of_training(image: np.ndarray, text: str | None) -> None:
    found = REFLECTANCE.value_problems(image)
    assert found == [] if text is None else text in found[0]
    assert DataContract(3).value_problems(image) == []  # nothing is known of training
    if image.min() == -9999:
        assert dataclasses.replace(REFLECTANCE, nodata=-9999.0).value_problems(image) == []


def test_scaled_training_statistics_are_compared_with_unscaled_values() -> None:
    scaled: dict = {"scale": 1 / 65535, "mean": (0.005,), "std": (100 / 65535,)}
    contract = DataContract(1, dtype="uint16", minimum=(0.0,), maximum=(60000.0,), **scaled)  # one hot pixel
    image = np.random.default_rng(0).normal(300, 100, (50, 50, 1)).clip(0, 65535).astype(np.uint16)
    assert contract.value_problems(image) == []
    assert contract.value_problems((image // 256).astype(np.uint16)) != []


# ------------------------------------------------------------------------------------------------ preparation


def test_images_are_scaled_and_normalized_by_channel() -> None:
    image = invent("uint8")
    kept = image.copy()
    values, valid = FULL.prepare(image)
    expected = (image / 255 - np.array(FULL.mean)) / np.array(FULL.std)
    expected[(image == 0).all(-1)] = 0
    assert values.dtype == torch.float32 and values.shape == (3, 8, 9) and values.is_contiguous()
    torch.testing.assert_close(values, torch.from_numpy(np.moveaxis(expected, -1, 0)).float())
    assert np.array_equal(valid.numpy(), ~(image == 0).all(-1)) and np.array_equal(image, kept)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", ">u2", "uint32", "int64", "float16", "float64"])
def test_without_statistics_images_are_only_scaled(dtype: str) -> None:
    image = invent(dtype)
    values, valid = DataContract(3, scale=0.5).prepare(image)
    torch.testing.assert_close(values, torch.from_numpy(np.moveaxis(image.astype(np.float32) / 2, -1, 0)))
    assert values.dtype == torch.float32 and valid.dtype == torch.bool and valid.all()
    largest = {"uint8": 255, "int16": 32767, ">u2": 65535, "uint32": 2**32 - 1, "int64": 2**63 - 1}
    assert default_scale(dtype) == 1 / largest.get(dtype, 1)


@pytest.mark.parametrize(("dtype", "nodata"), [("uint8", 0), ("int16", -9999), ("float32", NAN)])
def test_pixels_without_data_become_0(dtype: str, nodata: float) -> None:
    image = invent(dtype) + np.ones((), dtype)
    image[3:5, 2:4] = nodata
    contract = DataContract(3, dtype=dtype, mean=(7.0, 8.0, 9.0), std=(1.0, 2.0, 3.0), nodata=nodata)
    values, valid = contract.prepare(image)
    assert int((~valid).sum()) == 4 and not valid[3:5, 2:4].any()
    assert (values[:, ~valid] == 0).all() and values.isfinite().all()
    assert (values[:, valid] != 0).float().mean() > 0.9


@pytest.mark.parametrize(("dtype", "offset"), [("float32", 1e6), ("uint32", 4e9), ("int64", 1e12)])
def test_large_means_do_not_drown_the_std(dtype: str, offset: float) -> None:
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (20, 20, 1))
    contract = DataContract(1, dtype=dtype, mean=(offset + 1 / 3,), std=(1.0,))
    values, _ = contract.prepare((offset + signs).astype(dtype))
    np.testing.assert_allclose(values[0], signs[..., 0] - 1 / 3, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------------------------------------------- outputs


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probabilities_follow_task_and_temperature(temperature: float, dtype: torch.dtype) -> None:
    logits = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    divided = logits.double() / temperature
    for task, expected in zip(TASKS, (divided.softmax(1), divided.sigmoid(), logits.double()), strict=True):
        found = DataContract(1, task=task, temperature=temperature).probabilities(logits)
        assert found.dtype == torch.float32 and torch.allclose(found.double(), expected, atol=1e-6)
    contract = DataContract(1, temperature=temperature)  # the most probable class stays what it is
    classes = contract.classes(contract.probabilities(logits.float()))
    assert classes.dtype == torch.uint8 and torch.equal(classes.long(), logits.float().argmax(1))


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4, 5)])
@pytest.mark.parametrize("threshold", [0.25, 0.5, (0.125, 0.5, 0.75)])
def test_labels_begin_at_their_threshold(shape: tuple[int, ...], threshold: Any) -> None:
    probabilities = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    contract = DataContract(1, task="multi-label", outputs=3, threshold=threshold)
    ones = [1] * (len(shape) - 2)
    thresholds = torch.tensor(np.broadcast_to(threshold, 3), dtype=torch.float32).reshape(3, *ones)
    probabilities[0] = thresholds  # exactly
    classes = contract.classes(probabilities)
    assert classes.dtype == torch.uint8 and classes[0].min() == 1
    assert torch.equal(classes == 1, probabilities >= thresholds)
    single = dataclasses.replace(contract, threshold=0.5).classes(probabilities[:, :1])
    assert torch.equal(single == 1, probabilities[:, 0] >= 0.5)
