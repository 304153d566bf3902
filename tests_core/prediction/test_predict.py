"""Prediction reads images as training did, writes under the input's name, and refuses what does not fit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dida_core.config.prediction_keys import OUTPUTS
from dida_core.data.contract import DataContract
from dida_core.data.images import DataError
from dida_core.errors import ConfigError
from dida_core.prediction import load_predictor, predict
from dida_core.storage.weights import WeightsError, save_weights
from PIL import Image
from torch import nn

from tests_core.prediction.samples import Brightest, Net, expected, make_config, reflectance, write_arrays

RNG = np.random.default_rng(0)
# Subtracts (100, 50, 0) and divides by (10, 20, 40), before scaling.
SCALED = {"scale": 1 / 255, "mean": (100 / 255, 50 / 255, 0.0), "std": (10 / 255, 20 / 255, 40 / 255)}
LINEAR = ("in_features", "out_features")
RGB = DataContract(3, dtype="uint8", outputs=3, **SCALED)


@pytest.fixture
def rgb(tmp_path: Path) -> dict[str, Any]:
    return make_config(tmp_path, Brightest(), RGB) | {"TILE": None}


def expected_classes(image: np.ndarray) -> np.ndarray:
    return ((image.astype(np.float64) - (100, 50, 0)) / (10, 20, 40)).argmax(-1)


def an_image(height: int = 20, width: int = 30) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_every_kind_of_output(tmp_path, config, dtype):
    image = reflectance(90, 70)
    image[:10] = 0
    p, valid = expected(config, image), (image != 0).any(-1)
    entropy = -(p * np.log(p)).sum(0) / np.log(3)
    right = dict(zip(OUTPUTS, (p.argmax(0), np.moveaxis(p, 0, -1), p.max(0), entropy), strict=True))
    (file,) = write_arrays(tmp_path, image)
    files = predict(config | {"FILES": file, "OUTPUT": OUTPUTS, "OUTPUT_DTYPE": dtype})
    assert [file.name for file in files] == [f"0_{kind}.npy" for kind in OUTPUTS]
    for kind, written in zip(OUTPUTS, files, strict=True):
        values = np.load(written)
        assert values.dtype == (np.uint8 if kind == "classes" else dtype), kind
        missing = values == 255 if values.dtype == np.uint8 else np.isnan(values)
        assert np.array_equal(missing.all(-1) if missing.ndim == 3 else missing, ~valid), kind
        scaled = kind != "classes" and dtype == "uint8"
        found, atol = (values[valid] / 254, 0.5 / 254 + 1e-6) if scaled else (values[valid], 1e-5)
        np.testing.assert_allclose(found, right[kind][valid], atol=atol)
    assert 0.1 < entropy[valid].min() < entropy[valid].max() <= 1


def test_a_binary_model_uses_its_threshold(tmp_path):
    contract = DataContract(channels=1, dtype="float32", task="multi-label", threshold=0.9)
    config = make_config(tmp_path, Brightest(), contract)
    logits = np.linspace(-5, 5, 100, dtype=np.float32).reshape(10, 10)
    (written,) = predict(config | {"FILES": write_arrays(tmp_path, logits)})
    assert np.array_equal(np.load(written), 1 / (1 + np.exp(-logits)) >= 0.9)


def test_an_array_is_predicted_as_its_file_alone_or_in_company(tmp_path, config):
    for size in [(20, 30), (32, 32), (70, 31)]:
        image = reflectance(*size)
        image[:5] = 0
        files = write_arrays(tmp_path, *[image] * 3)
        for file in predict(config | {"FILES": files, "OUTPUT": "probabilities"}):
            assert np.array_equal(np.moveaxis(np.load(file), -1, 0), expected(config, image), equal_nan=True)


def test_weights_without_a_contract_predict_what_the_first_image_suggests(tmp_path, config):
    save_weights(config["WEIGHTS"], {"model": Net().state_dict()})
    images = reflectance(30, 25), reflectance(70, 40)
    files = predict(config | {"FILES": write_arrays(tmp_path, *images), "OUTPUT": "probabilities"})
    with torch.no_grad():
        inputs = torch.from_numpy(np.moveaxis(images[0] / np.float32(65535), -1, 0))[None]
        wanted = Net()(inputs).softmax(1)[0].numpy()
    np.testing.assert_allclose(np.load(files[0]), np.moveaxis(wanted, 0, -1), atol=1e-6)
    assert np.load(files[1]).shape == (70, 40, 3)
    with pytest.raises(WeightsError, match="holds no data contract"):
        load_predictor(config["WEIGHTS"], Net)


def test_pictures_become_pictures_in_the_colors_of_the_classes(tmp_path, rgb):
    image, colors = an_image(50, 40), ((1, 2, 3), (4, 5, 6), (7, 8, 9))
    rgb |= make_config(tmp_path, Brightest(), replace(RGB, class_colors=colors))
    names = ["photo.png", "other.jpg", "third.bmp", "fourth.jp2"]
    for name in names:
        Image.fromarray(image).save(tmp_path / name, **({"quality": 100} if name == "other.jpg" else {}))
    files = {"FILES": [tmp_path / name for name in names], "PREFIX": "p_", "SUFFIX": "_classes"}
    written = predict(rgb | files)
    assert [file.name for file in written] == [f"p_{Path(name).stem}_classes.png" for name in names]
    for file in written:
        with Image.open(file) as picture:
            numbers, shown = np.asarray(picture), np.asarray(picture.convert("RGB"))
        assert np.array_equal(numbers, expected_classes(image)) or "other" in file.name
        assert np.array_equal(shown, np.array(colors)[numbers])


@pytest.mark.parametrize(("task", "dtype"), [("values", np.float32), ("multi-label", np.uint8)])
def test_what_no_picture_can_hold_goes_into_npy(tmp_path, rgb, task, dtype):
    rgb = make_config(tmp_path, Brightest(), DataContract(channels=3, dtype="uint8", task=task, outputs=3))
    Image.fromarray(an_image()).save(tmp_path / "photo.png")
    (written,) = predict(rgb | {"FILES": [tmp_path / "photo.png"]})
    assert written.name == "photo.npy"
    assert (np.load(written).dtype, np.load(written).shape) == (dtype, (20, 30, 3))
    if task == "values":
        with pytest.raises(ConfigError, match="the model predicts values, not classes"):
            predict(rgb | {"FILES": tmp_path / "photo.png", "MASKS": tmp_path})


def test_a_format_that_cannot_hold_an_output_is_refused_before_anything_is_written(tmp_path, config):
    files = {"FILES": write_arrays(tmp_path, reflectance(20, 20)), "FORMAT": ".png"}
    with pytest.raises(ConfigError, match=r"which cannot hold probabilities: choose \.npy or \.tif"):
        predict(config | files | {"OUTPUT": ["classes", "probabilities"]})
    assert not config["OUT_DIR"].exists()
    (file,) = predict(config | files)
    assert np.asarray(Image.open(file)).shape == (20, 20)


def test_folders_of_images_nothing_overwrites_an_input_or_another_output(tmp_path, rgb):
    images = [an_image(10 + number, 30 - number) for number in range(4)]
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_arrays(tmp_path / folder, *images)
    written = predict(rgb | {"FILES": tmp_path / "one"})
    assert written == [tmp_path / "out" / f"{number}.npy" for number in range(4)]
    for file, image in zip(written, images, strict=True):
        assert np.array_equal(np.load(file), expected_classes(image))
    with pytest.raises(DataError, match="several inputs would be written to it"):
        predict(rgb | {"FILES": [tmp_path / "one", tmp_path / "two"]})
    with pytest.raises(DataError, match="would overwrite an input"):
        predict(rgb | {"FILES": tmp_path / "one", "OUT_DIR": tmp_path / "one"})
    assert np.array_equal(np.load(tmp_path / "one" / "0.npy"), images[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda image: image[..., [0, 1, 2, 3, 0]], "it has 5 channels, the model was trained on 4"),
        (lambda image: (image / 1e4).astype(np.float32), "it is float32, the model was trained on uint16"),
        (lambda image: (image // 256).astype(np.uint16), "as if they had been divided by a number"),
        (lambda image: image * np.uint16([1, 0, 1, 1]) + np.uint16([0, 7, 0, 0]), "B03 is constant .7."),
    ],
)
def test_data_unlike_those_of_training_are_refused_before_anything_is_written(
    tmp_path, config, change, message
):
    for size in ((100, 80), (30, 30)):
        files = write_arrays(tmp_path, reflectance(30, 30), change(reflectance(*size)))
        with pytest.raises(DataError, match=message) as caught:
            predict(config | {"FILES": files})
        assert "1.npy" in str(caught.value) and not config["OUT_DIR"].exists()
    if "divided" in message:
        assert len(predict(config | {"FILES": files, "CHECK_VALUES": False})) == 2


def test_an_image_that_turns_out_to_be_odd_does_not_cost_the_others(tmp_path, config, monkeypatch):
    monkeypatch.setattr("dida_core.prediction.jobs._NUM_CHECKED", 0)
    images = [reflectance(20 + 20 * (number % 2), 20, seed=number) for number in range(5)]
    images[1:3] = [(image // 256).astype(np.uint16) for image in images[1:3]]
    with pytest.raises(DataError) as caught:
        predict(config | {"FILES": write_arrays(tmp_path, *images)})
    assert len(caught.value.problems) == 2
    assert [path.name for path in sorted(config["OUT_DIR"].glob("*.npy"))] == ["0.npy", "3.npy", "4.npy"]


def test_nan_is_refused_with_the_files_name(tmp_path):
    config = make_config(tmp_path, Brightest(), DataContract(channels=1, dtype="float32"))
    with pytest.raises(DataError, match=r"0\.npy.*NaN"):
        predict(config | {"FILES": write_arrays(tmp_path, np.array([[0.0, np.nan]], np.float32))})
    assert [path.name for path in config["OUT_DIR"].iterdir()] == ["predictions.jsonl"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"FILES": None}, ConfigError, "FILES is None: it must be a path or a list of them"),
        ({"FILE": 1}, ConfigError, r"FILE is no key of a config: did you mean FILES\?"),
        ({"OUTPUT": "picture"}, ConfigError, "OUTPUT is 'picture': it must be one or several of classes, "),
        ({"OUTPUT": ["classes", 3]}, ConfigError, "OUTPUT is"),
        ({"FORMAT": ".bmp"}, ConfigError, r"it must be one of \.npy, \.png, \.tif or None"),
        ({"OVERLAP": 1}, ConfigError, "OVERLAP is 1: it must be a number of at least 0 and below 1"),
        ({"TILE": 0}, ConfigError, "TILE is 0: it must be a whole number of at least 1 or None"),
        ({"FILES": "nowhere.npy"}, DataError, "no such file"),
        ({"FILES": "nowhere*.npy"}, DataError, "nothing matches this pattern"),
        ({"WEIGHTS": "nowhere.pt"}, WeightsError, "no such weights file"),
        ({"MODEL": nn.Linear, "MODEL_CONFIG": dict.fromkeys(LINEAR, 2)}, WeightsError, "not fit"),
    ],
)
def test_mistakes_are_reported(tmp_path, rgb, changes, error, message):
    files = write_arrays(tmp_path, an_image())
    with pytest.raises(error, match=message):
        predict(rgb | {"FILES": files} | changes)
