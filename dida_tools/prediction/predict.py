"""Contains prediction of whole images: files in, predictions out, under the input's name."""

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ..config.capture import ConfigError
from ..config.device import autocast, get_device, get_precision
from ..utils.data.contract import DataContract
from ..utils.data.datasets import NpyPredictionDataset
from ..utils.data.images import ENDINGS, DataError, list_images
from ..utils.path import write_atomic
from ..utils.signals import raise_if_stop_requested, stop_on_signals
from ..utils.torchutils import fill_model
from ..utils.weights import load_weights, model_state

OUTPUTS = ("classes", "probabilities")

DEFAULTS: dict[str, Any] = {
    "MODEL_CONFIG": {},
    "DEVICE": "auto",
    "PRECISION": "auto",
    "OUTPUT": "classes",
    "PREFIX": "",
    "SUFFIX": "",
}
REQUIRED = ("MODEL", "WEIGHTS", "FILES", "OUT_DIR")


def predict(predict_config: dict[str, Any]) -> list[Path]:
    """
    Predicts images with a trained model.

    The images are read, scaled and normalised as in training, by the data contract in the weights file.

    :param predict_config: MODEL (class), MODEL_CONFIG, WEIGHTS (file), FILES (image files or folders of them),
        OUT_DIR, DEVICE, PRECISION, OUTPUT ("classes": uint8, "probabilities": float32 (H, W, C)), and PREFIX and SUFFIX
        of the outputs' names
    :return: the written files
    :raises ConfigError, DataError, WeightsError: for what cannot be used, before anything is written; NaN in an
        image when it is its turn
    :raises Preempted: between two images, if a signal has asked to end
    """
    unknown = [f"{key} is no key of a predict_config" for key in predict_config if key not in {*DEFAULTS, *REQUIRED}]
    missing = [f"{key} is missing" for key in REQUIRED if predict_config.get(key) is None]
    config = DEFAULTS | predict_config
    if config["OUTPUT"] not in OUTPUTS:
        missing.append(f"OUTPUT is {config['OUTPUT']!r}: choose one of {', '.join(OUTPUTS)}")
    if unknown or missing:
        raise ConfigError(unknown + missing)
    device = get_device(config["DEVICE"])
    precision = get_precision(device, config["PRECISION"])
    stored = load_weights(config["WEIGHTS"])
    contract = DataContract.from_dict(stored["contract"]) if "contract" in stored else None
    model = config["MODEL"](**config["MODEL_CONFIG"])
    fill_model(model, model_state(stored), str(config["WEIGHTS"]))
    model = model.to(device).eval()
    files = find_files(config["FILES"])
    dataset = NpyPredictionDataset(files, contract)
    # A picture holds one class number a pixel; anything else goes into .npy.
    is_map = config["OUTPUT"] == "classes" and dataset.contract.task != "values"
    as_picture = is_map and (dataset.contract.task == "multi-class" or dataset.contract.outputs == 1)
    outputs = _output_files(files, Path(config["OUT_DIR"]), config["PREFIX"], config["SUFFIX"], as_picture)
    with stop_on_signals():
        for index in tqdm(range(len(dataset)), unit=" images", disable=None, leave=False):
            raise_if_stop_requested()
            inputs, _ = dataset[index]
            probabilities = predict_image(model, inputs, dataset.contract, device, precision)
            if not is_map:
                result = np.moveaxis(probabilities.numpy(), 0, -1)
            else:
                result = dataset.contract.classes(probabilities[None])[0].numpy()
                result = np.moveaxis(result, 0, -1) if result.ndim == 3 else result
            save_prediction(outputs[index], result, like=files[index])
    return outputs


@torch.no_grad()
def predict_image(
    model: nn.Module, inputs: Tensor, contract: DataContract, device: torch.device, precision: str
) -> Tensor:
    """
    Predicts one image.

    :param inputs: (C, H, W), scaled and normalised
    :return: (K, H, W) probabilities in float32, or values of a regression
    """
    with autocast(device, precision):
        logits = model(inputs[None].to(device, memory_format=torch.channels_last))
    return contract.probabilities(logits)[0].cpu()


def find_files(paths: Any) -> list[Path]:
    """
    Image files from files and folders.

    :raises DataError: with each that is not there, is no image, or is an empty folder
    """
    files: list[Path] = []
    problems = []
    for path in map(Path, [paths] if isinstance(paths, str | os.PathLike) else paths):
        if path.is_dir():
            found = list_images(path)
            files += found
            if not found:
                problems.append(f"{path}: holds no images")
        elif not path.is_file():
            problems.append(f"{path}: there is no such file")
        elif path.suffix.lower() not in ENDINGS:
            problems.append(f"{path}: its ending is none of {', '.join(ENDINGS)}")
        else:
            files.append(path)
    if problems:
        raise DataError(problems)
    return files


def _output_files(files: list[Path], out_dir: Path, prefix: str, suffix: str, as_picture: bool) -> list[Path]:
    """The input's name with prefix and suffix, one for each input, and never an input itself."""
    outputs = []
    for file in files:
        ending = {".npz": ".npy", ".jpg": ".png", ".jpeg": ".png"}.get(file.suffix.lower(), file.suffix.lower())
        ending = ".npy" if ending == ".png" and not as_picture else ending
        outputs.append(out_dir / f"{prefix}{file.stem}{suffix}{ending}")
    inputs = {file.resolve() for file in files}
    problems = [f"{output}: the output would overwrite an input: give another OUT_DIR, PREFIX or SUFFIX"
                for output in outputs if output.resolve() in inputs]  # fmt: skip
    twice = {output for output in outputs if outputs.count(output) > 1} if len(set(outputs)) < len(outputs) else set()
    problems += [f"{output}: several inputs would be written to this file" for output in sorted(twice)]
    if problems:
        raise DataError(problems)
    return outputs


def save_prediction(path: Path, values: np.ndarray, like: Path) -> None:
    """
    Writes a prediction, whole or not at all.

    :param path: the file; its ending decides on the format
    :param values: (H, W) or (H, W, C)
    :param like: the image that was predicted; a GeoTIFF gives its grid to a GeoTIFF
    """

    def write(file: BinaryIO) -> None:
        if path.suffix == ".npy":
            np.save(file, values)
        elif path.suffix == ".png":
            Image.fromarray(values).save(file, format="png")
        else:  # <- your file format here
            file.write(_as_tiff(values, like))

    write_atomic(path, write)


def _as_tiff(values: np.ndarray, like: Path) -> bytes:
    import warnings

    import rasterio  # imported where used: the file formats of most projects do not need it
    from rasterio.errors import NotGeoreferencedWarning

    bands = values[None] if values.ndim == 2 else np.moveaxis(values, -1, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        profile = {"driver": "GTiff", "compress": "deflate", "dtype": bands.dtype, "count": bands.shape[0]}
        profile |= {"height": bands.shape[1], "width": bands.shape[2]}
        if like.suffix.lower() in (".tif", ".tiff"):
            with rasterio.open(like) as source:
                profile |= {"crs": source.crs, "transform": source.transform}
        with rasterio.MemoryFile() as memory:
            with memory.open(**profile) as target:
                target.write(bands)
            return memory.read()
