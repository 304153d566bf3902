"""
Folders of images and masks as PyTorch datasets. A template: change what a sample is, or how it is drawn.

The routines train on any dataset of (input, target) pairs. These offer more, which your own may offer too.
Checks are in dida_core/data/pairs.py, how files are read in images.py.
"""

import copy
import dataclasses
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from dida_core.data.contract import TASKS, DataContract
from dida_core.data.dataset import split_numbers
from dida_core.data.facts import Facts
from dida_core.data.images import DataError, Window, image_info, raise_if, read_masked
from dida_core.data.pairs import (
    MaskReading,
    Pairs,
    contract_problems,
    dataset_problems,
    find_problems,
    find_remarks,
    map_values,
    several_channels,
)
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset

Transform = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class NpyDataset(Dataset):
    """
    Pairs of images and masks of the same file name in two folders, in any format of images.py.

    In training it gives random crops with augmentation, read without the rest of the image; in evaluation
    (``for_evaluation()``) every pixel once, in windows of at most ``tile`` pixels.
    """

    def __init__(
        self,
        x_dir: str | os.PathLike,
        y_dir: str | os.PathLike,
        crop: int | None = None,
        crops_per_image: int = 1,
        foreground: float = 0.0,
        augment: Transform | Sequence[Transform] = (),
        task: str = "multi-class",
        class_names: Sequence[str] = (),
        channel_names: Sequence[str] = (),
        mask_values: dict | None = None,
        ignore_index: int = 255,
        nodata: float | None = None,
        scale: float | None = None,
        tile: int = 1024,
        class_colors: Sequence[Sequence[int]] = (),
    ) -> None:
        """
        :param x_dir: folder of the images, (H, W) or (H, W, C)
        :param y_dir: folder of the masks: (H, W) of class numbers for "multi-class", (H, W) or (H, W, C) of 0
            and 1 for "multi-label" (binary is one such class), numbers of any kind for "values"
        :param crop: size of the random crops in pixels, to which smaller images are padded with pixels that
            count nowhere; None takes entire images, all of the same size
        :param crops_per_image: samples of each image in an epoch
        :param foreground: fraction of the crops that are drawn to hold a class other than 0, each class as
            often as another (not for "values")
        :param augment: functions of transforms.py, such as transforms.STANDARD, or a single one
        :param task: "multi-class", "multi-label" or "values"
        :param class_names: names of the classes, in the order of their numbers
        :param channel_names: names of the channels of the images, in their order
        :param mask_values: class of values in the masks, such as {255: 1} or {(255, 0, 0): 1}; others stay
        :param ignore_index: class number of pixels that count nowhere
        :param nodata: value of pixels without data, besides what the files state; they count nowhere
        :param scale: factor of the images; None divides integers by the largest value of their type
        :param tile: largest size of a sample in evaluation, in pixels
        :param class_colors: a color of each class on maps, (red, green, blue) from 0 to 255
        :raises DataError: if the folders do not hold pairs, with every missing or surplus partner
        """
        self.arguments = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        self.arguments |= {"x_dir": str(x_dir), "y_dir": str(y_dir)}
        if task not in TASKS:
            raise ValueError(f"task is {task!r}: choose one of {', '.join(TASKS)}.")
        for name, size in {"crop": crop, "crops_per_image": crops_per_image, "tile": tile}.items():
            if size is not None and size < 1:
                raise ValueError(f"{name} is {size}: it is at least 1.")
        self.pairs = Pairs(Path(x_dir), Path(y_dir), nodata)
        self.crop, self.crops_per_image, self.foreground, self.tile = crop, crops_per_image, foreground, tile
        self.augment = (augment,) if callable(augment) else tuple(augment)
        self.task, self.mask_values, self.ignore_index = task, mask_values, ignore_index
        for_contract = ("task", "scale", "nodata", "channel_names", "class_names", "class_colors")
        self._for_contract = {key: self.arguments[key] for key in for_contract}
        self._contract: DataContract | None = None  # how images are read, once it is set
        self._windows: list[tuple[int, Window]] | None = None  # in evaluation: (image, window) of each sample
        self._is_part = False  # of a dataset that was split

    _ignored = property(lambda self: np.nan if self.task == "values" else self.ignore_index)
    images = property(lambda self: self.pairs.images, doc="The images' files.")
    masks = property(lambda self: self.pairs.masks, doc="The masks' files, in the order of the images.")

    def __len__(self) -> int:
        return len(self.images) * self.crops_per_image if self._windows is None else len(self._windows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """
        Return the image (C, H, W) in float32, and its mask: (H, W) in int64 for "multi-class", (C, H, W) in
        float32 for "multi-label" and "values".
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number, window = self._choose_window(index)
        contract = self._contract or self._plain_contract()
        image, valid = contract.prepare(*read_masked(self.images[number], window))
        mask = self._read_mask(self.masks[number], window)
        mask[..., ~valid] = self._ignored
        if self._windows is None:
            if self.crop and self.crop > min(image.shape[1:]):
                beyond = (0, self.crop - image.shape[2], 0, self.crop - image.shape[1])
                image, mask = pad(image, beyond), pad(mask, beyond, value=self._ignored)
            for transform in self.augment:
                image, mask = transform(image, mask)
        return image.contiguous(), mask.contiguous()

    def _choose_window(self, index: int) -> tuple[int, Window]:
        """Choose the image of a sample, and a part of it."""
        if self._windows is not None:
            return self._windows[index]
        number = self._number(index)
        height, width, _ = self.pairs.info(self.images[number]).shape
        if self.crop is None:
            return number, Window(0, 0, height, width)
        row, column = None, None
        if self.foreground and self.task != "values" and torch.rand(()) < self.foreground:
            places = list(self._foreground_places(number).values())
            if places:
                of_class = places[int(torch.randint(len(places), ()))]
                row, column = divmod(of_class[int(torch.randint(len(of_class), ()))], width)
        rows, columns = min(self.crop, height), min(self.crop, width)
        top, left = _random_start(height, rows, row), _random_start(width, columns, column)
        return number, Window(top, left, rows, columns)

    def _reading(self) -> MaskReading:
        return MaskReading(self.task, self.mask_values, self.ignore_index)

    def _foreground_places(self, number: int) -> dict[int, list[int]]:
        """Return some pixels (row * width + column) of each class other than 0 in a mask."""
        facts = self.pairs.fact(self.masks[number])
        places: dict[int, list[int]] = {}
        for (value, _), noted in zip(facts.get("values") or [], facts.get("places") or [], strict=True):
            for label in self._reading().labels_of(value):
                places.setdefault(label, []).extend(noted)
        return places

    def _read_mask(self, file: Path, window: Window) -> Tensor:
        stored, valid = read_masked(file, window, is_mask=self.task != "values")
        stored[~valid] = 0  # NaN is no integer
        mask = map_values(stored, self.mask_values)
        if mask.shape[-1] != 1 and self.task == "multi-class":
            raise DataError([f"{file}: {several_channels(mask.shape[-1])}"])
        mask = mask[..., 0].astype(np.int64) if self.task == "multi-class" else mask.astype(np.float32)
        mask[~valid] = self._ignored
        return torch.from_numpy(mask if mask.ndim == 2 else np.moveaxis(mask, -1, 0))

    def scan(self, cache_file: Path | None = None) -> dict[Path, Facts]:
        """Read every file once, or take what an earlier scan found; see facts.py."""
        return self.pairs.scan(cache_file)

    def check(
        self, cache_file: Path | None = None, num_classes: int | None = None, training: bool = True
    ) -> None:
        """Read every file once; raise DataError with what is wrong, warn of what is odd; see pairs.py."""
        raise_if(find_problems(self.pairs, self._reading(), cache_file, num_classes, training, self.crop))
        for remark in find_remarks(self.pairs, self._reading()):
            warnings.warn(f"{remark}.", stacklevel=2)

    def _plain_contract(self) -> DataContract:
        """Return how images are read, without normalization: as the first one suggests."""
        return DataContract.of(self.pairs.info(self.images[0]), **self._for_contract)

    def contract(self, normalize: bool = True, cache_file: Path | None = None) -> DataContract:
        """Return how these images are read, and their values; with normalize, fit mean and std on them."""
        contract = self.pairs.fit(self._plain_contract(), normalize, cache_file)
        size = max(max(self.pairs.info(file).shape[:2]) for file in self.images)
        return dataclasses.replace(contract, tile_size=self.crop or min(self.tile, size))

    def with_contract(self, contract: DataContract) -> "NpyDataset":
        """Return a copy that reads by this contract; raise DataError with all images that do not fit it."""
        with_values = self.pairs.is_scanned and not self._is_part  # a part has the values of its dataset
        raise_if(dataset_problems(contract, self.pairs, with_values))
        return self._copy(_contract=contract)

    def with_mask_values(self, mask_values: dict) -> "NpyDataset":
        """Return a copy with other mask_values."""
        return self._copy(mask_values=mask_values, arguments=self.arguments | {"mask_values": mask_values})

    def for_evaluation(self) -> "NpyDataset":
        """Return a copy that gives every pixel once, in the order of the files, without augmentation."""
        shapes = [self.pairs.info(file).shape for file in self.images]
        windows = [
            (number, Window(top, left, min(self.tile, height - top), min(self.tile, width - left)))
            for number, (height, width, _) in enumerate(shapes)
            for top in range(0, height, self.tile)
            for left in range(0, width, self.tile)
        ]
        return self._copy(_windows=windows)

    def split(self, fraction: float, seed: int) -> tuple["NpyDataset", "NpyDataset"]:
        """Split by entire files, at least one in each part: the larger part, and a random fraction."""
        larger, smaller = split_numbers(len(self.images), fraction, seed)
        return self._only(larger), self._only(smaller)

    def select(self, indices: Sequence[int]) -> "NpyDataset":
        """Return a dataset of the images alone that these samples are taken from."""
        return self._only(sorted({self._number(index) for index in indices}))

    def _only(self, numbers: Sequence[int]) -> "NpyDataset":
        other = self._copy(pairs=self.pairs.only(numbers), _is_part=True)
        return other if self._windows is None else other.for_evaluation()

    def _copy(self, **changes: object) -> "NpyDataset":
        other = copy.copy(self)
        other.__dict__ |= changes
        return other

    def sample_name(self, index: int) -> str:
        """Return the image's file name, for messages."""
        return self.images[self._number(index)].name

    def sample_shape(self, index: int) -> tuple[int, int]:
        """Return height and width of a sample in evaluation."""
        return self._choose_window(index)[1][2:]

    def _number(self, index: int) -> int:
        """Return the number of the image that a sample is taken from."""
        return index // self.crops_per_image if self._windows is None else self._windows[index][0]


class NpyPredictionDataset(Dataset):
    """Entire images without masks, read by a contract: for prediction."""

    def __init__(self, files: Sequence[str | os.PathLike], contract: DataContract | None = None) -> None:
        """
        :param files: image files in any format of images.py
        :param contract: how to read them; None takes what the first file suggests, without normalization
        :raises DataError: if there are no files; with each that cannot be read or does not fit the contract
        """
        self.files = [Path(file) for file in files]
        if not self.files:
            raise DataError(["there are no files to predict"])
        self.contract = contract or DataContract.of(image_info(self.files[0]))
        raise_if(contract_problems(self.contract, self.files))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[str, Tensor]:
        """
        Return the file's path, and the image (C, H, W) in float32 as the model expects it.

        :raises DataError: if the image holds what the contract does not allow, such as NaN
        """
        image = read_masked(self.files[index])
        raise_if(f"{self.files[index]}: {problem}" for problem in self.contract.problems(*image))
        return str(self.files[index]), self.contract.prepare(*image)[0]


def _random_start(length: int, size: int, place: int | None) -> int:
    """Draw where a part of some size begins, so that it is within the length, and holds the place, if any."""
    low, high = 0, length - size
    if place is not None:
        low, high = max(low, place - size + 1), min(high, place)
    return low + int(torch.randint(high - low + 1, ()))
