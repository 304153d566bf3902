"""Each check of the doctor finds what it is for, in files of every kind, and says nothing about sound data."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.transform import Affine, from_origin, xy
from rasterio.warp import transform

from dida_tools.utils.data import NpyDataset
from dida_tools.utils.data.doctor import Finding, examine, report, shared_area
from dida_tools.utils.data.fingerprint import folders_of, main, suggest

Examine = Callable[..., list[Finding]]
RNG = np.random.default_rng(0)


def images(count: int = 3, shape: tuple[int, ...] = (40, 44, 3), dtype: str = "uint8") -> list[np.ndarray]:
    return [RNG.integers(1, 200, shape).astype(dtype) for _ in range(count)]


def masks(count: int = 3, values: Any = (0, 1), shape: tuple[int, ...] = (40, 44)) -> list[np.ndarray]:
    return [RNG.choice(np.array(values, np.uint8), shape) for _ in range(count)]


@pytest.fixture
def examined(tmp_path: Path, write: Any) -> Examine:
    """Writes parts {"train": (images, masks), ...}, and gives what the doctor says of them as the command calls it."""

    def examine_all(ending: str = ".npy", nodata: float | None = None, **parts: Any) -> list[Finding]:
        for part, (inputs, targets) in parts.items():
            for number, (image, mask) in enumerate(zip(inputs, targets, strict=True)):
                write(tmp_path / part / "x" / f"{number}{ending}", image)
                write(tmp_path / part / "y" / f"{number}{ending}", mask)
        return examine_folder(tmp_path, nodata)

    return examine_all


def examine_folder(folder: Path, nodata: float | None = None) -> list[Finding]:
    datasets = {part: NpyDataset(*places, nodata=nodata) for part, places in folders_of(folder).items()}
    suggestion = suggest(datasets["train"])
    return examine(datasets, folder, suggestion["DATASET_CONFIG"]["task"], suggestion.get("MASK_VALUES"))


def assert_only(findings: list[Finding], text: str, *files: str, is_problem: bool = False) -> None:
    assert len(findings) == 1, report(findings)
    assert re.search(text, findings[0].text), findings[0].text
    assert (list(findings[0].files), findings[0].is_problem) == (list(files), is_problem)


# ----------------------------------------------------------------------------------------------------------- sound data


@pytest.mark.parametrize("values", [(0, 1), (0, 1, 2, 255), (1, 2)])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_nothing_is_said_of_sound_data(examined: Examine, values: tuple[int, ...], dtype: str) -> None:
    parts = {part: (images(4, dtype=dtype), masks(4, values)) for part in ("train", "test", "validation")}
    findings = examined(**parts)
    assert findings == [] and report(findings) == "doctor: nothing found"


def test_nothing_is_said_of_labels_colors_and_numbers(tmp_path: Path, write: Any) -> None:
    colors = np.array([(0, 0, 0), (255, 255, 255), (255, 0, 0)], np.uint8)
    targets = {
        "labels": lambda: RNG.integers(0, 2, (40, 44, 4)).astype(np.uint8),
        "colors": lambda: colors[RNG.integers(0, 3, (40, 44))],
        "numbers": lambda: RNG.random((40, 44)).astype(np.float32),
    }
    for kind, make in targets.items():
        for part in ("train", "test"):
            for number, image in enumerate(images(2)):
                write(tmp_path / kind / part / "x" / f"{number}.npy", image)
                write(tmp_path / kind / part / "y" / f"{number}.npy", make())
        assert examine_folder(tmp_path / kind) == [], kind


# ------------------------------------------------------------------------------------------------------- axes and masks


def test_channels_first(examined: Examine) -> None:
    first = [np.moveaxis(image, -1, 0) for image in images(2)]
    found = examined(train=(first, masks(2)))
    assert_only(found, "2 images with channels first", "train/x/0.npy", "train/x/1.npy", is_problem=True)


def test_channels_first_of_both(examined: Examine) -> None:
    first = [np.moveaxis(image, -1, 0) for image in images(2)]
    (found,) = examined(train=(first, [mask[None] for mask in masks(2)]))
    assert "2 images with channels first" in found.text and found.is_problem


def test_channels_first_of_masks(examined: Examine) -> None:
    assert_only(
        examined(train=(images(1), [masks(1)[0][None]])), "1 mask with", "train/y/0.npy", is_problem=True
    )


def test_flat_images_have_their_channels_last(examined: Examine) -> None:
    assert examined(train=(images(2, (12, 90, 40)), masks(2, shape=(12, 90)))) == []


def test_masks_of_0_and_255(examined: Examine) -> None:
    findings = examined(train=(images(), masks(values=(0, 255))), test=(images(), masks(values=(0, 255))))
    assert_only(findings, r"masks of 0 and 255: .*MASK_VALUES=\{255: 1\}")


def test_masks_of_0_and_255_among_others(examined: Examine) -> None:
    found = examined(train=(images(), [*masks(2), *masks(1, (0, 255))]))
    assert_only(found, "1 mask of 0 and 255 among masks of 0 and 1", "train/y/2.npy", is_problem=True)


def test_ignored_pixels_are_no_foreground(examined: Examine) -> None:
    assert examined(train=(images(), [*masks(2, (0, 1, 2)), *masks(1, (0, 255))])) == []


def test_masks_that_are_nearly_all_ignored(examined: Examine) -> None:
    targets = masks(3, (0, 1, 255))
    targets[1][:39], targets[1][39:] = 255, 1
    targets[2][:34] = 255  # two thirds of the rest, 10 %, count
    assert_only(examined(train=(images(), targets)), "1 mask with less than 5%", "train/y/1.npy")


@pytest.mark.parametrize(
    ("train", "test", "text", "label", "is_problem"),
    [
        ((0, 1), (0, 1, 2), "1 class of test not in train", "class 2", True),
        ((0, 1, 2), (0, 1), "1 class of train not in test", "class 2", False),
    ],
)
def test_a_class_that_one_part_lacks(
    examined: Examine, train: Any, test: Any, text: str, label: str, is_problem: bool
) -> None:
    findings = examined(train=(images(), masks(3, train)), test=(images(), masks(3, test)))
    assert_only(findings, text, label, is_problem=is_problem)


def test_a_label_that_one_part_lacks(examined: Examine) -> None:
    train = masks(2, shape=(40, 44, 4))
    test = [mask * np.uint8([1, 1, 0, 1]) for mask in masks(2, shape=(40, 44, 4))]
    assert_only(
        examined(train=(images(2), train), test=(images(2), test)), "1 class of train not in test", "class 2"
    )


# ------------------------------------------------------------------------------------------------------------- channels


def test_constant_channels(examined: Examine) -> None:
    inputs = images(shape=(40, 44, 4))
    for image in inputs:
        image[..., 2] = 7
    inputs[1][..., 0] = 9
    findings = examined(train=(inputs, masks()))
    assert [finding.text.partition(":")[0] for finding in findings] == [
        "channel 2 has the same value in all images",
        "channel 0 is constant in 1 image of 3",
    ]
    assert list(findings[1].files) == ["train/x/1.npy"] and not any(
        finding.is_problem for finding in findings
    )


def test_equal_channels(examined: Examine) -> None:
    inputs = images(shape=(40, 44, 5))
    for image in inputs:
        image[..., 3] = image[..., 1]
    inputs[0][..., 2] = inputs[0][..., 0]  # in one image only
    assert_only(examined(train=(inputs, masks())), "channels 1, 3 are equal in all images")


# ----------------------------------------------------------------------------------------------------------- duplicates


def test_an_image_of_two_parts(examined: Examine) -> None:
    train, targets = (images(), masks()), masks()
    targets[0] = train[1][2]
    findings = examined(train=train, test=([train[0][2], *images(2)], targets))
    assert_only(
        findings,
        "1 image is the same as one of another part",
        "test/x/0.npy = train/x/2.npy",
        is_problem=True,
    )


def test_an_image_in_two_formats(tmp_path: Path, write: Any, examined: Examine) -> None:
    train = (images(), masks())
    for kind, values in (("x", train[0][1]), ("y", train[1][1])):
        write(tmp_path / "test" / kind / "other.png", values)
    findings = examined(train=train)
    assert_only(findings, "1 image is the same as one", "test/x/other.png = train/x/1.npy", is_problem=True)


def test_an_image_twice_in_one_part(examined: Examine) -> None:
    inputs, targets = images(), masks()
    findings = examined(train=([*inputs, inputs[0]], [*targets, targets[0]]))
    assert_only(findings, "1 image is the same as one of the same part", "train/x/3.npy = train/x/0.npy")


def test_an_image_with_two_masks(examined: Examine) -> None:
    inputs = images()
    findings = examined(train=([*inputs, inputs[0]], masks(4)))
    assert_only(findings, "same part, with another mask", "train/x/3.npy = train/x/0.npy", is_problem=True)


@pytest.mark.parametrize("turn", [np.flipud, np.fliplr, np.rot90, lambda array: np.rot90(array, 2)])
def test_a_turned_copy(examined: Examine, turn: Any) -> None:
    train = (images(dtype="float32"), masks())
    findings = examined(train=train, test=([turn(train[0][1])], [turn(train[1][1])]))
    text = "1 image is a flipped or turned copy of one of another part"
    assert_only(findings, text, "test/x/0.npy = train/x/1.npy", is_problem=True)


def test_blank_images_are_no_duplicates(examined: Examine) -> None:
    blank = [np.full((40, 44, 3), 5, np.uint8)]
    findings = examined(train=(images() + blank * 2, masks(5)), test=(images() + blank, masks(4)))
    names = ["train/x/3.npy", "train/x/4.npy", "test/x/3.npy"]
    assert_only(findings, "3 images of one value alone", *names)


# -------------------------------------------------------------------------------------------------- places on the earth


def write_tile(path: Path, crs: str | None, to_map: Affine, size: int = 40) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {"driver": "GTiff", "height": size, "width": size, "count": 1, "dtype": "uint8"}
    with rasterio.open(path, "w", crs=crs, transform=to_map, **profile) as raster:
        raster.write(RNG.integers(1, 200, (1, size, size), dtype=np.uint8))
    mask = path.parents[1] / "y" / path.name
    mask.parent.mkdir(exist_ok=True)
    with rasterio.open(mask, "w", crs=crs, transform=to_map, **profile) as raster:
        raster.write(RNG.integers(0, 2, (1, size, size), dtype=np.uint8))


def utm(column: float, row: float) -> Affine:
    """A grid of 10 m whose first pixel is so many pixels away from a place in UTM zone 33."""
    return from_origin(400_000 + 10 * column, 5_800_000 - 10 * row, 10, 10)


def tiles(
    folder: Path, test: tuple[str | None, Affine], train_crs: str | None = "EPSG:32633"
) -> list[Finding]:
    """A row of three tiles for training, and one for the test."""
    for number in range(3):
        write_tile(folder / "train" / "x" / f"{number}.tif", train_crs, utm(40 * number, 0))
    write_tile(folder / "test" / "x" / "a.tif", *test)
    return examine_folder(folder)


@pytest.mark.parametrize(("row", "share"), [(10, 75), (-30, 25), (0, 100), (39, 2)])
@pytest.mark.parametrize("crs", ["EPSG:32633", None])
def test_tiles_that_overlap(tmp_path: Path, row: int, share: int, crs: str | None) -> None:
    found = tiles(tmp_path, (crs, utm(40, row)), crs)
    assert_only(
        found, f"overlap, by up to {share}%", f"test/x/a.tif = train/x/1.tif ({share}%)", is_problem=True
    )


def test_tiles_that_overlap_several(tmp_path: Path) -> None:
    (found,) = tiles(tmp_path, ("EPSG:32633", utm(50, 20)))
    assert list(found.files) == ["test/x/a.tif = train/x/1.tif (38%)", "test/x/a.tif = train/x/2.tif (12%)"]


@pytest.mark.parametrize("row", [40, -40, 4000])
def test_tiles_that_touch_or_lie_apart(tmp_path: Path, row: int) -> None:
    assert tiles(tmp_path, ("EPSG:32633", utm(40, row))) == []


@pytest.mark.parametrize("row", [0, 41, -41])
def test_tiles_in_two_coordinate_systems(tmp_path: Path, row: int) -> None:
    # The same ground in the neighboring zone, where north is turned by some degrees: bounding boxes would overlap.
    places = xy(utm(40, row), [0, 0, 1], [0, 1, 0], offset="ul")
    (x, x_right, x_down), (y, y_right, y_down) = transform("EPSG:32633", "EPSG:32632", *places)
    turned = Affine(x_right - x, x_down - x, x, y_right - y, y_down - y, y)
    assert abs(turned.b) > 0.1
    found = tiles(tmp_path, ("EPSG:32632", turned))
    if row:
        assert found == []
    else:
        assert_only(found, "overlap", "test/x/a.tif = train/x/1.tif (100%)", is_problem=True)


def test_tiles_without_a_common_coordinate_system(tmp_path: Path) -> None:
    assert tiles(tmp_path, (None, utm(40, 0))) == []


def test_shared_area_is_that_of_a_fine_grid() -> None:
    y, x = np.mgrid[-2:2:801j, -2:2:801j]
    square = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], float)
    for angle, shift, orientation in ((0.3, (0.4, -0.2), 1), (0.8, (1.5, 1.5), -1), (1.2, (0.9, 0.1), -1)):
        cos, sin = np.cos(angle), np.sin(angle)
        turned = (square @ np.array([[cos, sin], [-sin, cos]]) * 0.7 + shift)[::orientation]
        u, v = (x - shift[0]) * cos + (y - shift[1]) * sin, (y - shift[1]) * cos - (x - shift[0]) * sin
        inside = (np.maximum(abs(u), abs(v)) < 0.7) & (np.maximum(abs(x), abs(y)) < 1)
        expected = inside.sum() * 0.005**2 / 1.4**2
        assert shared_area(square, turned) == pytest.approx(expected, abs=0.01)
        assert shared_area(turned + 5e6, square + 5e6) == pytest.approx(expected, abs=0.01)


# --------------------------------------------------------------------------------------------------- values and nodata


@pytest.mark.parametrize(("factor", "finds"), [(1e-4, True), (200.0, True), (3.0, False)])
def test_parts_in_other_units(examined: Examine, factor: float, finds: bool) -> None:
    test = [(image * factor).astype(np.float32) for image in images()]
    found = examined(train=(images(dtype="float32"), masks()), test=(test, masks()))
    if finds:
        assert_only(found, "the values of test are around .*, those of train around", is_problem=True)
    else:
        assert found == []


def test_an_image_in_other_units(examined: Examine) -> None:
    inputs = images(5, dtype="float32")
    inputs[3] /= 10_000
    assert_only(examined(train=(inputs, masks(5))), "1 image with values 1000 times", "train/x/3.npy")


def test_images_without_data(examined: Examine) -> None:
    inputs = images(4)
    inputs[1][:39] = 0
    inputs[2][:36] = 0  # 90 %
    findings = examined(train=(inputs, masks(4)), nodata=0)
    assert_only(findings, "1 image with data in less than 5% of the pixels", "train/x/1.npy")


def test_images_of_zeros(examined: Examine) -> None:
    inputs = images(4)
    inputs[1][:39] = 0
    inputs[2][:, :, 0] = RNG.integers(0, 2, (40, 44))  # single channels may be 0
    assert_only(examined(train=(inputs, masks(4))), "1 image with 0 in more than 95%", "train/x/1.npy")


# ------------------------------------------------------------------------------------------------------------ refusals


def test_what_training_would_refuse(examined: Examine) -> None:
    inputs = images(4, dtype="float32")
    inputs[1][3, 4], inputs[2][0, 0, 0] = np.nan, np.inf
    found = examined(train=(inputs, masks(4)), test=(images(), masks()))
    by_problem = {finding.text: list(finding.files) for finding in found}
    damaged = "2 files would be refused, as the first of them: 3 values are NaN or infinite: replace them, or name them"
    assert by_problem.pop(damaged + " as nodata.") == ["train/x/1.npy", "train/x/2.npy"]
    (other,) = by_problem
    assert (
        other.startswith("3 files would be refused")
        and "it is uint8, the model was trained on float32" in other
    )
    assert all(finding.is_problem for finding in found)


# ------------------------------------------------------------------------------------------------------------- command


def test_the_command_ends_with_1_for_problems_alone(
    tmp_path: Path, examined: Examine, capsys: pytest.CaptureFixture[str]
) -> None:
    examined(train=(images(), masks(values=(0, 255))))
    assert main([str(tmp_path)]) == 0
    assert "\ndoctor: 1 remark\n  remark   masks of 0 and 255" in capsys.readouterr().out
    pairs = (images(6), masks(6, (0, 255)))
    examined(train=pairs, test=pairs)
    assert main([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "\ndoctor: 1 problem, 1 remark\n  PROBLEM  6 images are the same as others of another part" in out
    assert "test/x/2.npy = train/x/2.npy, and 3 more remark masks of" in " ".join(out.split())
    assert "This suggests" in out and max(map(len, out.splitlines())) <= 120
