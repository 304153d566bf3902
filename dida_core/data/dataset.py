"""What a training asks of a dataset, and defaults for what yours does not offer."""

# ruff: noqa: D102 (methods are described in TrainingData)

import itertools
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch.utils.data import ConcatDataset, IterableDataset, Subset

from ..errors import ConfigError
from .contract import DataContract
from .images import DataError


@runtime_checkable
class TrainingData(Protocol):
    """
    What a dataset of (input, target) pairs may offer besides, and the defaults.

    NpyDataset offers all of it. What your own dataset has is used, also inside of torch's ConcatDataset and
    Subset (which is what random_split gives).

    For prediction, its class may have a staticmethod `read` of an image's file, which returns (C, H, W) as in
    samples.
    """

    arguments: Any = None  # what it was built with, for the record
    task: Any = None  # "multi-class", "multi-label" or "values"
    ignore_index: Any = None  # target value of pixels that count nowhere

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...

    def check(self, cache_file: Path, num_classes: int | None, training: bool) -> None:
        """Raise DataError with everything that is wrong, before training starts."""
        return None

    def scan(self) -> dict[Path, dict[str, Any]]:
        """Return what is known of each file; its "sha256" is recorded."""
        return {}

    def contract(self, normalize: bool, cache_file: Path) -> DataContract | None:
        """Return how images are read, with their statistics; None if the dataset gives values of its own."""
        return None

    def with_contract(self, contract: DataContract) -> Any:
        """Return a copy that reads images by a contract, usually that of the training set."""
        return self

    def with_mask_values(self, mask_values: dict) -> Any:
        """Return a copy that maps values of masks to classes."""
        raise ConfigError(["MASK_VALUES is set, but the data has no with_mask_values: map them there."])

    def for_evaluation(self) -> Any:
        """Return a copy without augmentation that has every pixel once, in samples named as their image."""
        return self

    def split(self, fraction: float, seed: int) -> Sequence[Any]:
        """Return two datasets: the larger part, and a random fraction."""
        return View([self], _all_samples([self])).split(fraction, seed)

    def select(self, indices: Sequence[int]) -> Any:
        """Return a dataset of the images alone that these samples are taken from."""
        return self

    def sample_name(self, index: int) -> str:
        """Return what messages call a sample."""
        return f"sample {index}"

    def sample_shape(self, index: int) -> Any:
        """Return (height, width) of a sample in evaluation, where they differ: batches hold one shape."""
        return None


def as_dataset(dataset: Any) -> TrainingData:
    """Return a dataset that offers all of TrainingData: the given one, or a view of it."""
    if isinstance(dataset, TrainingData):
        return dataset
    if type(dataset) is Subset:
        return View([dataset.dataset], [(0, int(index)) for index in dataset.indices])
    if type(dataset) is ConcatDataset:
        return View(dataset.datasets, _all_samples(dataset.datasets))
    return Stream(dataset) if isinstance(dataset, IterableDataset) else Custom(dataset)


class Custom(TrainingData):
    """A custom dataset. What it offers comes before the defaults."""

    def __init__(self, given: Any) -> None:
        self.given = given
        for name, default in vars(TrainingData).items():
            offered = getattr(given, name, None)
            if name[0] != "_" and offered is not None and callable(offered) == callable(default):
                setattr(self, name, offered)

    def __len__(self) -> int:
        return len(self.given)

    def __getitem__(self, index: int, /) -> Any:
        return self.given[index]


class Stream(Custom):
    """Streaming data: samples go by their place in it, and past its end it starts again."""

    num_samples = 0  # of an epoch; the next one goes on from there

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int, /) -> Any:
        return next(itertools.islice(self, index, None))

    def __iter__(self) -> Iterator[Any]:
        for place in itertools.count():
            is_empty = True
            for sample in self.given:
                is_empty = False
                yield sample
            if is_empty:
                when = "gives nothing" if place == 0 else "gives nothing when it is iterated over again"
                raise DataError([f"the streaming data {when}: let it start anew each time"])


class View(TrainingData):
    """Some samples of some datasets. Statistics are those of their images, if these can be selected."""

    def __init__(self, datasets: Sequence[Any], samples: Sequence[tuple[int, int]]) -> None:
        """:param samples: of each, which dataset it belongs to and its index there"""
        self.datasets, self.samples = [as_dataset(one) for one in datasets], samples
        self.task, self.ignore_index = self.datasets[0].task, self.datasets[0].ignore_index

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int, /) -> Any:
        number, index = self.samples[index]
        return self.datasets[number][index]

    def check(self, cache_file: Path, num_classes: int | None, training: bool) -> None:
        for one, _ in self._selected():
            one.check(cache_file, num_classes, training)

    def scan(self) -> dict[Path, dict[str, Any]]:
        return {file: facts for one, _ in self._selected() for file, facts in one.scan().items()}

    def contract(self, normalize: bool, cache_file: Path) -> DataContract | None:
        datasets, weights = zip(*self._selected(), strict=True)
        every = [one.contract(normalize, cache_file) for one in datasets]
        known = [one for one in every if one is not None]
        if len(known) < len(every) or len({(one.channels, one.scale, len(one.mean)) for one in known}) > 1:
            return every[0]  # what does not fit it is refused by with_contract
        mean = np.average([one.mean for one in known], 0, weights)
        square = np.average([np.square(one.mean) + np.square(one.std) for one in known], 0, weights)
        statistics = {"mean": mean, "std": np.sqrt(square - np.square(mean))}
        statistics["minimum"] = np.min([one.minimum for one in known], 0)
        statistics["maximum"] = np.max([one.maximum for one in known], 0)
        return replace(known[0], **{name: tuple(value.tolist()) for name, value in statistics.items()})

    def with_contract(self, contract: DataContract) -> Any:
        return View([one.with_contract(contract) for one in self.datasets], self.samples)

    def with_mask_values(self, mask_values: dict) -> Any:
        return View([one.with_mask_values(mask_values) for one in self.datasets], self.samples)

    def for_evaluation(self) -> Any:
        datasets = [as_dataset(one.for_evaluation()) for one in self.datasets]
        if all(new is old for new, old in zip(datasets, self.datasets, strict=True)):
            return self
        images = {self._image(sample) for sample in self.samples}
        every = View(datasets, _all_samples(datasets))
        return View(datasets, [sample for sample in every.samples if every._image(sample) in images])

    def split(self, fraction: float, seed: int) -> Sequence[Any]:
        images: dict[Hashable, list[tuple[int, int]]] = {}
        for sample in self.samples:
            images.setdefault(self._image(sample), []).append(sample)
        every, parts = list(images.values()), split_numbers(len(images), fraction, seed)
        return [View(self.datasets, [sample for image in part for sample in every[image]]) for part in parts]

    def select(self, indices: Sequence[int]) -> Any:
        return View(self.datasets, [self.samples[index] for index in indices])

    def sample_name(self, index: int) -> str:
        number, index = self.samples[index]
        return self.datasets[number].sample_name(index)

    def sample_shape(self, index: int) -> Any:
        number, index = self.samples[index]
        return self.datasets[number].sample_shape(index)

    def _selected(self) -> list[tuple[TrainingData, int]]:
        """Return the images of each dataset that samples are taken from, and how many samples."""
        indices: dict[int, list[int]] = {}
        for number, index in self.samples:
            indices.setdefault(number, []).append(index)
        return [(self.datasets[number].select(some), len(some)) for number, some in indices.items()]

    def _image(self, sample: tuple[int, int]) -> Hashable:
        """Identify the image that a sample is taken from, which no split may part."""
        number, index = sample
        one = self.datasets[number]
        if isinstance(one, View):
            return number, one._image(one.samples[index])
        is_image = isinstance(one, Custom) and not hasattr(one.given, "for_evaluation")
        return number, index if is_image else one.sample_name(index)


def split_numbers(count: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Split the numbers of some images, at least one in each part: the larger part, and a random fraction."""
    if count < 2:
        remedy = "add images, give a validation set, or VALIDATION_FRACTION=0"
        raise DataError([f"one image cannot be split: {remedy}"])
    number = min(max(1, round(fraction * count)), count - 1)
    order = np.random.default_rng(seed).permutation(count).tolist()
    return sorted(order[number:]), sorted(order[:number])


def _all_samples(datasets: Sequence[Any]) -> list[tuple[int, int]]:
    return [(number, index) for number, one in enumerate(datasets) for index in range(len(one))]
