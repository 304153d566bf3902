"""Prediction reads images as training did, writes under the input's name, and refuses what does not fit."""

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from rasterio.transform import from_origin
from torch import nn

from dida_tools.config.errors import ConfigError
from dida_tools.prediction import predict
from dida_tools.utils.data.contract import DataContract
from dida_tools.utils.data.images import DataError
from dida_tools.utils.weights import WeightsError, save_weights

RNG = np.random.default_rng(0)


class Brightest(nn.Module):
    """Logits are the channels themselves, so that what went in can be told from what came out."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * self.scale


@pytest.fixture
def config(tmp_path) -> dict:
    """A predict_config whose contract subtracts (100, 50, 0) and divides by (10, 20, 40), before scaling."""
    contract = DataContract(
        channels=3,
        dtype="uint8",
        scale=1 / 255,
        mean=(100 / 255, 50 / 255, 0.0),
        std=(10 / 255, 20 / 255, 40 / 255),
        outputs=3,
    )
    save_weights(tmp_path / "best.pt", {"model": Brightest().state_dict(), "contract": contract.to_dict()})
    return {
        "MODEL": Brightest,
        "WEIGHTS": tmp_path / "best.pt",
        "OUT_DIR": tmp_path / "out",
        "DEVICE": "cpu",
        "PRECISION": "fp32",
    }


def expected_classes(image: np.ndarray) -> np.ndarray:
    values = (image.astype(np.float64) - (100, 50, 0)) / (10, 20, 40)
    return values.argmax(-1)


def an_image(height: int = 20, width: int = 30) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_the_stored_normalization_is_applied(tmp_path, config):
    image = an_image()
    np.save(tmp_path / "a.npy", image)
    (written,) = predict(config | {"FILES": [tmp_path / "a.npy"]})
    assert written == tmp_path / "out" / "a.npy"
    assert np.array_equal(np.load(written), expected_classes(image))
    assert not np.array_equal(np.load(written), image.argmax(-1))


def test_probabilities_are_the_softmax(tmp_path, config):
    image = an_image()
    np.save(tmp_path / "a.npy", image)
    (written,) = predict(config | {"FILES": tmp_path / "a.npy", "OUTPUT": "probabilities"})
    probabilities = np.load(written)
    assert probabilities.dtype == np.float32
    assert probabilities.shape == (20, 30, 3)
    assert probabilities.sum(-1) == pytest.approx(np.ones((20, 30)), abs=1e-5)
    assert np.array_equal(probabilities.argmax(-1), expected_classes(image))


def test_a_geotiff_becomes_a_geotiff_on_the_same_grid(tmp_path, config):
    image = an_image(17, 23)
    grid = {"crs": "EPSG:32633", "transform": from_origin(400_000, 5_800_000, 10, 10)}
    with rasterio.open(
        tmp_path / "scene.tif", "w", driver="GTiff", height=17, width=23, count=3, dtype="uint8", **grid
    ) as file:
        file.write(np.moveaxis(image, -1, 0))
    (written,) = predict(config | {"FILES": [tmp_path / "scene.tif"]})
    with rasterio.open(written) as file:
        assert written.name == "scene.tif"
        assert (file.crs, file.transform) == (grid["crs"], grid["transform"])
        assert np.array_equal(file.read(1), expected_classes(image))


def test_pictures_become_pictures_and_names_take_prefix_and_suffix(tmp_path, config):
    image = an_image()
    Image.fromarray(image).save(tmp_path / "photo.png")
    (written,) = predict(config | {"FILES": [tmp_path / "photo.png"], "PREFIX": "p_", "SUFFIX": "_classes"})
    assert written.name == "p_photo_classes.png"
    assert np.array_equal(np.asarray(Image.open(written)), expected_classes(image))


def test_what_no_picture_can_hold_goes_into_npy(tmp_path, config):
    image = an_image()
    Image.fromarray(image).save(tmp_path / "photo.png")
    for task, dtype, shape in (("values", np.float32, (20, 30, 3)), ("multi-label", np.uint8, (20, 30, 3))):
        contract = DataContract(channels=3, dtype="uint8", task=task, outputs=3)
        save_weights(config["WEIGHTS"], {"model": Brightest().state_dict(), "contract": contract.to_dict()})
        (written,) = predict(config | {"FILES": [tmp_path / "photo.png"]})
        assert written.name == "photo.npy"
        assert (np.load(written).dtype, np.load(written).shape) == (dtype, shape)


def test_folders_of_images_of_several_sizes(tmp_path, config):
    (tmp_path / "images").mkdir()
    images = {f"{number}.npy": an_image(10 + number, 30 - number) for number in range(4)}
    for name, image in images.items():
        np.save(tmp_path / "images" / name, image)
    written = predict(config | {"FILES": tmp_path / "images"})
    assert [file.name for file in written] == list(images)
    for file in written:
        assert np.array_equal(np.load(file), expected_classes(images[file.name]))


def test_a_binary_model_uses_its_threshold(tmp_path, config):
    contract = DataContract(channels=1, dtype="float32", task="multi-label", threshold=0.9)
    save_weights(config["WEIGHTS"], {"model": Brightest().state_dict(), "contract": contract.to_dict()})
    logits = np.linspace(-5, 5, 100, dtype=np.float32).reshape(10, 10)
    np.save(tmp_path / "a.npy", logits)
    (written,) = predict(config | {"FILES": [tmp_path / "a.npy"]})
    assert np.array_equal(np.load(written), 1 / (1 + np.exp(-logits)) >= 0.9)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((8, 8, 4), np.uint8), "4 channels, the model was trained on 3"),
        (np.zeros((8, 8, 3), np.float32), "it is float32, the model was trained on uint8"),
        (np.zeros((8, 8, 3), np.uint16), "it is uint16, the model was trained on uint8"),
    ],
)
def test_an_image_that_the_model_does_not_know_is_refused_before_anything_is_written(
    tmp_path, config, array, message
):
    np.save(tmp_path / "good.npy", an_image())
    np.save(tmp_path / "odd.npy", array)
    with pytest.raises(DataError, match=message) as caught:
        predict(config | {"FILES": [tmp_path / "good.npy", tmp_path / "odd.npy"]})
    assert "odd.npy" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_nan_is_refused_with_the_files_name(tmp_path, config):
    contract = DataContract(channels=1, dtype="float32")
    save_weights(config["WEIGHTS"], {"model": Brightest().state_dict(), "contract": contract.to_dict()})
    np.save(tmp_path / "bad.npy", np.array([[0.0, np.nan]], np.float32))
    with pytest.raises(DataError, match=r"bad\.npy.*NaN"):
        predict(config | {"FILES": [tmp_path / "bad.npy"]})


def test_an_input_is_never_overwritten(tmp_path, config):
    np.save(tmp_path / "a.npy", an_image())
    with pytest.raises(DataError, match="would overwrite an input"):
        predict(config | {"FILES": [tmp_path / "a.npy"], "OUT_DIR": tmp_path})
    assert np.load(tmp_path / "a.npy").shape == (20, 30, 3)


def test_two_inputs_never_share_an_output(tmp_path, config):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "a.npy", an_image())
    with pytest.raises(DataError, match="several inputs"):
        predict(config | {"FILES": [tmp_path / "one", tmp_path / "two"]})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"FILES": None}, ConfigError, "FILES is missing"),
        ({"FILE": 1}, ConfigError, "FILE is no key"),
        ({"OUTPUT": "picture"}, ConfigError, "OUTPUT"),
        ({"FILES": "nowhere.npy"}, DataError, "no such file"),
        ({"WEIGHTS": "nowhere.pt"}, WeightsError, "no such weights file"),
        (
            {"MODEL": nn.Linear, "MODEL_CONFIG": {"in_features": 2, "out_features": 2}},
            WeightsError,
            "does not fit",
        ),
    ],
)
def test_mistakes_are_told(tmp_path, config, changes, error, message):
    np.save(tmp_path / "a.npy", an_image())
    with pytest.raises(error, match=message):
        predict(config | {"FILES": [tmp_path / "a.npy"]} | changes)
