"""Sliding windows: every pixel right at any size, in memory that does not depend on the height."""

import functools
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from dida_core.data.contract import DataContract
from dida_core.data.images import DataError, Window
from dida_core.errors import ConfigError
from dida_core.prediction import Predictor, predict_array
from dida_core.prediction.windows import ArrayImage, Tiling, blending_weights, predict_bands, window_starts
from torch import nn
from torch.nn import functional

TILE = 16
SIZES = [(5, 7), (16, 16), (17, 16), (16, 17), (9, 40), (40, 9), (33, 47), (64, 64), (1, 50), (31, 15)]
CONTRACT = DataContract(2, dtype="float32", outputs=3)


class Pixelwise(nn.Module):
    """Sees nothing but the pixel itself, so that windows must not change anything."""

    def __init__(self, size: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(2, 3, size, padding=size // 2)
        self.calls: list[tuple[int, ...]] = []

    def forward(self, x):
        self.calls.append(tuple(x.shape))
        return self.layer(x)


# Sees five pixels in each direction, and zeros beyond the window's edge.
Surroundings = functools.partial(Pixelwise, 11)


class Array(ArrayImage):
    """An image in memory that records which rows are read."""

    def __init__(self, array: np.ndarray) -> None:
        super().__init__(array)
        self.rows: list[int] = []

    def read(self, window: Window) -> np.ndarray:
        self.rows += range(window.top, window.top + window.height)
        return super().read(window)


def image_of(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(height, width, 2)).astype(np.float32)


def as_batch(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.moveaxis(image, -1, 0).copy())[None]


def predictor(model: nn.Module, contract: DataContract = CONTRACT, **options: Any) -> Predictor:
    return Predictor(model, contract, device="cpu", precision="fp32", **options)


def whole(model: nn.Module, image: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(as_batch(image)).softmax(1)[0].numpy()


def in_bands(
    model: Any, image: Any, overlap: float = 0.5, batch_size: int = 3, contract: DataContract = CONTRACT
):
    return list(predict_bands(predictor(model, contract), image, contract, Tiling(TILE, overlap, batch_size)))


@pytest.mark.parametrize("overlap", [0, 0.25, 0.5, 0.9, 0.99])
def test_windows_cover_a_length_and_end_with_it(overlap):
    for length in (1, 5, 15, 16, 17, 31, 32, 33, 100):
        size = min(16, length)
        starts = window_starts(length, size, overlap)
        covered = {pixel for start in starts for pixel in range(start, start + size)}
        assert covered == set(range(length)) and starts == sorted(set(starts))
        step = max(1, round(size * (1 - overlap)))
        assert all(after - before <= step for before, after in itertools.pairwise(starts))


@pytest.mark.parametrize("overlap", [0, 0.25, 0.5])
def test_windows_do_not_change_what_a_pixel_alone_decides(overlap):
    model = Pixelwise()
    for size in SIZES:
        image = image_of(*size)
        result = predict_array(predictor(model), image, TILE, overlap)
        np.testing.assert_allclose(result, whole(model, image), atol=1e-6)
        # Windows are not all the same: one of another image would be seen.
        assert np.abs(result - whole(model, image[::-1])).max() > 0.01 or size[0] == 1


@pytest.mark.parametrize("size", [size for size in SIZES if max(size) <= TILE])
def test_an_image_of_one_window_is_predicted_as_a_whole(size):
    model, image = Surroundings(), image_of(*size)
    found = predict_array(predictor(model), image, TILE)
    np.testing.assert_allclose(found, whole(model, image), atol=1e-6)
    assert np.array_equal(found, predictor(model)(as_batch(image))[0])  # to the last bit
    assert model.calls[0] == (1, 2, *size)


@pytest.mark.parametrize("overlap", [0, 0.25, 0.5])
def test_windows_are_blended_with_gaussian_weights(overlap):
    model, weights = Surroundings(), blending_weights(TILE, TILE)
    for size in [size for size in SIZES if min(size) >= TILE and max(size) > TILE]:
        image = image_of(*size)
        sums, norms = np.zeros((3, *size)), np.zeros(size)
        for corner in itertools.product(*(window_starts(length, TILE, overlap) for length in size)):
            window = tuple(slice(start, start + TILE) for start in corner)
            sums[:, *window] += whole(model, image[window]) * weights
            norms[window] += weights
        found = predict_array(predictor(model), image, TILE, overlap)
        np.testing.assert_allclose(found, sums / norms, atol=1e-6)
        assert np.abs(found - whole(model, image)).max() > 0.02  # windows make a difference for this model


@pytest.mark.slow
@pytest.mark.parametrize("size", [size for size in SIZES if min(size) >= TILE])
@pytest.mark.parametrize("overlap", [0, 0.25, 0.5])
def test_windows_are_blended_as_monai_does(size, overlap):
    inferers = pytest.importorskip("monai.inferers.utils")
    model, image = Surroundings(), image_of(*size)
    call = as_batch(image), (TILE, TILE), 4, lambda x: model(x).softmax(1), overlap, "gaussian"
    with torch.no_grad():
        weights = torch.from_numpy(blending_weights(TILE, TILE))
        same = inferers.sliding_window_inference(*call, roi_weight_map=weights)[0].numpy()
        # Their own weights are centered half a pixel beside the middle.
        own = inferers.sliding_window_inference(*call, sigma_scale=0.125)[0].numpy()
    ours = predict_array(predictor(model), image, TILE, overlap)
    np.testing.assert_allclose(ours, same, atol=1e-6)
    assert np.abs(ours - own).max() < 0.01


def test_blending_weights_are_a_gaussian_that_does_not_vanish():
    weights = blending_weights(16, 24)
    assert weights.dtype == np.float32 and weights.max() == 1 and weights.min() == np.float32(1e-3)
    # In the middle row 3.5, in the middle column 0.5 pixels from the center, which lies between pixels.
    inner = np.exp(-0.5 * ((3.5 / 2) ** 2 - (0.5 / 2) ** 2))
    assert weights[4, 12] == pytest.approx(inner, rel=1e-6)


def test_bands_join_and_every_row_is_read_once():
    for size in SIZES:
        image = Array(image_of(*size))
        bands = in_bands(Pixelwise(), image)
        lengths = [len(band.valid) for band in bands]
        assert [band.top for band in bands] == list(np.cumsum([0, *lengths[:-1]]))
        assert sum(lengths) == size[0] and image.rows == list(range(size[0]))


def test_windows_come_in_batches_of_one_shape():
    model = Pixelwise()
    in_bands(model, Array(image_of(70, 90)), batch_size=4)
    starts = len(window_starts(90, TILE, 0.5))
    assert starts == 11 and set(model.calls) == {(4, 2, TILE, TILE)}
    assert len(model.calls) == 3 * len(window_starts(70, TILE, 0.5))


@pytest.mark.parametrize("nodata", [-9999.0, 0.0, float("nan")])
def test_what_is_no_data_has_no_influence_on_its_neighbors(nodata):
    image, results = image_of(50, 60) + 10, []
    missing = np.zeros((50, 60), bool)
    missing[10:30, 20:50] = True
    for value in (nodata, -1234):
        image[missing] = value
        contract = DataContract(2, dtype="float32", outputs=3, nodata=value)
        results.append(predict_array(predictor(Surroundings(), contract), image, TILE, 0.5))
        assert np.array_equal(np.isnan(results[-1]).all(0), missing)
    assert np.array_equal(*results, equal_nan=True)


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
def test_views_are_turned_back_exactly(augment, number):
    model = Pixelwise()  # sees no directions
    for size in [(16, 16), (9, 14), (40, 33)]:
        image, one = image_of(*size), predictor(model, augment=augment)
        np.testing.assert_allclose(predict_array(one, image, TILE), whole(model, image), atol=1e-6)
        assert len(one.views) == number and one.num_changed == 0


def test_the_views_are_all_that_there_are_and_their_mean_is_the_result():
    model, image, expected = Surroundings(), image_of(12, 12), []
    for turns, mirrored in itertools.product(range(4), (1, -1)):
        answer = whole(model, np.rot90(image, turns)[:, ::mirrored])
        expected.append(np.rot90(answer[:, :, ::mirrored], -turns, (1, 2)))
    one, mean = predictor(model, augment="all"), np.mean(expected, axis=0)
    np.testing.assert_allclose(one(as_batch(image))[0], mean, atol=1e-6)
    assert np.std(expected, axis=0).max() > 0.01
    assert one.num_pixels == 144 and 0 < one.num_changed < 144
    assert one.num_changed == (mean.argmax(0) != expected[0].argmax(0)).sum()


def test_a_model_that_makes_no_maps_is_refused():
    class Classifier(nn.Module):
        def forward(self, x):
            return functional.adaptive_avg_pool2d(x, 1).flatten(1)

    message = r"outputs \(1, 2\) for an input of \(1, 2, 5, 7\): .* \(N, 3, H, W\)"
    with pytest.raises(ConfigError, match=message):
        predict_array(predictor(Classifier()), image_of(5, 7), TILE)
