"""Predict image files: images in, maps out, under the input's name. Of an array: predictor.predict_array."""

import json
import os
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .. import __version__
from ..config.capture import capture
from ..config.check import check_keys
from ..config.keys import complete
from ..config.prediction_keys import PREDICT_KEYS, as_list
from ..config.project import find_project
from ..data.images import DataError
from ..errors import ConfigError, Preempted
from ..report.console import hides_bar, say, signs_of_life
from ..runs.lookup import find_run, read_run_config
from ..storage.files import write_atomic
from ..storage.weights import weights_digest
from ..training.signals import raise_if_stop_requested, stop_on_signals
from .jobs import Job, check_jobs, find_inputs, find_masks, plan, score_maps
from .ledger import LEDGER, Ledger, of_this_process
from .outputs import Output, only_writer, open_output
from .predictor import Predictor, load_predictor
from .windows import Band, Tiling, open_image, predict_bands

SCORES = "scores.json"
_MIN_TILE = 256


def predict(predict_config: dict[str, Any]) -> list[Path]:
    """
    Predict images of any size with a trained model.

    The images are read, scaled and normalized as in training, by the data contract in the weights file.
    Images that an earlier call with the same weights and settings has finished are skipped unless they were
    changed since; an unfinished one starts again. LEDGER in OUT_DIR tells what was made of what. Several
    processes of torchrun share the images.

    :param predict_config: MODEL (class), WEIGHTS (file), FILES (images, folders, or patterns such as
        ``in/*.tif``), OUT_DIR, and the other PREDICT_KEYS
    :return: the outputs of all images of this process
    :raises ConfigError, DataError, WeightsError: for what cannot be used, before anything is written; for
        an image that turns out to be unusable later, after all others are done
    :raises UserError: if another call is writing into OUT_DIR
    :raises Preempted: if a signal has asked to end; all outputs that are there are complete
    """
    if problems := check_keys(predict_config, PREDICT_KEYS):
        raise ConfigError(list(problems.values()))
    config = complete(predict_config, PREDICT_KEYS)
    kinds, out_dir, masks = as_list(config["OUTPUT"]), Path(config["OUT_DIR"]), config["MASKS"]
    inputs = find_inputs(config["FILES"], config["BANDS"])
    options = {key.lower(): config[key] for key in ("DEVICE", "PRECISION", "AUGMENT")}
    if "LOCAL_RANK" in os.environ and config["DEVICE"] == "auto" and torch.cuda.is_available():
        options["device"] = f"cuda:{os.environ['LOCAL_RANK']}"
    model = config["WEIGHTS"], config["MODEL"], config["MODEL_CONFIG"]
    predictor = load_predictor(*model, inputs[0], **options)
    contract = predictor.contract
    if masks is not None and contract.task == "values":
        raise ConfigError("MASKS is given, but the model predicts values, not classes: leave it out.")
    jobs = plan(inputs, kinds, contract, config)
    jobs = jobs[int(os.environ.get("RANK", 0)) :: int(os.environ.get("WORLD_SIZE", 1))]
    check_jobs(jobs, contract, config["CHECK_VALUES"], config["DATASET"])
    masks = find_masks(jobs, masks) if masks is not None else []
    out_dir.mkdir(parents=True, exist_ok=True)
    with only_writer(out_dir / of_this_process(LEDGER)):
        work = _Work(predictor, config)
        with stop_on_signals(), _rasters(jobs), closing(work.ledger):
            try:
                work.predict_all(jobs)
            except Preempted:
                say(f"Stopped by a signal; all files in {out_dir} are intact: repeat the call.")
                raise
        if masks:
            scores = score_maps([job.outputs["probabilities"] for job in jobs], masks, contract, config)
            results, file = scores.results(contract.class_names), out_dir / of_this_process(SCORES)
            write_atomic(file, lambda stream: stream.write(json.dumps(results, indent=2).encode()))
            names = ("f1", "iou", "accuracy", "average_precision", "ece")
            say(f"{', '.join(f'{name} {results[name]:.4f}' for name in names)}; all scores: {file}")
            for job in jobs if "probabilities" not in kinds else ():
                job.outputs.pop("probabilities").unlink()
    outputs = [output for job in jobs for output in job.outputs.values()]
    say(f"{len(outputs)} prediction{'s' * (len(outputs) != 1)} in {out_dir}")
    return outputs


def predict_run(
    name: str, files: Any, out_dir: Any, global_config: dict[str, str] | None = None, **options: Any
) -> list[Path]:
    """
    Predict images with a run.

    :param name: the run's name or part of it, "latest", or "best"
    :param global_config: default: the project's
    :param options: further PREDICT_KEYS, such as OUTPUT="probabilities"
    :return: the outputs
    """
    return predict(run_config(name, global_config) | {"FILES": files, "OUT_DIR": out_dir} | options)


def run_config(name: str, global_config: dict[str, str] | None = None, package: str = "") -> dict[str, Any]:
    """
    Return what a predict_config takes of a run.

    :param package: the project's; default: the one in the working directory or beside the library
    """
    project = find_project(package)
    global_config = global_config or project.module(".config.config").global_config
    name = find_run(global_config, name, with_weights=True)
    keys: tuple[str, ...] = ("MODEL", "MODEL_CONFIG", "MASK_VALUES", "IGNORE_INDEX")
    run_dir = Path(global_config["LOG_DIR"]) / name
    config = read_run_config(run_dir, project, keys=keys)
    with suppress(ConfigError):  # a dataset that is no longer there reads nothing
        dataset = read_run_config(run_dir, project, keys=("DATASET",)).get("DATASET")
        if callable(getattr(dataset, "read", None)):
            keys, config = (*keys, "DATASET"), config | {"DATASET": dataset}
    weights = Path(global_config["WEIGHT_DIR"]) / name / "best.pt"
    return {key: config[key] for key in keys if key in config} | {"WEIGHTS": weights}


@contextmanager
def _rasters(jobs: list[Job]) -> Iterator[None]:
    """Have GDAL take little memory, and not warn of rasters that lie nowhere."""
    files = (file for job in jobs for file in (*job.inputs, *job.outputs.values()))
    if not any(file.suffix.lower() in (".tif", ".tiff") for file in files):
        yield
        return
    import rasterio  # imported where used: other formats do not need it

    with rasterio.Env(GDAL_CACHEMAX=64 * 2**20), warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        yield


class _Work:
    def __init__(self, predictor: Predictor, config: dict[str, Any]) -> None:
        self.predictor, self.contract, self.config = predictor, predictor.contract, config
        tile = config["TILE"] or max(_MIN_TILE, self.contract.tile_size or 0)
        self.tiling = Tiling(tile, config["OVERLAP"], config["BATCH_SIZE"])
        keys = ["MODEL", "MODEL_CONFIG", "OUTPUT", "OUTPUT_DTYPE", "OVERLAP", "BATCH_SIZE", "AUGMENT"]
        keys += ["DATASET"] if config["DATASET"] is not None else []
        settings = {key: config[key] for key in keys}
        settings |= {"PRECISION": predictor.context.precision, "TILE": tile}
        settings = capture(settings, find_project(config["MODEL"].__module__), [])["config"]
        settings["WEIGHTS"] = weights_digest(predictor.model.state_dict())
        settings["CONTRACT"] = self.contract.to_dict()
        self.num_done = 0  # pixels
        versions = {"dida_core": __version__, "torch": torch.__version__}
        about = {"run": predictor.run, "model_digest": settings["WEIGHTS"], "versions": versions}
        about |= {"classes": list(self.contract.class_names), "weights_file": str(config["WEIGHTS"])}
        self.ledger = Ledger(Path(config["OUT_DIR"]), settings, about)
        self.tags = {"RUN": predictor.run} if predictor.run else {}
        self.tags |= {"MODEL_DIGEST": settings["WEIGHTS"]}
        self.tags |= {"VERSIONS": ", ".join(f"{name} {version}" for name, version in versions.items())}

    def predict_all(self, jobs: list[Job]) -> None:
        """Predict images, and report the speed; raise DataError with those that could not be predicted."""
        to_do = [job for job in jobs if not self.ledger.is_done(job)]
        if num_done := len(jobs) - len(to_do):
            say(f"{num_done} of {len(jobs)} images were predicted before, with the same settings.")
        form = "{desc}{percentage:3.0f}%|{bar}| {n:.1f}/{total:.1f} MP [{elapsed}<{remaining}, {rate_fmt}]"
        total = sum(job.size[0] * job.size[1] for job in to_do) / 1e6
        started, problems = time.monotonic(), []
        bar = tqdm(total=total, unit=" MP", bar_format=form, disable=hides_bar(), leave=False)
        with bar as progress, signs_of_life(lambda: f"{self.num_done / 1e6:.1f} of {total:.1f} MP"):
            for job in to_do:
                raise_if_stop_requested()
                try:
                    self._predict(job, progress)
                except DataError as error:  # the other images are not lost for it
                    problems += [f"{job.place}: {problem}" for problem in error.problems]
        seconds = max(time.monotonic() - started, 1e-9)
        if total and not problems:
            say(f"{total:.1f} MP in {seconds:.1f} s: {total / seconds:.2f} MP/s.")
        if self.predictor.num_pixels:
            fraction = self.predictor.num_changed / self.predictor.num_pixels
            passes = f"Augmentation took {len(self.predictor.views)} forward passes instead of 1"
            say(f"{passes}, and changed the class of {fraction:.2%} of the pixels.")
            say("Its gain on test data: python -m pytest tests/test_models --run NAME")
        if problems:
            raise DataError(problems)

    def _predict(self, job: Job, progress: tqdm) -> None:
        origin = self.ledger.origin(job)
        with ExitStack() as stack:
            image = stack.enter_context(open_image(job.inputs, self.config["DATASET"]))
            contract = self.contract.for_nodata(image.nodata)
            size, tile = image.shape[:2], self.tiling.tile
            if self.config["CHECK_VALUES"]:
                sample = image.sample(tile if max(size) <= tile else 64)
                if problems := contract.value_problems(sample):
                    raise DataError(problems)
            lacks_data = image.lacks_data or contract.nodata is not None
            about = contract, self.config["OUTPUT_DTYPE"], lacks_data
            outputs = {kind: Output(kind, *about) for kind in job.outputs}
            for output in outputs.values():
                output.tags |= self.tags
            opened = {
                kind: open_output(job.outputs[kind], size, outputs[kind], image.grid) for kind in outputs
            }
            files = {kind: stack.enter_context(file) for kind, file in opened.items()}

            def write(band: Band) -> None:
                for kind, file in files.items():
                    file.write(outputs[kind].values(band))

            bands = stack.enter_context(closing(predict_bands(self.predictor, image, contract, self.tiling)))
            pool = stack.enter_context(ThreadPoolExecutor(1))
            written: Future[Any] = pool.submit(int)  # nothing yet
            for band in bands:  # each is written while the next one is computed
                written.result()
                written = pool.submit(write, band)
                self.num_done += band.valid.size
                progress.update(band.valid.size / 1e6)
            written.result()
            for kind, file in files.items():
                file.finish()
                self.ledger.add(origin, file.path, kind)
