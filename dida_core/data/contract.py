"""
The data contract: what a model was trained on, stored with its weights.

So what is predicted with it later is read, scaled and normalized in the same way, or refused.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ..config.kinds import is_of
from .images import ImageInfo, has_data

TASKS = ("multi-class", "multi-label", "values")

# Colors of classes whose dataset gives no class_colors, by number.
PALETTE = [
    (222, 205, 120), (34, 110, 60), (45, 100, 190), (200, 70, 60), (235, 235, 235), (145, 95, 170),
    (240, 145, 50), (90, 200, 200), (230, 130, 180), (130, 130, 60), (100, 70, 50), (150, 150, 150),
]  # fmt: skip
_MIN_PIXELS = 64
_LARGEST_TILE = 2**16
_PLURAL = ("mean", "std", "minimum", "maximum", "channel_names", "class_names")
_KINDS: dict[str, Any] = dict.fromkeys(("channels", "outputs"), int) | {"tile_size": int | None}
_KINDS |= dict.fromkeys(("scale", "temperature", "threshold", "mean", "std", "minimum", "maximum"), float)
_KINDS |= dict.fromkeys(("dtype", "task", "channel_names", "class_names"), str)
Values = np.ndarray  # one for each channel


@dataclass(frozen=True)
class DataContract:
    """
    What goes into a model and what comes out. All of it is plain data, so that it fits into a weights file.

    :param channels: number of channels, in their order in the files
    :param channel_names: their names, or ()
    :param dtype: of the files, such as "uint8"
    :param scale: factor of the values after reading
    :param mean: of each channel, scaled; () where images are not normalized
    :param std: of each channel, scaled
    :param nodata: pixels with this value are no data, see has_data
    :param minimum: smallest value of each channel in the training files, as it stands there; () if unknown
    :param maximum: largest value of each channel
    :param tile_size: size of the images that the model was trained on, in pixels
    :param task: "multi-class" (softmax), "multi-label" (sigmoid of each class), "values" (regression)
    :param outputs: number of the model's output channels
    :param class_names: names of the classes, or ()
    :param class_colors: a color of each class, (red, green, blue) from 0 to 255, or ()
    :param threshold: probability from which a pixel belongs to a class (multi-label), one for all or one each
    :param temperature: divisor of logits, so that probabilities are frequencies (Guo et al. 2017)
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

    @classmethod
    def of(cls, info: ImageInfo, **more: Any) -> Self:
        """Return the contract that an image suggests, without normalization; what is given counts more."""
        given = {"dtype": info.dtype, "scale": default_scale(info.dtype), "nodata": info.nodata}
        given |= {key: value for key, value in more.items() if value is not None}
        return cls.from_dict({"channels": info.shape[2], **given})

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: strings, numbers and lists."""
        return {key: _nested(list, value) for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Self:
        """Read what to_dict wrote; ignore what a later version may have added."""
        known = {field.name for field in fields(cls)}
        return cls(**{key: _nested(tuple, value) for key, value in stored.items() if key in known})

    def verified(self) -> Self:
        """Return it; raise ValueError if it is none of ours, for a weights file may be somebody else's."""
        for key, kind in _KINDS.items():
            value = getattr(self, key)
            is_plural = key in _PLURAL or (key == "threshold" and isinstance(value, tuple))
            values = value if isinstance(value, tuple) and is_plural else (value,)
            if is_plural != isinstance(value, tuple) or not all(is_of(one, kind) for one in values):
                raise ValueError(f"{key} is {value!r:.80}")
        if self.task not in TASKS or not 0 < (self.tile_size or 1) <= _LARGEST_TILE:
            raise ValueError(f"task is {self.task!r:.80}, tile_size {self.tile_size}")
        return self

    def problems(self, image: np.ndarray, valid: np.ndarray | bool = True) -> list[str]:
        """
        Return in what an image is not as the model knows it.

        :param image: (H, W, C) as read from its file
        :param valid: which pixels hold data as the file states it, (H, W) bool
        """
        found = []
        if image.shape[-1] != self.channels:
            names = f" ({', '.join(self.channel_names)})" if self.channel_names else ""
            about = f"it has {image.shape[-1]} channels, the model was trained on {self.channels}{names}"
            found.append(f"{about}: give those, in this order")
        if image.dtype.name != self.dtype:
            found.append(
                f"it is {image.dtype}, the model was trained on {self.dtype} files, whose values were "
                f"multiplied with {self.scale:g}: convert it to {self.dtype} with the same range of values"
                if self.maximum or self.dtype != "float32"
                else f"it is {image.dtype}, the model was trained on what its dataset made of files: give "
                "the class in DATASET a staticmethod `read` of a file, or predict such values in float32"
            )
        elif image.dtype.kind == "f":
            bad = int((~np.isfinite(image) & (valid & has_data(image, self.nodata))[..., None]).sum())
            if bad:
                found.append(f"it has {bad} NaN or infinite values: replace them, or name them as nodata")
        return found

    def value_problems(self, pixels: np.ndarray) -> list[str]:
        """
        Return what shows that values are unlike those of training: another scale, another offset, a missing
        band. Values that are merely unusual are no problem.

        :param pixels: (..., C), of an image or a sample of it, as read from the file; few show nothing
        """
        pixels = pixels[has_data(pixels, self.nodata)].astype(np.float64)
        if len(pixels) < _MIN_PIXELS or pixels.shape[-1] != self.channels or not self.maximum:
            return []
        low, high = pixels.min(0), pixels.max(0)
        return self.range_problems(low, high, *np.percentile(pixels, (1, 99), axis=0))

    def range_problems(self, low: Values, high: Values, usual_low: Values, usual_high: Values) -> list[str]:
        """Return the same for each channel's smallest and largest value, and where nearly all values lie."""
        minimum, maximum = np.array(self.minimum), np.array(self.maximum)
        span, spread = maximum - minimum, usual_high - usual_low
        std = np.array(self.std) / self.scale if self.std else span / 20  # one hot pixel makes a span
        varies, is_flat = span > 0, high == low
        here, there = f"{low.min():g} to {high.max():g}", f"{minimum.min():g} to {maximum.max():g}"
        about = f"its values go from {here}, those of the training data from {there}"
        remedy = "bring them to the scale of the training data"
        if not varies.any() or is_flat.all():
            return []
        if (spread < 0.05 * std)[varies].all() and (high - low < 0.05 * span)[varies].all():
            return [f"{about}: as if they had been divided by a number; {remedy}"]
        if (spread > 50 * span)[varies].any():
            return [f"{about}: as if they had been multiplied by a number; {remedy}"]
        problems = []
        outside = varies & ((usual_high < minimum - span / 2) | (usual_low > maximum + span / 2))
        if outside.any():
            problems.append(f"{about}, with another offset in {self._named(outside)}; {remedy}")
        dead = varies & is_flat
        if dead.any():
            values = ", ".join(f"{value:g}" for value in sorted(set(low[dead])))
            what = "is the band missing, or in another place?"
            problems.append(f"{self._named(dead)} is constant ({values}): {what}")
        alive = ~varies & ((low != minimum) | (high != maximum))
        if alive.any():
            about = f"{self._named(alive)} was constant in the training data, and is not here"
            problems.append(f"{about}: fill it with that value, or train with data that have it")
        return problems

    def for_nodata(self, nodata: float | None) -> Self:
        """Return the contract for a file that states a nodata value, which counts more than its own."""
        return self if nodata is None else replace(self, nodata=nodata)

    def constant_channels(self) -> str:
        """Name the channels that were constant in the training data, or return ""."""
        constant = np.array(self.minimum) == np.array(self.maximum)
        return self._named(constant) if constant.any() and not constant.all() else ""

    def _named(self, which: np.ndarray) -> str:
        numbers = np.flatnonzero(which).tolist()
        names = [str(self.channel_names[one]) if self.channel_names else str(one) for one in numbers]
        return f"channel{'s' * (len(names) > 1)} {', '.join(names)}"

    def colors(self) -> list[tuple[int, ...]]:
        """Return a color of each class: its own, or one of PALETTE."""
        number = max(2, self.outputs)
        given = [tuple(color) for color in self.class_colors]
        return given if len(given) >= number else [PALETTE[one % len(PALETTE)] for one in range(number)]

    def prepare(self, image: np.ndarray, valid: np.ndarray | bool = True) -> tuple[Tensor, Tensor]:
        """
        Scale and normalize an image.

        :param image: (H, W, C) as read from its file
        :param valid: which pixels hold data as the file states it, (H, W) bool
        :return: (C, H, W) in float32, 0 where there is no data; and where there is data, (H, W) bool
        """
        valid = has_data(image, self.nodata) & valid
        kind = (
            np.float32 if image.dtype.itemsize <= 2 else np.float64
        )  # of a large mean, float32 loses the std
        values = np.multiply(image, self.scale, dtype=kind)
        if self.mean:
            values = (values - np.asarray(self.mean, kind)) / np.asarray(self.std, kind)
        values[~valid] = 0
        channels_first = np.ascontiguousarray(np.moveaxis(values, -1, 0), np.float32)
        return torch.from_numpy(channels_first), torch.from_numpy(valid)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Turn logits (N, C, ...) into probabilities in float32; values of a regression stay as they are."""
        if self.task == "values":
            return logits.float()
        logits = logits.float() / self.temperature
        return logits.softmax(1) if self.task == "multi-class" else logits.sigmoid()

    def classes(self, probabilities: Tensor) -> Tensor:
        """
        Turn probabilities (N, C, ...) into classes in uint8: (N, ...) class numbers for multi-class,
        (N, C, ...) of 0 and 1 for multi-label (of a single class: (N, ...)).
        """
        if self.task == "multi-class":
            return probabilities.argmax(1).to(torch.uint8)
        thresholds = torch.as_tensor(self.threshold, dtype=torch.float32, device=probabilities.device)
        thresholds = thresholds.reshape(1, -1, *[1] * (probabilities.ndim - 2))
        chosen = (probabilities >= thresholds).to(torch.uint8)
        return chosen[:, 0] if chosen.shape[1] == 1 else chosen


def _nested(kind: type, value: Any) -> Any:
    """Return lists and tuples as one of both."""
    return kind(_nested(kind, one) for one in value) if isinstance(value, list | tuple) else value


def default_scale(dtype: str) -> float:
    """Return the factor that makes the largest integer of a type 1; floats stay as they are."""
    return 1 / np.iinfo(dtype).max if np.dtype(dtype).kind in "ui" else 1.0
