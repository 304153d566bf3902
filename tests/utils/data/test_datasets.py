import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import dida_tools
from dida_tools.training.determinism import EvaluationBatches, Samples, TrainingBatches, seed_sample
from dida_tools.utils.data import NpyDataset, NpyPredictionDataset
from dida_tools.utils.data.contract import DataContract
from dida_tools.utils.data.datasets import map_values, pair_files
from dida_tools.utils.data.images import DataError
from dida_tools.utils.data.transforms import GEOMETRY, STANDARD

ROOT = Path(dida_tools.__file__).parents[1]
Pairs = Callable[..., tuple[Path, Path]]
FORMATS = pytest.mark.parametrize(
    ("ending", "dtype"), [(".npy", "uint16"), (".npz", "uint8"), (".png", "uint8"), (".tif", "uint16")]
)


def invent_images(
    count: int = 4, size: tuple[int, int] = (24, 30), channels: int = 3, dtype: str = "uint8"
) -> list:
    rng = np.random.default_rng(0)
    return [(rng.random((*size, channels)) * (100 + 10 * number)).astype(dtype) for number in range(count)]


def invent_masks(count: int = 4, size: tuple[int, int] = (24, 30), classes: int = 3) -> list:
    rng = np.random.default_rng(1)
    return [rng.integers(0, classes, size, dtype=np.uint8) for _ in range(count)]


def problems_of(function: Callable[..., Any], *arguments: Any, **options: Any) -> list[str]:
    with pytest.raises(DataError) as caught:
        function(*arguments, **options)
    assert str(caught.value).count("\n  - ") == len(caught.value.problems)
    return caught.value.problems


# ------------------------------------------------------------------------------------------------------------- samples


@FORMATS
def test_whole_images_come_scaled_and_channels_first(write_pairs: Pairs, ending: str, dtype: str) -> None:
    images, masks = invent_images(dtype=dtype), invent_masks()
    dataset = NpyDataset(*write_pairs(images, masks, ending))
    assert len(dataset) == 4
    for number, (image, mask) in enumerate(zip(images, masks, strict=True)):
        x, y = dataset[number]
        scaled = np.moveaxis(image, -1, 0) / np.iinfo(dtype).max
        assert (x.dtype, y.dtype) == (torch.float32, torch.int64) and x.is_contiguous() and y.is_contiguous()
        torch.testing.assert_close(x, torch.from_numpy(scaled).float(), rtol=1e-6, atol=0)
        assert np.array_equal(y, mask)


def test_images_and_masks_may_have_different_formats(tmp_path: Path, write: Any) -> None:
    for number, (ending, of_mask) in enumerate([(".npy", ".png"), (".tif", ".npz"), (".png", ".tif")]):
        write(tmp_path / "x" / f"{number}{ending}", np.full((8, 8, 3), number, np.uint8))
        write(tmp_path / "y" / f"{number}{of_mask}", np.full((8, 8), number, np.uint8))
    dataset = NpyDataset(str(tmp_path / "x"), str(tmp_path / "y"), scale=1.0)
    dataset.check(num_classes=3)
    assert [(int(x.unique()), int(y.unique())) for x, y in dataset] == [(0, 0), (1, 1), (2, 2)]


def test_floats_stay_as_they_are_and_a_given_scale_is_used(write_pairs: Pairs) -> None:
    images = invent_images(2, dtype="float32")
    folders = write_pairs(images, invent_masks(2))
    assert np.array_equal(NpyDataset(*folders)[1][0], np.moveaxis(images[1], -1, 0))
    assert np.array_equal(NpyDataset(*folders, scale=0.25)[1][0], np.moveaxis(images[1], -1, 0) / 4)


@pytest.mark.parametrize("index", [-1, 4, 100])
def test_samples_that_do_not_exist_raise_an_index_error(write_pairs: Pairs, index: int) -> None:
    with pytest.raises(IndexError):
        NpyDataset(*write_pairs(invent_images(), invent_masks()))[index]


@FORMATS
def test_crops_are_windows_of_image_and_mask(write_pairs: Pairs, ending: str, dtype: str) -> None:
    y, x = np.mgrid[0:24, 0:30].astype(np.uint8)
    place = np.stack([y, x, y * 0], -1)
    folders = write_pairs([place.astype(dtype)] * 2, [y * 8 + x // 4] * 2, ending)
    dataset = NpyDataset(*folders, crop=10, crops_per_image=50, scale=1.0)
    corners = set()
    for index in range(len(dataset)):
        image, mask = dataset[index]
        assert image.shape == (3, 10, 10) and mask.shape == (10, 10)
        assert torch.equal(mask, (image[0] * 8 + torch.floor(image[1] / 4)).long())
        corners.add((int(image[0, 0, 0]), int(image[1, 0, 0])))
    rows, columns = zip(*corners, strict=True)
    assert (min(rows), max(rows), min(columns), max(columns)) == (0, 14, 0, 20) and len(corners) > 70


def test_every_image_gives_its_number_of_crops(write_pairs: Pairs) -> None:
    images = [np.full((16, 16, 1), number, np.uint8) for number in range(3)]
    dataset = NpyDataset(
        *write_pairs(images, invent_masks(3, (16, 16))), crop=4, crops_per_image=5, scale=1.0
    )
    assert [int(x.unique()) for x, _ in dataset] == [number for number in range(3) for _ in range(5)]
    assert [dataset.sample_name(index) for index in (0, 4, 5, 14)] == ["0.npy", "0.npy", "1.npy", "2.npy"]


def test_a_crop_may_be_as_large_as_an_image_and_no_larger(write_pairs: Pairs) -> None:
    folders = write_pairs(invent_images(), invent_masks())
    assert NpyDataset(*folders, crop=24)[0][0].shape == (3, 24, 24)
    with pytest.raises(DataError, match="crop of 25 pixels is larger than an image of 24 x 30"):
        NpyDataset(*folders, crop=25)[0]


@pytest.mark.parametrize(
    "arguments", [{"crop": 0}, {"crop": -3}, {"crops_per_image": 0}, {"tile": 0}, {"task": "boxes"}]
)
def test_impossible_arguments_are_refused(write_pairs: Pairs, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        NpyDataset(*write_pairs(invent_images(), invent_masks()), **arguments)


CROP_HUGE = """
import resource, sys
import numpy as np
from {package}.utils.data import NpyDataset
dataset = NpyDataset(sys.argv[1], sys.argv[2], crop=128, crops_per_image=20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for x, y in dataset:
    assert x.shape == (6, 128, 128) and y.shape == (128, 128)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_crops_of_images_larger_than_memory_take_little_memory(tmp_path: Path) -> None:
    for kind, shape in (("x", (30_000, 30_000, 6)), ("y", (30_000, 30_000))):
        (tmp_path / kind).mkdir()
        np.lib.format.open_memmap(
            tmp_path / kind / "huge.npy", "w+", np.uint8, shape
        )  # sparse: 5.4 GB of zeros
    command = [
        sys.executable,
        "-c",
        CROP_HUGE.format(package=dida_tools.__name__),
        tmp_path / "x",
        tmp_path / "y",
    ]
    grown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert int(grown) < 100 * 1024


# ------------------------------------------------------------------------------------------------ tasks and mask values


@pytest.mark.parametrize("ending", [".npy", ".png"])
def test_0_and_255_can_be_mapped(write_pairs: Pairs, ending: str) -> None:
    masks = [mask * 255 for mask in invent_masks(classes=2)]
    folders = write_pairs(invent_images(), masks, ending)
    dataset = NpyDataset(*folders, mask_values={255: 1})
    dataset.check(num_classes=2)
    assert all(np.array_equal(y, mask // 255) for (_, y), mask in zip(dataset, masks, strict=True))
    assert all(np.array_equal(NpyDataset(*folders)[n][1], mask) for n, mask in enumerate(masks))


@pytest.mark.parametrize("ending", [".npy", ".png", ".tif"])
def test_colors_can_be_mapped(write_pairs: Pairs, ending: str) -> None:
    colors = np.array([[0, 0, 0], [255, 0, 0], [0, 128, 255], [0, 0, 1]], np.uint8)
    classes = invent_masks(classes=4)
    mask_values = {tuple(color): number for number, color in enumerate(colors.tolist())}
    dataset = NpyDataset(*write_pairs(invent_images(), [colors[mask] for mask in classes], ending))
    mapped = dataset.with_mask_values(mask_values)
    mapped.check(num_classes=4)
    assert all(np.array_equal(y, mask) for (_, y), mask in zip(mapped, classes, strict=True))
    assert mapped.arguments["mask_values"] == mask_values and dataset.arguments["mask_values"] is None


def test_values_are_swapped_at_once_and_not_one_after_the_other() -> None:
    mask = np.array([[[0], [1], [2], [7]]], np.uint8)
    assert map_values(mask, {0: 1, 1: 0, 2: 300})[..., 0].tolist() == [[1, 0, 300, 7]]
    assert map_values(mask, {-1: 5})[..., 0].tolist() == [[0, 1, 2, 7]]
    assert map_values(mask, None) is mask and map_values(mask, {}) is mask


def test_several_values_can_become_one_class_or_be_ignored(write_pairs: Pairs) -> None:
    mask = np.array([[10, 20], [30, 40]], np.uint8)
    dataset = NpyDataset(
        *write_pairs([np.zeros((2, 2, 1))], [mask]), mask_values={10: 0, 20: 1, 30: 1, 40: 255}
    )
    dataset.check(num_classes=2)
    assert dataset[0][1].tolist() == [[0, 1], [1, 255]]


@pytest.mark.parametrize("channels", [None, 1, 4])
def test_multi_label_masks_have_channels(write_pairs: Pairs, channels: int | None) -> None:
    shape = (24, 30) if channels is None else (24, 30, channels)
    masks = [np.random.default_rng(n).integers(0, 2, shape, dtype=np.uint8) for n in range(4)]
    dataset = NpyDataset(*write_pairs(invent_images(), masks), task="multi-label")
    dataset.check(num_classes=channels or 1)
    for (_, y), mask in zip(dataset, masks, strict=True):
        assert y.dtype == torch.float32 and np.array_equal(y, np.moveaxis(mask.reshape(24, 30, -1), -1, 0))


def test_multi_label_values_can_be_mapped_and_ignored(write_pairs: Pairs) -> None:
    mask = np.array([[[0, 200], [200, 255]]], np.uint8)
    dataset = NpyDataset(
        *write_pairs([np.zeros((1, 2, 1))], [mask]), task="multi-label", mask_values={200: 1}
    )
    dataset.check(num_classes=2)
    assert dataset[0][1].tolist() == [[[0, 1]], [[1, 255]]]


@pytest.mark.parametrize("channels", [None, 2])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int16"])
def test_values_are_numbers_of_any_kind(write_pairs: Pairs, channels: int | None, dtype: str) -> None:
    shape = (24, 30) if channels is None else (24, 30, channels)
    masks = [(np.random.default_rng(n).normal(size=shape) * 3000).astype(dtype) for n in range(4)]
    dataset = NpyDataset(*write_pairs(invent_images(), masks), task="values")
    dataset.check(num_classes=channels or 1)
    for (_, y), mask in zip(dataset, masks, strict=True):
        expected = np.moveaxis(mask.reshape(24, 30, -1), -1, 0).astype(np.float32)
        assert y.dtype == torch.float32 and np.array_equal(y, expected)


@pytest.mark.parametrize("ending", [".npy", ".tif"])
@pytest.mark.parametrize("task", ["multi-class", "multi-label"])
def test_pixels_without_data_are_0_and_ignored(write_pairs: Pairs, ending: str, task: str) -> None:
    images = invent_images(dtype="int16")
    missing = np.zeros((24, 30), bool)
    missing[:, 20:] = missing[:5] = True
    for image in images:
        image[missing] = -99
    folders = write_pairs(images, invent_masks(classes=2), ending, nodata=-99)
    given = None if ending == ".tif" else -99
    dataset = NpyDataset(*folders, nodata=given, task=task, ignore_index=77)
    dataset.check(num_classes=2 if task == "multi-class" else 1)
    for contract in (dataset.contract(), dataset.contract(normalize=False)):
        assert contract.nodata == -99
        for image, mask in dataset.with_contract(contract):
            assert (image.numpy()[:, missing] == 0).all() and (mask.numpy()[..., missing] == 77).all()
            assert (mask.numpy()[..., ~missing] <= 1).all()


# ------------------------------------------------------------------------------------------------------- normalization


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32", "float64"])
@pytest.mark.parametrize("sizes", [[(24, 30)] * 4, [(9, 40), (30, 11), (17, 17)]])
def test_normalized_training_pixels_have_mean_0_and_deviation_1(
    write_pairs: Pairs, dtype: str, sizes: list
) -> None:
    images = [invent_images(1, size, 3, dtype)[0] + (7 * number) for number, size in enumerate(sizes)]
    images = [image.astype(dtype) for image in images]
    dataset = NpyDataset(*write_pairs(images, [np.zeros(size, np.uint8) for size in sizes]))
    dataset = dataset.with_contract(dataset.contract())
    pixels = torch.cat([image.flatten(1) for image, _ in dataset], 1).double()
    assert pixels.mean(1).abs().max() < 1e-5 and (pixels.std(1, correction=0) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_normalized_pixels_of_a_large_mean_too(write_pairs: Pairs, dtype: str) -> None:
    rng = np.random.default_rng(0)
    images = [(1e6 + rng.choice([-1, 1], (30, 30, 2))).astype(dtype) for _ in range(3)]
    dataset = NpyDataset(*write_pairs(images, invent_masks(3, (30, 30))))
    dataset = dataset.with_contract(dataset.contract())
    pixels = torch.cat([image.flatten(1) for image, _ in dataset], 1).double()
    assert pixels.mean(1).abs().max() < 1e-5 and (pixels.std(1, correction=0) - 1).abs().max() < 1e-5


def test_statistics_leave_out_pixels_without_data(write_pairs: Pairs) -> None:
    images = [image + 1 for image in invent_images(3)]
    for number, image in enumerate(images):
        image[: 4 * number + 4] = 0
    contract = NpyDataset(*write_pairs(images, invent_masks(3)), nodata=0).contract()
    pixels = (
        np.concatenate([image[4 * number + 4 :].reshape(-1, 3) for number, image in enumerate(images)]) / 255
    )
    np.testing.assert_allclose(contract.mean, pixels.mean(0))
    np.testing.assert_allclose(contract.std, pixels.std(0))


@pytest.mark.parametrize("value", [0, 7, 0.1, 1e6 / 3])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_constant_channel_becomes_0(write_pairs: Pairs, value: float, dtype: str) -> None:
    images = invent_images(3, (17, 13), dtype=dtype)
    for image in images:
        image[..., 1] = value
    dataset = NpyDataset(*write_pairs(images, invent_masks(3, (17, 13))))
    contract = dataset.contract()
    assert contract.std[1] == 1
    assert all(image[1].abs().max() < 1e-6 for image, _ in dataset.with_contract(contract))


def test_the_contract_says_how_the_images_are_read(write_pairs: Pairs) -> None:
    names: dict[str, Any] = {"channel_names": ("r", "g", "b"), "class_names": ["a", "b", "c"]}
    names["class_colors"] = [(0, 0, 0), (255, 0, 0), (0, 255, 0)]
    images = invent_images()
    contract = NpyDataset(*write_pairs(images, invent_masks()), **names).contract(normalize=False)
    assert contract == DataContract(
        3,
        ("r", "g", "b"),
        "uint8",
        1 / 255,
        minimum=tuple(min(image[..., channel].min() for image in images) for channel in range(3)),
        maximum=tuple(max(image[..., channel].max() for image in images) for channel in range(3)),
        tile_size=max(max(image.shape[:2]) for image in images),
        class_names=("a", "b", "c"),
        class_colors=((0, 0, 0), (255, 0, 0), (0, 255, 0)),
    )


def test_test_images_of_another_scale_are_refused(write_pairs: Pairs) -> None:
    images = [image.astype(np.float32) for image in invent_images()]
    train = NpyDataset(*write_pairs(images, invent_masks(), folder="train"))
    test = NpyDataset(*write_pairs([image / 255 for image in images], invent_masks(), folder="test"))
    contract = train.contract()
    test.check()
    with pytest.raises(DataError, match="as if they had been divided by a number; bring them to the scale"):
        test.with_contract(contract)


def test_other_data_are_read_by_the_contract_of_the_training_set(write_pairs: Pairs) -> None:
    train = NpyDataset(*write_pairs(invent_images(), invent_masks(), folder="train"))
    test = NpyDataset(*write_pairs(invent_images(2), invent_masks(2), folder="test"))
    contract = train.contract()
    read = test.with_contract(contract)
    assert torch.equal(read[1][0], contract.prepare(invent_images(2)[1])[0])
    assert not torch.equal(read[1][0], test[1][0]) and test.contract() != contract
    assert torch.equal(read.for_evaluation()[1][0], read[1][0])


def test_data_that_the_contract_does_not_fit_are_refused_with_every_name(write_pairs: Pairs) -> None:
    contract = NpyDataset(*write_pairs(invent_images(), invent_masks(), folder="train")).contract()
    other = NpyDataset(*write_pairs(invent_images(2, dtype="uint16"), invent_masks(2), folder="test"))
    problems = problems_of(other.with_contract, contract)
    assert [Path(problem.split(": ")[0]).name for problem in problems] == ["0.npy", "1.npy"]
    assert all("it is uint16, the model was trained on uint8 files" in problem for problem in problems)


@pytest.mark.parametrize(
    ("of_train", "of_test", "fits"),
    [(0, None, True), (0, 0.0, True), (None, 0, False), (0, 5, False), (float("nan"), float("nan"), True)],
)
def test_data_of_another_nodata_value_are_refused(
    write_pairs: Pairs, of_train: float | None, of_test: float | None, fits: bool
) -> None:
    folders = write_pairs(invent_images(dtype="float32"), invent_masks())
    contract = NpyDataset(*folders, nodata=of_train).contract()
    dataset = NpyDataset(*folders, nodata=of_test)
    if fits:
        assert dataset.with_contract(contract).contract().channels == 3
    else:
        (problem,) = problems_of(dataset.with_contract, contract)
        assert f"its nodata value is {of_test}, that of the training data {of_train}" in problem


def test_the_contract_of_the_training_part_knows_nothing_of_the_validation_part(write_pairs: Pairs) -> None:
    dataset = NpyDataset(*write_pairs(invent_images(6), invent_masks(6)))
    dataset.check()
    train, _ = dataset.split(0.5, seed=3)
    pixels = np.concatenate([np.load(file).reshape(-1, 3) for file in train.images]) / 255
    np.testing.assert_allclose(train.contract().mean, pixels.mean(0))


# ---------------------------------------------------------------------------------------------------- evaluation, split


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=3), st.integers(1, 50)
)
def test_evaluation_gives_every_pixel_once(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[tuple[int, int]], tile: int
) -> None:
    folder = tmp_path_factory.mktemp("evaluation")
    for kind in ("x", "y"):
        (folder / kind).mkdir()
    first = 0
    for number, (height, width) in enumerate(sizes):
        numbers = np.arange(first, first + height * width).reshape(height, width)
        np.save(folder / "x" / f"{number}.npy", numbers.astype(np.float32))
        np.save(folder / "y" / f"{number}.npy", numbers)
        first += height * width
    dataset = NpyDataset(folder / "x", folder / "y", tile=tile).for_evaluation()
    samples = list(dataset)
    assert len(samples) == len(dataset)
    assert [dataset.sample_shape(index) for index in range(len(dataset))] == [
        tuple(y.shape) for _, y in samples
    ]
    assert all(max(y.shape) <= tile and torch.equal(x[0].long(), y) for x, y in samples)
    assert torch.cat([y.flatten() for _, y in samples]).sort()[0].tolist() == list(range(first))


def test_evaluation_neither_crops_nor_augments_nor_draws(write_pairs: Pairs) -> None:
    folders = write_pairs(invent_images(), invent_masks())
    options: dict[str, Any] = {"crop": 8, "crops_per_image": 3, "foreground": 1.0, "augment": STANDARD}
    dataset = NpyDataset(*folders, **options).for_evaluation()
    state = torch.get_rng_state()
    plain = NpyDataset(*folders)
    assert len(dataset) == 4
    assert equal(list(dataset), list(plain))
    assert torch.equal(state, torch.get_rng_state())
    assert [dataset.sample_name(index) for index in range(4)] == ["0.npy", "1.npy", "2.npy", "3.npy"]


def test_evaluation_batches_hold_samples_of_one_shape(write_pairs: Pairs) -> None:
    sizes = [(24, 30), (17, 40), (8, 8)]
    dataset = NpyDataset(
        *write_pairs([np.zeros((*s, 2)) for s in sizes], [np.zeros(s, np.uint8) for s in sizes]), tile=16
    ).for_evaluation()
    dataset.check(training=False)
    loader = DataLoader(Samples(dataset, 0), batch_sampler=EvaluationBatches(dataset, 4, 600))
    assert sum(y.numel() for _, y in loader) == sum(height * width for height, width in sizes)


@pytest.mark.parametrize(("fraction", "number"), [(0.001, 1), (0.2, 2), (0.5, 5), (0.77, 8), (0.999, 9)])
def test_a_split_is_by_whole_files_disjoint_and_complete(
    write_pairs: Pairs, fraction: float, number: int
) -> None:
    dataset = NpyDataset(*write_pairs(invent_images(10), invent_masks(10)), crops_per_image=3)
    larger, smaller = dataset.split(fraction, seed=1)
    assert len(smaller.images) == number and len(smaller) == 3 * number
    assert sorted([*larger.images, *smaller.images]) == dataset.images
    for part in (larger, smaller):
        assert part.images == sorted(part.images)
        assert [file.name for file in part.images] == [file.name for file in part.masks]


def test_a_split_follows_from_its_seed(write_pairs: Pairs) -> None:
    dataset = NpyDataset(*write_pairs(invent_images(10), invent_masks(10)))
    splits = [[file.name for file in dataset.split(0.3, seed)[1].images] for seed in range(8)]
    assert splits == [[file.name for file in dataset.split(0.3, seed)[1].images] for seed in range(8)]
    assert len({tuple(split) for split in splits}) > 4


def test_one_image_cannot_be_split(write_pairs: Pairs) -> None:
    (problem,) = problems_of(NpyDataset(*write_pairs(invent_images(1), invent_masks(1))).split, 0.2, 0)
    assert "VALIDATION_FRACTION=0" in problem


def test_an_evaluation_set_can_be_split_too(write_pairs: Pairs) -> None:
    dataset = NpyDataset(*write_pairs(invent_images(5), invent_masks(5)), tile=16).for_evaluation()
    larger, smaller = dataset.split(0.4, seed=0)
    assert (len(larger), len(smaller)) == (12, 8)
    for part in (larger, smaller):
        assert sum(y.numel() for _, y in part) == len(part.images) * 24 * 30


# --------------------------------------------------------------------------------------------------------- determinism


def epoch_of(dataset: NpyDataset, seed: int, epoch: int, workers: int, batch_size: int = 3) -> list:
    batches = TrainingBatches(len(dataset), batch_size, shuffle=True, drop_last=False, seed=seed)
    batches.epoch = epoch
    return list(DataLoader(Samples(dataset, seed), batch_sampler=batches, num_workers=workers))


def equal(one: list, other: list) -> bool:
    return all(
        torch.equal(a, b)
        for pair, same in zip(one, other, strict=True)
        for a, b in zip(pair, same, strict=True)
    )


@pytest.fixture
def augmented(write_pairs: Pairs) -> NpyDataset:
    options: dict[str, Any] = {"crop": 16, "crops_per_image": 2, "foreground": 0.5, "augment": STANDARD}
    dataset = NpyDataset(*write_pairs(invent_images(channels=5), invent_masks()), **options)
    return dataset.with_contract(dataset.contract())


def test_samples_are_the_same_with_any_number_of_workers(augmented: NpyDataset) -> None:
    with_none = epoch_of(augmented, seed=5, epoch=2, workers=0)
    assert len(with_none) == 3 and equal(with_none, epoch_of(augmented, seed=5, epoch=2, workers=2))


@pytest.mark.parametrize(("seed", "epoch"), [(5, 3), (6, 2)])
def test_another_epoch_or_seed_gives_other_samples(augmented: NpyDataset, seed: int, epoch: int) -> None:
    assert not equal(epoch_of(augmented, 5, 2, 0), epoch_of(augmented, seed, epoch, 0))
    for index in range(len(augmented)):
        one, other = Samples(augmented, 5)[2, index], Samples(augmented, seed)[epoch, index]
        assert not torch.equal(one[0], other[0])


def test_a_sample_does_not_depend_on_what_was_drawn_before(augmented: NpyDataset) -> None:
    samples = Samples(augmented, seed=1)
    forwards = [samples[4, index] for index in range(len(augmented))]
    torch.manual_seed(99)
    np.random.seed(99)
    backwards = [samples[4, index] for index in reversed(range(len(augmented)))]
    assert equal(forwards, backwards[::-1])


def test_a_sample_is_the_same_in_a_new_process(augmented: NpyDataset, tmp_path: Path) -> None:
    (tmp_path / "dataset.pickle").write_bytes(pickle.dumps(augmented))
    code = (
        "import pickle, sys, torch\n"
        f"from {dida_tools.__name__}.training.determinism import Samples\n"
        "dataset = pickle.load(open(sys.argv[1], 'rb'))\n"
        "torch.save([Samples(dataset, 3)[7, index] for index in range(len(dataset))], sys.argv[2])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "dataset.pickle"), str(tmp_path / "samples.pt")]
    subprocess.run(command, cwd=ROOT, check=True)
    assert equal(
        [Samples(augmented, 3)[7, i] for i in range(len(augmented))], torch.load(tmp_path / "samples.pt")
    )


def test_crops_of_one_image_and_epoch_differ(augmented: NpyDataset) -> None:
    samples = Samples(augmented, seed=0)
    assert not torch.equal(samples[0, 0][0], samples[0, 1][0])


def test_augmentation_moves_image_and_mask_alike(write_pairs: Pairs) -> None:
    masks = invent_masks()
    images = [np.stack([mask, 255 - mask], -1) for mask in masks]
    dataset = NpyDataset(
        *write_pairs(images, masks), crop=12, crops_per_image=20, augment=GEOMETRY, scale=1.0
    )
    assert all(torch.equal(image[0].long(), mask) for image, mask in dataset)


def test_augmented_pixels_without_data_stay_ignored(write_pairs: Pairs) -> None:
    images = [image + 1 for image in invent_images()]
    for image in images:
        image[:, :10] = 0
    dataset = NpyDataset(*write_pairs(images, invent_masks()), nodata=0, crop=20, augment=GEOMETRY)
    for image, mask in dataset:
        assert torch.equal((image == 0).all(0), mask == 255)


# ---------------------------------------------------------------------------------------------------------- foreground


def share_with(dataset: NpyDataset, wanted: Callable[[torch.Tensor], Any], draws: int = 150) -> float:
    hits = 0
    for number in range(draws):
        seed_sample(0, number, 0)
        hits += bool(wanted(dataset[number % len(dataset)][1]))
    return hits / draws


@pytest.fixture
def rare(write_pairs: Pairs) -> tuple[Path, Path]:
    """Class 1 at one place of a large image, class 2 in half of another, and an image without either."""
    masks = [np.zeros((300, 400), np.uint8) for _ in range(3)]
    masks[0][280:283, 390:394] = 1
    masks[1][:150] = 2
    masks[1][299, 0] = 1
    return write_pairs([np.zeros((300, 400, 1), np.uint8)] * 3, masks)


@pytest.mark.parametrize("foreground", [0.3, 0.7, 1.0])
def test_foreground_is_the_part_of_crops_that_hold_a_class(
    rare: tuple[Path, Path], foreground: float
) -> None:
    without = NpyDataset(*rare, crop=32)
    without.images, without.masks = without.images[:1], without.masks[:1]
    assert share_with(without, lambda mask: (mask == 1).any()) < 0.03
    dataset = NpyDataset(*rare, crop=32, foreground=foreground)
    dataset.images, dataset.masks = dataset.images[:1], dataset.masks[:1]
    assert share_with(dataset, lambda mask: (mask == 1).any()) == pytest.approx(foreground, abs=0.1)


def test_each_class_is_drawn_as_often_as_another(rare: tuple[Path, Path]) -> None:
    dataset = NpyDataset(*rare, crop=32, foreground=1.0)
    dataset.images, dataset.masks = dataset.images[1:2], dataset.masks[1:2]
    assert share_with(dataset, lambda mask: (mask == 1).any()) == pytest.approx(0.5, abs=0.12)
    assert share_with(dataset, lambda mask: (mask > 0).any()) == 1


def test_crops_with_foreground_are_at_many_places_and_within_the_image(rare: tuple[Path, Path]) -> None:
    dataset = NpyDataset(*rare, crop=32, foreground=1.0)
    windows = set()
    for number in range(100):
        seed_sample(0, number, 0)
        top, left, height, width = dataset._choose_window(0)[1]
        assert 0 <= top <= 300 - height and 0 <= left <= 400 - width
        windows.add((top, left))
    assert len(windows) > 60


def test_an_image_without_foreground_is_cropped_anywhere(rare: tuple[Path, Path]) -> None:
    dataset = NpyDataset(*rare, crop=32, foreground=1.0)
    dataset.images, dataset.masks = dataset.images[2:], dataset.masks[2:]
    assert share_with(dataset, lambda mask: (mask == 0).all(), 5) == 1


@pytest.mark.parametrize("task", ["multi-class", "multi-label"])
def test_foreground_follows_the_mask_values(write_pairs: Pairs, task: str) -> None:
    mask = np.full((200, 200), 9, np.uint8)
    mask[100, 120], mask[5, 5] = 200, 255
    folders = write_pairs([np.zeros((200, 200, 1), np.uint8)], [mask])
    dataset = NpyDataset(*folders, crop=16, foreground=1.0, mask_values={9: 0, 200: 1}, task=task)
    assert share_with(dataset, lambda mask: (mask == 1).any(), 30) == 1


def test_foreground_finds_colors_and_labels(write_pairs: Pairs) -> None:
    mask = np.zeros((200, 200, 3), np.uint8)
    mask[100, 120], mask[180, 10] = (0, 1, 0), (1, 0, 1)
    folders = write_pairs([np.zeros((200, 200, 1), np.uint8)], [mask])
    labels = NpyDataset(*folders, crop=16, foreground=1.0, task="multi-label")
    for label, part in enumerate((2 / 3, 1 / 3, 2 / 3)):
        found = share_with(labels, lambda mask, label=label: (mask[label] == 1).any(), 60)
        assert found == pytest.approx(part, abs=0.2)
    colors = NpyDataset(*folders, crop=16, foreground=1.0).with_mask_values(
        {(0, 0, 0): 0, (0, 1, 0): 1, (1, 0, 1): 2}
    )
    assert share_with(colors, lambda mask: (mask > 0).any(), 30) == 1


def test_regression_has_no_foreground(write_pairs: Pairs) -> None:
    masks = [np.random.default_rng(0).random((24, 30)).astype(np.float32)]
    dataset = NpyDataset(*write_pairs(invent_images(1), masks), crop=8, foreground=1.0, task="values")
    assert dataset[0][1].shape == (1, 8, 8)


# ------------------------------------------------------------------------------------------------------------- records


def test_a_data_set_can_be_built_again_from_its_arguments(write_pairs: Pairs) -> None:
    folders = write_pairs(invent_images(), invent_masks())
    options: dict[str, Any] = {
        "crop": 8,
        "foreground": 0.2,
        "augment": STANDARD,
        "nodata": 0,
        "ignore_index": 9,
    }
    dataset = NpyDataset(*folders, **options)
    assert dataset.arguments["x_dir"] == str(folders[0]) and dataset.arguments["augment"] is STANDARD
    again = NpyDataset(**dataset.arguments)
    assert again.arguments == dataset.arguments
    assert equal([Samples(dataset, 0)[0, i] for i in range(4)], [Samples(again, 0)[0, i] for i in range(4)])


def test_copies_leave_the_data_set_as_it_is(write_pairs: Pairs) -> None:
    dataset = NpyDataset(*write_pairs(invent_images(), invent_masks()), crop=8, crops_per_image=2)
    before = Samples(dataset, 0)[0, 3]
    dataset.for_evaluation()
    dataset.split(0.5, 0)
    dataset.with_contract(dataset.contract())
    dataset.with_mask_values({0: 2})
    assert len(dataset) == 8 and equal([before], [Samples(dataset, 0)[0, 3]])


# --------------------------------------------------------------------------------------------------------------- pairs


def test_missing_folders_are_all_named(tmp_path: Path) -> None:
    assert problems_of(NpyDataset, tmp_path / "x", tmp_path / "y") == [
        f"{tmp_path / 'x'}: there is no such folder",
        f"{tmp_path / 'y'}: there is no such folder",
    ]


def test_empty_folders_are_named(tmp_path: Path) -> None:
    for kind in ("x", "y"):
        (tmp_path / kind).mkdir()
    (tmp_path / "x" / "readme.txt").touch()
    assert problems_of(pair_files, tmp_path / "x", tmp_path / "y") == [
        f"{tmp_path / 'x'}: holds no images",
        f"{tmp_path / 'y'}: holds no images",
    ]


def test_missing_and_surplus_partners_and_equal_names_are_all_named(write_pairs: Pairs, write: Any) -> None:
    x_dir, y_dir = write_pairs(invent_images(5), invent_masks(5))
    (y_dir / "1.npy").unlink()
    (x_dir / "3.npy").unlink()
    (x_dir / "4.npy").unlink()
    write(x_dir / "0.png", np.zeros((4, 4), np.uint8))
    problems = problems_of(NpyDataset, x_dir, y_dir)
    assert problems == [
        f"{x_dir}: 2 files are called 0",
        f"{x_dir / '1.npy'}: has no mask in {y_dir}",
        f"{y_dir / '3.npy'}: has no image in {x_dir}",
        f"{y_dir / '4.npy'}: has no image in {x_dir}",
    ]


def test_pairs_are_in_the_order_of_their_names(write_pairs: Pairs) -> None:
    images, masks = pair_files(*write_pairs(invent_images(12), invent_masks(12)))
    assert [file.stem for file in images] == sorted(str(number) for number in range(12))
    assert [file.stem for file in masks] == [file.stem for file in images]


# --------------------------------------------------------------------------------------------------------------- check


def test_good_data_pass(write_pairs: Pairs, tmp_path: Path) -> None:
    dataset = NpyDataset(*write_pairs(invent_images(), invent_masks()))
    assert dataset.check(tmp_path / "facts.json", num_classes=3) is None
    assert dataset.check(num_classes=None) is None and (tmp_path / "facts.json").is_file()


def check_problems(dataset: NpyDataset, **options: Any) -> list[str]:
    """Each one begins with a file, whose name is left."""
    return [
        re.sub(r"^\S*/([xy]/[^/:]+): ", r"\1: ", problem) for problem in problems_of(dataset.check, **options)
    ]


def test_all_that_is_wrong_is_listed_at_once_with_the_files_names(tmp_path: Path, write: Any) -> None:
    def pair(name: str, image: np.ndarray | None = None, mask: np.ndarray | None = None) -> None:
        write(tmp_path / "x" / f"{name}.npy", np.ones((20, 20, 3), np.float32) if image is None else image)
        write(tmp_path / "y" / f"{name}.npy", np.ones((20, 20), np.uint8) if mask is None else mask)

    for name in ("a", "b", "c", "d", "e", "f", "truncated", "foreign"):
        pair(name)
    broken, unbroken = np.ones((2, 20, 20, 3), np.float32)
    broken[0, :2] = np.nan
    pair("nan", broken)
    pair("channels", np.ones((20, 20, 4), np.float32))
    pair("dtype", np.ones((20, 20, 3), np.float64))
    pair("small", np.ones((10, 40, 3), np.float32), np.ones((10, 40), np.uint8))
    pair("size", unbroken, np.ones((21, 20), np.uint8))
    pair("class", unbroken, np.full((20, 20), 7, np.uint8))
    pair("negative", unbroken, np.full((20, 20), -1, np.int16))
    pair("float", unbroken, np.full((20, 20), 0.5, np.float32))
    pair("colors", unbroken, np.ones((20, 20, 3), np.uint8))
    pair("many", unbroken, np.arange(400 * 20, dtype=np.uint16).reshape(20, 20, 20)[..., 0])
    truncated = tmp_path / "x" / "truncated.npy"
    truncated.write_bytes(truncated.read_bytes()[:200])
    (tmp_path / "y" / "foreign.npy").write_bytes(b"no mask")
    found = check_problems(NpyDataset(tmp_path / "x", tmp_path / "y", crop=16), num_classes=2)
    expected = [
        ("x/truncated.npy", "cannot be read as an image"),
        ("y/foreign.npy", "cannot be read as an image"),
        ("x/channels.npy", "has 4 channels, most have 3"),
        ("x/dtype.npy", "has float64 as dtype, most have float32"),
        ("y/colors.npy", "has 3 channels, most have 1"),
        ("x/nan.npy", "6 values are NaN or infinite"),
        ("x/small.npy", "its size is 10 x 40 pixels, too small for a crop of 16"),
        (
            "y/class.npy",
            "the values 7 are outside of the classes 0 to 1 (ignored: 255): map them with MASK_VALUES",
        ),
        ("y/colors.npy", "it has 3 channels: a multi-class mask has one"),
        ("y/float.npy", "its values (float32) are no class numbers"),
        ("y/many.npy", "the values 20, 40, 60, 80, 100, 120, 140, 160 are outside"),
        ("y/negative.npy", "the values -1 are outside of the classes"),
        ("y/size.npy", "its size is 21 x 20 pixels, that of its image 20 x 20"),
    ]
    assert len(found) == len(expected)
    for problem, (file, text) in zip(found, expected, strict=True):
        assert problem.startswith(f"{file}: ") and text in problem


def test_mixed_sizes_need_a_crop_in_training_and_not_in_evaluation(write_pairs: Pairs) -> None:
    sizes = [(24, 30), (24, 30), (30, 24)]
    folders = write_pairs([np.zeros((*s, 1)) for s in sizes], [np.zeros(s, np.uint8) for s in sizes])
    (problem,) = check_problems(NpyDataset(*folders))
    assert problem == "x/2.npy: has 30 x 24 pixels, most have 24 x 30: images of several sizes need a crop"
    NpyDataset(*folders, crop=24).check()
    NpyDataset(*folders).check(training=False)
    NpyDataset(*folders, crop=100).check(training=False)


def test_mixed_nodata_values_are_named_unless_one_is_given(tmp_path: Path, write: Any) -> None:
    for number, nodata in enumerate([0, 0, 5, None]):
        write(tmp_path / "x" / f"{number}.tif", np.ones((16, 16), np.uint8), nodata)
        write(tmp_path / "y" / f"{number}.tif", np.ones((16, 16), np.uint8))
    problems = check_problems(NpyDataset(tmp_path / "x", tmp_path / "y"))
    assert [problem.split(", most")[0] for problem in problems] == [
        "x/2.tif: has 5.0 as nodata value",
        "x/3.tif: has None as nodata value",
    ]
    NpyDataset(tmp_path / "x", tmp_path / "y", nodata=0).check()


@pytest.mark.parametrize("task", ["multi-label", "values"])
def test_mixed_channels_of_masks_are_named(write_pairs: Pairs, task: str) -> None:
    masks = [np.ones((24, 30, channels), np.uint8) for channels in (2, 2, 3, 2)]
    problems = check_problems(NpyDataset(*write_pairs(invent_images(), masks), task=task))
    assert problems == ["y/2.npy: has 3 channels, most have 2"]


def test_labels_other_than_0_and_1_and_another_number_of_them_are_named(write_pairs: Pairs) -> None:
    masks = [np.zeros((24, 30, 2), np.uint8) for _ in range(4)]
    masks[1][0, 0, 1], masks[2][0, 0, 0] = 200, 255
    dataset = NpyDataset(*write_pairs(invent_images(), masks), task="multi-label")
    assert check_problems(dataset) == [
        "y/1.npy: the values 200 are not 0 or 1: map them with MASK_VALUES, such as {255: 1}"
    ]
    assert len(check_problems(dataset, num_classes=3)) == 5
    dataset.with_mask_values({200: 1}).check(num_classes=2)


def test_colors_without_a_class_are_named(write_pairs: Pairs) -> None:
    masks = [np.zeros((24, 30, 3), np.uint8) for _ in range(2)]
    masks[1][0, 0] = (1, 2, 3)
    dataset = NpyDataset(*write_pairs(invent_images(2), masks), mask_values={(0, 0, 0): 0, (255, 0, 0): 1})
    (problem,) = check_problems(dataset, num_classes=2)
    assert problem.startswith("y/1.npy: it has 3 channels") and "unmapped: (1, 2, 3)" in problem


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_damaged_values_of_a_regression_are_named(write_pairs: Pairs, value: float) -> None:
    masks = [np.zeros((24, 30), np.float32) for _ in range(2)]
    masks[1][3, 3] = value
    problems = check_problems(NpyDataset(*write_pairs(invent_images(2), masks), task="values"))
    assert problems == ["y/1.npy: 1 values are NaN or infinite"]


def test_class_numbers_are_checked_against_the_model(write_pairs: Pairs) -> None:
    dataset = NpyDataset(*write_pairs(invent_images(), invent_masks(classes=3)))
    dataset.check(num_classes=3)
    problems = check_problems(dataset, num_classes=2)
    assert len(problems) == 4 and all(
        "MASK_VALUES, such as {255: 1}, or correct ch_out" in text for text in problems
    )


def test_an_ignored_value_is_no_problem(write_pairs: Pairs) -> None:
    masks = [np.where(mask == 2, 9, mask) for mask in invent_masks()]
    NpyDataset(*write_pairs(invent_images(), masks), ignore_index=9).check(num_classes=2)


@pytest.mark.parametrize(
    ("task", "channels"), [("multi-class", None), ("multi-label", None), ("multi-label", 2)]
)
def test_masks_of_0_and_an_ignored_255_alone_are_refused_in_training(
    write_pairs: Pairs, task: str, channels: int | None
) -> None:
    shape = (24, 30) if channels is None else (24, 30, channels)
    masks = [np.random.default_rng(n).integers(0, 2, shape, dtype=np.uint8) * 255 for n in range(4)]
    dataset = NpyDataset(*write_pairs(invent_images(), masks), task=task)
    (problem,) = problems_of(dataset.check)
    assert problem.endswith("map it with MASK_VALUES={255: 1}")
    dataset.check(training=False)
    dataset.with_mask_values({255: 1}).check()


def test_nan_is_no_problem_if_it_means_no_data(write_pairs: Pairs) -> None:
    images = invent_images(dtype="float32")
    for image in images:
        image[:4] = np.nan
    folders = write_pairs(images, invent_masks())
    NpyDataset(*folders, nodata=float("nan")).check()
    assert len(check_problems(NpyDataset(*folders))) == 4


def test_dead_links_are_listed_with_the_rest(write_pairs: Pairs) -> None:
    x_dir, y_dir = write_pairs(invent_images(), invent_masks(classes=9))
    (x_dir / "2.npy").unlink()
    (x_dir / "2.npy").symlink_to(x_dir / "nowhere.npy")
    problems = check_problems(NpyDataset(x_dir, y_dir), num_classes=3)
    assert problems[0].startswith("x/2.npy: cannot be read") and len(problems) == 4


def test_a_checked_data_set_knows_its_images_without_opening_them(
    write_pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = NpyDataset(*write_pairs(invent_images(), invent_masks(), ".png"))
    dataset.check()
    monkeypatch.setattr(sys.modules[NpyDataset.__module__], "image_info", None)
    assert len(dataset.with_contract(dataset.contract()).for_evaluation()) == 4


def test_a_second_check_does_not_read_again(write_pairs: Pairs, tmp_path: Path) -> None:
    x_dir, y_dir = write_pairs(invent_images(), invent_masks())
    NpyDataset(x_dir, y_dir).check(tmp_path / "facts.json")
    for file in [*x_dir.iterdir(), *y_dir.iterdir()]:
        stat = file.stat()
        file.write_bytes(bytes(stat.st_size))
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    NpyDataset(x_dir, y_dir).check(tmp_path / "facts.json")
    assert len(check_problems(NpyDataset(x_dir, y_dir))) == 8


# ---------------------------------------------------------------------------------------------------------- prediction


@FORMATS
def test_prediction_reads_whole_images_by_the_contract(write_pairs: Pairs, ending: str, dtype: str) -> None:
    images = invent_images(dtype=dtype)
    x_dir, y_dir = write_pairs(images, invent_masks(), ending)
    train = NpyDataset(x_dir, y_dir)
    contract = train.contract()
    dataset = NpyPredictionDataset([str(file) for file in train.images], contract)
    for number, (image, name) in enumerate(dataset):
        assert name == f"{number}{ending}" and torch.equal(image, train.with_contract(contract)[number][0])


def test_prediction_without_a_contract_takes_that_of_the_first_file(tmp_path: Path, write: Any) -> None:
    files = [write(tmp_path / f"{n}.tif", np.full((16, 16 + n, 2), n, np.uint8), nodata=9) for n in range(2)]
    dataset = NpyPredictionDataset(files)
    assert dataset.contract == DataContract(2, dtype="uint8", scale=1 / 255, nodata=9)
    assert torch.equal(dataset[1][0], torch.full((2, 16, 17), 1 / 255))


def test_prediction_lists_every_file_that_does_not_fit(tmp_path: Path, write: Any) -> None:
    arrays = {
        "good": np.zeros((4, 4, 3), np.uint8),
        "channels": np.zeros((4, 4), np.uint8),
        "dtype": np.zeros((4, 4, 3)),
    }
    files = [write(tmp_path / f"{name}.npy", array) for name, array in arrays.items()]
    problems = problems_of(
        NpyPredictionDataset, [*files, tmp_path / "missing.tif"], DataContract(3, dtype="uint8")
    )
    assert [Path(problem.split(": ")[0]).name for problem in problems] == [
        "channels.npy",
        "dtype.npy",
        "missing.tif",
    ]


def test_prediction_refuses_nan(tmp_path: Path, write: Any) -> None:
    image = np.zeros((4, 4, 2), np.float32)
    image[1, 2, 0] = np.nan
    dataset = NpyPredictionDataset([write(tmp_path / "image.npy", image)], DataContract(2))
    with pytest.raises(DataError, match=r"image.npy: it has 1 NaN or infinite values"):
        dataset[0]


def test_prediction_wants_files() -> None:
    assert problems_of(NpyPredictionDataset, []) == ["there are no files to predict"]


@pytest.mark.parametrize("scanned", [False, True])
def test_nodata_of_a_mask_counts_nowhere_but_0_is_a_class(tmp_path: Path, scanned: bool) -> None:
    import rasterio

    mask = np.random.default_rng(0).choice(np.uint8([0, 1, 200]), (1, 24, 30))
    for name, nodata in (("a", 200), ("b", 0)):
        for kind in ("x", "y"):
            (tmp_path / kind).mkdir(exist_ok=True)
        np.save(tmp_path / "x" / f"{name}.npy", np.zeros((24, 30, 3), np.uint8))
        written = np.where(mask == 200, 0, mask) if nodata == 0 else mask
        profile = {
            "driver": "GTiff",
            "height": 24,
            "width": 30,
            "count": 1,
            "dtype": "uint8",
            "nodata": nodata,
        }
        with rasterio.open(tmp_path / "y" / f"{name}.tif", "w", **profile) as file:
            file.write(written)
    dataset = NpyDataset(tmp_path / "x", tmp_path / "y")
    if scanned:
        dataset.check(num_classes=2)
    first, second = (dataset.for_evaluation()[number][1].numpy() for number in range(2))
    assert np.array_equal(first, np.where(mask[0] == 200, 255, mask[0]))
    assert np.array_equal(second, np.where(mask[0] == 200, 0, mask[0]))
