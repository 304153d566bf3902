"""
Contains the data contract: what a model was trained on, stored with its weights, so that whatever is predicted with it
later is read, scaled and normalised in the same way, or refused.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .facts import has_data

TASKS = ("multi-class", "multi-label", "values")


@dataclass(frozen=True)
class DataContract:
    """
    What goes in and what comes out of a model. All of it is plain data, so that it fits into a weights file.

    :param channels: number of channels, in their order in the files
    :param channel_names: their names, or ()
    :param dtype: of the files, such as "uint8"
    :param scale: what values are multiplied with after reading
    :param mean: of each channel, scaled; () where images are not normalised
    :param std: of each channel, scaled
    :param nodata: pixels with this value in all channels are no data
    :param minimum: smallest value of each channel in the training files, as it stands there; () where it is not known
    :param maximum: largest value of each channel
    :param tile_size: edge of the images that the model was trained on, in pixels
    :param task: "multi-class" (softmax over the classes), "multi-label" (sigmoid for each class), "values" (regression)
    :param outputs: number of the model's output channels
    :param class_names: names of the classes, or ()
    :param class_colors: a colour of each class, (red, green, blue) from 0 to 255, or ()
    :param threshold: probability from which a pixel belongs to a class (multi-label); one for all classes, or one each
    :param temperature: what logits are divided by, so that probabilities are frequencies (Guo et al. 2017)
    """

    channels: int
    channel_names: Sequence[str] = ()
    dtype: str = "float32"
    scale: float = 1.0
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    nodata: float | None = None
    minimum: Sequence[float] = ()
    maximum: Sequence[float] = ()
    tile_size: int | None = None
    task: str = "multi-class"
    outputs: int = 1
    class_names: Sequence[str] = ()
    class_colors: Sequence[Sequence[int]] = ()
    threshold: float | Sequence[float] = 0.5
    temperature: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data: strings, numbers and lists."""
        return {key: _lists(value) for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> "DataContract":
        """Reads what to_dict wrote; ignores what a later version may have added."""
        known = {field.name for field in fields(cls)}
        return cls(**{key: _tuples(value) for key, value in stored.items() if key in known})

    def problems(self, image: np.ndarray) -> list[str]:
        """What of an image (H, W, C), as read from its file, is not as the model knows it: a sentence each."""
        found = []
        if image.shape[-1] != self.channels:
            names = f" ({', '.join(self.channel_names)})" if self.channel_names else ""
            found.append(f"it has {image.shape[-1]} channels, the model was trained on {self.channels}{names}")
        if image.dtype.name != self.dtype:
            found.append(
                f"it is {image.dtype}, the model was trained on {self.dtype} files, whose values were multiplied with "
                f"{self.scale:g}: convert it to {self.dtype} with the same range of values"
            )
        elif image.dtype.kind == "f":
            bad = ~np.isfinite(image) & has_data(image, self.nodata)[..., None]
            if bad.any():
                found.append(f"it has {int(bad.sum())} NaN or infinite values: replace them, or name them as nodata")
        return found

    def prepare(self, image: np.ndarray) -> tuple[Tensor, Tensor]:
        """
        Scales and normalises an image.

        :param image: (H, W, C) as read from its file
        :return: (C, H, W) in float32, 0 where there is no data; and where there is data, (H, W) bool
        """
        valid = has_data(image, self.nodata)
        kind = np.float32 if image.dtype.itemsize <= 2 else np.float64  # of a large mean, float32 loses the deviation
        values = np.multiply(image, self.scale, dtype=kind)
        if self.mean:
            values = (values - np.asarray(self.mean, kind)) / np.asarray(self.std, kind)
        values[~valid] = 0
        channels_first = np.ascontiguousarray(np.moveaxis(values, -1, 0), np.float32)
        return torch.from_numpy(channels_first), torch.from_numpy(valid)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits (N, C, ...) as probabilities of the classes in float32; values of a regression as they are."""
        if self.task == "values":
            return logits.float()
        logits = logits.float() / self.temperature
        return logits.softmax(1) if self.task == "multi-class" else logits.sigmoid()

    def classes(self, probabilities: Tensor) -> Tensor:
        """
        Probabilities (N, C, ...) as uint8 classes: (N, ...) class numbers for multi-class, (N, C, ...) of 0 and 1 for
        multi-label (of a single class: (N, ...)).
        """
        if self.task == "multi-class":
            return probabilities.argmax(1).to(torch.uint8)
        thresholds = torch.as_tensor(self.threshold, dtype=torch.float32, device=probabilities.device)
        thresholds = thresholds.reshape(1, -1, *[1] * (probabilities.ndim - 2))
        chosen = (probabilities >= thresholds).to(torch.uint8)
        return chosen[:, 0] if chosen.shape[1] == 1 else chosen


def _lists(value: Any) -> Any:
    return [_lists(one) for one in value] if isinstance(value, list | tuple) else value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(one) for one in value) if isinstance(value, list) else value


def default_scale(dtype: str) -> float:
    """Integers are divided by the largest value of their type (255, 65535, ...); floats stay as they are."""
    return 1 / np.iinfo(dtype).max if np.dtype(dtype).kind in "ui" else 1.0
