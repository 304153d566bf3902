"""Contains what there is to predict: the images, and the outputs that are made of each."""

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..config.errors import ConfigError
from ..utils.data.contract import DataContract
from ..utils.data.images import ENDINGS, DataError, ImageReader, list_images

_NUM_CHECKED = 32  # images whose values are looked at before the first one is predicted


@dataclass(frozen=True)
class Job:
    """One image and what is made of it."""

    inputs: tuple[Path, ...]  # several: the channels of one image
    outputs: tuple[Path, ...]  # one for each kind

    @property
    def stem(self) -> str:
        """The image's name without ending."""
        return self.inputs[0].stem if len(self.inputs) == 1 else self.inputs[0].resolve().parent.name

    @property
    def name(self) -> str:
        """For messages."""
        return str(self.inputs[0] if len(self.inputs) == 1 else self.inputs[0].parent)


def find_inputs(paths: Any, bands: Any = None) -> list[tuple[Path, ...]]:
    """
    The images: files, all of a folder, all that match a pattern.

    :param bands: patterns of file names: each of the paths is a folder then, whose files are the channels of one image
    :return: the file of each image, or its files in the order of the bands
    :raises DataError: with each path that gives no image
    """
    found: list[tuple[Path, ...]] = []
    problems = []
    for path in [paths] if isinstance(paths, str | os.PathLike) else paths:
        matches = (
            sorted(glob.glob(str(path))) if glob.has_magic(str(path)) and not Path(path).exists() else [path]
        )
        if not matches:
            problems.append(f"{path}: nothing matches this pattern")
        for one in map(Path, matches):
            if bands is not None and one.is_dir():
                of_band = {band: sorted(one.glob(band)) for band in bands}
                wrong = {band: len(files) for band, files in of_band.items() if len(files) != 1}
                problems += [
                    f"{one}: {number} files match {band}, it has to be one" for band, number in wrong.items()
                ]
                found += [] if wrong else [tuple(files[0] for files in of_band.values())]
            elif bands is not None:
                problems.append(f"{one}: with BANDS, an image is a folder that holds a file for each")
            elif one.is_dir():
                files = list_images(one)
                found += [(file,) for file in files]
                problems += [] if files else [f"{one}: holds no images"]
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
    The outputs of each image: its name with prefix and suffix, never that of an image.

    :param config: PREFIX, SUFFIX, FORMAT, OUTPUT_DTYPE and OUT_DIR of a predict_config
    :raises ConfigError: if FORMAT cannot hold an output
    :raises DataError: if an output would overwrite an image or another output
    """
    jobs = []
    for files in inputs:
        stem = files[0].stem if len(files) == 1 else files[0].resolve().parent.name
        parts = {kind: f"_{kind}" if len(kinds) > 1 else "" for kind in kinds}
        endings = {
            kind: config["FORMAT"] or _ending(files[0], kind, contract, config["OUTPUT_DTYPE"])
            for kind in kinds
        }
        names = [f"{config['PREFIX']}{stem}{config['SUFFIX']}{parts[kind]}{endings[kind]}" for kind in kinds]
        jobs.append(Job(files, tuple(Path(config["OUT_DIR"]) / name for name in names)))
    too_much = [
        f"FORMAT is '.png', which cannot hold {kind}: choose .npy or .tif, or leave it out"
        for kind in kinds
        if config["FORMAT"] == ".png"
        and _ending(Path("map.png"), kind, contract, config["OUTPUT_DTYPE"]) != ".png"
    ]
    if too_much:
        raise ConfigError(too_much)
    images = {file.resolve() for files in inputs for file in files}
    outputs = [output for job in jobs for output in job.outputs]
    problems = [
        f"{output}: the output would overwrite an input: give another OUT_DIR, PREFIX or SUFFIX"
        for output in outputs
        if output.resolve() in images
    ]
    twice = (
        {output for output in outputs if outputs.count(output) > 1}
        if len(set(outputs)) < len(outputs)
        else set()
    )
    problems += [f"{output}: several inputs would be written to this file" for output in sorted(twice)]
    if problems:
        raise DataError(problems)
    return jobs


def _ending(file: Path, kind: str, contract: DataContract, dtype: str) -> str:
    """The input's, where that format can hold the output: a picture holds one number from 0 to 255 a pixel."""
    ending = {".npz": ".npy", ".jpg": ".png", ".jpeg": ".png"}.get(file.suffix.lower(), file.suffix.lower())
    single = contract.outputs == 1 or (contract.task == "multi-class" and kind != "probabilities")
    whole = contract.task != "values" and (kind == "classes" or dtype == "uint8")
    return ".npy" if ending == ".png" and not (single and whole) else ending


def check_jobs(jobs: Sequence[Job], contract: DataContract, check_values: bool) -> dict[Job, tuple[int, int]]:
    """
    What can be told of the images before the first one is predicted.

    :return: height and width of each
    :raises DataError: with each that cannot be read, or is not as the contract says
    """
    sizes, problems = {}, []
    for number, job in enumerate(tqdm(jobs, desc="check", unit=" images", disable=None, leave=False)):
        try:
            with ImageReader(*job.inputs) as image:
                sizes[job] = image.shape[:2]
                problems += _problems(job, image, contract, check_values and number < _NUM_CHECKED)
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return sizes


def _problems(job: Job, image: ImageReader, contract: DataContract, check_values: bool) -> list[str]:
    contract = contract.for_nodata(image.nodata)
    problems = contract.problems(np.zeros((1, 1, image.shape[2]), image.dtype))
    if check_values and not problems:
        found = contract.value_problems(image.sample())
        problems = [f"{problem} (CHECK_VALUES=False predicts it anyway)" for problem in found]
    return [f"{job.name}: {problem}" for problem in problems]
