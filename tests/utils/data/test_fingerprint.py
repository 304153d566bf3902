import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dida_tools
from dida_tools.utils.data import NpyDataset
from dida_tools.utils.data.fingerprint import describe, fingerprint, folders_of, main, suggest
from dida_tools.utils.data.images import DataError
from dida_tools.utils.loss import dice_bce_sum

ROOT = Path(dida_tools.__file__).parents[1]


def images_of(masks: list[np.ndarray], channels: int = 3, dtype: str = "uint8") -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [(rng.random((*mask.shape[:2], channels)) * 100).astype(dtype) for mask in masks]


def masks_with(values: Any, count: int = 4, size: tuple[int, int] = (40, 48)) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [np.asarray(values)[rng.integers(0, len(values), size)] for _ in range(count)]


def suggest_for(write_pairs: Any, masks: list[np.ndarray], **options: Any) -> dict[str, Any]:
    return suggest(NpyDataset(*write_pairs(images_of(masks), masks), **options))


# --------------------------------------------------------------------------------------------------------- fingerprint


def test_a_fingerprint_tells_what_is_there(write_pairs: Any) -> None:
    masks = [np.uint8([[0, 0, 0, 2]] * 6), np.uint8([[0, 1], [1, 1]])]
    images = images_of(masks, channels=2, dtype="uint16")
    facts = fingerprint(NpyDataset(*write_pairs(images, masks)))
    pixels = np.concatenate([image.reshape(-1, 2) for image in images]).astype(float)
    statistics = facts.pop("statistics")
    assert facts == {
        "images": 2,
        "sizes": {"6 x 4": 1, "2 x 2": 1},
        "channels": {2: 2},
        "dtypes": {"uint16": 2},
        "mask channels": {1: 2},
        "mask dtypes": {"uint8": 2},
        "mask values": {0: 19 / 28, 1: 3 / 28, 2: 6 / 28},
    }
    assert list(facts["mask values"]) == [0, 1, 2]
    for name in ("min", "max", "mean", "std"):
        np.testing.assert_allclose([row[name] for row in statistics], getattr(np, name)(pixels, 0), rtol=1e-9)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32"])
def test_statistics_are_in_the_units_of_the_files_whatever_the_scale(write_pairs: Any, dtype: str) -> None:
    masks = masks_with(np.uint8([0, 1]))
    images = images_of(masks, dtype=dtype)
    folders = write_pairs(images, masks)
    pixels = np.concatenate([image.reshape(-1, 3) for image in images]).astype(float)
    for scale in (None, 0.01):
        rows = fingerprint(NpyDataset(*folders, scale=scale))["statistics"]
        np.testing.assert_allclose([row["mean"] for row in rows], pixels.mean(0))
        np.testing.assert_allclose([row["std"] for row in rows], pixels.std(0))


def test_statistics_leave_out_what_holds_no_data(write_pairs: Any) -> None:
    masks = masks_with(np.uint8([0, 1]), count=3)
    images = [image + 5 for image in images_of(masks)]
    images[0][:] = images[1][:7] = 0
    rows = fingerprint(NpyDataset(*write_pairs(images, masks), nodata=0))["statistics"]
    pixels = np.concatenate([images[1][7:].reshape(-1, 3), images[2].reshape(-1, 3)]).astype(float)
    for name in ("min", "max", "mean", "std"):
        np.testing.assert_allclose([row[name] for row in rows], getattr(np, name)(pixels, 0))


def test_mixed_data_are_described_too(write_pairs: Any) -> None:
    masks = [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.uint8), np.zeros((9, 8), np.int16)]
    images = [
        np.zeros((*mask.shape[:2], channels), np.uint8)
        for mask, channels in zip(masks, (3, 3, 4), strict=True)
    ]
    dataset = NpyDataset(*write_pairs(images, masks))
    facts = fingerprint(dataset)
    assert facts["channels"] == {3: 2, 4: 1} and facts["statistics"] == [] and len(facts["mask values"]) == 2
    text = describe(facts)
    assert "  channels       3 (2), 4 (1)" in text and "  sizes          8 x 8 (2), 9 x 8 (1)" in text
    assert suggest(dataset)["MODEL_CONFIG"]["ch_in"] == 3


def test_unreadable_files_are_all_named(write_pairs: Any) -> None:
    masks = masks_with(np.uint8([0, 1]))
    x_dir, y_dir = write_pairs(images_of(masks), masks)
    (x_dir / "1.npy").write_bytes(b"")
    (y_dir / "2.npy").write_bytes(b"nothing")
    with pytest.raises(DataError) as caught:
        fingerprint(NpyDataset(x_dir, y_dir))
    assert [problem.split(": ")[0] for problem in caught.value.problems] == [
        str(x_dir / "1.npy"),
        str(y_dir / "2.npy"),
    ]


def test_long_lists_are_shortened(write_pairs: Any) -> None:
    masks = [(np.arange(100 + n).reshape(1, -1) % 40).astype(np.uint8) for n in range(6)]
    text = describe(fingerprint(NpyDataset(*write_pairs(images_of(masks), masks))))
    assert ", and 2 more" in text and ", and 24 more" in text


# ---------------------------------------------------------------------------------------------------------- suggestion


def test_class_numbers_need_no_mapping(write_pairs: Any) -> None:
    suggestion = suggest_for(write_pairs, masks_with(np.uint8([0, 1, 2, 255])))
    assert suggestion["MODEL_CONFIG"] == {"ch_in": 3, "ch_out": 3} and "MASK_VALUES" not in suggestion
    assert suggestion["DATASET_CONFIG"]["task"] == "multi-class" and "LOSS" not in suggestion


@pytest.mark.parametrize(
    ("values", "mask_values", "ch_out"),
    [
        ([0, 1], None, 2),
        ([0, 255], {255: 1}, 2),
        ([255], {255: 1}, 2),
        ([0], None, 2),
        ([0, 1, 3], None, 4),
        ([1, 2], None, 3),
        ([10, 20, 30], {10: 0, 20: 1, 30: 2}, 3),
        ([0, 128], {0: 0, 128: 1}, 2),
        ([False, True], None, 2),
    ],
)
def test_values_of_masks_suggest_classes(
    write_pairs: Any, values: list[int], mask_values: dict | None, ch_out: int
) -> None:
    masks = masks_with(np.array(values, bool if isinstance(values[0], bool) else np.uint8))
    suggestion = suggest_for(write_pairs, masks)
    assert suggestion.get("MASK_VALUES") == mask_values and suggestion["MODEL_CONFIG"]["ch_out"] == ch_out


@pytest.mark.parametrize(
    "colors",
    [
        [(0, 0, 0), (128, 0, 0), (0, 64, 9)],
        [(0, 0, 0), (255, 255, 255)],
        [(0, 0, 0), (0, 0, 255), (0, 255, 0), (255, 0, 0)],
    ],
)
def test_colors_become_classes(write_pairs: Any, colors: list[tuple[int, int, int]]) -> None:
    suggestion = suggest_for(write_pairs, masks_with(np.array(colors, np.uint8)))
    assert suggestion["MASK_VALUES"] == {color: number for number, color in enumerate(sorted(colors))}
    assert suggestion["MODEL_CONFIG"]["ch_out"] == len(colors)
    assert suggestion["DATASET_CONFIG"]["task"] == "multi-class" and "LOSS" not in suggestion


@pytest.mark.parametrize(
    ("channels", "values", "mask_values"),
    [
        (2, (0, 1), None),
        (3, (0, 1), None),
        (5, (0, 1, 255), None),
        (2, (0, 255), {255: 1}),
        (6, (0, 255), {255: 1}),
    ],
)
def test_channels_of_0_and_1_are_labels(
    write_pairs: Any, channels: int, values: tuple[int, ...], mask_values: dict | None
) -> None:
    rng = np.random.default_rng(0)
    masks = [rng.choice(np.array(values, np.uint8), (40, 48, channels)) for _ in range(3)]
    suggestion = suggest_for(write_pairs, masks)
    assert suggestion["DATASET_CONFIG"]["task"] == "multi-label" and suggestion["LOSS"] is dice_bce_sum
    assert suggestion["MODEL_CONFIG"]["ch_out"] == channels and suggestion.get("MASK_VALUES") == mask_values


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_numbers_suggest_a_regression(write_pairs: Any, channels: int, dtype: str) -> None:
    rng = np.random.default_rng(0)
    masks = [(rng.random((80, 90, channels)) * 1e6).astype(dtype) for _ in range(2)]
    suggestion = suggest_for(write_pairs, masks)
    assert (
        suggestion["DATASET_CONFIG"]["task"] == "values" and suggestion["MODEL_CONFIG"]["ch_out"] == channels
    )
    assert (suggestion["LOSS"], suggestion["METRICS"]) == (torch.nn.functional.mse_loss, {})
    assert suggestion["MONITOR"] == "min loss"


@pytest.mark.parametrize(
    ("size", "crop"),
    [((1, 1), 1), ((20, 90), 20), ((32, 32), 32), ((50, 50), 32), ((128, 90), 64), ((400, 500), 192)],
)
def test_crops_fit_into_the_smallest_image(write_pairs: Any, size: tuple[int, int], crop: int) -> None:
    masks = [np.zeros(size, np.uint8), np.zeros((600, 700), np.uint8)]
    suggestion = suggest_for(write_pairs, masks)
    assert suggestion["DATASET_CONFIG"]["crop"] == crop
    assert 2 * suggestion["DATASET_CONFIG"]["crops_per_image"] >= 160


def test_large_images_give_more_crops(write_pairs: Any) -> None:
    masks = [np.zeros((1920, 1920), np.uint8)] * 2
    suggestion = suggest(NpyDataset(*write_pairs(images_of(masks, 1), masks)))
    assert suggestion["DATASET_CONFIG"]["crops_per_image"] == 100


# ------------------------------------------------------------------------------------------------------------- command


def place(folder: Path, *parts: str) -> None:
    for part in parts:
        (folder / part / "x").mkdir(parents=True)
        (folder / part / "y").mkdir()


@pytest.mark.parametrize("parts", [["train"], ["train", "test"], ["train", "test", "validation"]])
def test_parts_are_found(tmp_path: Path, parts: list[str]) -> None:
    place(tmp_path, *parts, "notes")
    assert folders_of(tmp_path) == {part: (tmp_path / part / "x", tmp_path / part / "y") for part in parts}


def test_a_folder_without_parts_is_for_training(tmp_path: Path) -> None:
    place(tmp_path, ".", "test")
    assert folders_of(tmp_path)["train"] == (tmp_path / "x", tmp_path / "y") and "test" in folders_of(
        tmp_path
    )


@pytest.mark.parametrize("parts", [[], ["test"], ["images"]])
def test_a_folder_without_a_training_part_is_refused(tmp_path: Path, parts: list[str]) -> None:
    place(tmp_path, *parts)
    with pytest.raises(DataError, match="put images and masks of the same names into train/x and train/y"):
        folders_of(tmp_path)


def run(*arguments: Any) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"{dida_tools.__name__}.utils.data.fingerprint", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command_prints_what_is_there_and_what_it_suggests(tmp_path: Path, write_pairs: Any) -> None:
    mask = np.zeros((40, 40), np.uint8)
    mask[:10] = 255
    image = np.stack([np.full((40, 40), 7), np.arange(1600).reshape(40, 40)], -1).astype(np.uint16)
    write_pairs([image] * 5, [mask] * 5, ".tif", "data/train")
    write_pairs([image] * 2, [mask] * 2, ".tif", "data/test")
    done = run(tmp_path / "data")
    assert done.returncode == 1 and done.stderr == ""  # the same images are in both parts
    numbers = [f"{number:>12.5g}" for number in (0, 1599, 799.5, np.arange(1600).std())]
    lines = done.stdout.splitlines()
    for line in (
        f"train: {tmp_path / 'data'}",
        "  images         5",
        "  sizes          40 x 40",
        "  channels       2",
        "  dtypes         uint16",
        "  mask channels  1",
        "  mask dtypes    uint8",
        "  mask values    0: 75.00%, 255: 25.00%",
        "        0              7           7           7           0",
        f"        1   {''.join(numbers)}",
        f"test: {tmp_path / 'data'}",
        "  images         2",
        "  MODEL_CONFIG = {'ch_in': 2, 'ch_out': 2}",
        "  DATASET_CONFIG = {'crop': 32, 'crops_per_image': 32, 'task': 'multi-class', 'foreground': 0.3}",
        "  MASK_VALUES = {255: 1}",
    ):
        assert line in lines, line
    assert re.search(r"METRICS = \{'f1': f1, 'precision': precision", done.stdout)


def test_the_command_names_a_missing_folder(tmp_path: Path) -> None:
    done = run(tmp_path / "missing")
    assert done.returncode == 1 and done.stdout == ""
    assert (
        done.stderr.startswith("the data has 1 problem:\n  - ") and str(tmp_path / "missing") in done.stderr
    )
    assert "Traceback" not in done.stderr


def test_the_command_names_what_is_wrong(
    tmp_path: Path, write_pairs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    x_dir, y_dir = write_pairs(images_of(masks := masks_with(np.uint8([0, 1]))), masks)
    (y_dir / "0.npy").unlink()
    (y_dir / "1.npy").unlink()
    assert main([str(x_dir.parent)]) == 1
    error = capsys.readouterr().err
    assert "0.npy: has no mask" in error and "1.npy: has no mask" in error


def test_the_command_writes_nothing(
    tmp_path: Path, write_pairs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    x_dir, _ = write_pairs(images_of(masks := masks_with(np.uint8([0, 1]))), masks)
    before = sorted(tmp_path.rglob("*"))
    assert main([str(x_dir.parent)]) == 0 and "This suggests" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
