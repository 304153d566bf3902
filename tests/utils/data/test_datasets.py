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
from dida_core.data.pairs import map_values
from dida_core.training import determinism
from dida_core.training.determinism import EvaluationBatches, Samples, TrainingBatches, seed_sample
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from dida_tools.utils.data import NpyDataset, NpyPredictionDataset
from dida_tools.utils.data import datasets as module
from dida_tools.utils.data.transforms import GEOMETRY, STANDARD

Pairs = Callable[..., tuple[Path, Path]]
FORMATS = pytest.mark.parametrize(
    ("ending", "dtype"), [(".npy", "uint16"), (".npz", "uint8"), (".png", "uint8"), (".tif", "uint16")]
)
SIZE = (24, 30)
NAN = float("nan")


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
    dataset = NpyDataset(*write_pairs(images, masks, ending))
    prediction = NpyPredictionDataset([str(file) for file in dataset.images])
    contract = dataset.contract()
    normalized = dataset.with_contract(contract)
    for number, (image, mask) in enumerate(zip(images, masks, strict=True)):
        (x, y), (alone, name) = dataset[number], prediction[number]
        scaled = np.moveaxis(image, -1, 0) / np.iinfo(dtype).max
        assert (x.dtype, y.dtype) == (torch.float32, torch.int64) and x.is_contiguous() and y.is_contiguous()
        torch.testing.assert_close(x, torch.from_numpy(scaled).float(), rtol=1e-6, atol=0)
        assert np.array_equal(y, mask) and torch.equal(alone, x) and name == f"{number}{ending}"
        by_contract = NpyPredictionDataset(dataset.images, contract)[number][0]
        assert torch.equal(by_contract, normalized[number][0]) and not torch.equal(by_contract, x)
    assert len(dataset) == len(prediction) == 4
    for index in (-1, 4, 100):
        with pytest.raises(IndexError):
            dataset[index]


def test_images_and_masks_may_have_different_formats(tmp_path: Path, write: Any) -> None:
    for number, (ending, of_mask) in enumerate([(".npy", ".png"), (".tif", ".npz"), (".png", ".tif")]):
        write(tmp_path / "x" / f"{number}{ending}", np.full((8, 8, 3), number, np.uint8))
        write(tmp_path / "y" / f"{number}{of_mask}", np.full((8, 8), number, np.uint8))
    dataset = NpyDataset(str(tmp_path / "x"), str(tmp_path / "y"), scale=1.0)
    dataset.check(num_classes=3)
    assert [(int(x.unique()), int(y.unique())) for x, y in dataset] == [(0, 0), (1, 1), (2, 2)]


def test_floats_stay_as_they_are_and_a_given_scale_is_used(write_pairs: Pairs) -> None:
    image = invent_images(1, dtype="float32")[0]
    folders = write_pairs([image], invent_masks(1))
    for options, factor in (({}, 1), ({"scale": 0.25}, 0.25)):
        assert np.array_equal(NpyDataset(*folders, **options)[0][0], np.moveaxis(image, -1, 0) * factor)


@FORMATS
def test_crops_are_windows_of_image_and_mask(write_pairs: Pairs, ending: str, dtype: str) -> None:
    y, x = np.mgrid[0:24, 0:30].astype(np.uint8)
    place = np.stack([y, x, y * 0], -1)
    folders = write_pairs([place.astype(dtype)] * 2, [y * 8 + x // 4] * 2, ending)
    dataset = NpyDataset(*folders, crop=10, crops_per_image=50, scale=1.0)
    corners = set()
    for image, mask in dataset:
        assert image.shape == (3, 10, 10) and mask.shape == (10, 10)
        assert torch.equal(mask, (image[0] * 8 + torch.floor(image[1] / 4)).long())
        corners.add((int(image[0, 0, 0]), int(image[1, 0, 0])))
    rows, columns = zip(*corners, strict=True)
    assert (min(rows), max(rows), min(columns), max(columns)) == (0, 14, 0, 20) and len(corners) > 70


def test_every_image_gives_its_number_of_crops(write_pairs: Pairs) -> None:
    images = [np.full((16, 16, 1), number, np.uint8) for number in range(3)]
    folders = write_pairs(images, invent_masks(3, (16, 16)))
    dataset = NpyDataset(*folders, crop=4, crops_per_image=5, scale=1.0)
    assert [int(x.unique()) for x, _ in dataset] == [number for number in range(3) for _ in range(5)]
    assert [dataset.sample_name(index) for index in (0, 4, 5, 14)] == ["0.npy", "0.npy", "1.npy", "2.npy"]
    assert NpyDataset(*folders, crop=16)[0][0].shape == (1, 16, 16)
    with pytest.raises(DataError, match="crop of 17 pixels is larger than an image of 16 x 16"):
        NpyDataset(*folders, crop=17)[0]


@pytest.mark.parametrize(
    "arguments", [{"crop": 0}, {"crop": -3}, {"crops_per_image": 0}, {"tile": 0}, {"task": "boxes"}]
)
def test_impossible_arguments_are_refused(folders: tuple[Path, Path], arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        NpyDataset(*folders, **arguments)


CROP_HUGE = """
dataset = NpyDataset(sys.argv[1], sys.argv[2], crop=128, crops_per_image=20)
assert all(x.shape == (6, 128, 128) and y.shape == (128, 128) for x, y in dataset)
"""


def test_crops_of_images_larger_than_memory_take_little_memory(tmp_path: Path, memory_growth: Any) -> None:
    for kind, shape in (("x", (30_000, 30_000, 6)), ("y", (30_000, 30_000))):  # sparse: 5.4 GB of zeros
        (tmp_path / kind).mkdir()
        np.lib.format.open_memmap(tmp_path / kind / "huge.npy", "w+", np.uint8, shape)
    imports = f"from {module.__name__} import NpyDataset"
    assert memory_growth(imports, CROP_HUGE, tmp_path / "x", tmp_path / "y") < 100


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


def test_values_are_swapped_at_once_and_several_can_become_one() -> None:
    mask = np.array([[[0], [1], [2], [7]]], np.uint8)
    assert map_values(mask, {0: 1, 1: 0, 2: 300})[..., 0].tolist() == [[1, 0, 300, 7]]
    assert map_values(mask, {-1: 5, 1: 2, 7: 2})[..., 0].tolist() == [[0, 2, 2, 2]]
    assert map_values(mask, None) is mask and map_values(mask, {}) is mask


def test_values_can_be_merged_and_ignored(write_pairs: Pairs) -> None:
    folders = write_pairs([np.zeros((2, 2, 1))], [np.array([[10, 20], [30, 40]], np.uint8)])
    dataset = NpyDataset(*folders, mask_values={10: 0, 20: 1, 30: 1, 40: 255})
    dataset.check(num_classes=2)
    assert dataset[0][1].tolist() == [[0, 1], [1, 255]]
    folders = write_pairs(
        [np.zeros((1, 2, 1))], [np.array([[[0, 200], [200, 255]]], np.uint8)], folder="labels"
    )
    dataset = NpyDataset(*folders, task="multi-label", mask_values={200: 1})
    dataset.check(num_classes=2)
    assert dataset[0][1].tolist() == [[[0, 1]], [[1, 255]]]


@pytest.mark.parametrize("channels", [(), (1,), (4,)])
@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64", "int16"])
def test_labels_and_values_have_channels(write_pairs: Pairs, channels: tuple[int, ...], dtype: str) -> None:
    task = "multi-label" if dtype == "uint8" else "values"
    rng = np.random.default_rng(0)
    masks = [
        (rng.random((*SIZE, *channels)) * (2 if task == "multi-label" else 3000)).astype(dtype)
        for _ in range(4)
    ]
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


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32", "float64"])
@pytest.mark.parametrize("sizes", [[SIZE] * 4, [(9, 40), (30, 11), (17, 17)]])
@pytest.mark.parametrize("offset", [0, 1e6])
def test_normalized_pixels_have_mean_0_and_std_1(
    write_pairs: Pairs, dtype: str, sizes: list, offset: float
) -> None:
    images = [invent_images(1, size, 3, dtype)[0] + 7 * number for number, size in enumerate(sizes)]
    images = [(image + offset * dtype.startswith("f")).astype(dtype) for image in images]
    dataset = NpyDataset(*write_pairs(images, [np.zeros(size, np.uint8) for size in sizes]))
    dataset = dataset.with_contract(dataset.contract())
    pixels = torch.cat([image.flatten(1) for image, _ in dataset], 1).double()
    assert pixels.mean(1).abs().max() < 1e-5 and (pixels.std(1, correction=0) - 1).abs().max() < 1e-5


def test_statistics_leave_out_pixels_without_data_and_other_parts(write_pairs: Pairs) -> None:
    images = [image + 1 for image in invent_images(6)]
    for number, image in enumerate(images):
        image[: 3 * number + 4] = 0
    dataset = NpyDataset(*write_pairs(images, invent_masks(6)), nodata=0)
    dataset.check()
    for part in (dataset, dataset.split(0.5, seed=3)[0]):
        chosen = [
            image[3 * n + 4 :].reshape(-1, 3)
            for n, image in enumerate(images)
            if dataset.images[n] in part.images
        ]
        pixels = np.concatenate(chosen) / 255
        np.testing.assert_allclose(part.contract().mean, pixels.mean(0))
        np.testing.assert_allclose(part.contract().std, pixels.std(0))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_constant_channel_becomes_0(write_pairs: Pairs, dtype: str) -> None:
    images = invent_images(3, (17, 13), 5, dtype)
    for image in images:
        image[..., 1:] = (0, 7, 0.1, 1e6 / 3)
    dataset = NpyDataset(*write_pairs(images, invent_masks(3, (17, 13))))
    assert dataset.contract().std[1:] == (1, 1, 1, 1)
    assert all(image[1:].abs().max() < 1e-6 for image, _ in dataset.with_contract(dataset.contract()))


def test_the_contract_says_how_the_images_are_read(folders: tuple[Path, Path]) -> None:
    names: dict[str, Any] = {"channel_names": ("r", "g", "b"), "class_names": ["a", "b", "c"]}
    names["class_colors"] = [(0, 0, 0), (255, 0, 0), (0, 255, 0)]
    low, high = (
        np.min([image.min((0, 1)) for image in invent_images()], 0),
        np.max([image.max((0, 1)) for image in invent_images()], 0),
    )
    expected = DataContract(
        3, ("r", "g", "b"), "uint8", 1 / 255, minimum=tuple(low.tolist()), maximum=tuple(high.tolist()),
        tile_size=30, class_names=("a", "b", "c"), class_colors=((0, 0, 0), (255, 0, 0), (0, 255, 0)),
    )  # fmt: skip
    assert NpyDataset(*folders, **names).contract(normalize=False) == expected
    assert [NpyDataset(*folders, **size).contract().tile_size for size in ({"crop": 8}, {"tile": 16})] == [
        8,
        16,
    ]


def test_other_data_are_read_by_the_contract_of_the_training_set(
    folders: tuple[Path, Path], write_pairs: Pairs
) -> None:
    test = NpyDataset(*write_pairs(invent_images(2), invent_masks(2), folder="test"))
    contract = NpyDataset(*folders).contract()
    read = test.with_contract(contract)
    assert torch.equal(read[1][0], contract.prepare(invent_images(2)[1])[0])
    assert not torch.equal(read[1][0], test[1][0]) and test.contract() != contract
    assert torch.equal(read.for_evaluation()[1][0], read[1][0])


# ------------------------------------------------------------------------------------------ evaluation, split


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=3), st.integers(1, 50)
)
def test_evaluation_gives_every_pixel_once(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[tuple[int, int]], tile: int
) -> None:
    folder = tmp_path_factory.mktemp("evaluation")
    (folder / "x").mkdir()
    (folder / "y").mkdir()
    first = 0
    for number, (height, width) in enumerate(sizes):
        numbers = np.arange(first, first + height * width).reshape(height, width)
        np.save(folder / "x" / f"{number}.npy", numbers.astype(np.float32))
        np.save(folder / "y" / f"{number}.npy", numbers)
        first += height * width
    dataset = NpyDataset(folder / "x", folder / "y", tile=tile).for_evaluation()
    samples = list(dataset)
    assert [dataset.sample_shape(index) for index in range(len(dataset))] == [
        tuple(y.shape) for _, y in samples
    ]
    assert all(max(y.shape) <= tile and torch.equal(x[0].long(), y) for x, y in samples)
    assert torch.cat([y.flatten() for _, y in samples]).sort()[0].tolist() == list(range(first))


def test_evaluation_neither_crops_nor_augments_nor_draws(folders: tuple[Path, Path]) -> None:
    options: dict[str, Any] = {"crop": 8, "crops_per_image": 3, "foreground": 1.0, "augment": STANDARD}
    dataset = NpyDataset(*folders, **options).for_evaluation()
    state = torch.get_rng_state()
    assert equal(list(dataset), list(NpyDataset(*folders)))
    assert torch.equal(state, torch.get_rng_state())
    assert [dataset.sample_name(index) for index in range(4)] == ["0.npy", "1.npy", "2.npy", "3.npy"]


def test_evaluation_batches_hold_samples_of_one_shape(write_pairs: Pairs) -> None:
    sizes = [SIZE, (17, 40), (8, 8)]
    folders = write_pairs([np.zeros((*s, 2)) for s in sizes], [np.zeros(s, np.uint8) for s in sizes])
    dataset = NpyDataset(*folders, tile=16).for_evaluation()
    dataset.check(training=False)
    loader = DataLoader(Samples(dataset, 0), batch_sampler=EvaluationBatches(dataset, 4, 600))
    assert sum(y.numel() for _, y in loader) == sum(height * width for height, width in sizes)


@pytest.mark.parametrize(("fraction", "number"), [(0.001, 1), (0.2, 2), (0.5, 5), (0.77, 8), (0.999, 9)])
def test_a_split_is_by_files_disjoint_and_complete(write_pairs: Pairs, fraction: float, number: int) -> None:
    dataset = NpyDataset(*write_pairs(invent_images(10), invent_masks(10)), crops_per_image=3, tile=16)
    larger, smaller = dataset.split(fraction, seed=1)
    assert len(smaller.images) == number and len(smaller) == 3 * number
    assert sorted([*larger.images, *smaller.images]) == dataset.images
    for part in (larger, smaller, *dataset.for_evaluation().split(fraction, seed=1)):
        assert part.images == sorted(part.images)
        assert [file.name for file in part.images] == [file.name for file in part.masks]
        evaluated = part.for_evaluation()
        assert (
            len(evaluated) == 4 * len(part.images)
            and sum(y.numel() for _, y in evaluated) == len(part.images) * 720
        )
    splits = [[file.name for file in dataset.split(0.3, seed)[1].images] for seed in range(8)]
    assert splits == [[file.name for file in dataset.split(0.3, seed)[1].images] for seed in range(8)]
    assert len({tuple(split) for split in splits}) > 4


def test_one_image_cannot_be_split(write_pairs: Pairs) -> None:
    with pytest.raises(DataError, match="VALIDATION_FRACTION=0"):
        NpyDataset(*write_pairs(invent_images(1), invent_masks(1))).split(0.2, 0)


# ------------------------------------------------------------------------------------------------ determinism


def epoch_of(dataset: NpyDataset, seed: int, epoch: int, workers: int = 0) -> list:
    batches = TrainingBatches(len(dataset), 3, shuffle=True, drop_last=False, seed=seed)
    batches.epoch = epoch
    return list(DataLoader(Samples(dataset, seed), batch_sampler=batches, num_workers=workers))


@pytest.fixture
def augmented(write_pairs: Pairs) -> NpyDataset:
    options: dict[str, Any] = {"crop": 16, "crops_per_image": 2, "foreground": 0.5, "augment": STANDARD}
    dataset = NpyDataset(*write_pairs(invent_images(channels=5), invent_masks()), **options)
    return dataset.with_contract(dataset.contract())


def test_samples_follow_from_seed_epoch_and_index_alone(augmented: NpyDataset) -> None:
    first = epoch_of(augmented, seed=5, epoch=2)
    assert len(first) == 3 and equal(first, epoch_of(augmented, seed=5, epoch=2, workers=2))
    samples = [Samples(augmented, 5)[2, index] for index in range(8)]
    torch.manual_seed(99)
    np.random.seed(99)
    assert equal(samples, [Samples(augmented, 5)[2, index] for index in reversed(range(8))][::-1])
    for seed, epoch in ((5, 3), (6, 2)):
        assert not equal(first, epoch_of(augmented, seed, epoch))
        assert not any(
            torch.equal(samples[index][0], Samples(augmented, seed)[epoch, index][0]) for index in range(8)
        )
    assert not torch.equal(samples[0][0], samples[1][0])  # two crops of one image


def test_a_sample_is_the_same_in_a_new_process(
    augmented: NpyDataset, tmp_path: Path, run_python: Any
) -> None:
    (tmp_path / "dataset.pickle").write_bytes(pickle.dumps(augmented))
    code = (
        f"import pickle, sys, torch\nfrom {determinism.__name__} import Samples\n"
        "dataset = pickle.load(open(sys.argv[1], 'rb'))\n"
        "torch.save([Samples(dataset, 3)[7, index] for index in range(len(dataset))], sys.argv[2])"
    )
    run_python(code, tmp_path / "dataset.pickle", tmp_path / "samples.pt")
    samples = [Samples(augmented, 3)[7, index] for index in range(8)]
    assert equal(samples, torch.load(tmp_path / "samples.pt"))


def test_augmentation_moves_image_and_mask_alike(write_pairs: Pairs) -> None:
    masks = invent_masks()
    folders = write_pairs([np.stack([mask, 255 - mask], -1) for mask in masks], masks)
    dataset = NpyDataset(*folders, crop=12, crops_per_image=20, augment=GEOMETRY, scale=1.0)
    assert all(torch.equal(image[0].long(), mask) for image, mask in dataset)
    images = [image + 1 for image in invent_images()]
    for image in images:
        image[:, :10] = 0
    for image, mask in NpyDataset(*write_pairs(images, masks), nodata=0, crop=20, augment=GEOMETRY):
        assert torch.equal((image == 0).all(0), mask == 255)  # pixels without data stay ignored


# ------------------------------------------------------------------------------------------------- foreground


def fraction_with(dataset: NpyDataset, wanted: Callable[[torch.Tensor], Any], draws: int = 150) -> float:
    found = 0
    for number in range(draws):
        seed_sample(0, number, 0)
        found += bool(wanted(dataset[number % len(dataset)][1]))
    return found / draws


@pytest.fixture
def rare(write_pairs: Pairs) -> Callable[..., NpyDataset]:
    """Class 1 at one place of a large image, class 2 in half of another, and an image without either."""
    masks = [np.zeros((300, 400), np.uint8) for _ in range(3)]
    masks[0][280:283, 390:394] = 1
    masks[1][:150] = 2
    masks[1][299, 0] = 1
    folders = write_pairs([np.zeros((300, 400, 1), np.uint8)] * 3, masks)

    def make(number: int, foreground: float) -> NpyDataset:
        return NpyDataset(*folders, crop=32, foreground=foreground)._only(np.array([number]))

    return make


@pytest.mark.parametrize("foreground", [0.0, 0.3, 0.7, 1.0])
def test_foreground_is_the_fraction_of_crops_that_hold_a_class(rare: Any, foreground: float) -> None:
    found = fraction_with(rare(0, foreground), lambda mask: (mask == 1).any())
    assert found == pytest.approx(foreground, abs=0.1 if foreground else 0.03)
    assert fraction_with(rare(2, foreground), lambda mask: (mask == 0).all(), 5) == 1  # there is none


def test_each_class_is_drawn_as_often_as_another_and_at_many_places(rare: Any) -> None:
    dataset = rare(1, 1.0)
    assert fraction_with(dataset, lambda mask: (mask == 1).any()) == pytest.approx(0.5, abs=0.12)
    assert fraction_with(dataset, lambda mask: (mask > 0).any()) == 1
    windows = set()
    for number in range(100):
        seed_sample(0, number, 0)
        top, left, height, width = rare(0, 1.0)._choose_window(0)[1]
        assert 0 <= top <= 300 - height and 0 <= left <= 400 - width
        windows.add((top, left))
    assert len(windows) > 60


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


# ---------------------------------------------------------------------------------------------------- records


def test_a_dataset_can_be_built_again_and_its_copies_leave_it_as_it_is(folders: tuple[Path, Path]) -> None:
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
    samples = [Samples(dataset, 0)[0, index] for index in range(4)]
    assert again.arguments == dataset.arguments
    assert equal(samples, [Samples(again, 0)[0, index] for index in range(4)])
    dataset.for_evaluation()
    dataset.split(0.5, 0)
    dataset.with_contract(dataset.contract())
    dataset.with_mask_values({0: 2})
    assert len(dataset) == 4 and equal(samples, [Samples(dataset, 0)[0, index] for index in range(4)])


# ------------------------------------------------------------------------------------------------- prediction


def test_prediction_without_a_contract_takes_that_of_the_first_file(tmp_path: Path, write: Any) -> None:
    files = [write(tmp_path / f"{n}.tif", np.full((16, 16 + n, 2), n, np.uint8), nodata=9) for n in range(2)]
    dataset = NpyPredictionDataset(files)
    assert dataset.contract == DataContract(2, dtype="uint8", scale=1 / 255, nodata=9)
    assert torch.equal(dataset[1][0], torch.full((2, 16, 17), 1 / 255))


def test_prediction_refuses_what_does_not_fit_with_every_name(tmp_path: Path, write: Any) -> None:
    arrays = {
        "good": np.zeros((4, 4, 3), np.uint8),
        "channels": np.zeros((4, 4), np.uint8),
        "dtype": np.zeros((4, 4, 3)),
    }
    files = [write(tmp_path / f"{name}.npy", array) for name, array in arrays.items()]
    with pytest.raises(DataError) as caught:
        NpyPredictionDataset([*files, tmp_path / "missing.tif"], DataContract(3, dtype="uint8"))
    names = [Path(problem.split(": ")[0]).name for problem in caught.value.problems]
    assert names == ["channels.npy", "dtype.npy", "missing.tif"]
    image = np.zeros((4, 4, 2), np.float32)
    image[1, 2, 0] = np.nan
    with pytest.raises(DataError, match=r"image.npy: it has 1 NaN or infinite values"):
        NpyPredictionDataset([write(tmp_path / "image.npy", image)], DataContract(2))[0]
    with pytest.raises(DataError, match="there are no files to predict"):
        NpyPredictionDataset([])
