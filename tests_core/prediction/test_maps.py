"""Large images and many of them: rasters, scores, what is done already, kills, several processes."""

import functools
import itertools
import json
import os
import signal
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import dida_core
import numpy as np
import pytest
import rasterio
import torch
from dida_core.config.prediction_keys import OUTPUTS
from dida_core.data.contract import PALETTE
from dida_core.data.images import DataError
from dida_core.errors import Preempted, UserError
from dida_core.prediction import predict, predict_run
from dida_core.prediction.ledger import Ledger
from dida_core.prediction.outputs import OutputFile, Raster
from dida_core.runs.rows import current_row
from dida_core.storage.journal import Journal, read_journal
from dida_core.storage.weights import load_weights, save_weights, weights_digest
from PIL import Image
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp
from rasterio.rpc import RPC

from tests.helpers import Child, run_script, wait_until
from tests_core.prediction.samples import (
    CONTRACT,
    GRID,
    Net,
    expected,
    make_config,
    reflectance,
    write_arrays,
    write_raster,
)


def test_a_raster_becomes_a_cloud_optimized_one_on_its_grid(tmp_path, config):
    image = reflectance(700, 600)
    image[100:200, 300:500] = 0
    tiles = {"tiled": True, "blockxsize": 128, "blockysize": 128, "compress": "deflate"}
    scene = write_raster(tmp_path / "scene.tif", image, **tiles)
    probabilities = expected(config, image)
    classes, chances = predict(config | {"FILES": scene, "OUTPUT": ["classes", "probabilities"]})
    assert (classes.name, chances.name) == ("scene_classes.tif", "scene_probabilities.tif")
    with rasterio.open(classes) as file:
        assert (file.crs.to_string(), file.transform) == (GRID["crs"], GRID["transform"])
        assert file.dtypes == ("uint8",) and file.nodata == 255 and file.block_shapes == [(512, 512)]
        assert file.compression.name == "deflate" and file.overviews(1) == [2]
        assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert file.tags()["CLASSES"] == "0: land, 1: water, 2: cloud" and file.tags()["OUTPUT"] == "classes"
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
        assert np.array_equal(file.read(), probabilities, equal_nan=True)
        assert np.nanstd(file.read(1, out_shape=(350, 300))) > 0  # overviews average
    left = {path.name for path in config["OUT_DIR"].iterdir()}
    assert left == {"predictions.jsonl", classes.name, chances.name}


def test_a_raster_that_lies_nowhere_stays_so_without_a_warning(tmp_path, config, recwarn):
    image = reflectance(20, 30)
    write_raster(tmp_path / "a.tif", image, crs=None, transform=None, nodata=None)
    recwarn.clear()
    (written,) = predict(config | {"FILES": tmp_path / "a.tif"})
    assert not [warning for warning in recwarn if "georef" in str(warning.message)]
    with rasterio.open(written) as file:
        assert file.crs is None and file.transform.is_identity and file.nodata == 255


POINTS = [GroundControlPoint(row, col, 10 + col / 100, 50 - row / 100) for row in (0, 20) for col in (0, 30)]
NUMBERS = {f"{axis}_{kind}_coeff": [1.0] * 20 for axis in ("line", "samp") for kind in ("num", "den")}
NUMBERS |= {
    f"{name}_{kind}": 1.0 for name in ("height", "lat", "line", "long", "samp") for kind in ("off", "scale")
}
PLACES: dict[str, dict[str, Any]] = {
    "rotated": GRID | {"transform": GRID["transform"] @ rasterio.Affine.rotation(20)},
    "south up": GRID | {"transform": rasterio.Affine(10, 0, 399_960, 0, 10, 5_900_040)},
    "points": {"gcps": POINTS, "crs": "EPSG:4326", "transform": None},
    "coefficients": {"rpcs": RPC(**NUMBERS, err_bias=None, err_rand=None), "crs": None, "transform": None},
}


@pytest.mark.parametrize("name", PLACES)
def test_where_a_raster_lies_is_kept(tmp_path, config, capsys, name):
    def place(file):
        with rasterio.open(file) as raster:
            points = [(point.row, point.col, point.x, point.y) for point in raster.gcps[0]]
            coefficients = raster.rpcs and raster.rpcs.to_dict()
            return raster.crs, raster.gcps[1], raster.transform, points, coefficients

    scene = write_raster(tmp_path / "scene.tif", reflectance(20, 30), **PLACES[name])
    (written,) = predict(config | {"FILES": scene})
    assert place(written) == place(scene)
    assert "cannot hold where" not in capsys.readouterr().out
    predict(config | {"FILES": scene, "FORMAT": ".png"})
    assert "FORMAT is '.png', which cannot hold where the images lie" in capsys.readouterr().out


def test_a_picture_with_a_world_file_gives_a_raster(tmp_path):
    config = make_config(tmp_path, Net(3), replace(CONTRACT, channels=3, dtype="uint8", mean=(), maximum=()))
    config["MODEL_CONFIG"] = {"channels": 3}
    pixels = np.random.default_rng(0).integers(1, 255, (20, 30, 3)).astype(np.uint8)
    Net.calls = 0
    for name in ("a.png", "b.png"):
        Image.fromarray(pixels).save(tmp_path / name)
    (tmp_path / "a.pgw").write_text("10\n0\n0\n-10\n500005\n4999995\n")
    files = predict(config | {"FILES": [tmp_path / "a.png", tmp_path / "b.png"]})
    assert [file.name for file in files] == ["a.tif", "b.png"] and Net.calls == 2
    predict(config | {"FILES": [tmp_path / "a.png", tmp_path / "b.png"]})
    assert Net.calls == 2
    with rasterio.open(files[0]) as raster:
        assert raster.transform == rasterio.Affine(10, 0, 500_000, 0, -10, 5_000_000)
        assert np.array_equal(raster.read(1), np.asarray(Image.open(files[1])))
    (tmp_path / "a.pgw").write_text("10\n0\n0\n-10\n0\n0\n")  # the map has to move, too
    predict(config | {"FILES": [tmp_path / "a.png", tmp_path / "b.png"]})
    assert Net.calls == 3


@pytest.mark.parametrize("height", [30, 300])
def test_masked_pixels_are_nodata_in_maps_and_move_no_other(tmp_path, height):
    config = make_config(tmp_path, Net(), replace(CONTRACT, nodata=None))
    image, missing = reflectance(height, 60), np.zeros((height, 60), bool)
    missing[5:25, 10:40] = True
    maps = []
    for value in (9, 60000):
        image[missing] = value
        scene = write_raster(tmp_path / "scene.tif", image, nodata=None)
        with rasterio.open(scene, "r+") as raster:
            raster.write_mask(~missing)
        (file,) = predict(config | {"FILES": scene, "OUTPUT": "probabilities"})
        with rasterio.open(file) as raster:
            assert np.isnan(raster.nodata)
            maps.append(raster.read())
    assert np.array_equal(*maps, equal_nan=True) and np.array_equal(np.isnan(maps[0]).all(0), missing)
    image[missing] = 0  # as nodata, this is the same
    again = expected(make_config(tmp_path, Net()), image)
    assert np.array_equal(maps[0], again, equal_nan=True)


def test_masks_are_scored_where_they_hold_data_and_lie_as_their_image(tmp_path, config):
    (tmp_path / "masks").mkdir()
    image, labels = reflectance(40, 50), np.random.default_rng(0).integers(0, 3, (40, 50, 1))
    write_raster(tmp_path / "a.tif", image)
    files = config | {"FILES": tmp_path / "a.tif", "MASKS": tmp_path / "masks"}

    def scores(stored, **options):
        file = write_raster(tmp_path / "masks" / "a.tif", stored, **options)
        if "nodata" in options and options["nodata"] is None:
            with rasterio.open(file, "r+") as raster:
                raster.write_mask(hidden)
        predict(files)
        return json.loads((config["OUT_DIR"] / "scores.json").read_text())

    hidden = np.zeros((40, 50), bool)
    hidden[:, 8:] = True
    ignored = np.where(hidden[..., None], labels, 255).astype(np.uint8)
    plain = scores(ignored)
    for value in (-9999, np.float32(-3.4028234663852886e38), np.nan):
        assert scores(np.where(ignored == 255, np.float32(value), ignored), nodata=value) == plain
    assert scores(np.where(ignored == 255, 2, ignored), nodata=None) == plain
    with pytest.raises(DataError, match="masks: every pixel is ignored or without data"):
        scores(np.full_like(ignored, 99), nodata=99)
    moved = {"transform": GRID["transform"] @ rasterio.Affine.translation(0, 3)}
    with pytest.raises(DataError, match=r"it lies at \(399960, 5900010\).* a\.tif at \(399960, 5900040"):
        scores(ignored, **moved)


def test_the_nodata_value_of_a_file_counts_more_than_that_of_training(tmp_path, config):
    for size in [(30, 30), (90, 70)]:
        image = reflectance(*size)
        image[5:15] = 65535
        (file,) = predict(config | {"FILES": write_raster(tmp_path / "scene.tif", image, nodata=65535)})
        with rasterio.open(file) as raster:
            assert raster.nodata == 255
            assert np.array_equal(raster.read(1) == 255, (image == 65535).all(-1))


def test_bytes_in_a_raster_have_a_scale_and_no_colors(tmp_path, config):
    image = reflectance(40, 50)
    files = {"FILES": write_raster(tmp_path / "scene.tif", image), "OUTPUT_DTYPE": "uint8"}
    written = predict(config | files | {"OUTPUT": ["confidence", "probabilities"]})
    p = expected(config, image)
    for file, wanted in zip(written, (p.max(0, keepdims=True), p), strict=True):
        with rasterio.open(file) as raster:
            assert len(set(raster.scales)) == 1 and raster.dtypes[0] == "uint8"
            np.testing.assert_allclose(raster.read() * raster.scales[0], wanted, atol=0.5 / 254 + 1e-6)
            assert not {ColorInterp.red, ColorInterp.alpha} & set(raster.colorinterp)


def test_multi_label_outputs_have_a_band_for_each_class(tmp_path):
    config = make_config(tmp_path, Net(), replace(CONTRACT, task="multi-label", threshold=(0.2, 0.5, 0.7)))
    image = reflectance(40, 50)
    p = expected(config, image)
    files = predict(config | {"FILES": write_raster(tmp_path / "scene.tif", image), "OUTPUT": OUTPUTS})
    read = {}
    for kind, file in zip(OUTPUTS, files, strict=True):
        with rasterio.open(file) as raster:
            assert raster.descriptions == ("land", "water", "cloud")
            read[kind] = raster.read()
    assert np.array_equal(read["classes"], p >= np.array([0.2, 0.5, 0.7], np.float32)[:, None, None])
    np.testing.assert_allclose(read["confidence"], np.maximum(p, 1 - p), atol=1e-6)
    np.testing.assert_allclose(read["entropy"], -(p * np.log2(p) + (1 - p) * np.log2(1 - p)), atol=1e-5)


def test_single_band_files_are_one_image_in_the_given_order(tmp_path, config):
    image, names = reflectance(60, 50), ("B02", "B03", "B04", "B08")
    for scene, shift in (("S2A_1", 0), ("S2A_2", 3)):
        (tmp_path / scene).mkdir()
        for channel, name in enumerate(names):
            write_raster(tmp_path / scene / f"T33_{name}_10m.tif", image[..., channel : channel + 1] + shift)
        (tmp_path / scene / "preview.png").write_bytes(b"")
    scenes = {"FILES": str(tmp_path / "S2A_*"), "BANDS": [f"*_{name}_*.tif" for name in names]}
    files = predict(config | scenes)
    files += predict(config | scenes | {"BANDS": scenes["BANDS"][::-1], "SUFFIX": "_r"})
    assert [file.name for file in files] == ["S2A_1.tif", "S2A_2.tif", "S2A_1_r.tif", "S2A_2_r.tif"]
    for file, pixels in zip(files, (image, image + 3, image[..., ::-1]), strict=False):
        with rasterio.open(file) as raster:
            assert raster.crs.to_string() == GRID["crs"]
            assert np.array_equal(raster.read(1), expected(config, pixels).argmax(0))
    write_raster(tmp_path / "S2A_2" / "T33_B08_10m.tif", image[:20, :20, :1])
    with pytest.raises(DataError, match=r"S2A_1: 0 files match \*_B11_\*\.tif: with BANDS, an"):
        predict(config | scenes | {"BANDS": ["*_B02_*.tif", "*_B11_*.tif"]})
    with pytest.raises(DataError, match=r"B08_10m.tif: it has 20 x 20 pixels .* has 60 x 50 .* one grid"):
        predict(config | scenes)


@pytest.mark.parametrize("ending", [".npy", ".tif"])
def test_memory_does_not_grow_with_the_height(tmp_path, config, ending):
    def peak(height: int) -> int:
        np.save(tmp_path / "scene.npy", np.full((height, 200, 4), 500, np.uint16))
        tracemalloc.start()
        predict(config | {"FILES": tmp_path / "scene.npy", "OUTPUT": "probabilities", "FORMAT": ending})
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    config |= {"CHECK_VALUES": False}
    peak(50)  # what is made once
    low, high = peak(300), peak(2000)
    assert high < 1.5 * low and high > 200 * 32 * 3 * 4


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_with_masks_the_maps_are_scored(tmp_path, config, capsys, dtype):
    (tmp_path / "masks").mkdir()
    images, masks, truths, guesses = [], [], [], []
    for number, size in enumerate([(300, 40), (20, 20)]):
        image, mask = reflectance(*size, seed=number), np.random.default_rng(number).integers(0, 3, size)
        image[5:9] = 0
        mask[:, :3] = 255
        counts = (mask != 255) & (image != 0).any(-1)
        truths.append(mask[counts])
        guesses.append(expected(config, image).argmax(0)[counts])
        images.append(image)
        masks.append(np.where(mask == 2, 77, mask).astype(np.uint8))
    masks = write_arrays(tmp_path / "masks", *masks)
    files = {"FILES": write_arrays(tmp_path, *images), "MASKS": tmp_path / "masks", "MASK_VALUES": {77: 2}}
    predict(config | files | {"OUTPUT_DTYPE": dtype})
    results = json.loads((config["OUT_DIR"] / "scores.json").read_text())
    truth, guess = (np.concatenate(arrays)[:, None] == range(3) for arrays in (truths, guesses))
    exact = 2 * (truth & guess).sum(0) / (truth.sum(0) + guess.sum(0))
    found = [results[f"f1.{name}"] for name in CONTRACT.class_names]
    np.testing.assert_allclose(found, exact, atol=1e-6 if dtype == "float32" else 0.02)
    assert f"f1 {results['f1']:.4f}" in capsys.readouterr().out
    made = sorted(file.name for file in config["OUT_DIR"].iterdir() if file.suffix == ".npy")
    assert made == ["0.npy", "1.npy"]  # what was asked for, under the names without masks
    kept = predict(config | files | {"OUTPUT": ["classes", "probabilities"]})
    assert len(kept) == 4 and all(file.is_file() for file in kept)
    assert len(predict(config | files)) == 2 and all(file.is_file() for file in kept)
    np.save(masks[1], np.zeros((20, 21), np.uint8))
    with pytest.raises(DataError, match=r"1\.npy: its size is 20 x 21 pixels, that of the map 20 x 20"):
        predict(config | files)
    masks[1].unlink()
    with pytest.raises(DataError, match="there is no mask called 1"):
        predict(config | files)


def test_what_is_done_is_not_done_again_unless_something_has_changed(tmp_path, config, capsys):
    write_arrays(tmp_path, *[reflectance(20, 20, seed) for seed in range(3)])
    files = config | {"FILES": [tmp_path / f"{number}.npy" for number in range(3)]}

    def calls(**changes: Any) -> int:
        Net.calls = 0
        predict(files | changes)
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
    save_weights(config["WEIGHTS"], {"model": Net(seed=8).state_dict(), "contract": CONTRACT.to_dict()})
    assert calls(OVERLAP=0.5) == 3
    lines = [json.loads(line) for line in (config["OUT_DIR"] / "predictions.jsonl").read_text().splitlines()]
    assert sum(line["event"] == "settings" for line in lines) == 3
    assert lines[-1]["inputs"][0][0].endswith("2.npy") and lines[-1]["output"] == "2.npy"


@pytest.fixture
def two_models(tmp_path, config, monkeypatch) -> Callable[..., tuple[int, str]]:
    """Return a function that predicts two images by model A or B: how many anew, and whose maps are there."""
    images, maps = [reflectance(20, 20, number) for number in range(2)], {}
    files = write_arrays(tmp_path, *images)
    for seed, name in enumerate("AB"):
        save_weights(tmp_path / name, {"model": Net(seed=seed).state_dict(), "contract": CONTRACT.to_dict()})
        for number, image in enumerate(images):
            of_model = expected(config | {"WEIGHTS": tmp_path / name}, image).argmax(0).astype(np.uint8)
            maps[number, of_model.tobytes()] = name
    assert len(maps) == 4

    def predict_both(name: str, num_processes: int = 1) -> tuple[int, str]:
        Net.calls = 0
        for rank in range(num_processes):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", str(num_processes))
            predict(config | {"WEIGHTS": tmp_path / name, "FILES": files})
        found = [np.load(config["OUT_DIR"] / file.name).tobytes() for file in files]
        return Net.calls, "".join(maps[number, content] for number, content in enumerate(found))

    return predict_both


def test_maps_of_another_model_are_not_taken_for_done_whichever_process_made_them(two_models):
    assert two_models("A") == (2, "AA")
    assert two_models("B", num_processes=2) == (2, "BB")
    assert two_models("B") == (0, "BB")
    assert two_models("A") == (2, "AA")
    assert two_models("A", num_processes=2) == (0, "AA")


def test_a_map_that_was_written_but_not_recorded_is_not_taken_for_an_earlier_one(two_models, monkeypatch):
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


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("[!.]*") if file.suffix != ".jsonl"}


def slowly(tmp_path: Path, config: dict[str, Any], work: Callable[[], int]) -> Child:
    """Start a process that predicts slowly, and wait until it has begun 0.npy."""
    Net.seconds = 0.05
    child = Child(work, tmp_path / "said")
    Net.seconds = 0.0
    wait_until(lambda: any((config["OUT_DIR"] / ".0.npy.unfinished").glob("*")))
    return child


def predict_until(config: dict[str, Any], moment: int) -> int:
    """Predict in a process that kills itself before its so-many-th step."""
    steps = itertools.count(1)

    def watched(step: Callable) -> Callable:
        def call(*arguments: Any, **options: Any) -> Any:
            if next(steps) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*arguments, **options)

        return call

    names = [(Net, "forward"), (OutputFile, "write"), (OutputFile, "finish"), (Raster, "write")]
    for owner, name in [*names, (Ledger, "add"), (os, "fsync"), (os, "replace")]:
        setattr(owner, name, watched(getattr(owner, name)))
    return len(predict(config)) * 0


def test_a_killed_prediction_resumes_file_by_file(tmp_path, config):
    files = [*write_arrays(tmp_path, reflectance(90, 50), reflectance(20, 20)), tmp_path / "a.tif"]
    write_raster(files[-1], reflectance(100, 60))
    config |= {"FILES": files, "OUTPUT": ["classes", "probabilities"]}
    predict(config | {"OUT_DIR": tmp_path / "undisturbed"})
    undisturbed, finished, codes = contents(tmp_path / "undisturbed"), {}, []
    for moment in itertools.count(1, 2):
        child = Child(functools.partial(predict_until, config, moment), tmp_path / "said")
        assert child.wait() and child.code in (0, -signal.SIGKILL), child.said()
        codes.append(child.code)
        found = contents(config["OUT_DIR"])
        assert found.items() <= undisturbed.items()  # no half of a file has a name
        stamps = {name: (config["OUT_DIR"] / name).stat().st_mtime_ns for name in found}
        assert finished.items() <= stamps.items()  # what is finished is not done again
        if child.code == 0:
            break
        # Only once the next image is begun, both outputs of one are known to be in the ledger.
        finished = {name: stamps[name] for name in sorted(stamps)[: 2 * ((len(stamps) - 1) // 2)]}
    assert len(codes) > 8 and found == undisturbed and not list(config["OUT_DIR"].glob(".*"))


def test_what_was_left_unfinished_is_begun_anew(tmp_path, config):
    leftover = config["OUT_DIR"] / ".0.npy.unfinished"  # of version 0.1, with its rows and their state
    leftover.mkdir(parents=True)
    np.save(leftover / "rows.npy", np.zeros((100, 40), np.uint8))
    (leftover / "state.json").write_text('{"rows": 64}')
    image = reflectance(100, 40)
    (file,) = predict(config | {"FILES": write_arrays(tmp_path, image)})
    assert np.array_equal(np.load(file), expected(config, image).argmax(0))
    assert not list(config["OUT_DIR"].glob(".*"))


def test_another_prediction_into_the_same_folder_is_refused_and_disturbs_nothing(
    tmp_path, config, monkeypatch
):
    images = [reflectance(200, 40, number) for number in range(2)]
    files = write_arrays(tmp_path, *images)
    first = slowly(tmp_path, config, lambda: len(predict(config | {"FILES": files})) * 0)
    os.kill(first.pid, signal.SIGSTOP)
    busy = r"out: another prediction is writing {} there: wait until"
    with pytest.raises(UserError, match=busy.format(r"predictions\.jsonl")):
        predict(config | {"FILES": files, "OVERLAP": 0.5})
    # One of several processes has a ledger of its own, but the image is the same.
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=busy.format(r"0\.npy")):
        predict(config | {"FILES": files[::-1], "OVERLAP": 0.5})
    os.kill(first.pid, signal.SIGCONT)
    assert first.wait() and first.code == 0, first.said()
    for file, image in zip(files, images, strict=True):
        assert np.array_equal(np.load(config["OUT_DIR"] / file.name), expected(config, image).argmax(0))
    assert not list(config["OUT_DIR"].glob(".*"))


def test_a_signal_ends_it_between_two_batches(tmp_path, config):
    config |= {"FILES": write_arrays(tmp_path, reflectance(400, 40))}

    def ends_early() -> int:
        with pytest.raises(Preempted):
            predict(config)
        return 7

    child = slowly(tmp_path, config, ends_early)
    started = time.monotonic()
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait() and child.code == 7, child.said()
    assert time.monotonic() - started < 5
    assert "Stopped by a signal; all files in" in child.said()
    assert {path.name for path in config["OUT_DIR"].iterdir()} == {"predictions.jsonl"}


def test_processes_of_torchrun_share_the_files(tmp_path, config):
    images = [reflectance(20, 24, number) for number in range(5)]
    config |= {"FILES": write_arrays(tmp_path, *images)}

    def predict_as(rank: str) -> int:
        os.environ |= {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank}
        return len(predict(config))

    children = [Child(functools.partial(predict_as, rank), tmp_path / f"said.{rank}") for rank in "01"]
    assert all(child.wait() for child in children) and [child.code for child in children] == [3, 2]
    assert [len(read_journal(file)) for file in sorted(config["OUT_DIR"].glob("*.jsonl"))] == [3, 4]
    for number, image in enumerate(images):
        found = np.load(config["OUT_DIR"] / f"{number}.npy")
        assert np.array_equal(found, expected(config, image).argmax(0))
    Net.calls = 0
    assert len(predict(config)) == 5 and Net.calls == 0  # one process finds what two have done


def test_a_run_predicts_by_its_name(tmp_path, small_run):
    root = small_run.root
    image = np.random.default_rng(0).integers(1, 256, (40, 300, 3), dtype=np.uint8)
    options = ["-i", *write_arrays(tmp_path, image), "-o", tmp_path / "out", "--format", "tif", "--no-check"]
    options += ["--output", "confidence", "classes", "--tile", 64, "--overlap", 0.5, "--prefix", "p_"]
    done = run_script("run_prediction.py", small_run.name[:-1], *options, root=root)
    assert done.returncode == 0 and "2 predictions in" in done.stdout, done.stderr
    written = sorted(path.name for path in (tmp_path / "out").glob("*.tif"))
    assert written == ["p_0_classes.tif", "p_0_confidence.tif"]
    refused = run_script("run_prediction.py", "nonsense", *options, root=root)
    assert refused.returncode == 1 and "no run is called 'nonsense'" in refused.stderr
    refused = run_script("predict.py", *options, "--augment", "some", "--weights", tmp_path / "nowhere.pt")
    assert refused.returncode == 1 and "AUGMENT is 'some': it must be one of" in refused.stderr


def test_a_map_is_traced_to_its_model_and_the_row_of_its_run(tmp_path, small_run):
    image = np.random.default_rng(0).integers(1, 256, (40, 60, 3), dtype=np.uint8)
    scene, out = write_raster(tmp_path / "scene.tif", image), tmp_path / "maps"
    options = {"CHECK_VALUES": False, "TILE": 32}
    np.save(tmp_path / "other.npy", image)
    predict_run(
        small_run.name, tmp_path / "other.npy", out, small_run.global_config, **options, FORMAT=".png"
    )
    predict_run(small_run.name, scene, out, small_run.global_config, **options)
    row = current_row(Path(small_run.global_config["LOG_DIR"]) / small_run.name)
    assert row["BEST_DIGEST"] == weights_digest(load_weights(small_run.weights)["model"])
    with Image.open(out / "other.png") as picture, rasterio.open(out / "scene.tif") as raster:
        for tags in (picture.text, raster.tags()):
            assert (tags["RUN"], tags["MODEL_DIGEST"]) == (row["NAME"], row["BEST_DIGEST"])
            assert tags["VERSIONS"] == f"dida_core {dida_core.__version__}, torch {torch.__version__}"
            assert tags["CLASSES"] == "0: ground, 1: left, 2: right"
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    made = [line for line in lines if line["event"] == "prediction"]
    assert [line["output"] for line in made] == ["other.png", "scene.tif"]
    for line in made:
        assert (line["run"], line["model_digest"]) == (row["NAME"], row["BEST_DIGEST"])
        assert line["versions"]["torch"] == torch.__version__
        assert line["classes"] == ["ground", "left", "right"]
