"""
Contains prediction: image files in, maps out, under the input's name.

From a notebook: predict(config) and predict_run(name, files, out_dir); predict_array of predictor.py for what is in the
memory.
"""

import functools
import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..config.capture import capture
from ..config.config import global_config as default_global_config
from ..config.errors import ConfigError
from ..config.project import project_of
from ..utils.data.contract import DataContract, default_scale
from ..utils.data.images import DataError, Grid, ImageReader, Window
from ..utils.files import write_atomic
from ..utils.logging.journal import Journal, read_journal
from ..utils.logging.runs import find_run, read_run_config
from ..utils.signals import raise_if_stop_requested, stop_on_signals
from ..utils.weights import weights_digest
from .jobs import Job, check_jobs, find_inputs, plan
from .outputs import DTYPES, KINDS, GrowingFile, make_output, only_writer, style_of
from .predictor import AUGMENTATIONS, Predictor, load_predictor
from .score import find_masks, score_maps
from .windows import Band, Tiling, predict_bands

DEFAULTS: dict[str, Any] = {
    "MODEL_CONFIG": {},
    "DEVICE": "auto",
    "PRECISION": "auto",
    "OUTPUT": "classes",  # or several of KINDS
    "OUTPUT_DTYPE": "float32",
    "FORMAT": None,  # ending of the outputs; None: like the input
    "PREFIX": "",
    "SUFFIX": "",
    "BANDS": None,  # patterns of file names, in the order of the channels: each folder in FILES is one image then
    "TILE": None,  # edge of the windows; None: what the model was trained on, but at least 256
    "OVERLAP": 0.25,
    "BATCH_SIZE": 4,
    "AUGMENT": "none",
    "CHECK_VALUES": True,
    "MASKS": None,  # folder of masks with the images' names: what the maps are worth goes into SCORES
    "MASK_VALUES": None,  # of the masks, as in a training config
    "IGNORE_INDEX": 255,
}
REQUIRED = ("MODEL", "WEIGHTS", "FILES", "OUT_DIR")
LEDGER = "predictions.jsonl"
SCORES = "scores.json"

Sample = tuple[
    Job, Tensor, np.ndarray, Grid | None
]  # an image of one window: inputs, where there is data, its grid

_SMALLEST_TILE = 256
_RASTER_CACHE_BYTES = 64 * 2**20  # GDAL would take a part of the machine's memory


def predict(predict_config: dict[str, Any]) -> list[Path]:
    """
    Predicts images of any size with a trained model.

    The images are read, scaled and normalized as in training, by the data contract in the weights file. What an earlier
    call with the same weights and settings has finished is not done again unless it was changed since, and an image
    that it left unfinished is gone on with; LEDGER in OUT_DIR tells what was made of what. Several processes of
    torchrun share the images.

    :param predict_config: MODEL (class), WEIGHTS (file), FILES (images, folders, or patterns such as ``in/*.tif``),
        OUT_DIR, and what DEFAULTS has
    :return: the outputs of all images of this process
    :raises ConfigError, DataError, WeightsError: for what cannot be used, before anything is written; for an image that
        turns out to be unusable later, after all others are done
    :raises UserError: if another call is writing into OUT_DIR
    :raises Preempted: if a signal has asked to end; what is written is whole
    """
    config = _complete(predict_config)
    kinds = [config["OUTPUT"]] if isinstance(config["OUTPUT"], str) else list(config["OUTPUT"])
    kinds += ["probabilities"] if config["MASKS"] is not None and "probabilities" not in kinds else []
    options = {"device": config["DEVICE"], "precision": config["PRECISION"], "augment": config["AUGMENT"]}
    if "LOCAL_RANK" in os.environ and options["device"] == "auto" and torch.cuda.is_available():
        options["device"] = f"cuda:{os.environ['LOCAL_RANK']}"
    predictor = load_predictor(
        config["WEIGHTS"],
        config["MODEL"],
        config["MODEL_CONFIG"],
        lambda: _suggested_contract(config),
        **options,
    )
    if config["MASKS"] is not None and predictor.contract.task == "values":
        raise ConfigError(["MASKS is given, but the model predicts values, not classes: leave it out"])
    inputs = find_inputs(config["FILES"], config["BANDS"])
    jobs = plan(inputs, kinds, predictor.contract, config)
    jobs = jobs[int(os.environ.get("RANK", 0)) :: int(os.environ.get("WORLD_SIZE", 1))]
    sizes = check_jobs(jobs, predictor.contract, config["CHECK_VALUES"])
    masks = find_masks([job.stem for job in jobs], config["MASKS"]) if config["MASKS"] is not None else []
    Path(config["OUT_DIR"]).mkdir(parents=True, exist_ok=True)
    with only_writer(_ledger_of(config)):
        with stop_on_signals(), ExitStack() as stack:
            if any(
                file.suffix.lower() in (".tif", ".tiff")
                for job in jobs
                for file in (*job.inputs, *job.outputs)
            ):
                import rasterio  # imported where used: the file formats of most projects do not need it

                stack.enter_context(rasterio.Env(GDAL_CACHEMAX=_RASTER_CACHE_BYTES))
            work = _Work(predictor, kinds, config)
            stack.callback(work.close)
            work.do(jobs, sizes)
        if masks:
            maps = [job.outputs[kinds.index("probabilities")] for job in jobs]
            scores = score_maps(
                maps, masks, predictor.contract, config["IGNORE_INDEX"], config["MASK_VALUES"]
            )
            _report(scores.results(predictor.contract.class_names), Path(config["OUT_DIR"]))
    return [output for job in jobs for output in job.outputs]


def predict_run(
    name: str, files: Any, out_dir: Any, global_config: dict[str, str] = default_global_config, **options: Any
) -> list[Path]:
    """
    Predicts images with a tracked run.

    :param name: the run's name or part of it, "latest", or "best"
    :param options: keys of DEFAULTS, such as OUTPUT="probabilities"
    :return: the outputs
    """
    return predict(run_config(name, global_config) | {"FILES": files, "OUT_DIR": out_dir} | options)


def _report(results: dict[str, float], out_dir: Path) -> None:
    rank = os.environ.get("RANK", "0")  # of several processes, each scores its own images
    file = out_dir / (SCORES if rank == "0" else f"scores.{rank}.json")
    write_atomic(file, lambda stream: stream.write(json.dumps(results, indent=2).encode()))
    shown = ", ".join(
        f"{name} {results[name]:.4f}" for name in ("f1", "iou", "accuracy", "average_precision", "ece")
    )
    print(f"{shown}; all of it: {file}")


def run_config(name: str, global_config: dict[str, str] = default_global_config) -> dict[str, Any]:
    """What a predict_config takes of a tracked run."""
    name = find_run(global_config, name, with_weights=True)
    keys = ("MODEL", "MODEL_CONFIG", "MASK_VALUES", "IGNORE_INDEX")
    config = read_run_config(Path(global_config["LOG_DIR"]) / name, project_of(__name__), keys=keys)
    weights = Path(global_config["WEIGHT_DIR"]) / name / "best.pt"
    return {key: config[key] for key in keys if key in config} | {"WEIGHTS": weights}


# ---------------------------------------------------------------------------------------------------- before the start


def _ledger_of(config: dict[str, Any]) -> Path:
    """Where this process notes what it has done: of several, each has a file of its own."""
    rank = os.environ.get("RANK", "0")
    return Path(config["OUT_DIR"]) / (LEDGER if rank == "0" else f"{Path(LEDGER).stem}.{rank}.jsonl")


def _complete(given: dict[str, Any]) -> dict[str, Any]:
    problems = [f"{key} is no key of a predict_config" for key in given if key not in {*DEFAULTS, *REQUIRED}]
    problems += [f"{key} is missing" for key in REQUIRED if given.get(key) is None]
    config = DEFAULTS | given
    kinds = [config["OUTPUT"]] if isinstance(config["OUTPUT"], str) else config["OUTPUT"]
    choices = {
        "OUTPUT_DTYPE": DTYPES,
        "AUGMENT": tuple(AUGMENTATIONS),
        "FORMAT": (None, ".npy", ".png", ".tif"),
    }
    asked = [("OUTPUT", kind, KINDS) for kind in kinds] + [
        (key, config[key], allowed) for key, allowed in choices.items()
    ]
    problems += [
        f"{key} is {value!r}: choose one of {', '.join(map(str, allowed))}"
        for key, value, allowed in asked
        if value not in allowed
    ]
    if not (isinstance(config["OVERLAP"], int | float) and 0 <= config["OVERLAP"] < 1):
        problems.append(f"OVERLAP is {config['OVERLAP']!r}: it is from 0 to below 1")
    for key in ("TILE", "BATCH_SIZE"):
        if config[key] is not None and not (isinstance(config[key], int) and config[key] > 0):
            problems.append(f"{key} is {config[key]!r}: it is a whole number above 0")
    if problems:
        raise ConfigError(problems)
    return config


def _suggested_contract(config: dict[str, Any]) -> DataContract:
    """For weights without a contract: what the first image suggests."""
    with ImageReader(*find_inputs(config["FILES"], config["BANDS"])[0]) as image:
        scale = default_scale(image.dtype)
        return DataContract(image.shape[2], dtype=image.dtype, scale=scale, nodata=image.nodata)


# ------------------------------------------------------------------------------------------------------------ the work


class _Work:
    """Predicts the images of one process."""

    def __init__(self, predictor: Predictor, kinds: list[str], config: dict[str, Any]) -> None:
        self.predictor, self.contract, self.kinds = predictor, predictor.contract, kinds
        self.dtype, self.check_values = config["OUTPUT_DTYPE"], config["CHECK_VALUES"]
        tile = config["TILE"] or max(_SMALLEST_TILE, self.contract.tile_size or 0)
        self.tiling = Tiling(tile, config["OVERLAP"], config["BATCH_SIZE"])
        self.settings = capture(
            {key: config[key] for key in ("MODEL", "MODEL_CONFIG", "OUTPUT", "OUTPUT_DTYPE", "OVERLAP", "BATCH_SIZE")}
            | {"AUGMENT": config["AUGMENT"], "PRECISION": predictor.precision, "TILE": tile},
            project_of(__name__),
            [],
        )["config"] | {
            "WEIGHTS": weights_digest(predictor.model.state_dict()),
            "CONTRACT": self.contract.to_dict(),
        }  # fmt: skip
        ledger = _ledger_of(config)
        events = [
            event
            for file in ledger.parent.glob(f"{Path(LEDGER).stem}*.jsonl")
            for event in read_journal(file)
        ]
        earlier = sorted(
            (event for event in events if event["event"] == "prediction"), key=lambda event: event["time"]
        )
        self.done = {event["output"]: event for event in earlier}  # the last one, whoever noted it
        self.ledger = Journal(ledger)
        self.settings_digest = _digest(self.settings)
        if self.settings_digest not in [event.get("settings_digest") for event in self.ledger.events]:
            self.ledger.write({"event": "settings", "settings_digest": self.settings_digest} | self.settings)
        self.reader, self.writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self.problems: list[str] = []

    def close(self) -> None:
        """Ends reading and writing."""
        for pool in (self.reader, self.writer):
            pool.shutdown(cancel_futures=True)
        self.ledger.close()

    def do(self, jobs: list[Job], sizes: dict[Job, tuple[int, int]]) -> None:
        """
        Predicts images, and says how fast.

        :param sizes: height and width of each
        :raises DataError: with those that could not be
        """
        abouts = {job: self._about(job) for job in jobs}
        to_do = [job for job in jobs if not self._is_done(job, abouts[job])]
        if len(to_do) < len(jobs):
            print(
                f"{len(jobs) - len(to_do)} of {len(jobs)} images were predicted before, with the same settings."
            )
        started, num_pixels = time.monotonic(), 0
        form = "{desc}{percentage:3.0f}%|{bar}| {n:.1f}/{total:.1f} MP [{elapsed}<{remaining}, {rate_fmt}]"
        total = sum(height * width for height, width in (sizes[job] for job in to_do)) / 1e6
        with tqdm(total=total, unit=" MP", bar_format=form, disable=None, leave=False) as progress:

            def advance(pixels: int) -> None:
                nonlocal num_pixels
                num_pixels += pixels
                progress.update(pixels / 1e6)

            for is_small, some in itertools.groupby(to_do, lambda job: max(sizes[job]) <= self.tiling.tile):
                if is_small:
                    self._do_small(some, abouts, advance)
                    continue
                for job in some:
                    self._guarded(job, functools.partial(self._do_large, job, abouts[job], advance))
        seconds = time.monotonic() - started
        if num_pixels:
            print(
                f"{num_pixels / 1e6:.1f} MP in {seconds:.1f} s: {num_pixels / 1e6 / max(seconds, 1e-9):.2f} MP/s."
            )
        if self.predictor.num_pixels:
            print(
                f"Augmentation took {len(self.predictor.views)} forward passes instead of 1, and gave another class to "
                f"{self.predictor.num_changed / self.predictor.num_pixels:.2%} of the pixels. What it gains on test "
                "data: python -m pytest tests/test_models --run NAME"
            )
        if self.problems:
            raise DataError(self.problems)

    def _do_small(self, jobs: Iterable[Job], abouts: dict[Job, Any], advance: Callable[[int], None]) -> None:
        """Images of one window each: several of the same size are one batch."""
        for same in _batches(self._read_ahead(jobs), self.tiling.batch_size):
            raise_if_stop_requested()
            answers = self.predictor(torch.stack([inputs for _, inputs, _, _ in same]))
            written = []
            for (job, _, valid, grid), answer in zip(same, answers, strict=True):
                band = Band(0, answer, valid)
                written.append(self.writer.submit(self._write_whole, job, abouts[job], band, grid))
                advance(valid.size)
            for future in written:
                future.result()

    def _read_ahead(self, jobs: Iterable[Job]) -> Iterator[Sample]:
        waiting: list[tuple[Job, Future]] = []
        rest = iter(jobs)
        while True:
            for job in itertools.islice(rest, 2 * self.tiling.batch_size - len(waiting)):
                waiting.append((job, self.reader.submit(self._read_whole, job)))
            if not waiting:
                return
            job, future = waiting.pop(0)
            result = self._guarded(job, future.result)
            if result is not None:
                yield job, *result

    def _read_whole(self, job: Job) -> tuple[Tensor, np.ndarray, Grid | None]:
        with ImageReader(*job.inputs) as image:
            pixels, grid = image.read(Window(0, 0, *image.shape[:2])), image.grid
            contract = self.contract.for_nodata(image.nodata)
        problems = contract.problems(pixels)
        if self.check_values and not problems:
            problems = contract.value_problems(pixels)
        if problems:
            raise DataError(problems)
        inputs, valid = contract.prepare(pixels)
        return inputs, valid.numpy(), grid

    def _write_whole(self, job: Job, about: dict[str, Any], band: Band, grid: Grid | None) -> None:
        with self._open_outputs(job, about, band.valid.shape) as files:
            self._write(files, band)
            self._finish(about, files, grid)

    def _do_large(self, job: Job, about: dict[str, Any], advance: Callable[[int], None]) -> None:
        with ImageReader(*job.inputs) as image:
            contract = self.contract.for_nodata(image.nodata)
            if self.check_values:
                problems = contract.value_problems(image.sample())
                if problems:
                    raise DataError(problems)
            height, width = image.shape[:2]
            with self._open_outputs(job, about, (height, width)) as files:
                first_row = min(file.num_rows for file in files)
                if first_row:
                    print(f"{job.name}: goes on at row {first_row} of {height}.")
                    advance(first_row * width)
                if first_row < height:
                    previous: Future | None = None
                    for band in predict_bands(self.predictor, image, contract, self.tiling, first_row):
                        if previous is not None:
                            previous.result()
                        previous = self.writer.submit(self._write, files, band)
                        advance(band.valid.size)
                    assert previous is not None
                    previous.result()
                self._finish(about, files, image.grid)

    @staticmethod
    @contextmanager
    def _open_outputs(job: Job, about: dict[str, Any], size: tuple[int, ...]) -> Iterator[list[GrowingFile]]:
        with ExitStack() as stack:
            whole = (size[0], size[1])
            yield [stack.enter_context(closing(GrowingFile(output, whole, about))) for output in job.outputs]

    def _write(self, files: list[GrowingFile], band: Band) -> None:
        for kind, file in zip(self.kinds, files, strict=True):
            values = make_output(kind, band, self.contract, self.dtype)
            file.write(
                values[max(0, file.num_rows - band.top) :]
            )  # one of several may be further than the others

    def _finish(self, about: dict[str, Any], files: list[GrowingFile], grid: Grid | None) -> None:
        has_nodata = self.contract.nodata is not None or (grid is not None and grid.nodata is not None)
        for kind, file in zip(self.kinds, files, strict=True):
            file.finish(grid, style_of(kind, self.contract, has_nodata, self.dtype))
            event = {"event": "prediction", "output": file.path.name} | _state_of(file.path)
            self.ledger.write(event | {"time": time.time(), "kind": kind, "digest": _digest(about)} | about)

    def _guarded(self, job: Job, do: Callable[[], Any]) -> Any:
        """What cannot be predicted is told at the end: the other images are not lost for it."""
        try:
            return do()
        except DataError as error:
            self.problems += [f"{job.name}: {problem}" for problem in error.problems]
            return None

    def _about(self, job: Job) -> dict[str, Any]:
        """All that the outputs of an image depend on."""
        stamps = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in job.inputs]
        return {"inputs": stamps, "settings_digest": self.settings_digest}

    def _is_done(self, job: Job, about: dict[str, Any]) -> bool:
        digest = _digest(about)
        events = [self.done.get(output.name, {}) for output in job.outputs]
        return all(
            event.get("digest") == digest and output.is_file() and event.items() >= _state_of(output).items()
            for event, output in zip(events, job.outputs, strict=True)
        )


def _state_of(output: Path) -> dict[str, int]:
    """Tells an output from one that was written later, which may well have the same size."""
    state = output.stat()
    return {"bytes": state.st_size, "mtime_ns": state.st_mtime_ns}


def _batches(samples: Iterable[Sample], batch_size: int) -> Iterator[list[Sample]]:
    """Samples of one shape that follow one another."""
    batch: list[Sample] = []
    for sample in samples:
        if batch and (len(batch) == batch_size or sample[1].shape != batch[0][1].shape):
            yield batch
            batch = []
        batch.append(sample)
    if batch:
        yield batch


def _digest(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
