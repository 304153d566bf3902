"""Samples: what they hold, how crops are drawn, that every pixel is evaluated once, and all repeats."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dida_core.data.contract import DataContract
from dida_core.data.images import DataError
from dida_core.training.determinism import Samples, TrainingBatches, seed_sample
from torch.nn import functional
from torch.utils.data import DataLoader

from dida_tools.utils.data import NpyDataset, NpyPredictionDataset
from dida_tools.utils.data.transforms import GEOMETRY, STANDARD

Pairs = Callable[..., tuple[Path, Path]]
ENDINGS = [(".npy", "uint16"), (".npz", "uint8"), (".png", "uint8"), (".tif", "uint16")]
FORMATS = pytest.mark.parametrize(("ending", "dtype"), ENDINGS)
DTYPES = [("uint8", 0), ("uint16", 0), ("float32", 1e6), ("float64", 1e6)]
SIZE = (24, 30)


def invent_images(
    count: int = 4, size: Any = SIZE, channels: int = 3, dtype: str = "uint8"
) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [(rng.random((*size, channels)) * (100 + 10 * number)).astype(dtype) for number in range(count)]


def invent_masks(count: int = 4, size: Any = SIZE, classes: int = 3) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, classes, size, dtype=np.uint8) for _ in range(count)]


@pytest.fixture
def folders(write_pairs: Pairs) -> tuple[Path, Path]:
    """Four images of 24 x 30 pixels, and their masks of three classes."""
    return write_pairs(invent_images(), invent_masks())


def equal(one: list, other: list) -> bool:
    pairs = [pair for samples in zip(one, other, strict=True) for pair in zip(*samples, strict=True)]
    return all(torch.equal(a, b) for a, b in pairs)


# ---------------------------------------------------------------------------------------------------- samples


@FORMATS
def test_images_come_scaled_and_channels_first(write_pairs: Pairs, ending: str, dtype: str) -> None:
    images, masks = invent_images(dtype=dtype), invent_masks()
    folders = write_pairs(images, masks, ending)
    dataset = NpyDataset(*folders)
    prediction = NpyPredictionDataset([str(file) for file in dataset.images])
    contract = dataset.contract()
    normalized = dataset.with_contract(contract)
    for number, (image, mask) in enumerate(zip(images, masks, strict=True)):
        (x, y), (path, alone) = dataset[number], prediction[number]
        scaled = np.moveaxis(image, -1, 0) / np.iinfo(dtype).max
        assert (x.dtype, y.dtype) == (torch.float32, torch.int64) and x.is_contiguous() and y.is_contiguous()
        torch.testing.assert_close(x, torch.from_numpy(scaled).float(), rtol=1e-6, atol=0)
        assert np.array_equal(y, mask) and torch.equal(alone, x)
        assert path == str(dataset.images[number])
        by_contract = NpyPredictionDataset(dataset.images, contract)[number][1]
        assert torch.equal(by_contract, normalized[number][0]) and not torch.equal(by_contract, x)
    assert len(dataset) == len(prediction) == 4
    given = NpyDataset(*folders, scale=1.0)
    assert np.array_equal(given[3][0], np.moveaxis(images[3], -1, 0).astype(np.float32))
    for index in (-1, 4):
        with pytest.raises(IndexError):
            dataset[index]


@FORMATS
def test_crops_are_windows_of_image_and_mask(write_pairs: Pairs, ending: str, dtype: str) -> None:
    y, x = np.mgrid[0:24, 0:30].astype(np.uint8)
    place = np.stack([y, x, y * 0], -1)
    folders = write_pairs([place.astype(dtype)] * 2, [y * 8 + x // 4] * 2, ending)
    dataset = NpyDataset(*folders, crop=10, crops_per_image=50, scale=1.0)
    corners = set()
    torch.manual_seed(0)  # a hundred draws hit every edge
    for image, mask in dataset:
        assert image.shape == (3, 10, 10) and mask.shape == (10, 10)
        assert torch.equal(mask, (image[0] * 8 + torch.floor(image[1] / 4)).long())
        corners.add((int(image[0, 0, 0]), int(image[1, 0, 0])))
    rows, columns = zip(*corners, strict=True)
    assert (min(rows), max(rows), min(columns), max(columns)) == (0, 14, 0, 20) and len(corners) > 70
    assert [dataset.sample_name(index) for index in (0, 49, 50)] == [f"{n}{ending}" for n in (0, 0, 1)]


@pytest.mark.parametrize(("task", "ignored"), [("multi-class", 255), ("multi-label", 7), ("values", np.nan)])
def test_smaller_images_are_padded_with_pixels_that_count_nowhere(
    write_pairs: Pairs, task: str, ignored: float
) -> None:
    folders = write_pairs(invent_images(), invent_masks(classes=2))
    dataset = NpyDataset(*folders, crop=40, task=task, ignore_index=7 if task == "multi-label" else 255)
    whole = NpyDataset(*folders, task=task)
    for padded, alone in zip(dataset, whole, strict=True):
        for one, other, value in zip(padded, alone, (0, ignored), strict=True):
            expected = functional.pad(other, (0, 10, 0, 16), value=value)
            assert np.array_equal(one, expected, equal_nan=True) and one.shape[-2:] == (40, 40)
    augmented = NpyDataset(*folders, crop=26, task=task, augment=GEOMETRY)[0]
    assert [one.shape[-2:] for one in augmented] == [(26, 26)] * 2
    dataset.check()


def test_impossible_arguments_are_refused(folders: tuple[Path, Path]) -> None:
    for name, value in {"crop": 0, "crops_per_image": 0, "tile": 0, "task": "boxes"}.items():
        with pytest.raises(ValueError, match=name):
            NpyDataset(*folders, **{name: value})


# ------------------------------------------------------------------------------------------------------ masks


PALETTE = np.array([[0, 0, 0], [255, 0, 0], [0, 128, 255], [0, 0, 1]], np.uint8)


@pytest.mark.parametrize("ending", [".npy", ".png", ".tif"])
@pytest.mark.parametrize("values", [np.uint8([0, 255]), np.uint8([10, 20, 30]), PALETTE])
def test_values_and_colors_can_be_mapped(write_pairs: Pairs, ending: str, values: np.ndarray) -> None:
    classes = invent_masks(classes=len(values))
    keys = [tuple(value) if isinstance(value, list) else value for value in values.tolist()]
    mask_values = {value: number for number, value in enumerate(keys)}
    dataset = NpyDataset(*write_pairs(invent_images(), [values[mask] for mask in classes], ending))
    mapped = dataset.with_mask_values(mask_values)
    mapped.check(num_classes=len(values))
    assert all(np.array_equal(y, mask) for (_, y), mask in zip(mapped, classes, strict=True))
    assert mapped.arguments["mask_values"] == mask_values and dataset.arguments["mask_values"] is None
    if values.ndim == 1:
        assert np.array_equal(dataset[1][1], values[classes[1]])
    else:
        with pytest.raises(DataError, match="it has 3 channels: a multi-class mask has one"):
            dataset[0]


@pytest.mark.parametrize("channels", [(), (1,), (4,)])
@pytest.mark.parametrize("dtype", ["uint8", "float32", "int16"])
def test_labels_and_values_have_channels(write_pairs: Pairs, channels: tuple[int, ...], dtype: str) -> None:
    task, most = ("multi-label", 2) if dtype == "uint8" else ("values", 3000)
    rng = np.random.default_rng(0)
    masks = [(rng.random((*SIZE, *channels)) * most).astype(dtype) for _ in range(4)]
    dataset = NpyDataset(*write_pairs(invent_images(), masks), task=task, crop=8, foreground=1.0)
    dataset.check(num_classes=channels[0] if channels else 1)
    assert dataset[0][1].shape == (*(channels or (1,)), 8, 8)  # values have no foreground
    for (_, y), mask in zip(dataset.for_evaluation(), masks, strict=True):
        expected = np.moveaxis(mask.reshape(*SIZE, -1), -1, 0).astype(np.float32)
        assert y.dtype == torch.float32 and np.array_equal(y, expected)


@pytest.mark.parametrize("ending", [".npy", ".tif"])
@pytest.mark.parametrize("task", ["multi-class", "multi-label"])
def test_pixels_without_data_are_0_and_ignored(write_pairs: Pairs, ending: str, task: str) -> None:
    images = invent_images(dtype="int16")
    missing = np.zeros(SIZE, bool)
    missing[:, 20:] = missing[:5] = True
    for image in images:
        image[missing] = -99
    folders = write_pairs(images, invent_masks(classes=2), ending, nodata=-99)
    dataset = NpyDataset(*folders, nodata=None if ending == ".tif" else -99, task=task, ignore_index=77)
    dataset.check(num_classes=2 if task == "multi-class" else 1)
    for contract in (dataset.contract(), dataset.contract(normalize=False)):
        assert contract.nodata == -99
        for image, mask in dataset.with_contract(contract):
            assert (image.numpy()[:, missing] == 0).all() and (mask.numpy()[..., missing] == 77).all()
            assert (mask.numpy()[..., ~missing] <= 1).all()


@pytest.mark.parametrize("scanned", [False, True])
def test_nodata_of_a_mask_counts_nowhere_but_0_is_a_class(tmp_path: Path, write: Any, scanned: bool) -> None:
    mask = np.random.default_rng(0).choice(np.uint8([0, 1, 200]), SIZE)
    zeros = np.where(mask == 200, 0, mask)
    for name, stored, nodata in (("a", mask, 200), ("b", zeros, 0)):
        write(tmp_path / "x" / f"{name}.npy", np.zeros((*SIZE, 3), np.uint8))
        write(tmp_path / "y" / f"{name}.tif", stored, nodata)
    dataset = NpyDataset(tmp_path / "x", tmp_path / "y")
    if scanned:
        dataset.check(num_classes=2)
    first, second = (dataset.for_evaluation()[number][1].numpy() for number in range(2))
    assert np.array_equal(first, np.where(mask == 200, 255, mask)) and np.array_equal(second, zeros)


# -------------------------------------------------------------------------------------------------- contracts


@pytest.mark.parametrize(("dtype", "offset"), DTYPES)
def test_normalized_pixels_have_mean_0_and_std_1(write_pairs: Pairs, dtype: str, offset: float) -> None:
    sizes = [(9, 40), (30, 11), (17, 17)]
    images = [invent_images(1, size)[0] + 7.0 * number + offset for number, size in enumerate(sizes)]
    for image in images:
        image[..., 2] = 7  # a constant channel becomes 0
    masks = [np.zeros(size, np.uint8) for size in sizes]
    dataset = NpyDataset(*write_pairs([image.astype(dtype) for image in images], masks))
    assert dataset.contract().std[2] == 1
    dataset = dataset.with_contract(dataset.contract())
    pixels = torch.cat([image.flatten(1) for image, _ in dataset], 1).double()
    assert pixels.mean(1).abs().max() < 1e-5 and (pixels[:2].std(1, correction=0) - 1).abs().max() < 1e-5
    assert pixels[2].abs().max() < 1e-6


def test_the_contract_says_how_the_images_are_read(folders: tuple[Path, Path]) -> None:
    names: dict[str, Any] = {"channel_names": ("r", "g", "b"), "class_names": ["a", "b", "c"]}
    names["class_colors"] = [(0, 0, 0), (255, 0, 0), (0, 255, 0)]
    pixels = np.concatenate([image.reshape(-1, 3) for image in invent_images()])
    limits = {"minimum": tuple(pixels.min(0).tolist()), "maximum": tuple(pixels.max(0).tolist())}
    expected = DataContract(3, dtype="uint8", scale=1 / 255, tile_size=30, **limits, **names)
    assert NpyDataset(*folders, **names).contract(normalize=False).to_dict() == expected.to_dict()
    assert NpyDataset(*folders, crop=8).contract().tile_size == 8
    assert NpyDataset(*folders, tile=16).contract().tile_size == 16


# ------------------------------------------------------------------------------------------ evaluation, split


@pytest.mark.parametrize("tile", [1, 7, 16, 100])
def test_evaluation_gives_every_pixel_once(write_pairs: Pairs, tile: int) -> None:
    sizes, numbers, first = [(24, 17), (1, 9), (16, 32)], [], 0
    for height, width in sizes:
        numbers.append(np.arange(first, first + height * width).reshape(height, width))
        first += height * width
    folders = write_pairs([one.astype(np.float32) for one in numbers], numbers)
    dataset = NpyDataset(*folders, tile=tile).for_evaluation()
    samples = list(dataset)
    shapes = [dataset.sample_shape(index) for index in range(len(dataset))]
    assert shapes == [tuple(y.shape) for _, y in samples]
    assert all(max(y.shape) <= tile and torch.equal(x[0].long(), y) for x, y in samples)
    assert torch.cat([y.flatten() for _, y in samples]).sort()[0].tolist() == list(range(first))


def test_evaluation_neither_crops_nor_augments_nor_draws(folders: tuple[Path, Path]) -> None:
    options: dict[str, Any] = {"crop": 8, "crops_per_image": 3, "foreground": 1.0, "augment": STANDARD}
    dataset = NpyDataset(*folders, **options).for_evaluation()
    state = torch.get_rng_state()
    assert equal(list(dataset), list(NpyDataset(*folders)))
    assert torch.equal(state, torch.get_rng_state())
    assert [dataset.sample_name(index) for index in range(4)] == ["0.npy", "1.npy", "2.npy", "3.npy"]


@pytest.mark.parametrize(("fraction", "number"), [(0.001, 1), (0.2, 2), (0.77, 8), (0.999, 9)])
def test_a_split_is_by_files_disjoint_and_complete(write_pairs: Pairs, fraction: float, number: int) -> None:
    dataset = NpyDataset(*write_pairs(invent_images(10), invent_masks(10)), crops_per_image=3, tile=16)
    larger, smaller = dataset.split(fraction, seed=1)
    assert len(smaller.images) == number and len(smaller) == 3 * number
    assert sorted([*larger.images, *smaller.images]) == dataset.images
    for part in (larger, smaller, *dataset.for_evaluation().split(fraction, seed=1)):
        assert part.images == sorted(part.images)
        assert [file.name for file in part.images] == [file.name for file in part.masks]
        assert len(part.for_evaluation()) == 4 * len(part.images)
    splits = [[file.name for file in dataset.split(0.3, seed)[1].images] for seed in range(8)]
    assert splits == [[file.name for file in dataset.split(0.3, seed)[1].images] for seed in range(8)]
    assert len({tuple(split) for split in splits}) > 4
    with pytest.raises(DataError, match="VALIDATION_FRACTION=0"):
        dataset.select([0, 2]).split(0.2, 0)  # of one image


# ------------------------------------------------------------------------------------------------ determinism


def epoch_of(dataset: NpyDataset, seed: int, epoch: int, workers: int = 0) -> list:
    batches = TrainingBatches(len(dataset), 3, shuffle=True, drop_last=False, seed=seed)
    batches.epoch = epoch
    return list(DataLoader(Samples(dataset, seed), batch_sampler=batches, num_workers=workers))


def samples_of(dataset: NpyDataset, seed: int, epoch: int) -> list:
    return [Samples(dataset, seed)[epoch, index] for index in range(len(dataset))]


def test_samples_follow_from_seed_epoch_and_index_alone(write_pairs: Pairs) -> None:
    options: dict[str, Any] = {"crop": 16, "crops_per_image": 2, "foreground": 0.5, "augment": STANDARD}
    dataset = NpyDataset(*write_pairs(invent_images(channels=5), invent_masks()), **options)
    dataset = dataset.with_contract(dataset.contract())
    first = epoch_of(dataset, seed=5, epoch=2)
    assert len(first) == 3 and equal(first, epoch_of(dataset, seed=5, epoch=2, workers=2))
    samples = samples_of(dataset, 5, 2)
    torch.manual_seed(99)
    np.random.seed(99)
    again = pickle.loads(pickle.dumps(dataset))  # as a worker gets it
    assert equal(samples, [Samples(again, 5)[2, index] for index in reversed(range(8))][::-1])
    for seed, epoch in ((5, 3), (6, 2)):
        assert not equal(first, epoch_of(dataset, seed, epoch))
        others = samples_of(dataset, seed, epoch)
        assert not any(torch.equal(one[0], other[0]) for one, other in zip(samples, others, strict=True))
    assert not torch.equal(samples[0][0], samples[1][0])  # two crops of one image


def test_pixels_without_data_stay_ignored_in_augmentation(write_pairs: Pairs) -> None:
    images = [image + 1 for image in invent_images()]
    for image in images:
        image[:, :10] = 0
    folders = write_pairs(images, invent_masks())
    for image, mask in NpyDataset(*folders, nodata=0, crop=20, augment=GEOMETRY):
        assert torch.equal((image == 0).all(0), mask == 255)


# ------------------------------------------------------------------------------------------------- foreground


def fraction_with(dataset: NpyDataset, wanted: Callable[[torch.Tensor], Any], draws: int = 150) -> float:
    found = 0
    for number in range(draws):
        seed_sample(0, number, 0)
        found += bool(wanted(dataset[number % len(dataset)][1]))
    return found / draws


def test_foreground_is_the_fraction_of_crops_that_hold_a_class(write_pairs: Pairs) -> None:
    """Class 1 at one place of a large image, class 2 in half of another, and an image without either."""
    masks = [np.zeros((150, 200), np.uint8) for _ in range(3)]
    masks[0][140:143, 190:194] = 1
    masks[1][:75] = 2
    masks[1][149, 0] = 1
    folders = write_pairs([np.zeros((150, 200, 1), np.uint8)] * 3, masks)

    def make(number: int, foreground: float) -> NpyDataset:
        return NpyDataset(*folders, crop=16, foreground=foreground).select([number])

    for foreground in (0.0, 0.3, 1.0):
        found = fraction_with(make(0, foreground), lambda mask: (mask == 1).any())
        assert found == pytest.approx(foreground, abs=0.1 if foreground else 0.03)
    assert fraction_with(make(2, 1.0), lambda mask: (mask == 0).all(), 5) == 1  # there is none
    both = make(1, 1.0)  # each class as often as another
    assert fraction_with(both, lambda mask: (mask == 1).any()) == pytest.approx(0.5, abs=0.12)
    assert fraction_with(both, lambda mask: (mask > 0).any()) == 1


def test_foreground_follows_mask_values_colors_and_labels(write_pairs: Pairs) -> None:
    def make(mask: np.ndarray, folder: str, **options: Any) -> NpyDataset:
        folders = write_pairs([np.zeros((200, 200, 1), np.uint8)], [mask], folder=folder)
        return NpyDataset(*folders, crop=16, foreground=1.0, **options)

    mask = np.full((200, 200), 9, np.uint8)
    mask[100, 120], mask[5, 5] = 200, 255
    for task in ("multi-class", "multi-label"):
        dataset = make(mask, "values", mask_values={9: 0, 200: 1}, task=task)
        assert fraction_with(dataset, lambda mask: (mask == 1).any(), 30) == 1
    mask = np.zeros((200, 200, 3), np.uint8)
    mask[100, 120], mask[180, 10] = (0, 1, 0), (1, 0, 1)
    labels = make(mask, "labels", task="multi-label")
    for label, part in enumerate((2 / 3, 1 / 3, 2 / 3)):
        found = fraction_with(labels, lambda mask, label=label: (mask[label] == 1).any(), 60)
        assert found == pytest.approx(part, abs=0.2)
    colors = make(mask, "labels", mask_values={(0, 0, 0): 0, (0, 1, 0): 1, (1, 0, 1): 2})
    assert fraction_with(colors, lambda mask: (mask > 0).any(), 30) == 1


# ---------------------------------------------------------------------------------------- records, prediction


def test_a_dataset_can_be_built_again_and_its_copies_leave_it_as_it_is(folders: tuple[Path, Path]) -> None:
    options: dict[str, Any] = {"crop": 8, "foreground": 0.2, "augment": STANDARD, "nodata": 0}
    dataset = NpyDataset(*folders, **options, ignore_index=9)
    assert dataset.arguments["x_dir"] == str(folders[0]) and dataset.arguments["augment"] is STANDARD
    again = NpyDataset(**dataset.arguments)
    samples = samples_of(dataset, 0, 0)
    assert again.arguments == dataset.arguments and equal(samples, samples_of(again, 0, 0))
    dataset.for_evaluation()
    dataset.split(0.5, 0)
    dataset.with_contract(dataset.contract())
    dataset.with_mask_values({0: 2})
    assert len(dataset) == 4 and equal(samples, samples_of(dataset, 0, 0))


def test_prediction_reads_by_a_contract_and_refuses_what_does_not_fit(tmp_path: Path, write: Any) -> None:
    files = [write(tmp_path / f"{n}.tif", np.full((16, 16 + n, 2), n, np.uint8), nodata=9) for n in range(2)]
    dataset = NpyPredictionDataset(files)
    assert dataset.contract == DataContract(2, dtype="uint8", scale=1 / 255, nodata=9)
    assert torch.equal(dataset[1][1], torch.full((2, 16, 17), 1 / 255))
    other = write(tmp_path / "dtype.npy", np.zeros((4, 4, 2)))
    with pytest.raises(DataError) as caught:
        NpyPredictionDataset([*files, other, tmp_path / "missing.tif"], DataContract(2, dtype="uint8"))
    names = [Path(problem.split(": ")[0]).name for problem in caught.value.problems]
    assert names == ["dtype.npy", "missing.tif"]
    image = np.zeros((4, 4, 2), np.float32)
    image[1, 2, 0] = np.nan
    with pytest.raises(DataError, match=r"image.npy: it has 1 NaN or infinite values"):
        NpyPredictionDataset([write(tmp_path / "image.npy", image)], DataContract(2))[0]
    with pytest.raises(DataError, match="there are no files to predict"):
        NpyPredictionDataset([])
