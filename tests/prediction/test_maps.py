"""Large images and many of them: rasters, kinds of output, going on after a kill, sharing out."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from rasterio.transform import from_origin
from torch import nn

from dida_tools.config.errors import ConfigError, UserError
from dida_tools.prediction import load_predictor, predict, predict_array
from dida_tools.config.predict_keys import OUTPUTS as KINDS
from dida_tools.utils.data.contract import PALETTE, DataContract
from dida_tools.utils.data.images import DataError
from dida_tools.utils.logging.journal import Journal, read_journal
from dida_tools.utils.weights import save_weights

ROOT = Path(__file__).resolve().parents[2]
CONTRACT = DataContract(
    channels=4,
    channel_names=("B02", "B03", "B04", "B08"),
    dtype="uint16",
    scale=1e-4,
    mean=(0.1, 0.1, 0.1, 0.3),
    std=(0.05, 0.05, 0.05, 0.1),
    nodata=0,
    minimum=(1.0, 1.0, 1.0, 1.0),
    maximum=(10000.0,) * 4,
    tile_size=32,
    outputs=3,
    class_names=("land", "water", "cloud"),
)


class Net(nn.Module):
    """A convolution; slow if it is told to be, and counts."""

    calls = 0

    def __init__(self, channels: int = 4, outputs: int = 3, seconds: float = 0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Conv2d(channels, outputs, 5, padding=2)
        self.seconds = seconds

    def forward(self, x):
        Net.calls += 1
        time.sleep(self.seconds)
        return self.layer(x)


def reflectance(height: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = rng.normal((1000, 1000, 1000, 3000), (500, 500, 500, 1000), (height // 8 + 1, width // 8 + 1, 4))
    image = coarse.repeat(8, 0).repeat(8, 1)[:height, :width] + rng.normal(0, 100, (height, width, 4))
    return np.clip(image, 1, 10000).astype(np.uint16)


GRID = {"crs": "EPSG:32633", "transform": from_origin(399_960, 5_900_040, 10, 10)}


def write_raster(path: Path, image: np.ndarray, **options: Any) -> Path:
    bands = np.moveaxis(image, -1, 0)
    profile = {"driver": "GTiff", "dtype": image.dtype, "count": len(bands), "nodata": 0} | GRID | options
    with rasterio.open(path, "w", height=image.shape[0], width=image.shape[1], **profile) as file:
        file.write(bands)
    return path


@pytest.fixture
def config(tmp_path) -> dict[str, Any]:
    save_weights(tmp_path / "best.pt", {"model": Net().state_dict(), "contract": CONTRACT.to_dict()})
    return {
        "MODEL": Net,
        "WEIGHTS": tmp_path / "best.pt",
        "OUT_DIR": tmp_path / "out",
        "DEVICE": "cpu",
        "PRECISION": "fp32",
        "TILE": 32,
        "BATCH_SIZE": 3,
    }


def expected(config: dict[str, Any], image: np.ndarray) -> np.ndarray:
    """(K, H, W), by what test_windows.py has tested."""
    one = load_predictor(config["WEIGHTS"], Net, device="cpu", precision="fp32")
    return predict_array(one, image, 32, 0.25)


# ------------------------------------------------------------------------------------------------------------- rasters


def test_a_raster_becomes_a_cloud_optimized_one_on_its_grid(tmp_path, config):
    image = reflectance(700, 600)
    image[100:200, 300:500] = 0
    scene = write_raster(
        tmp_path / "scene.tif", image, tiled=True, blockxsize=128, blockysize=128, compress="deflate"
    )
    probabilities = expected(config, image)
    classes, chances = predict(config | {"FILES": scene, "OUTPUT": ["classes", "probabilities"]})
    assert (classes.name, chances.name) == ("scene_classes.tif", "scene_probabilities.tif")
    with rasterio.open(classes) as file:
        assert (file.crs.to_string(), file.transform) == (GRID["crs"], GRID["transform"])
        assert file.dtypes == ("uint8",) and file.nodata == 255 and file.block_shapes == [(512, 512)]
        assert file.compression.name == "deflate" and file.overviews(1) == [2]
        assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert file.tags()["CLASSES"] == "0: land, 1: water, 2: cloud"
        assert [file.colormap(1)[number][:3] for number in range(3)] == PALETTE[:3]
        values = file.read(1)
        small = file.read(1, out_shape=(350, 300))
    valid = (image != 0).any(-1)
    assert np.array_equal(values == 255, ~valid)
    assert np.array_equal(values[valid], probabilities.argmax(0)[valid])
    assert set(np.unique(values[valid])) == {0, 1, 2}
    assert set(np.unique(small)) <= {0, 1, 2, 255}  # overviews mix no class numbers
    with rasterio.open(chances) as file:
        assert file.descriptions == ("land", "water", "cloud") and np.isnan(file.nodata)
        assert (file.crs.to_string(), file.transform) == (GRID["crs"], GRID["transform"])
        read = file.read()
    np.testing.assert_allclose(read, probabilities, atol=1e-6)
    assert sorted(path.name for path in config["OUT_DIR"].iterdir()) == sorted(
        ["predictions.jsonl", classes.name, chances.name]
    )


@pytest.mark.parametrize("size", [(30, 30), (90, 70)])
def test_a_file_that_states_another_nodata_value_than_the_training_data_is_believed(tmp_path, config, size):
    image = reflectance(*size)
    image[5:15] = 65535
    (file,) = predict(config | {"FILES": write_raster(tmp_path / "scene.tif", image, nodata=65535)})
    with rasterio.open(file) as raster:
        assert raster.nodata == 255
        assert np.array_equal(raster.read(1) == 255, (image == 65535).all(-1))


def test_every_kind_of_output_in_floats_and_in_bytes(tmp_path, config):
    image = reflectance(90, 70)
    image[:10] = 0
    p = expected(config, image)
    valid = (image != 0).any(-1)
    np.save(tmp_path / "scene.npy", image)
    entropy = -(p * np.log(p)).sum(0) / np.log(3)
    right = {
        "classes": p.argmax(0),
        "probabilities": np.moveaxis(p, 0, -1),
        "confidence": p.max(0),
        "entropy": entropy,
    }
    for dtype in ("float32", "uint8"):
        files = predict(config | {"FILES": tmp_path / "scene.npy", "OUTPUT": KINDS, "OUTPUT_DTYPE": dtype})
        for kind, file in zip(KINDS, files, strict=True):
            values = np.load(file)
            assert values.dtype == (np.uint8 if kind == "classes" else dtype), kind
            missing = values == 255 if values.dtype == np.uint8 else np.isnan(values)
            assert np.array_equal(missing.all(-1) if missing.ndim == 3 else missing, ~valid), kind
            if kind == "classes" or dtype == "float32":
                np.testing.assert_allclose(values[valid], right[kind][valid], atol=1e-5)
            else:
                np.testing.assert_allclose(values[valid] / 254, right[kind][valid], atol=0.5 / 254 + 1e-6)
    assert 0.1 < entropy[valid].min() < entropy[valid].max() <= 1


def test_bytes_in_a_raster_say_their_scale(tmp_path, config):
    image = reflectance(40, 50)
    scene = write_raster(tmp_path / "scene.tif", image)
    (file,) = predict(config | {"FILES": scene, "OUTPUT": "confidence", "OUTPUT_DTYPE": "uint8"})
    with rasterio.open(file) as raster:
        np.testing.assert_allclose(
            raster.read(1) * raster.scales[0], expected(config, image).max(0), atol=0.5 / 254 + 1e-6
        )


def test_multi_label_outputs_have_a_band_for_each_class(tmp_path, config):
    import dataclasses

    contract = dataclasses.replace(CONTRACT, task="multi-label", threshold=(0.2, 0.5, 0.7))
    save_weights(config["WEIGHTS"], {"model": Net().state_dict(), "contract": contract.to_dict()})
    image = reflectance(40, 50)
    p = expected(config, image)
    files = predict(config | {"FILES": write_raster(tmp_path / "scene.tif", image), "OUTPUT": KINDS})
    read = {}
    for kind, file in zip(KINDS, files, strict=True):
        with rasterio.open(file) as raster:
            assert raster.descriptions == ("land", "water", "cloud")
            read[kind] = raster.read()
    assert np.array_equal(read["classes"], p >= np.array([0.2, 0.5, 0.7], np.float32)[:, None, None])
    np.testing.assert_allclose(read["confidence"], np.maximum(p, 1 - p), atol=1e-6)
    np.testing.assert_allclose(read["entropy"], -(p * np.log2(p) + (1 - p) * np.log2(1 - p)), atol=1e-5)


def test_single_band_files_are_one_image_in_the_order_that_is_given(tmp_path, config):
    image = reflectance(60, 50)
    names = ("B02", "B03", "B04", "B08")
    for scene, shift in (("S2A_1", 0), ("S2A_2", 3)):
        (tmp_path / scene).mkdir()
        for channel, name in enumerate(names):
            write_raster(tmp_path / scene / f"T33_{name}_10m.tif", image[..., channel : channel + 1] + shift)
        (tmp_path / scene / "preview.png").write_bytes(b"")
    files = predict(
        config | {"FILES": str(tmp_path / "S2A_*"), "BANDS": [f"*_{name}_*.tif" for name in names]}
    )
    assert [file.name for file in files] == ["S2A_1.tif", "S2A_2.tif"]
    with rasterio.open(files[0]) as raster:
        assert raster.crs.to_string() == GRID["crs"]
        assert np.array_equal(raster.read(1), expected(config, image).argmax(0))
    with rasterio.open(files[1]) as raster:
        assert np.array_equal(raster.read(1), expected(config, image + 3).argmax(0))
    reverse = predict(
        config | {"FILES": tmp_path / "S2A_1", "BANDS": [f"*{n}*.tif" for n in names[::-1]], "SUFFIX": "_r"}
    )
    with rasterio.open(reverse[0]) as raster:
        assert np.array_equal(raster.read(1), expected(config, image[..., ::-1]).argmax(0))


def test_bands_that_are_missing_or_of_another_grid_are_told(tmp_path, config):
    (tmp_path / "scene").mkdir()
    for channel, size in enumerate((40, 40, 20)):
        write_raster(tmp_path / "scene" / f"B{channel}.tif", reflectance(size, size)[..., :1])
    with pytest.raises(DataError, match=r"scene: 0 files match B3\*, it has to be one"):
        predict(config | {"FILES": tmp_path / "scene", "BANDS": ["B0*", "B1*", "B3*"]})
    with pytest.raises(
        DataError, match=r"B2.tif: it has 20 x 20 pixels in uint16, B0.tif has 40 x 40 .* onto one grid"
    ):
        predict(config | {"FILES": tmp_path / "scene", "BANDS": ["B0*", "B1*", "B2*"]})


def test_a_format_that_cannot_hold_an_output_is_refused_before_anything_is_written(tmp_path, config):
    np.save(tmp_path / "scene.npy", reflectance(20, 20))
    with pytest.raises(ConfigError, match=r"which cannot hold probabilities: choose \.npy or \.tif"):
        predict(
            config
            | {"FILES": tmp_path / "scene.npy", "FORMAT": ".png", "OUTPUT": ["classes", "probabilities"]}
        )
    assert not config["OUT_DIR"].exists()
    (file,) = predict(config | {"FILES": tmp_path / "scene.npy", "FORMAT": ".png"})
    assert np.asarray(Image.open(file)).shape == (20, 20)


def test_masks_are_refused_where_values_are_predicted(tmp_path, config):
    import dataclasses

    contract = dataclasses.replace(CONTRACT, task="values")
    save_weights(config["WEIGHTS"], {"model": Net().state_dict(), "contract": contract.to_dict()})
    np.save(tmp_path / "scene.npy", reflectance(20, 20))
    with pytest.raises(ConfigError, match="the model predicts values, not classes"):
        predict(config | {"FILES": tmp_path / "scene.npy", "MASKS": tmp_path})


# -------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_with_masks_the_maps_are_scored_as_scikit_learn_does(tmp_path, config, capsys, dtype):
    from sklearn.metrics import f1_score

    (tmp_path / "masks").mkdir()
    truths, guesses = [], []
    for number, size in enumerate([(300, 40), (20, 20)]):
        image = reflectance(*size, seed=number)
        image[5:9] = 0
        mask = np.random.default_rng(number).integers(0, 3, size).astype(np.uint8)
        mask[:, :3] = 255
        mask[mask == 2] = 77
        np.save(tmp_path / f"{number}.npy", image)
        np.save(tmp_path / "masks" / f"{number}.npy", mask)
        counts = (mask != 255) & (image != 0).any(-1)
        truths.append(np.where(mask == 77, 2, mask)[counts])
        guesses.append(expected(config, image).argmax(0)[counts])
    settings = config | {
        "FILES": str(tmp_path / "[01].npy"),
        "MASKS": tmp_path / "masks",
        "MASK_VALUES": {77: 2},
    }
    predict(settings | {"OUTPUT_DTYPE": dtype})
    results = json.loads((config["OUT_DIR"] / "scores.json").read_text())
    truth, guess = np.concatenate(truths), np.concatenate(guesses)
    exact = f1_score(truth, guess, average=None)
    found = [results[f"f1.{name}"] for name in CONTRACT.class_names]
    np.testing.assert_allclose(found, exact, atol=1e-6 if dtype == "float32" else 0.02)
    assert f"f1 {results['f1']:.4f}" in capsys.readouterr().out
    (tmp_path / "masks" / "1.npy").unlink()
    with pytest.raises(DataError, match="there is no mask called 1"):
        predict(settings)


# -------------------------------------------------------------------------------------------------------- the contract


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda image: np.concatenate([image, image[..., :1]], -1),
            "it has 5 channels, the model was trained on 4",
        ),
        (lambda image: (image / 1e4).astype(np.float32), "it is float32, the model was trained on uint16"),
        (lambda image: (image // 256).astype(np.uint16), "as if they had been divided by a number"),
        (
            lambda image: image * np.uint16([1, 0, 1, 1]) + np.uint16([0, 7, 0, 0]),
            "channel B03 is constant .7.",
        ),
    ],
)
@pytest.mark.parametrize("size", [(30, 30), (100, 80)])
def test_data_unlike_those_of_training_are_told_not_mapped(tmp_path, config, change, message, size):
    np.save(tmp_path / "odd.npy", change(reflectance(*size)))
    with pytest.raises(DataError, match=message):
        predict(config | {"FILES": tmp_path / "odd.npy"})
    assert not config["OUT_DIR"].exists()


def test_odd_values_can_be_predicted_all_the_same(tmp_path, config):
    image = (reflectance(40, 40) // 256).astype(np.uint16) + 1
    np.save(tmp_path / "odd.npy", image)
    (file,) = predict(config | {"FILES": tmp_path / "odd.npy", "CHECK_VALUES": False})
    assert np.load(file).shape == (40, 40)


def test_an_image_that_turns_out_to_be_odd_does_not_cost_the_others(tmp_path, config, monkeypatch):
    monkeypatch.setattr("dida_tools.prediction.jobs._NUM_CHECKED", 0)
    for number in range(5):
        image = reflectance(20 + 20 * (number % 2), 20, seed=number)
        np.save(tmp_path / f"{number}.npy", (image // 256).astype(np.uint16) if number in (1, 2) else image)
    with pytest.raises(DataError) as caught:
        predict(config | {"FILES": str(tmp_path / "[0-9].npy")})
    assert len(caught.value.problems) == 2
    assert sorted(path.name for path in config["OUT_DIR"].glob("*.npy")) == ["0.npy", "3.npy", "4.npy"]


# ----------------------------------------------------------------------------------------------------------- many files


def test_small_files_are_batched_across_files(tmp_path, config):
    (tmp_path / "tiles").mkdir()
    images = [reflectance(32, 32, seed) for seed in range(8)]
    for number, image in enumerate(images):
        np.save(tmp_path / "tiles" / f"{number}.npy", image)
    Net.calls = 0
    files = predict(config | {"FILES": tmp_path / "tiles"})
    assert Net.calls == 3
    for image, file in zip(images, files, strict=True):
        assert np.array_equal(np.load(file), expected(config, image).argmax(0))


def test_what_is_done_is_not_done_again_unless_something_has_changed(tmp_path, config, capsys):
    for number in range(3):
        np.save(tmp_path / f"{number}.npy", reflectance(20, 20, number))
    files = config | {"FILES": [tmp_path / f"{number}.npy" for number in range(3)]}

    def calls(**changes: Any) -> int:
        Net.calls = 0
        predict(files | {"BATCH_SIZE": 1} | changes)
        return Net.calls

    assert calls() == 3 and calls() == 0
    assert "3 of 3 images were predicted before, with the same settings." in capsys.readouterr().out
    np.save(tmp_path / "1.npy", reflectance(20, 20, 9))
    assert calls() == 1
    (config["OUT_DIR"] / "2.npy").unlink()
    assert calls() == 1
    (config["OUT_DIR"] / "2.npy").write_bytes(b"half")
    assert calls() == 1
    assert calls(OVERLAP=0.5) == 3
    torch.manual_seed(8)
    save_weights(config["WEIGHTS"], {"model": nn.ModuleDict({"layer": nn.Conv2d(4, 3, 5)}).state_dict()} | {
        "contract": CONTRACT.to_dict()})  # fmt: skip
    assert calls(OVERLAP=0.5) == 3
    lines = [json.loads(line) for line in (config["OUT_DIR"] / "predictions.jsonl").read_text().splitlines()]
    assert sum(line["event"] == "settings" for line in lines) == 3
    assert lines[-1]["inputs"][0][0].endswith("2.npy") and lines[-1]["output"] == "2.npy"


@pytest.fixture
def two_models(tmp_path, config, monkeypatch) -> Any:
    """Gives a function that predicts two images by model A or B; it returns how many, and whose maps there are."""
    images, maps = [reflectance(20, 20, number) for number in range(2)], {}
    for number, image in enumerate(images):
        np.save(tmp_path / f"{number}.npy", image)
    for seed, name in enumerate("AB"):
        torch.manual_seed(seed)
        save_weights(tmp_path / name, {"model": {f"layer.{key}": value for key, value in nn.Conv2d(
            4, 3, 5).state_dict().items()}, "contract": CONTRACT.to_dict()})  # fmt: skip
        of_model = config | {"WEIGHTS": tmp_path / name}
        maps |= {
            (number, expected(of_model, image).argmax(0).tobytes()): name
            for number, image in enumerate(images)
        }
    assert len(maps) == 4

    def predict_both(name: str, num_processes: int = 1) -> tuple[int, str]:
        Net.calls = 0
        for rank in range(num_processes):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", str(num_processes))
            files = [tmp_path / f"{number}.npy" for number in range(2)]
            predict(config | {"WEIGHTS": tmp_path / name, "FILES": files, "BATCH_SIZE": 1})
        found = [np.load(config["OUT_DIR"] / f"{number}.npy").astype(np.int64) for number in range(2)]
        return Net.calls, "".join(maps[number, array.tobytes()] for number, array in enumerate(found))

    return predict_both


def test_maps_of_another_model_are_not_taken_for_done_whichever_process_made_them(two_models):
    assert two_models("A") == (2, "AA")
    assert two_models("B", num_processes=2) == (2, "BB")
    assert two_models("B") == (0, "BB")
    assert two_models("A") == (2, "AA")
    assert two_models("A", num_processes=2) == (0, "AA")


def test_a_map_that_was_written_but_not_noted_is_not_taken_for_an_earlier_one(two_models, monkeypatch):
    assert two_models("A") == (2, "AA")
    original = Journal.write

    def write(self: Journal, event: dict[str, Any]) -> bool:
        if event["event"] == "prediction":
            raise KeyboardInterrupt  # where a kill can come, too
        return original(self, event)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "write", write)
        two_models("B")
    assert two_models("A") == (1, "AA")


def test_maps_of_which_an_older_ledger_tells_too_little_are_made_again(two_models, config):
    assert two_models("A") == (2, "AA")
    events = read_journal(config["OUT_DIR"] / "predictions.jsonl")
    (config["OUT_DIR"] / "predictions.jsonl").unlink()
    ledger = Journal(config["OUT_DIR"] / "predictions.jsonl")
    for event in events:
        ledger.write({key: value for key, value in event.items() if key != "mtime_ns"})
    ledger.close()
    assert two_models("A") == (2, "AA")
    assert two_models("A") == (0, "AA")


def test_what_a_picture_shows_has_the_colors_of_the_classes(tmp_path, config):
    contract = DataContract(3, dtype="uint8", outputs=3, class_colors=((1, 2, 3), (4, 5, 6), (7, 8, 9)))
    save_weights(config["WEIGHTS"], {"model": Net(3).state_dict(), "contract": contract.to_dict()})
    image = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "photo.jpg", quality=100)
    (file,) = predict(config | {"FILES": tmp_path / "photo.jpg", "MODEL_CONFIG": {"channels": 3}})
    with Image.open(file) as picture:
        numbers, colors = np.asarray(picture), np.asarray(picture.convert("RGB"))
    assert set(np.unique(numbers)) == {0, 1, 2}
    assert np.array_equal(colors, np.array(contract.class_colors)[numbers])


# -------------------------------------------------------------------------------------------------- kills and processes


def run(config: dict[str, Any], files: Any, seconds: float = 0.0, **environment: str) -> subprocess.Popen:
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from tests.prediction.test_maps import Net
from dida_tools.prediction import predict
predict({{**{config | {"MODEL": None, "FILES": files}!r}, "MODEL": Net, "MODEL_CONFIG": {{"seconds": {seconds}}}}})
""".replace("PosixPath", "Path")
    keep = {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | keep, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(
    "ending", [pytest.param("npy", marks=pytest.mark.slow), "tif"]
)  # the same code grows both
def test_a_killed_prediction_goes_on_and_ends_with_the_same_bytes(tmp_path, config, ending):
    image = reflectance(400, 60)
    image[100:130] = 0
    scene = tmp_path / f"scene.{ending}"
    np.save(scene, image) if ending == "npy" else write_raster(scene, image)
    outputs = ["classes", "probabilities"]
    config |= {"OUTPUT": outputs, "PREFIX": "killed_"}
    names = [config["OUT_DIR"] / f"killed_scene_{kind}.{ending}" for kind in outputs]
    rng, kills, rows = random.Random(0), 0, []
    while not all(name.exists() for name in names):
        child = run(config, [scene], seconds=0.08)
        states = [name.with_name(f".{name.name}.unfinished") / "state.json" for name in names]
        # Kill it once it has got on, at any moment.
        begun = rows[-1] if rows else 0
        while child.poll() is None and rows_of(states) <= begun:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))
        if kills < 4:
            child.send_signal(signal.SIGKILL)
        said = child.communicate()[0]
        kills += child.returncode == -signal.SIGKILL
        assert child.returncode in (0, -signal.SIGKILL)
        assert not begun or "goes on at row" in said or child.returncode != 0
        rows.append(rows_of(states))
    assert kills >= 3 and rows == sorted(rows[:-1]) + rows[-1:]
    # An overview of floats and so on is made from the same rows: equal bytes.
    undisturbed = run(config | {"PREFIX": "whole_"}, [scene])
    assert undisturbed.communicate()[0] is not None and undisturbed.returncode == 0
    for name in names:
        assert name.read_bytes() == name.with_name(name.name.replace("killed", "whole")).read_bytes()
    assert not list(config["OUT_DIR"].glob(".*"))


def rows_of(states: list[Path]) -> int:
    try:
        return min(json.loads(state.read_bytes())["rows"] for state in states)
    except FileNotFoundError:
        return 0


def test_another_prediction_into_the_same_folder_is_refused_and_disturbs_nothing(
    tmp_path, config, monkeypatch
):
    images = [reflectance(200, 40, number) for number in range(2)]
    files = [tmp_path / f"{number}.npy" for number in range(2)]
    for file, image in zip(files, images, strict=True):
        np.save(file, image)
    first = run(config, files, seconds=0.05)
    try:
        while rows_of([config["OUT_DIR"] / ".0.npy.unfinished" / "state.json"]) < 60:
            assert first.poll() is None
            time.sleep(0.01)
        first.send_signal(signal.SIGSTOP)
        with pytest.raises(
            UserError, match=r"out: another prediction is writing predictions\.jsonl there: wait until"
        ):
            predict(config | {"FILES": files, "OVERLAP": 0.5})
        # One of several processes notes what it does in another file, but the image is the same.
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(UserError, match=r"out: another prediction is writing 0\.npy there: wait until"):
            predict(config | {"FILES": files[::-1], "OVERLAP": 0.5})
        first.send_signal(signal.SIGCONT)
        first.wait()
    finally:
        first.kill()
        first.communicate()
    assert first.returncode == 0
    for file, image in zip(files, images, strict=True):
        assert np.array_equal(np.load(config["OUT_DIR"] / file.name), expected(config, image).argmax(0))
    assert not list(config["OUT_DIR"].glob(".*"))


def test_rows_that_were_damaged_are_not_gone_on_with(tmp_path, config):
    image = reflectance(200, 40)
    np.save(tmp_path / "scene.npy", image)
    child = run(config, [tmp_path / "scene.npy"], seconds=0.1)
    folder = config["OUT_DIR"] / ".scene.npy.unfinished"
    while rows_of([folder / "state.json"]) < 60:
        assert child.poll() is None
        time.sleep(0.01)
    child.kill()
    child.communicate()
    content = bytearray((folder / "rows.npy").read_bytes())
    content[500] ^= 1
    (folder / "rows.npy").write_bytes(content)
    (file,) = predict(config | {"FILES": tmp_path / "scene.npy", "MODEL_CONFIG": {"seconds": 0.1}})
    assert np.array_equal(np.load(file), expected(config, image).argmax(0))


def test_a_signal_ends_it_between_two_batches(tmp_path, config):
    np.save(tmp_path / "scene.npy", reflectance(400, 40))
    child = run(config, [tmp_path / "scene.npy"], seconds=0.1)
    while rows_of([config["OUT_DIR"] / ".scene.npy.unfinished" / "state.json"]) < 40:
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    child.communicate()
    assert child.returncode == 1  # Preempted, which the scripts make 75 of
    assert not (config["OUT_DIR"] / "scene.npy").exists()


def test_torchrun_shares_the_files_out(tmp_path, config):
    images = {f"{number}.npy": reflectance(20, 24, number) for number in range(5)}
    for name, image in images.items():
        np.save(tmp_path / name, image)
    script = tmp_path / "predict_all.py"
    settings = config | {"MODEL": None, "FILES": [tmp_path / name for name in images]}
    script.write_text(
        f"""
import os, sys; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from tests.prediction.test_maps import Net
from dida_tools.prediction import predict
files = predict({{**{settings!r}, "MODEL": Net}})
Path("{tmp_path}/" + os.environ["RANK"]).write_text(" ".join(file.name for file in files))
""".replace("PosixPath", "Path")
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
    ]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert (tmp_path / "0").read_text() == "0.npy 2.npy 4.npy" and (
        tmp_path / "1"
    ).read_text() == "1.npy 3.npy"
    for name, image in images.items():
        assert np.array_equal(np.load(config["OUT_DIR"] / name), expected(config, image).argmax(0))
    Net.calls = 0
    predict(settings | {"MODEL": Net})
    assert Net.calls == 0  # one process finds what two have done
