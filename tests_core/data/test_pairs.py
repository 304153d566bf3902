"""All that is wrong with a dataset is listed at once, with the names of its files; what is right is not."""

import os
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dida_core.data import pairs
from dida_core.data.images import DataError
from dida_core.data.pairs import map_values, pair_files

from dida_tools.utils.data import NpyDataset

SIZE = (24, 30)
NAN = float("nan")
WritePairs = Callable[..., tuple[Path, Path]]


def images(count: int = 4, dtype: str = "uint8") -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [(rng.random((*SIZE, 3)) * (100 + 10 * number)).astype(dtype) for number in range(count)]


def masks(count: int = 4, values: Any = (0, 1, 2), channels: tuple[int, ...] = ()) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.choice(np.uint8(values), (*SIZE, *channels)) for _ in range(count)]


def problems_of(function: Callable[..., Any], *arguments: Any, **options: Any) -> list[str]:
    """Each one begins with a file, whose name and folder are left."""
    with pytest.raises(DataError) as caught:
        function(*arguments, **options)
    return [re.sub(r"^\S*/([xy]/[^/:]+): ", r"\1: ", problem) for problem in caught.value.problems]


# ------------------------------------------------------------------------------------------------------ pairs


def test_all_that_is_wrong_with_folders_is_named(tmp_path: Path, write_pairs: WritePairs, write: Any) -> None:
    x_dir, y_dir = tmp_path / "x", tmp_path / "y"
    missing = [f"{folder}: there is no such folder" for folder in (x_dir, y_dir)]
    assert problems_of(NpyDataset, x_dir, y_dir) == missing
    x_dir.mkdir()
    y_dir.mkdir()
    (x_dir / "readme.txt").touch()
    assert problems_of(pair_files, x_dir, y_dir) == [f"{one}: holds no images" for one in (x_dir, y_dir)]
    x_dir, y_dir = write_pairs(images(5), masks(5))
    for file in (y_dir / "1.npy", x_dir / "3.npy", x_dir / "4.npy"):
        file.unlink()
    write(x_dir / "0.png", np.zeros((4, 4), np.uint8))
    assert problems_of(NpyDataset, x_dir, y_dir) == [
        f"{x_dir}: 2 files are called 0",
        f"x/1.npy: has no mask in {y_dir}",
        f"y/3.npy: has no image in {x_dir}",
        f"y/4.npy: has no image in {x_dir}",
    ]


def test_pairs_are_in_the_order_of_their_names(write_pairs: WritePairs) -> None:
    found = pair_files(*write_pairs(images(12), masks(12)))
    assert [[file.stem for file in files] for files in found] == [sorted(map(str, range(12)))] * 2


def test_values_are_swapped_at_once_and_several_can_become_one() -> None:
    mask = np.array([[[0], [1], [2], [7]]], np.uint8)
    assert map_values(mask, {0: 1, 1: 0, 2: 300})[..., 0].tolist() == [[1, 0, 300, 7]]
    assert map_values(mask, {-1: 5, 1: 2, 7: 2})[..., 0].tolist() == [[0, 2, 2, 2]]
    assert map_values(mask, None) is mask and map_values(mask, {}) is mask


# ------------------------------------------------------------------------------------------------------ check


def test_all_that_is_wrong_is_listed_at_once(tmp_path: Path, write: Any) -> None:
    def pair(name: str, image: np.ndarray | None = None, mask: np.ndarray | None = None) -> None:
        write(tmp_path / "x" / f"{name}.npy", np.ones((20, 20, 3), np.float32) if image is None else image)
        write(tmp_path / "y" / f"{name}.npy", np.ones((20, 20), np.uint8) if mask is None else mask)

    for name in ("a", "b", "c", "d", "e", "f", "truncated", "foreign"):
        pair(name)
    with_nan = np.ones((20, 20, 3), np.float32)
    with_nan[0, :2] = np.nan
    pair("nan", with_nan)
    pair("channels", np.ones((20, 20, 4), np.float32))
    pair("dtype", np.ones((20, 20, 3), np.float64))
    pair("small", np.ones((10, 40, 3), np.float32), np.ones((10, 40), np.uint8))
    pair("size", mask=np.ones((21, 20), np.uint8))
    pair("class", mask=np.full((20, 20), 7, np.uint8))
    pair("negative", mask=np.full((20, 20), -1, np.int16))
    pair("float", mask=np.full((20, 20), 0.5, np.float32))
    pair("colors", mask=np.ones((20, 20, 3), np.uint8))
    pair("many", mask=np.arange(400 * 20, dtype=np.uint16).reshape(20, 20, 20)[..., 0])
    truncated = tmp_path / "x" / "truncated.npy"
    truncated.write_bytes(truncated.read_bytes()[:200])
    (tmp_path / "y" / "foreign.npy").write_bytes(b"no mask")
    dataset = NpyDataset(tmp_path / "x", tmp_path / "y", crop=16)
    expected = [
        ("x/truncated.npy", "cannot be read as an image"),
        ("y/foreign.npy", "cannot be read as an image"),
        ("x/channels.npy", "has 4 channels, most have 3"),
        ("x/dtype.npy", "has float64 as dtype, most have float32"),
        ("y/colors.npy", "has 3 channels, most have 1"),
        ("x/nan.npy", "6 values are NaN or infinite: replace them, or name them as nodata"),
        ("y/class.npy", "the values 7 are outside of the classes 0 to 1 (ignored: 255): map them with MASK_"),
        ("y/colors.npy", "it has 3 channels: a multi-class mask has one"),
        ("y/float.npy", "its values (float32) are no class numbers"),
        ("y/many.npy", "the values 20, 40, 60, 80, 100, 120, 140, 160 and 391 more are outside"),
        ("y/negative.npy", "the values -1 are outside of the classes"),
        ("y/size.npy", "its size is 21 x 20 pixels, that of its image 20 x 20"),
    ]
    for _ in range(2):  # the second time from what is known
        for problem, (file, text) in zip(problems_of(dataset.check, num_classes=2), expected, strict=True):
            assert problem.startswith(f"{file}: ") and text in problem


def changed(array: np.ndarray, place: Any, value: Any) -> np.ndarray:
    array = array.copy()
    array[place] = value
    return array


LABELS = masks(values=(0, 1), channels=(2,))
NO_BINARY = "are not 0 or 1: map them with MASK_VALUES, such as {255: 1}"


@pytest.mark.parametrize(
    ("of_masks", "options", "num_classes", "expected"),
    [
        (masks(), {}, 3, []),
        (masks(), {}, None, []),
        (masks(), {}, 2, [f"y/{n}.npy: the values 2 are outside of the classes 0 to 1" for n in range(4)]),
        (masks(values=(0, 1, 9)), {"ignore_index": 9}, 2, []),
        (masks(values=(0, 200)), {"mask_values": {200: 1}}, 2, []),
        (LABELS, {"task": "multi-label"}, 2, []),
        (LABELS, {"task": "multi-label"}, 3, [f"y/{n}.npy: it has 2 channels, the " for n in range(4)]),
        ([changed(LABELS[0], (0, 0, 1), 200), changed(LABELS[1], (0, 0, 0), 255), *LABELS[2:]],
         {"task": "multi-label"}, 2, [f"y/0.npy: the values 200 {NO_BINARY}"]),
        ([changed(LABELS[0], (0, 0, 1), 200), *LABELS[1:]],
         {"task": "multi-label", "mask_values": {200: 1}}, 2, []),
        *[([*LABELS[:2], *masks(1, (0, 1), (3,)), LABELS[3]], {"task": task}, None, ["y/2.npy: has 3 "])
          for task in ("multi-label", "values")],
        *[([changed(np.zeros(SIZE, np.float32), (3, 3), value)] * 4, {"task": "values"}, None,
           [f"y/{n}.npy: 1 values are NaN or infinite" for n in range(4)]) for value in (np.nan, np.inf)],
        ([*masks(3, (0,), (3,)), changed(np.zeros((*SIZE, 3), np.uint8), (0, 0), (1, 2, 3))],
         {"mask_values": {(0, 0, 0): 0, (255, 0, 0): 1}}, 2,
         ["y/3.npy: it has 3 channels: a multi-class mask has one"]),
    ],
)  # fmt: skip
def test_masks_are_checked_by_what_they_mean(
    write_pairs: WritePairs, of_masks: list, options: dict, num_classes: int | None, expected: list[str]
) -> None:
    dataset = NpyDataset(*write_pairs(images(), of_masks), **options)
    if not expected:
        assert dataset.check(num_classes=num_classes) is None
        return
    for problem, text in zip(problems_of(dataset.check, num_classes=num_classes), expected, strict=True):
        assert problem.startswith(text)
        assert "(255, 0, 0)" not in str(options) or "(unmapped: (1, 2, 3))" in problem


@pytest.mark.parametrize(
    ("task", "channels"), [("multi-class", ()), ("multi-label", ()), ("multi-label", (2,))]
)
def test_masks_of_0_and_an_ignored_255_alone_are_refused_in_training(
    write_pairs: WritePairs, task: str, channels: tuple[int, ...]
) -> None:
    dataset = NpyDataset(*write_pairs(images(), masks(values=(0, 255), channels=channels)), task=task)
    (problem,) = problems_of(dataset.check)
    assert problem.endswith(
        "the masks hold 0 and 255 alone, and 255 is ignored: map it with MASK_VALUES={255: 1}"
    )
    dataset.check(training=False)
    dataset.with_mask_values({255: 1}).check()


def test_mixed_sizes_need_a_crop_in_training_and_not_in_evaluation(write_pairs: WritePairs) -> None:
    sizes = [SIZE, SIZE, SIZE[::-1]]
    folders = write_pairs([np.zeros((*s, 1)) for s in sizes], [np.zeros(s, np.uint8) for s in sizes])
    (problem,) = problems_of(NpyDataset(*folders).check)
    assert problem == "x/2.npy: has 30 x 24 pixels, most have 24 x 30: images of several sizes need a crop"
    NpyDataset(*folders, crop=24).check()
    NpyDataset(*folders).check(training=False)
    NpyDataset(*folders, crop=100).check(training=False)


def test_nodata_may_be_nan_and_must_be_the_same_everywhere(
    tmp_path: Path, write: Any, write_pairs: WritePairs
) -> None:
    for number, nodata in enumerate([0, 0, 5, None]):
        write(tmp_path / "x" / f"{number}.tif", np.ones((16, 16), np.uint8), nodata)
        write(tmp_path / "y" / f"{number}.tif", np.ones((16, 16), np.uint8))
    problems = problems_of(NpyDataset(tmp_path / "x", tmp_path / "y").check)
    assert [problem.split(", most")[0] for problem in problems] == [
        "x/2.tif: has 5.0 as nodata value",
        "x/3.tif: has None as nodata value",
    ]
    NpyDataset(tmp_path / "x", tmp_path / "y", nodata=0).check()
    folders = write_pairs([changed(image, np.s_[:4], np.nan) for image in images(dtype="float32")], masks())
    NpyDataset(*folders, nodata=NAN).check()
    assert len(problems_of(NpyDataset(*folders).check)) == 4


def test_what_was_checked_is_known(
    write_pairs: WritePairs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    x_dir, y_dir = write_pairs(images(), masks())
    dataset = NpyDataset(x_dir, y_dir)
    dataset.check(tmp_path / "facts.json")
    with monkeypatch.context() as patch:  # no file is opened again
        patch.setattr(pairs, "image_info", None)
        patch.setattr(pairs, "scan_files", None)
        assert len(dataset.with_contract(dataset.contract()).for_evaluation().split(0.5, 0)[1]) == 2
    for file in [*x_dir.iterdir(), *y_dir.iterdir()]:
        stat = file.stat()
        file.write_bytes(bytes(stat.st_size))
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    NpyDataset(x_dir, y_dir).check(tmp_path / "facts.json")
    assert len(problems_of(NpyDataset(x_dir, y_dir).check)) == 8


# -------------------------------------------------------------------------------------------------- contracts


@pytest.mark.parametrize(
    ("of_train", "of_test", "fits"),
    [(0, None, True), (0, 0.0, True), (None, 0, False), (0, 5, False), (NAN, NAN, True), (NAN, 0, False)],
)
def test_data_of_another_nodata_value_are_refused(
    write_pairs: WritePairs, of_train: float | None, of_test: float | None, fits: bool
) -> None:
    folders = write_pairs(images(dtype="float32"), masks())
    contract = NpyDataset(*folders, nodata=of_train).contract()
    dataset = NpyDataset(*folders, nodata=of_test)
    if fits:
        assert dataset.with_contract(contract).contract().channels == 3
    else:
        (problem,) = problems_of(dataset.with_contract, contract)
        assert f"its nodata value is {of_test}, that of the training data {of_train}" in problem


def test_data_of_another_dtype_or_scale_are_refused(write_pairs: WritePairs) -> None:
    contract = NpyDataset(*write_pairs(images(dtype="float32"), masks(), folder="train")).contract()
    other = NpyDataset(*write_pairs(images(2, "uint16"), masks(2), folder="test"))
    for number, problem in enumerate(problems_of(other.with_contract, contract)):
        assert problem.startswith(f"x/{number}.npy: it is uint16, the model was trained on float32 files")
    divided = NpyDataset(
        *write_pairs([image / 255 for image in images(dtype="float32")], masks(), folder="divided")
    )
    divided.with_contract(contract)  # nothing is known of its values yet
    divided.check()
    (problem,) = problems_of(divided.with_contract, contract)
    assert "as if they had been divided by a number; bring them to the scale" in problem
    divided.split(0.5, 0)[0].with_contract(contract)  # a part is as it is


def test_a_channel_that_is_constant_in_one_split_can_be_taken(write_pairs: WritePairs) -> None:
    contract = NpyDataset(*write_pairs(images(dtype="uint16"), masks(), folder="train")).contract()
    constant = [changed(image, np.s_[..., 1], 60_000) for image in images(2, "uint16")]
    other = NpyDataset(*write_pairs(constant, masks(2), folder="test"))
    other.check()
    found = problems_of(other.with_contract, contract)
    assert found and all(problem.endswith("(CHECK_VALUES=False takes it anyway)") for problem in found)
    other.with_contract(replace(contract, minimum=(), maximum=()))  # as training does then


# --------------------------------------------------------------------------------------------- what is odd


@pytest.mark.parametrize(
    ("name", "is_named"),
    [("notes.txt", True), ("3.svg", True), ("more", True), ("9.psd", True)]
    + [
        (name, False) for name in (".hidden", "Thumbs.db", "0.tfw", "0.npy.aux.xml", "~$x.npy", "desktop.ini")
    ],
)
@pytest.mark.parametrize("kind", ["x", "y"])
def test_what_is_not_read_is_named(write_pairs: WritePairs, name: str, is_named: bool, kind: str) -> None:
    folders = write_pairs(images(2), masks(2))
    (folders["xy".index(kind)] / name).touch()
    with warnings.catch_warnings(record=True) as caught:
        NpyDataset(*folders).check()
    said = [f"{folders['xy'.index(kind)]}: 1 of its files and folders are not read: {name}."]
    assert [str(one.message) for one in caught] == (said if is_named else [])


@pytest.mark.parametrize(("value", "task"), [(0, "multi-class"), (2, "multi-class"), (0, "multi-label")])
def test_masks_of_one_class_alone_are_reported(write_pairs: WritePairs, value: int, task: str) -> None:
    values = [value, 255] if value else [value]
    dataset = NpyDataset(*write_pairs(images(2), masks(2, values)), task=task)
    with pytest.warns(UserWarning, match=f"/y: all masks hold class {value} alone"):
        dataset.check()
