"""What there is to predict: the images, the outputs that are made of each, and masks to score them with."""

import glob
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..config.prediction_keys import as_list
from ..data.contract import DataContract
from ..data.images import (
    ARRAYS,
    ENDINGS,
    PICTURES,
    DataError,
    Grid,
    ImageReader,
    Place,
    Window,
    elsewhere,
    files_beside,
    list_images,
    raise_if,
)
from ..data.pairs import map_values
from ..errors import ConfigError
from ..report.console import hides_bar, say
from ..training.scores import Scores
from .outputs import Output
from .windows import open_image

_NUM_CHECKED = 32  # images whose values are checked before the first one is predicted
_ROWS = 256  # that are scored at once
_RASTERS = (".tif", ".tiff")  # that are written


@dataclass
class Job:
    """One image and what is made of it."""

    inputs: tuple[Path, ...]  # several: the channels of one image
    outputs: dict[str, Path] = field(default_factory=dict)  # by kind
    size: tuple[int, ...] = (0, 0)  # (H, W)
    corners: Place | None = None  # where it lies

    @property
    def place(self) -> Path:
        """The image's file, or folder."""
        return self.inputs[0] if len(self.inputs) == 1 else self.inputs[0].parent

    @property
    def stem(self) -> str:
        """The image's name without ending."""
        return self.place.stem if len(self.inputs) == 1 else self.place.resolve().name


def find_inputs(paths: Any, bands: Sequence[str] | None = None) -> list[tuple[Path, ...]]:
    """
    Find the images: files, all of a folder, all that match a pattern.

    :param bands: patterns of file names: each path is a folder then, whose files are one image's channels
    :return: the file of each image, or its files in the order of the bands
    :raises DataError: with each path that gives no image
    """
    found, problems = [], []
    for path in as_list(paths):
        is_pattern = glob.has_magic(str(path)) and not Path(path).exists()
        matches = sorted(glob.glob(str(path))) if is_pattern else [path]
        if not matches:
            problems.append(f"{path}: nothing matches this pattern")
        for one in map(Path, matches):
            if bands is not None:
                files = {band: sorted(one.glob(band)) for band in bands}
                rule = "with BANDS, an image is a folder of one file for each"
                numbers = {band: len(matching) for band, matching in files.items()}
                wrong = [f"{one}: {n} files match {band}: {rule}" for band, n in numbers.items() if n != 1]
                problems += wrong
                found += [] if wrong else [tuple(matching[0] for matching in files.values())]
            elif one.is_dir():
                images = list_images(one)
                problems += [] if images else [f"{one}: holds no images"]
                found += [(image,) for image in images]
            elif not one.is_file():
                problems.append(f"{one}: there is no such file")
            elif one.suffix.lower() not in ENDINGS:
                problems.append(f"{one}: its ending is none of {', '.join(ENDINGS)}")
            else:
                found.append((one,))
    if problems:
        raise DataError(problems)
    return list(dict.fromkeys(found))


def plan(
    inputs: list[tuple[Path, ...]], kinds: Sequence[str], contract: DataContract, config: dict[str, Any]
) -> list[Job]:
    """
    Name the outputs of each image: its name with prefix and suffix, never that of an image.

    :param config: PREFIX, SUFFIX, FORMAT, OUTPUT_DTYPE and OUT_DIR of a predict_config
    :raises ConfigError: if FORMAT cannot hold an output
    :raises DataError: if an output would overwrite an image or another output
    """
    form, problems = config["FORMAT"], []
    fits_picture = {kind: Output(kind, contract, config["OUTPUT_DTYPE"]).fits_picture for kind in kinds}
    if form == ".png" and not all(fits_picture.values()):
        problem = "FORMAT is '.png', which cannot hold {}: choose .npy or .tif, or leave it out."
        raise ConfigError([problem.format(kind) for kind in kinds if not fits_picture[kind]])
    jobs = [Job(files) for files in inputs]
    for job in jobs:
        ending = job.inputs[0].suffix.lower()
        if ending not in _RASTERS and any(map(_states_place, job.inputs)):
            ending = ".tif"  # which keeps it
        elif ending not in _RASTERS:
            ending = ".npy" if ending in ARRAYS else ".png"
        for kind in kinds:
            end = form or (".npy" if ending == ".png" and not fits_picture[kind] else ending)
            name = f"{config['PREFIX']}{job.stem}{config['SUFFIX']}{f'_{kind}' * (len(kinds) > 1)}{end}"
            job.outputs[kind] = Path(config["OUT_DIR"]) / name
        if config["MASKS"] is not None and "probabilities" not in kinds:  # to be scored, not kept
            name = f".{job.stem}_scored{ending if ending in _RASTERS else '.npy'}"
            job.outputs["probabilities"] = Path(config["OUT_DIR"]) / name
    images = {file.resolve() for files in inputs for file in files}
    for path, number in Counter(path for job in jobs for path in job.outputs.values()).items():
        if path.resolve() in images:
            problems.append(f"{path}: would overwrite an input: give another OUT_DIR, PREFIX or SUFFIX")
        if number > 1:
            problems.append(f"{path}: several inputs would be written to it")
    if problems:
        raise DataError(problems)
    return jobs


def _states_place(file: Path) -> bool:
    """Return whether a file, or one beside it, states where it lies."""
    ending = file.suffix.lower()
    if ending in ARRAYS or (ending in PICTURES and not files_beside(file)):
        return False
    with ImageReader(file) as image:
        return image.grid != Grid("", None)


def check_jobs(jobs: Sequence[Job], contract: DataContract, check_values: bool, dataset: Any = None) -> None:
    """
    Check what is known of the images before the first one is predicted, and set their sizes and places.

    :raises DataError: with each that cannot be read, or is not as the contract says
    """
    problems, unplaced = [], set()
    for number, job in enumerate(tqdm(jobs, desc="check", unit=" images", disable=hides_bar(), leave=False)):
        try:
            with open_image(job.inputs, dataset) as image:
                if image.grid not in (None, Grid("", None)):
                    unplaced |= {file.suffix for file in job.outputs.values()} - set(_RASTERS)
                job.size, job.corners, own = image.shape[:2], image.place, contract.for_nodata(image.nodata)
                found = own.problems(np.zeros((1, 1, image.shape[2]), image.dtype))
                if check_values and number < _NUM_CHECKED and not found:
                    hint = "(CHECK_VALUES=False predicts it anyway)"
                    found = [f"{problem} {hint}" for problem in own.value_problems(image.sample())]
                problems += [f"{job.place}: {problem}" for problem in found]
        except DataError as error:
            problems += error.problems
    raise_if(problems)
    if unplaced:
        say(f"FORMAT is {unplaced.pop()!r}, which cannot hold where the images lie: '.tif' keeps it.")


def find_masks(jobs: Sequence[Job], folder: str | Path) -> list[Path]:
    """
    Find the mask of each image, by the name without ending.

    :raises DataError: with each that is missing, or lies elsewhere than its image
    """
    masks = {file.stem: file for file in list_images(folder)}
    raise_if(f"{folder}: there is no mask called {job.stem}" for job in jobs if job.stem not in masks)
    problems = []
    for job in jobs:
        with ImageReader(masks[job.stem], is_mask=True) as mask:
            if mask.shape[:2] == job.size and (
                away := elsewhere(mask.place, job.corners, mask.shape, job.place.name)
            ):
                problems.append(f"{masks[job.stem]}: {away}: bring both onto one grid")
    raise_if(problems)
    return [masks[job.stem] for job in jobs]


def score_maps(maps: list[Path], masks: list[Path], contract: DataContract, config: dict[str, Any]) -> Scores:
    """
    Compare maps of probabilities with masks, by the same counts as in training and without missing pixels.

    :param maps: outputs of the kind "probabilities", in float32 or uint8
    :param masks: one for each, as in training
    :param config: IGNORE_INDEX and MASK_VALUES of a predict_config
    :raises DataError: if a mask has another size than its map, or values that are no classes; if none counts
    """
    multi_class, ignore_index = contract.task == "multi-class", config["IGNORE_INDEX"]
    scores = Scores(contract.outputs, multi_class, ignore_index, contract.threshold)
    for map_file, mask_file in zip(maps, masks, strict=True):
        with ImageReader(map_file) as predicted, ImageReader(mask_file, is_mask=True) as mask:
            height, width, _ = predicted.shape
            if mask.shape[:2] != (height, width):
                size = f"{mask.shape[0]} x {mask.shape[1]} pixels, that of the map {height} x {width}"
                raise DataError(f"{mask_file}: its size is {size}")
            for top in range(0, height, _ROWS):
                window = Window(top, 0, min(_ROWS, height - top), width)
                values = predicted.read(window)
                is_uint8 = values.dtype == np.uint8
                missing = (values == 255 if is_uint8 else np.isnan(values)).all(-1)
                p = np.clip(values / 254 if is_uint8 else values.astype(np.float64), 1e-12, 1 - 1e-12)
                logits = np.where(missing[..., None], 0, np.log(p) if multi_class else np.log(p / (1 - p)))
                stored, valid = mask.read_masked(window)
                stored[~valid] = 0  # NaN is no integer
                targets = map_values(stored, config["MASK_VALUES"])
                targets = targets.astype(np.int64 if multi_class else np.float32)
                targets[missing | ~valid] = ignore_index
                batch = [torch.from_numpy(array).movedim(-1, 0) for array in (logits, targets)]
                try:
                    scores.update(batch[0][None].float(), batch[1] if multi_class else batch[1][None])
                except ValueError as error:
                    raise DataError(f"{mask_file}: {error}") from error
    if not scores.confusion.any():
        raise DataError(f"{masks[0].parent}: every pixel is ignored or without data: nothing can be scored")
    return scores
