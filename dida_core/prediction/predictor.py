"""Predictor: prepared inputs in, probabilities out, with test-time augmentation if wanted."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..config.project import find_project
from ..data.contract import DataContract
from ..data.images import DataError, ImageInfo, ImageReader
from ..errors import ConfigError
from ..storage.weights import WeightsError, load_weights, model_state
from ..training.device import DeviceContext
from ..training.distributed import own_device
from ..training.modules import fill_model
from ..training.targets import main_output
from .windows import ArrayImage, Tiling, predict_bands

# Each is (rotations by a right angle, mirrored); the first one changes nothing.
AUGMENTATIONS: dict[str, list[tuple[int, bool]]] = {
    "none": [(0, False)],
    "flips": [(0, False), (0, True), (2, False), (2, True)],
    "all": [(turns, mirrored) for mirrored in (False, True) for turns in range(4)],  # flips and right angles
}


class Predictor:
    """Predict batches: return probabilities, or the values of a regression."""

    def __init__(
        self,
        model: nn.Module,
        contract: DataContract,
        device: str | torch.device | None = "auto",
        precision: str = "auto",
        augment: str = "none",
    ) -> None:
        """
        :param model: put into evaluation mode
        :param augment: "none", "flips" (4 times the time), "all" (8 times): the mean over so many views
        """
        choice = find_project(type(model).__module__).module(".config.device")
        device = own_device(choice.get_device(device))
        self.context = DeviceContext(device, choice.get_precision(device, precision))
        self.model, self.contract = model.to(self.context.device).eval(), contract
        self.run: str | None = None  # the one that trained the model, where known
        self.views = AUGMENTATIONS[augment]
        self.num_pixels, self.num_changed = 0, 0  # predicted with augmentation; of another class by it

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> np.ndarray:
        """
        Predict a batch.

        :param inputs: (N, C, H, W) as the contract prepares them
        :return: (N, K, H, W) in float32
        :raises ConfigError: if the model outputs anything but (N, K, H, W)
        """
        inputs = self.context.move(inputs)
        views = (self._predict_view(inputs, *view) for view in self.views)
        first = total = next(views)
        for probabilities in views:
            total = total + probabilities
        mean = total / len(self.views)
        if len(self.views) > 1 and self.contract.task != "values":
            changed = self.contract.classes(first) != self.contract.classes(mean)
            self.num_pixels += changed.numel()
            self.num_changed += int(changed.sum())
        return mean.cpu().numpy()

    def _predict_view(self, inputs: Tensor, turns: int, mirrored: bool) -> Tensor:
        view = torch.rot90(inputs, turns, (-2, -1)) if turns else inputs
        try:
            with self.context.autocast():
                logits = main_output(self.model(view.flip(-1) if mirrored else view))
        except TypeError as error:
            name = type(self.model).__name__
            raise ConfigError(
                f"MODEL {name} takes more than an image ({error}): call it yourself."
            ) from error
        if logits.shape != (len(view), self.contract.outputs, *view.shape[2:]):
            shapes = f"{tuple(logits.shape)} for an input of {tuple(view.shape)}"
            raise ConfigError(f"MODEL outputs {shapes}: a map needs (N, {self.contract.outputs}, H, W).")
        probabilities = self.contract.probabilities(logits)
        probabilities = probabilities.flip(-1) if mirrored else probabilities
        return torch.rot90(probabilities, -turns, (-2, -1)) if turns else probabilities


def load_predictor(
    weights: Any,
    model_class: type[nn.Module],
    model_config: dict[str, Any] | None = None,
    example: Sequence[Path] = (),
    **options: Any,
) -> Predictor:
    """
    Load a Predictor from a weights file.

    :param example: the files of an image, which suggests a contract for weights that come without one
    :param options: device, precision, augment of Predictor
    :raises WeightsError: if the file is damaged, of another model, or without a contract and an example
    """
    stored = load_weights(weights)
    model = model_class(**(model_config or {}))
    fill_model(model, model_state(stored), str(weights))
    if "contract" in stored:
        contract = DataContract.from_dict(stored["contract"])
    elif not example:
        raise WeightsError(f"{weights}: holds no data contract, without which no image can be scaled.")
    else:
        with ImageReader(*example) as image, torch.no_grad():
            outputs = main_output(model.eval()(torch.zeros(1, image.shape[2], 256, 256))).shape[1]
            info = ImageInfo(image.shape, image.dtype, image.nodata)
        contract = DataContract.of(info, outputs=outputs)
    predictor, run = Predictor(model, contract, **options), stored.get("run")
    predictor.run = run if isinstance(run, str) and run.isprintable() else None
    return predictor


def predict_array(
    predictor: Predictor, image: np.ndarray, tile: int = 512, overlap: float = 0.25
) -> np.ndarray:
    """
    Predict one image that is in memory, as in a notebook.

    :param image: (H, W, C) as its file has it: neither scaled nor normalized
    :return: (K, H, W) probabilities in float32; NaN where there is no data
    :raises DataError: if it is not as the contract says
    """
    step, contract = 1 + max(image.shape[:2]) // 512, predictor.contract
    if problems := contract.problems(image) or contract.value_problems(image[::step, ::step]):
        raise DataError(problems)
    source, tiling = ArrayImage(image), Tiling(tile, overlap, batch_size=4)
    bands = predict_bands(predictor, source, contract, tiling)
    masked = [np.where(band.valid, band.probabilities, np.float32(np.nan)) for band in bands]
    return np.concatenate(masked, axis=1)
