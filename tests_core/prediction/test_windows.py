"""Sliding windows: every pixel right at any size, in memory that does not depend on the height."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from dida_core.data.contract import DataContract
from dida_core.data.images import DataError, Window
from dida_core.errors import ConfigError
from dida_core.prediction import Predictor, predict_array
from dida_core.prediction.windows import Tiling, blending_weights, predict_bands, window_starts
from torch import nn
from torch.nn import functional

TILE = 16
SIZES = [(5, 7), (16, 16), (17, 16), (16, 17), (9, 40), (40, 9), (33, 47), (64, 64), (1, 50), (31, 15)]
CONTRACT = DataContract(2, dtype="float32", outputs=3)


class Pixelwise(nn.Module):
    """Sees nothing but the pixel itself, so that windows must not change anything."""

    def __init__(self, channels: int = 2, outputs: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(channels, outputs, 1)
        self.calls: list[tuple[int, ...]] = []

    def forward(self, x):
        self.calls.append(tuple(x.shape))
        return self.layer(x)


class Surroundings(Pixelwise):
    """Sees five pixels in each direction, and zeros beyond the window's edge."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(2, 3, 11, padding=5)


def image_of(height: int, width: int, channels: int = 2) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(height, width, channels)).astype(np.float32)


def predictor(model: nn.Module, contract: DataContract = CONTRACT, **options: Any) -> Predictor:
    return Predictor(model, contract, device="cpu", precision="fp32", **options)


def whole(model: nn.Module, image: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.from_numpy(np.moveaxis(image, -1, 0))[None]).softmax(1)[0].numpy()


def in_bands(
    model: Any, image: Any, overlap: float = 0.5, batch_size: int = 3, contract: DataContract = CONTRACT
):
    return list(predict_bands(predictor(model, contract), image, contract, Tiling(TILE, overlap, batch_size)))


class Array:
    """An image in the memory that notes what is read."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape = array, array.shape
        self.rows: list[int] = []

    def read(self, window: Window) -> np.ndarray:
        self.rows += range(window.top, window.top + window.height)
        return self.array[window.top : window.top + window.height, window.left : window.left + window.width]


@pytest.mark.parametrize("length", [1, 5, 15, 16, 17, 31, 32, 33, 100])
@pytest.mark.parametrize("overlap", [0, 0.25, 0.5, 0.9, 0.99])
def test_windows_cover_a_length_and_end_with_it(length, overlap):
    size = min(16, length)
    starts = window_starts(length, size, overlap)
    covered = {pixel for start in starts for pixel in range(start, start + size)}
    assert covered == set(range(length)) and starts == sorted(set(starts))
    assert all(
        after - before <= max(1, round(size * (1 - overlap))) for before, after in itertools.pairwise(starts)
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("overlap", [0, 0.25, 0.5])
def test_windows_do_not_change_what_a_pixel_alone_decides(size, overlap):
    model, image = Pixelwise(), image_of(*size)
    result = predict_array(predictor(model), image, TILE, overlap)
    np.testing.assert_allclose(result, whole(model, image), atol=1e-6)
    # Windows are not all the same: one of another image would be seen.
    assert np.abs(result - whole(model, image_of(*size)[::-1].copy())).max() > 0.01 or size[0] == 1


@pytest.mark.parametrize("size", [size for size in SIZES if max(size) <= TILE])
def test_an_image_of_one_window_is_predicted_as_a_whole(size):
    model, image = Surroundings(), image_of(*size)
    one = predictor(model)
    found = predict_array(one, image, TILE)
    np.testing.assert_allclose(found, whole(model, image), atol=1e-6)
    assert np.array_equal(found, one(torch.from_numpy(np.moveaxis(image, -1, 0))[None])[0])  # to the last bit
    assert model.calls[0] == (1, 2, *size)


@pytest.mark.parametrize("size", [size for size in SIZES if min(size) >= TILE])
@pytest.mark.parametrize("overlap", [0, 0.25, 0.5])
def test_windows_are_blended_as_monai_does(size, overlap):
    inferers = pytest.importorskip(
        "monai.inferers.utils", reason="MONAI is a part of the development environment"
    )
    model, image = Surroundings(), image_of(*size)
    inputs = torch.from_numpy(np.moveaxis(image, -1, 0))[None]

    def monai(**options: Any) -> np.ndarray:
        with torch.no_grad():
            predict = inferers.sliding_window_inference
            answer = predict(
                inputs, (TILE, TILE), 4, lambda x: model(x).softmax(1), overlap=overlap, **options
            )
        return answer[0].numpy()

    ours = predict_array(predictor(model), image, TILE, overlap)
    weights = torch.from_numpy(blending_weights(TILE, TILE))
    np.testing.assert_allclose(ours, monai(roi_weight_map=weights, mode="gaussian"), atol=1e-6)
    # Their own weights are centered half a pixel beside the middle.
    assert np.abs(ours - monai(mode="gaussian", sigma_scale=0.125)).max() < 0.01
    if max(size) > TILE:
        assert np.abs(ours - whole(model, image)).max() > 0.02  # windows do make a difference for this model


def test_blending_weights_are_a_gaussian_that_does_not_vanish():
    weights = blending_weights(16, 24)
    assert weights.dtype == np.float32 and weights.max() == 1 and weights.min() == np.float32(1e-3)
    # In the middle row 3.5, in the middle column 0.5 pixels from the center, which lies between pixels.
    inner = np.exp(-0.5 * ((3.5 / 2) ** 2 - (0.5 / 2) ** 2))
    assert weights[4, 12] == pytest.approx(inner, rel=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_bands_join_and_every_row_is_read_once(size):
    image = Array(image_of(*size))
    bands = in_bands(Pixelwise(), image)
    assert [band.top for band in bands] == list(np.cumsum([0, *[len(band.valid) for band in bands[:-1]]]))
    assert sum(len(band.valid) for band in bands) == size[0]
    assert image.rows == list(range(size[0]))


def test_windows_come_in_batches_of_one_shape():
    model = Pixelwise()
    in_bands(model, Array(image_of(70, 90)), batch_size=4)
    starts = len(window_starts(90, TILE, 0.5))
    assert starts == 11 and set(model.calls) == {(4, 2, TILE, TILE)}
    assert len(model.calls) == 3 * len(window_starts(70, TILE, 0.5))


@pytest.mark.parametrize("nodata", [-9999.0, 0.0, float("nan")])
def test_what_is_no_data_has_no_influence_on_its_neighbors(nodata):
    image = image_of(50, 60) + 10
    missing = np.zeros((50, 60), bool)
    missing[10:30, 20:50] = True
    image[missing] = nodata
    contract = DataContract(2, dtype="float32", outputs=3, nodata=nodata)
    result = predict_array(predictor(Surroundings(), contract), image, TILE, 0.5)
    assert np.array_equal(np.isnan(result).all(0), missing)
    other = image.copy()
    other[missing] = -1234
    changed = DataContract(2, dtype="float32", outputs=3, nodata=-1234)
    same = predict_array(predictor(Surroundings(), changed), other, TILE, 0.5)
    assert np.array_equal(result, same, equal_nan=True)


def test_windows_without_data_are_left_out():
    image = image_of(64, 64)
    image[:, 32:] = -1
    image[40:] = -1
    model = Pixelwise()
    contract = DataContract(2, dtype="float32", outputs=3, nodata=-1)
    bands = in_bands(model, Array(image), overlap=0, batch_size=1, contract=contract)
    assert len(model.calls) == 6  # of 16
    assert [band.valid.any() for band in bands] == [True, True, True, False]
    assert not np.isnan(bands[-1].probabilities).any()


def test_nan_that_means_nothing_is_reported_with_its_rows():
    image = image_of(150, 20)
    image[70, 3, 1] = np.nan
    with pytest.raises(DataError, match="rows 64 to 127: it has 1 NaN or infinite values"):
        in_bands(Pixelwise(), Array(image))


@pytest.mark.parametrize(("augment", "number"), [("none", 1), ("flips", 4), ("all", 8)])
@pytest.mark.parametrize("size", [(16, 16), (9, 14), (40, 33)])
def test_views_are_turned_back_exactly(augment, number, size):
    model, image = Pixelwise(), image_of(*size)  # a model that sees no directions
    one = predictor(model, augment=augment)
    np.testing.assert_allclose(predict_array(one, image, TILE), whole(model, image), atol=1e-6)
    assert len(one.views) == number and one.num_changed == 0


def test_the_views_are_all_that_there_are_and_their_mean_is_the_result():
    model, image = Surroundings(), image_of(12, 12)
    inputs = torch.from_numpy(np.moveaxis(image, -1, 0))[None]
    expected = []
    for turns in range(4):
        for mirror in (False, True):
            view = np.rot90(np.moveaxis(image, -1, 0), turns, (1, 2))
            view = view[:, :, ::-1] if mirror else view
            answer = whole(model, np.moveaxis(view, 0, -1).copy())
            answer = answer[:, :, ::-1] if mirror else answer
            expected.append(np.rot90(answer, -turns, (1, 2)))
    one = predictor(model, augment="all")
    np.testing.assert_allclose(one(inputs)[0], np.mean(expected, axis=0), atol=1e-6)
    assert np.std(expected, axis=0).max() > 0.01
    assert one.num_pixels == 144 and 0 < one.num_changed < 144
    assert one.num_changed == (np.mean(expected, axis=0).argmax(0) != expected[0].argmax(0)).sum()


def test_a_model_that_makes_no_maps_is_refused():
    class Classifier(nn.Module):
        def forward(self, x):
            return functional.adaptive_avg_pool2d(x, 1).flatten(1)

    with pytest.raises(
        ConfigError, match=r"outputs \(1, 2\) for an input of \(1, 2, 5, 7\): .* \(N, 3, H, W\)"
    ):
        predict_array(predictor(Classifier()), image_of(5, 7), TILE)
