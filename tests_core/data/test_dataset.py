"""What a dataset offers comes before the defaults, also inside of Subset and ConcatDataset."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dida_core.data.contract import DataContract
from dida_core.data.dataset import Custom, TrainingData, View, as_dataset
from dida_core.data.images import DataError
from dida_core.errors import ConfigError
from dida_core.training.setup import prepare
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset, random_split

from dida_tools.utils.data import NpyDataset

SIZE = 20


def write(folder: Path, levels: list[int]) -> Path:
    """Write images around these levels, with masks."""
    rng = np.random.default_rng(sum(levels))
    for name in "xy":
        (folder / name).mkdir(parents=True)
    for number, level in enumerate(levels):
        image = rng.integers(level - 9, level + 10, (SIZE, SIZE, 2))
        np.save(folder / "x" / f"{number}.npy", image.astype(np.uint8))
        np.save(folder / "y" / f"{number}.npy", (image[..., 0] > level).astype(np.uint8))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "images", [50, 60, 70, 80])


def npy(folder: Path, **options: Any) -> NpyDataset:
    return NpyDataset(folder / "x", folder / "y", **{"crop": 8, "crops_per_image": 3, **options})


def set_to_zero(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(image), mask


class Plain(Dataset):
    """Offers nothing but its samples."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.full((2, 4, 4), float(index)), torch.full((4, 4), index % 2)


class Rich(Plain):
    """Offers some things; its split is the name of one, as in torchvision."""

    task, ignore_index, split = "multi-class", 7, "train"

    def __init__(self, offset: int = 0) -> None:
        self.offset, self.arguments = offset, {"offset": offset}

    def check(self, cache_file: Path, num_classes: int | None, training: bool) -> None:
        raise DataError([f"{num_classes} classes, {training}"])

    def sample_name(self, index: int) -> str:
        return f"file {index // 2}"

    def for_evaluation(self) -> "Rich":
        return Rich(100)

    def with_mask_values(self, mask_values: dict) -> "Rich":
        return Rich(len(mask_values))


def test_a_plain_dataset_gets_the_defaults(tmp_path):
    plain = as_dataset(Plain())
    assert isinstance(plain, TrainingData) and as_dataset(plain) is plain
    assert isinstance(plain, Custom) and len(plain) == 10 and plain[3][0].mean() == 3
    assert (plain.arguments, plain.task, plain.ignore_index) == (None, None, None)
    assert plain.contract(True, tmp_path) is None and plain.scan() == {} and plain.sample_shape(0) is None
    assert plain.for_evaluation() is plain and plain.with_contract(DataContract(2)) is plain
    assert plain.sample_name(3) == "sample 3"
    plain.check(tmp_path, 2, training=True)
    with pytest.raises(ConfigError, match="MASK_VALUES is set, but the data has no with_mask_values"):
        plain.with_mask_values({255: 1})


def test_what_a_dataset_offers_comes_before_the_defaults(tmp_path, folder):
    assert as_dataset(npy(folder)).images and isinstance(npy(folder), TrainingData)
    rich = as_dataset(Rich())
    assert (rich.arguments, rich.task, rich.ignore_index) == ({"offset": 0}, "multi-class", 7)
    assert rich.sample_name(3) == "file 1" and rich.for_evaluation().offset == 100
    assert rich.with_mask_values({1: 2, 3: 4}).offset == 2 and rich.sample_shape(0) is None
    with pytest.raises(DataError, match="3 classes, False"):
        rich.check(tmp_path, 3, training=False)
    assert [len(part) for part in rich.split(0.2, 0)] == [8, 2]  # its attribute "split" is no function


@pytest.mark.parametrize(
    "dataset", [Plain(), Rich(), Subset(Rich(), [3, 1]), ConcatDataset([Plain(), Rich()])]
)
def test_workers_can_be_given_it(dataset):
    adapted = as_dataset(dataset)
    again = pickle.loads(pickle.dumps(adapted))
    assert len(again) == len(adapted) and torch.equal(again[1][0], adapted[1][0])
    assert again.sample_name(1) == adapted.sample_name(1)


def test_wrappers_pass_samples_and_names_on(folder):
    class Doubled(Subset):
        def __getitem__(self, index: Any) -> Any:
            return self.dataset[self.indices[index]][0] * 2

        def __getitems__(self, indices: list[int]) -> list[Any]:
            return [self[index] for index in indices]

    assert as_dataset(Doubled(Plain(), [4]))[0].mean() == 8  # a wrapper of the user's own keeps its ways
    base, joined = npy(folder, crop=None, crops_per_image=1), ConcatDataset([Plain(), Rich()])
    nested = as_dataset(Subset(Subset(ConcatDataset([joined, base]), [22, 5, 13]), [2, 0]))
    assert isinstance(nested, View)
    assert [nested.sample_name(index) for index in range(2)] == ["file 1", "2.npy"]
    assert nested[0][0].mean() == 3 and torch.equal(nested[1][0], base[2][0])
    assert len(nested) == 2 and len(nested.scan()) == 2 and nested.arguments is None
    with pytest.raises(IndexError):
        nested[2]


def test_a_part_is_split_as_before():
    order = np.random.default_rng(5).permutation(10)
    expected = [sorted(order[3:]), sorted(order[:3])]
    for dataset in (Plain(), Subset(Plain(), range(10))):
        parts = as_dataset(dataset).split(0.3, 5)
        assert [[int(part[index][0].mean()) for index in range(len(part))] for part in parts] == expected
    with pytest.raises(DataError, match="one image cannot be split"):
        as_dataset(Subset(Plain(), [3])).split(0.2, 0)


def test_no_image_is_parted_by_a_split(folder, tmp_path):
    other = write(tmp_path / "other", [55, 65])
    for dataset in (Subset(npy(folder), range(12)), ConcatDataset([npy(folder), npy(other)]), Rich()):
        adapted = as_dataset(dataset)
        whole = as_dataset(View([adapted], [(0, index) for index in range(len(adapted))]))
        train, validation = whole.split(0.3, 1)
        places = [{part._image(sample) for sample in part.samples} for part in (train, validation)]
        assert not places[0] & places[1] and len(train) + len(validation) == len(adapted)


def test_the_validation_part_of_a_subset_has_each_pixel_of_its_images_once(folder, tmp_path):
    _, validation = random_split(npy(folder, augment=set_to_zero, tile=16), [6, 6], torch.Generator())
    adapted = as_dataset(validation)
    assert adapted[0][0].abs().max() == 0 and adapted[0][0].shape[-1] == 8
    evaluated = as_dataset(adapted.for_evaluation())
    names = {adapted.sample_name(index) for index in range(6)}
    assert {evaluated.sample_name(index) for index in range(len(evaluated))} == names
    assert len(evaluated) == 4 * len(names) and min(float(image.max()) for image, _ in evaluated) > 0
    assert sum(mask.numel() for _, mask in evaluated) == len(names) * SIZE**2
    assert {evaluated.sample_shape(index) for index in range(4)} == {(16, 16), (16, 4), (4, 16), (4, 4)}
    assert as_dataset(Subset(Plain(), [2, 1])).for_evaluation()[0][0].mean() == 2  # in its own order
    joined = ConcatDataset(
        [npy(folder), npy(write(tmp_path / "other", [55, 65]))]
    )  # images of the same names
    evaluated = as_dataset(Subset(joined, [0, 1, 2])).for_evaluation()  # crops of the first image
    assert [evaluated.sample_name(index) for index in range(len(evaluated))] == ["0.npy"]


def test_joined_datasets_have_the_statistics_of_all(folder, tmp_path):
    cache, every = tmp_path / "facts.json", write(tmp_path / "every", [50, 60, 70, 80, 200, 210])
    parts = [tmp_path / "first", tmp_path / "second"]
    for part, names in zip(parts, (range(4), range(4, 6)), strict=True):
        for name in "xy":
            (part / name).mkdir(parents=True)
            for number in names:
                (part / name / f"{number}.npy").write_bytes((every / name / f"{number}.npy").read_bytes())
    expected = npy(every).contract(True, cache)
    joined = as_dataset(ConcatDataset([npy(part) for part in parts]))
    found = joined.contract(True, cache)
    for name in ("mean", "std", "minimum", "maximum"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-6)
    read = as_dataset(joined.with_contract(found)).for_evaluation()
    assert torch.cat([image.flatten(1) for image, _ in read], 1).mean(1).abs().max() < 1e-4
    assert as_dataset(ConcatDataset([npy(folder), Plain()])).contract(True, cache) is not None
    assert as_dataset(ConcatDataset([Plain(), npy(folder)])).contract(True, cache) is None


def test_statistics_are_those_of_the_images_that_samples_are_taken_from(folder, tmp_path):
    cache = tmp_path / "facts.json"
    subset = as_dataset(Subset(npy(folder), [3, 4, 11]))  # crops of images 1 and 3
    only = View([npy(folder)], [(0, 3), (0, 9)])
    for found in (subset.contract(True, cache), as_dataset(Subset(only, [1, 0])).contract(True, cache)):
        assert min(found.minimum) > 50 and max(found.maximum) > 80
        assert found.mean[0] * 255 == pytest.approx(70, abs=1)
    assert {file.name for file in subset.scan()} == {"1.npy", "3.npy"}


def test_all_that_is_wrong_is_found_in_every_dataset(folder, tmp_path):
    (folder / "x" / "1.npy").write_bytes(b"")
    with pytest.raises(DataError, match=r"1\.npy"):
        as_dataset(ConcatDataset([Plain(), npy(folder)])).check(tmp_path / "facts.json", 2, training=True)


@pytest.mark.parametrize("wrap", [lambda data: Subset(data, range(12)), lambda data: ConcatDataset([data])])
def test_a_wrapped_dataset_is_normalized_in_training_and_not_augmented_in_evaluation(
    folder, tmp_path, tiny_config, global_config, wrap
):
    model = {"MODEL_CONFIG": tiny_config["MODEL_CONFIG"] | {"ch_in": 2}}
    plain, zeroed = npy(folder), npy(folder, augment=set_to_zero)
    expected = prepare(plain, plain, tiny_config | model, global_config, None, "dida_tools")
    setup = prepare(wrap(zeroed), wrap(plain), tiny_config | model, global_config, None, "dida_tools")
    assert setup.contract.mean == expected.contract.mean and setup.contract.mean
    assert all(image.abs().max() == 0 for image, _ in setup.data.train)
    for split in ("validation", "test"):
        images = torch.cat([image.flatten(1) for image, _ in getattr(setup.data, split)], 1)
        assert images.std() > 0.1 and images.shape[1] % SIZE**2 == 0
    assert setup.experiment.not_rerunnable and setup.config["DATASET"] is None
    tensors = TensorDataset(torch.rand(6, 2, 8, 8), torch.randint(3, (6, 8, 8)))
    tensors = ConcatDataset([Subset(tensors, [5, 4, 3]), tensors])
    assert prepare(tensors, None, tiny_config | model, global_config, None, "dida_tools").contract.mean == ()
