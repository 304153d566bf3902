"""
Setup of a training, the same for all routines: check config and data against each other, and build.

Nothing is written yet.
"""

import contextlib
import hashlib
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel

from ..config.capture import restore
from ..config.check import check
from ..config.keys import complete
from ..config.project import Project, project_of
from ..data.contract import DataContract
from ..data.dataset import Custom, View, as_dataset
from ..data.images import DataError
from ..errors import ConfigError, UserError
from .device import DeviceContext, tensors_of
from .distributed import own_device
from .evaluation import Evaluation
from .first_sample import FirstSample, contract_of_values, dry_run, try_model, try_splits
from .loaders import Loaders, Splits, Values, build_loaders, stream_problems
from .modules import set_seed
from .optimization import (
    build_ema,
    build_loss,
    build_optimizer,
    build_scheduler,
    of_known,
    warm_up,
    watch_gradients,
)
from .targets import OutputLoss


@dataclass
class Experiment:
    """The config, whose it is, and how it is recorded."""

    config: dict[str, Any]
    global_config: dict[str, str]
    project: Project
    captured: dict[str, Any] = field(default_factory=dict)  # the config as plain data
    not_rerunnable: str = ""  # why a run cannot be reproduced from its record

    @property
    def cache_file(self) -> Path:
        """File that keeps facts of the data."""
        return Path(self.global_config["LOG_DIR"]) / "data_facts.json"


@dataclass
class Setup:
    """Everything that a routine trains with."""

    experiment: Experiment
    context: DeviceContext
    contract: DataContract
    data: Splits
    loaders: Loaders
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler | None
    scaler: torch.amp.GradScaler
    ema: AveragedModel | None
    loss_fn: OutputLoss

    @property
    def config(self) -> dict[str, Any]:
        """The complete config."""
        return self.experiment.config

    @property
    def eval_model(self) -> nn.Module:
        """The model that is evaluated and saved as best: the moving average, if there is one."""
        return self.model if self.ema is None else self.ema.module

    def autocast(self) -> torch.autocast:
        """Return the context manager of the forward pass; compute the loss outside of it, in float32."""
        return self.context.autocast()

    def metrics(self, contract: DataContract | None = None) -> Evaluation:
        """Return an empty evaluation of the config's METRICS. See there for the contract."""
        config, own = self.config, self.contract
        about = (config["IGNORE_INDEX"], own.class_names, contract, own.task)
        return Evaluation(config["METRICS"], self.loss_fn, *about)

    def parameters(self) -> list[nn.Parameter]:
        """Return all parameters that are trained: the model's, and the loss's if it has some."""
        return [*self.model.parameters(), *self.loss_fn.parameters()]

    def step_schedule(self, value: float | None) -> None:
        """
        Step a schedule that goes by epochs.

        :param value: the monitored result, for a schedule that follows it
        """
        if self.scheduler is None or self.config["SCHEDULER_STEP"] != "epoch":
            return
        if isinstance(self.scheduler, ReduceLROnPlateau):
            assert value is not None  # prepare has checked that there is validation data
            self.scheduler.step(value)
        else:
            self.scheduler.step()


def prepare(
    train_dataset: Any,
    test_dataset: Any,
    training_config: dict[str, Any],
    global_config: dict[str, str],
    validation_dataset: Any,
    routine: str,
) -> Setup:
    """
    Check everything, then build everything.

    :param train_dataset: (input, target) pairs; see TrainingData for what else it may offer
    :param test_dataset: likewise, or None
    :param validation_dataset: likewise; None takes VALIDATION_FRACTION of the training set
    :param routine: __name__ of the module that trains, or of the project's package where none does
    :raises ConfigError: with all problems of the config, and of the data if there are both
    :raises DataError: with all problems of the data
    """
    _check_folders(global_config)
    project, config = project_of(routine), complete(training_config)
    config["ROUTINE_NAME"] = None if routine == project.package else sys.modules.get(routine, routine)
    config["DATE"] = config["DATE"] or project.module(".utils.name").date_now()
    experiment = Experiment(config, global_config, project)
    data = Splits(train_dataset, test_dataset, validation_dataset).map(as_dataset)

    data, context, first = _check(experiment, data)
    data, contract = _fit_contract(experiment, data, first)
    set_seed(config["SEED"])  # of what a loss draws
    loss = build_loss(config, context.device, tensors_of(first.predictions)[0].ndim)
    loss_fn = OutputLoss(of_known(loss) if contract.task == "values" else loss)
    loaders = build_loaders(config, data, context.device, first.shape[1:], _values(config, contract))
    dry_run(first, config, loss_fn, contract, context)
    model = first.model.to(context.device)
    if context.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = build_optimizer(config, model, loss_fn)
    watch_gradients(optimizer, model)
    warm_up(config, optimizer, config["EPOCHS"] * loaders.steps_per_epoch)
    scheduler = build_scheduler(config, optimizer, loaders.steps_per_epoch)
    scaler = torch.amp.GradScaler(context.device.type, enabled=context.precision == "fp16")
    ema = build_ema(config, model)
    setup = Setup(
        experiment, context, contract, data, loaders, model, optimizer, scheduler, scaler, ema, loss_fn
    )
    try_splits(setup.model, first, loaders, lambda: setup.metrics(contract), context)
    return setup


def _check_folders(global_config: dict[str, str]) -> None:
    """Raise ConfigError unless there are folders for logs and weights, or may be made."""
    problems = []
    for key in ("LOG_DIR", "WEIGHT_DIR"):
        if not isinstance(global_config.get(key), str | os.PathLike):
            problems.append(f"{key} is missing in global_config: see make_global_config in config/config.py.")
            continue
        path = Path(global_config[key]).absolute()
        there = next(one for one in (path, *path.parents) if one.exists())
        if not there.is_dir():
            problems.append(f"{key} is {path}, but {there} is a file: take a folder.")
    if problems:
        raise ConfigError(problems)


def _check(experiment: Experiment, data: Splits) -> tuple[Splits, DeviceContext, FirstSample]:
    """Enter the data into the config, capture it, and raise all problems of both at once."""
    config, project = experiment.config, experiment.project
    problems: list[str] = []
    unreadable: list[str] = []
    first: FirstSample | None = None
    with _collect(problems):
        if config["MASK_VALUES"]:
            data = data.map(lambda dataset: dataset.with_mask_values(config["MASK_VALUES"]))
    problems += stream_problems(config, data)
    problems += _disagreements(config, data)
    reasons = _enter_data(config, data)
    with _collect(problems):
        experiment.captured = check(config, project)
    with _collect(problems):
        choice = project.module(".config.device")
        device = own_device(choice.get_device(config["DEVICE"]))
        precision = choice.get_precision(device, config["PRECISION"])
        context = DeviceContext(device, precision, config["CHANNELS_LAST"])
    if not any(problem.startswith(("MODEL", "INIT_WEIGHTS", "SEED")) for problem in problems):
        with _collect(problems, ConfigError), _collect(unreadable, DataError):
            first = try_model(config, data.train)
    data_problems: list[str] = []
    for split, dataset in data.items():
        if len(dataset) == 0:
            data_problems.append(f"the {split} data is empty")
            continue
        with _collect(data_problems, DataError):
            num_classes = first.num_outputs if first else None
            dataset.check(experiment.cache_file, num_classes, training=split == "train")
    data_problems = data_problems or unreadable
    if problems:
        raise ConfigError(problems + data_problems)
    if data_problems or first is None:
        raise DataError(data_problems)
    with _collect(reasons):
        restore(experiment.captured, project)
    experiment.not_rerunnable = "; ".join(reasons)
    return data, context, first


def _fit_contract(experiment: Experiment, given: Splits, first: FirstSample) -> tuple[Splits, DataContract]:
    """Return the splits as they are trained on and evaluated on, all read as the training set wants."""
    config, data = experiment.config, given
    if data.validation is None and config["VALIDATION_FRACTION"] > 0:
        train, validation = data.train.split(config["VALIDATION_FRACTION"], config["SEED"])
        data = Splits(train, data.test, validation).map(as_dataset)
    evaluated = {split: dataset.for_evaluation() for split, dataset in data.items() if split != "train"}
    data = Splits(data.train, **evaluated).map(as_dataset)
    contract = data.train.contract(config["NORMALIZE"], experiment.cache_file)
    contract = contract or contract_of_values(first, config, data.train)
    contract = replace(contract, outputs=first.num_outputs or 1)
    if constant := contract.constant_channels():
        effect = "the model learns nothing from it, and prediction will refuse images where it has others"
        warnings.warn(f"{constant} is constant in the training images: {effect}.", stacklevel=4)
    checked = contract if config["CHECK_VALUES"] else replace(contract, minimum=(), maximum=())
    data = data.map(lambda dataset: dataset.with_contract(checked))
    data.hashes = _hashes(config, given)
    data.digest = _digest(data.hashes, given)
    return data, contract


def _values(config: dict[str, Any], contract: DataContract) -> Values:
    """Return what batches may hold."""
    is_masked = any(getattr(metric, "masked", False) for metric in config["METRICS"].values())
    counts = contract.task == "multi-class" and not is_masked
    ignored = {config["IGNORE_INDEX"], config["LOSS_CONFIG"].get("ignore_index", config["IGNORE_INDEX"])}
    return Values(contract.outputs if counts else None, tuple(ignored))


@contextlib.contextmanager
def _collect(problems: list[str], kind: type[UserError] = UserError) -> Iterator[None]:
    """Add what is raised to problems."""
    try:
        yield
    except kind as error:
        problems += getattr(error, "problems", [str(error)])


def _disagreements(config: dict[str, Any], data: Splits) -> list[str]:
    """Return in what config and data do not fit, but for the model."""
    wanted, problems = config["IGNORE_INDEX"], []
    for split, dataset in data.items():
        if dataset.ignore_index not in (None, wanted):
            ignored = f"the {split} data ignores {dataset.ignore_index}"
            problems.append(f"IGNORE_INDEX is {wanted}, but {ignored}: give both the same.")
    tasks = {split: dataset.task for split, dataset in data.items() if dataset.task is not None}
    if len(set(tasks.values())) > 1:
        listed = ", ".join(f"{task!r} for {split}" for split, task in tasks.items())
        problems.append(f"DATASET_CONFIG has several tasks ({listed}): give all splits the same.")
    if data.validation is None and config["VALIDATION_FRACTION"] == 0:
        scheduler, needs = (
            config["SCHEDULER"],
            "needs a validation set: give one, or set VALIDATION_FRACTION.",
        )
        if config["PATIENCE"] is not None:
            problems.append(f"PATIENCE is {config['PATIENCE']}, which {needs}")
        if isinstance(scheduler, type) and issubclass(scheduler, ReduceLROnPlateau):
            problems.append(f"SCHEDULER is ReduceLROnPlateau, which {needs}")
    return problems


def _enter_data(config: dict[str, Any], data: Splits) -> list[str]:
    """Enter the datasets into the config. Return why a record cannot name them, if it cannot."""
    datasets = dict(data.items())
    kinds = {type(one.given if isinstance(one, Custom) else one) for one in datasets.values()}
    if len(kinds) == 1 and all(dataset.arguments is not None for dataset in datasets.values()):
        config["DATASET"] = kinds.pop()
        config["DATASET_CONFIG"] = {split: dict(dataset.arguments) for split, dataset in datasets.items()}
        return []
    if kinds == {config["DATASET"]} and config["DATASET_CONFIG"] is not None:
        return []
    config["DATASET"] = config["DATASET_CONFIG"] = None  # what the config names is not what was given
    return ["the datasets are not named: set DATASET to their class, and DATASET_CONFIG to their arguments"]


def _hashes(config: dict[str, Any], data: Splits) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of the files that the training reads, where the datasets tell."""
    hashes = {
        f"{split}/{file.parent.name}/{file.name}": {"bytes": file.stat().st_size, "sha256": facts["sha256"]}
        for split, dataset in data.items()
        for file, facts in dataset.scan().items()
        if "sha256" in facts
    }
    if config["INIT_WEIGHTS"] is not None:
        with open(config["INIT_WEIGHTS"], "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            hashes["INIT_WEIGHTS"] = {"bytes": stream.tell(), "sha256": digest}
    return hashes


def _digest(hashes: dict[str, dict[str, Any]], data: Splits) -> str:
    """Return a SHA-256 of all data, or which split has none."""
    unknown = [split for split, dataset in data.items() if not _is_hashed(dataset)]
    if unknown:
        return f"no: the {', '.join(unknown)} data has no hash, so a change would not be noticed"
    files = [(name, facts["sha256"]) for name, facts in sorted(hashes.items()) if name != "INIT_WEIGHTS"]
    return hashlib.sha256(repr(files).encode()).hexdigest()


def _is_hashed(dataset: Any) -> bool:
    if isinstance(dataset, View):
        return all(map(_is_hashed, dataset.datasets))
    facts = dataset.scan()
    return len(facts) > 0 and all("sha256" in one for one in facts.values())
