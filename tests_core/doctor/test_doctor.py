"""Each check of the doctor finds what it is for, in files of every kind, and nothing in valid data."""

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dida_core.data.build import splits_of, suggest
from dida_core.data.pairs import MaskReading, Pairs
from dida_core.doctor.doctor import Finding, examine, main
from dida_core.errors import exit_code
from rasterio.transform import Affine, from_origin, xy
from rasterio.warp import transform

Examine = Callable[..., list[Finding]]
RNG = np.random.default_rng(0)


def images(count: int = 3, shape: tuple[int, ...] = (40, 44, 3), dtype: str = "uint8") -> list[np.ndarray]:
    return [RNG.integers(1, 200, shape).astype(dtype) for _ in range(count)]


def masks(count: int = 3, values: Any = (0, 1), shape: tuple[int, ...] = (40, 44)) -> list[np.ndarray]:
    return [RNG.choice(np.array(values, np.uint8), shape) for _ in range(count)]


@pytest.fixture
def examined(tmp_path: Path, write: Any) -> Examine:
    """Write splits {"train": (images, masks), ...}, and return what the doctor's command finds."""

    def examine_all(**splits: Any) -> list[Finding]:
        for split, (inputs, targets) in splits.items():
            for number, (image, mask) in enumerate(zip(inputs, targets, strict=True)):
                write(tmp_path / split / "x" / f"{number}.npy", image)
                write(tmp_path / split / "y" / f"{number}.npy", mask)
        return examine_folder(tmp_path)

    return examine_all


def examine_folder(folder: Path) -> list[Finding]:
    splits = {split: Pairs(*places) for split, places in splits_of(folder).items()}
    suggestion = suggest(splits["train"])
    reading = MaskReading(suggestion["DATASET_CONFIG"]["task"], suggestion.get("MASK_VALUES"))
    return examine(splits, folder, reading)


def assert_only(findings: list[Finding], text: str, *files: str, is_problem: bool = True) -> None:
    assert len(findings) == 1, findings
    assert re.search(text, findings[0].text), findings[0].text
    assert (list(findings[0].files), findings[0].is_problem) == (list(files), is_problem)


# ------------------------------------------------------------------------------------------------- valid data


VALID = {
    "uint8": ("uint8", lambda: masks(1)[0]),
    "uint16": ("uint16", lambda: masks(1, (0, 1, 2, 255))[0]),
    "float32": ("float32", lambda: masks(1, (1, 2))[0]),
    "labels": ("uint8", lambda: RNG.integers(0, 2, (40, 44, 4)).astype(np.uint8)),
    "colors": (
        "uint8",
        lambda: np.uint8([(0, 0, 0), (255, 255, 255), (255, 0, 0)])[RNG.integers(0, 3, (40, 44))],
    ),
    "numbers": ("uint8", lambda: RNG.random((40, 44)).astype(np.float32)),
}


@pytest.mark.parametrize("kind", VALID)
def test_nothing_is_found_in_valid_data(examined: Examine, kind: str) -> None:
    dtype, make = VALID[kind]
    splits = ("train", "test", "validation")
    assert examined(**{split: (images(3, dtype=dtype), [make() for _ in range(3)]) for split in splits}) == []


# --------------------------------------------------------------------------------------- axes, masks, classes


def test_channels_first(examined: Examine) -> None:
    first, text = [np.moveaxis(image, -1, 0) for image in images(2)], "files? with channels first"
    assert_only(examined(train=(first, masks(2))), f"2 {text}", "train/x/0.npy", "train/x/1.npy")
    found = examined(train=(first, [mask[None] for mask in masks(2)]))
    assert_only(found, f"2 {text}", "train/x/0.npy", "train/x/1.npy")
    found = examined(train=(images(2), [masks(1)[0][None], *masks(1)]))
    assert_only(found, f"1 {text}", "train/y/0.npy")
    assert examined(train=(images(2, (12, 90, 40)), masks(2, shape=(12, 90)))) == []  # flat, channels last


def test_masks_of_0_and_255(examined: Examine) -> None:
    either, both = masks(values=(0, 255)), masks(2)
    text = r"takes the values of masks for classes by MASK_VALUES=\{255: 1\}"
    assert_only(examined(train=(images(), either), test=(images(), either)), text, is_problem=False)
    found = examined(train=(images(), [*both, either[0]]), test=(images(), masks()))
    assert_only(found, r"1 masks hold 0 and 255 \(2.npy\), the others 0 and 1")
    others = masks(3, (0, 1, 2))  # ignored pixels are no foreground
    assert examined(train=(images(), [*others[:2], either[0]]), test=(images(), others)) == []


LABELS = masks(3, shape=(40, 44, 4))


def test_a_class_that_one_split_lacks(examined: Examine) -> None:
    few, many = masks(3, (0, 1)), masks(3, (0, 1, 2))
    found = examined(train=(images(), few), test=(images(), many))
    assert_only(found, "1 class of test not in train: nothing", "class 2")
    found = examined(train=(images(), many), test=(images(), few))
    assert_only(found, "1 class of train not in test: the results", "class 2", is_problem=False)
    labels = masks(3, shape=(40, 44, 4))
    found = examined(
        train=(images(), labels), test=(images(), [mask * np.uint8([1, 1, 0, 1]) for mask in labels])
    )
    assert_only(found, "1 class of train not in test", "class 2", is_problem=False)


# --------------------------------------------------------------------------------------------------- copies


def test_an_image_of_two_splits(examined: Examine, tmp_path: Path, write: Any) -> None:
    train, targets = (images(), masks()), masks()
    targets[0] = train[1][2]
    found = examined(train=train, test=([train[0][2], *images(2)], targets))
    text = "1 image: each is the same as one of another split; results on what was trained on"
    assert_only(found, text, "test/x/0.npy = train/x/2.npy")
    for kind, array in (("x", train[0][1]), ("y", train[1][1])):  # in another format
        write(tmp_path / "test" / kind / "other.png", array)
    found = examine_folder(tmp_path)
    assert_only(found, "2 images", "test/x/other.png = train/x/1.npy", "test/x/0.npy = train/x/2.npy")


def test_an_image_twice_in_one_split(examined: Examine) -> None:
    inputs, targets = images(), masks()
    found = examined(train=([*inputs, inputs[0]], [*targets, targets[0]]))
    copies = "train/x/3.npy = train/x/0.npy"
    assert_only(found, "1 image: .* of the same split; a val", copies, is_problem=False)
    found = examined(train=([*inputs, inputs[0]], [*targets, targets[1]]))
    assert_only(found, "same split, with another mask", copies)


def test_a_rotated_copy(examined: Examine) -> None:
    train = (images(dtype="float32"), masks())
    for turn in (np.flipud, np.fliplr, np.rot90, lambda array: np.rot90(array, 2)):
        found = examined(train=train, test=([turn(train[0][1])], [turn(train[1][1])]))
        text = "is a flipped or rotated copy of one of another split"
        assert_only(found, text, "test/x/0.npy = train/x/1.npy")


def test_blank_images_are_no_copies(examined: Examine) -> None:
    blank = [np.full((40, 44, 3), 5, np.uint8)]
    assert examined(train=(images() + blank * 2, masks(5)), test=(images() + blank, masks(4))) == []


# ---------------------------------------------------------------------------------------- places on the earth


def utm(column: float, row: float) -> Affine:
    """A grid of 10 m whose first pixel is so many pixels away from a place in UTM zone 33."""
    return from_origin(400_000 + 10 * column, 5_800_000 - 10 * row, 10, 10)


@pytest.fixture
def tiles(tmp_path: Path, write: Any) -> Examine:
    """Examine a row of three tiles of 40 x 40 pixels for training, and one for the test."""

    def examine_tiles(crs: str | None, to_map: Affine, of_train: str | None = "EPSG:32633") -> list[Finding]:
        places = [(f"train/{n}", of_train, utm(40 * n, 0)) for n in range(3)] + [("test/a", crs, to_map)]
        for name, own_crs, own_place in places:
            split, _, stem = name.partition("/")
            for kind, array in (("x", images(1, (40, 40))[0]), ("y", masks(1, shape=(40, 40))[0])):
                write(tmp_path / split / kind / f"{stem}.tif", array, crs=own_crs, transform=own_place)
        return examine_folder(tmp_path)

    return examine_tiles


@pytest.mark.parametrize("crs", ["EPSG:32633", None])
def test_tiles_that_overlap_or_touch(tiles: Examine, crs: str | None) -> None:
    for row, percent in ((10, 75), (-30, 25), (0, 100), (39, 2), (40, 0), (-40, 0), (4000, 0)):
        found = tiles(crs, utm(40, row), crs)
        if percent:
            assert_only(found, f"overlap, by up to {percent}%", f"test/x/a.tif = train/x/1.tif ({percent}%)")
        else:
            assert found == []
    if crs:
        (one,) = tiles(crs, utm(50, 20))
        assert list(one.files) == [
            f"test/x/a.tif = train/x/{n}.tif ({part}%)" for n, part in ((1, 38), (2, 12))
        ]
        assert tiles(None, utm(40, 0)) == []  # without a common coordinate system


@pytest.mark.parametrize("row", [0, 20, 41, -41])
def test_tiles_in_two_coordinate_systems(tiles: Examine, row: int) -> None:
    # The same ground in the neighboring zone, where north is turned: bounding boxes would overlap.
    places = xy(utm(40, row), [0, 0, 1], [0, 1, 0], offset="ul")
    (x, x_right, x_down), (y, y_right, y_down) = transform("EPSG:32633", "EPSG:32632", *places)
    rotated = Affine(x_right - x, x_down - x, x, y_right - y, y_down - y, y)
    assert abs(rotated.b) > 0.1
    found = tiles("EPSG:32632", rotated)
    if abs(row) > 40:
        assert found == []
    else:
        assert len(found) == 1 and found[0].files[0].startswith("test/x/a.tif = train/x/1.tif")
        percent = re.search(r"by up to (\d+)%", found[0].text)
        assert percent and int(percent[1]) == pytest.approx(100 - row * 100 / 40, abs=3)


# -------------------------------------------------------------------------------------------------- refusals


def test_splits_and_images_in_other_units(examined: Examine) -> None:
    train = (images(5, dtype="float32"), masks(5))
    for factor in (1e-4, 200.0, 3.0):
        test = [(image * factor).astype(np.float32) for image in images()]
        found = examined(train=train, test=(test, masks()))
        if factor == 3:
            assert found == []
        else:
            assert_only(found, "the values of test are around .*, those of train around")
    train[0][3] /= 10_000
    found = examined(train=train, test=(images(dtype="float32"), masks()))
    assert_only(found, "1 image with values 1000 times", "train/x/3.npy", is_problem=False)


def test_what_training_would_refuse(examined: Examine) -> None:
    inputs = images(4, dtype="float32")
    inputs[1][3, 4], inputs[2][0, 0, 0] = np.nan, np.inf
    found = examined(train=(inputs, masks(4)), test=(images(), masks()))
    by_text = {finding.text: list(finding.files) for finding in found}
    damaged = "2 files would be refused, as the first of them: 3 values are NaN or infinite: replace them, "
    assert by_text.pop(f"{damaged}or name them as nodata.") == ["train/x/1.npy", "train/x/2.npy"]
    (other,) = by_text
    assert other.startswith("3 files would be refused")
    assert "it is uint8, the model was trained on float32" in other
    assert all(finding.is_problem for finding in found)


# --------------------------------------------------------------------------------------------------- command


def test_the_command_prints_what_is_there_and_what_is_wrong(
    tmp_path: Path, examined: Examine, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = (images(6), masks(6, (0, 255)))
    pairs[0][0][..., 0] = 7
    examined(train=pairs)
    before = sorted(tmp_path.rglob("*"))
    assert main([str(tmp_path)]) == 0
    assert sorted(tmp_path.rglob("*")) == before  # it writes nothing
    lines = capsys.readouterr().out.splitlines()
    for line in (
        f"  train          {tmp_path}",
        "  images         6",
        "  sizes          40 x 44",
        "  channels       3",
        "  dtypes         uint8",
        "  mask channels  1",
        "  mask dtypes    uint8",
        "  doctor         1 finding",
        "  MODEL_CONFIG = {'ch_in': 3, 'ch_out': 2}",
        "  DATASET = NpyDataset",
        "  MASK_VALUES = {255: 1}",
    ):
        assert line in lines, line
    text = "\n".join(lines)
    for pattern in (
        r"mask values    0: \d\d\.\d\d%, 255: ",
        r"channel 1      min 1, max 199, mean 1?\d\d\.?\d*, std 5\d\.\d+\n",
        r"remark         train.py --data takes the values of masks for classes by MASK_VALUES=\{255: 1\}",
        r"METRICS = \{'f1': f1, 'precision': precision",
    ):
        assert re.search(pattern, text), pattern
    examined(test=pairs)
    assert main([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "  PROBLEM        6 images: each is the same as one of another split" in out
    assert "test/x/2.npy = train/x/2.npy, and 3 more remark train.py" in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 110


def test_the_command_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(lambda: main([str(tmp_path / "missing")])) == 1
    out, error = capsys.readouterr()
    assert out == "" and error.startswith(f"DataError: the data has 1 problem: {tmp_path / 'missing'}")


def test_the_package_is_the_command(examined: Examine, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    examined(train=(images(), masks()))
    monkeypatch.setattr(sys, "argv", ["doctor", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("dida_core.doctor", run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0
    assert "  doctor         nothing found" in lines and "  DATASET = NpyDataset" in lines
