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
    :param task: "multi-class" (softmax over the classes), "multi-label" (sigmoid for each class), "values" (regression)
    :param class_names: names of the classes, or ()
    :param outputs: number of the model's output channels
    :param threshold: probability from which a pixel belongs to a class (multi-label)
    """

    channels: int
    channel_names: Sequence[str] = ()
    dtype: str = "float32"
    scale: float = 1.0
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    nodata: float | None = None
    task: str = "multi-class"
    class_names: Sequence[str] = ()
    threshold: float = 0.5
    outputs: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Plain data: strings, numbers and lists."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> "DataContract":
        """Reads what to_dict wrote; ignores what a later version may have added."""
        known = {field.name for field in fields(cls)}
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in stored.items()}
        return cls(**{key: value for key, value in values.items() if key in known})

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
        if self.task == "multi-class":
            return logits.float().softmax(1)
        return logits.float().sigmoid() if self.task == "multi-label" else logits.float()

    def classes(self, probabilities: Tensor) -> Tensor:
        """
        Probabilities (N, C, ...) as uint8 classes: (N, ...) class numbers for multi-class, (N, C, ...) of 0 and 1 for
        multi-label (of a single class: (N, ...)).
        """
        if self.task == "multi-class":
            return probabilities.argmax(1).to(torch.uint8)
        chosen = (probabilities >= self.threshold).to(torch.uint8)
        return chosen[:, 0] if chosen.shape[1] == 1 else chosen


def default_scale(dtype: str) -> float:
    """Integers are divided by the largest value of their type (255, 65535, ...); floats stay as they are."""
    return 1 / np.iinfo(dtype).max if np.dtype(dtype).kind in "ui" else 1.0
