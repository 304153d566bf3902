"""
Setup of a training, the same for all routines: check config and data against each other, build what they name.

Nothing is written yet.
"""

import contextlib
import hashlib
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import default_collate

from ..config.capture import restore
from ..config.check import check
from ..config.errors import ConfigError, UserError
from ..config.keys import complete
from ..config.project import Project, project_of
from ..utils.data.contract import DataContract
from ..utils.data.dataset import Custom, TrainingData, as_dataset
from ..utils.data.images import DataError
from ..utils.name import date_now
from ..utils.targets import is_multi_class, unmask
from ..utils.weights import load_weights, model_state
from .device import DeviceContext, choose_context
from .evaluation import Evaluation
from .loaders import Loaders, Splits, build_loaders
from .modules import fill_model, set_seed
from .optimization import Loss, build_ema, build_loss, build_optimizer, build_scheduler, config_errors


@dataclass
class Setup:
    """Everything that a routine trains with."""

    config: dict[str, Any]
    global_config: dict[str, str]
    project: Project
    captured: dict[str, Any]  # the config as plain data
    not_rerunnable: str  # why a run cannot be reproduced from its record, or ""
    context: DeviceContext
    contract: DataContract
    data: Splits
    loaders: Loaders
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler | None
    scaler: torch.amp.GradScaler
    ema: AveragedModel | None
    loss_fn: Loss

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimizer steps; the last one may have fewer batches."""
        return -(-self.loaders.batches.num_batches // self.config["ACCUMULATE"])

    @property
    def eval_model(self) -> nn.Module:
        """The model that is evaluated and saved as best: the moving average, if there is one."""
        return self.model if self.ema is None else self.ema.module

    def autocast(self) -> torch.autocast:
        """Return the context manager of the forward pass; compute the loss outside of it, in float32."""
        return self.context.autocast()

    def metrics(self, contract: DataContract | None = None) -> Evaluation:
        """Return an empty evaluation of the config's METRICS. See there for the contract."""
        config, class_names = self.config, self.contract.class_names
        return Evaluation(config["METRICS"], self.loss_fn, config["IGNORE_INDEX"], class_names, contract)

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
    project, cache_file = project_of(routine), Path(global_config["LOG_DIR"]) / "data_facts.json"
    module = None if routine == project.package else sys.modules.get(routine, routine)
    config = complete(training_config) | {"ROUTINE_NAME": module}
    config["DATE"] = config["DATE"] or date_now()
    given = {"train": train_dataset, "test": test_dataset, "validation": validation_dataset}
    data = {split: as_dataset(dataset) for split, dataset in given.items() if dataset is not None}

    problems: list[str] = []
    with _collect(problems):
        data = _with_mask_values(data, config["MASK_VALUES"])
    problems += _disagreements(data, config["IGNORE_INDEX"])
    unnamed = _enter_data(config, data)
    with _collect(problems):
        captured = check(config, project)
    with _collect(problems):
        context = choose_context(project, config["DEVICE"], config["PRECISION"], config["CHANNELS_LAST"])
    first, unreadable = None, list[str]()
    if not any(problem.startswith(("MODEL", "INIT_WEIGHTS", "SEED")) for problem in problems):
        with _collect(problems, ConfigError), _collect(unreadable, DataError):
            first = _try_model(config, data["train"])
    data_problems = _data_problems(data, first and first.num_outputs, cache_file) or unreadable
    if problems:
        raise ConfigError(problems + data_problems)
    if data_problems:
        raise DataError(data_problems)
    assert first is not None

    train, validation, test = _split(data, config)
    contract = train.contract(config["NORMALIZE"], cache_file) or _contract_of_values(train, first, config)
    contract = replace(contract, outputs=first.num_outputs or 1)
    if contract.constant_channels():
        warnings.warn(
            f"{contract.constant_channels()} of the training images has the same value everywhere: the model "
            "learns nothing from it, and prediction will refuse images where it has others.",
            stacklevel=3,
        )
    read = [None if one is None else as_dataset(one.with_contract(contract)) for one in (validation, test)]
    splits = Splits(as_dataset(train.with_contract(contract)), *read, _hashes(data, config["INIT_WEIGHTS"]))
    if splits.validation is None:
        _check_without_validation(config)
    with config_errors("LOSS"):
        loss_fn = build_loss(config, context.device)
    with config_errors("DATA_LOADER"):
        loaders = build_loaders(config, splits, context.device, first.inputs.shape[1:])
    _dry_run(config, first, loss_fn, contract, context.device)
    model = first.model.to(context.device)
    if config["CHANNELS_LAST"]:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with config_errors("OPTIMIZER"):
        optimizer = build_optimizer(config, model)
    with config_errors("SCHEDULER"):
        steps_per_epoch = -(-loaders.batches.num_batches // config["ACCUMULATE"])
        scheduler = build_scheduler(config, optimizer, steps_per_epoch)
    reasons = [unnamed] if unnamed else []
    with _collect(reasons):
        restore(captured, project)
    return Setup(
        config=config,
        global_config=global_config,
        project=project,
        captured=captured,
        not_rerunnable="; ".join(reasons),
        context=context,
        contract=contract,
        data=splits,
        loaders=loaders,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=torch.amp.GradScaler(context.device.type, enabled=context.precision == "fp16"),
        ema=build_ema(config, model),
        loss_fn=loss_fn,
    )


@contextlib.contextmanager
def _collect(problems: list[str], kind: type[UserError] = UserError) -> Iterator[None]:
    """Add what is raised to problems."""
    try:
        yield
    except kind as error:
        problems += getattr(error, "problems", [str(error)])


# --------------------------------------------------------------------------------------------- data


def _with_mask_values(data: dict[str, TrainingData], mask_values: dict | None) -> dict[str, TrainingData]:
    if not mask_values:
        return data
    return {split: as_dataset(dataset.with_mask_values(mask_values)) for split, dataset in data.items()}


def _disagreements(data: dict[str, TrainingData], ignore_index: int) -> list[str]:
    problems = [
        f"IGNORE_INDEX is {ignore_index}, but the {split} data ignores {dataset.ignore_index}: give both one."
        for split, dataset in data.items()
        if dataset.ignore_index not in (None, ignore_index)
    ]
    tasks = {split: dataset.task for split, dataset in data.items() if dataset.task is not None}
    if len(set(tasks.values())) > 1:
        listed = ", ".join(f"{task!r} for {split}" for split, task in tasks.items())
        problems.append(f"DATASET_CONFIG has several tasks ({listed}): give all splits the same.")
    return problems


def _enter_data(config: dict[str, Any], data: dict[str, TrainingData]) -> str:
    """Enter the datasets into the config. Return why a record cannot name them, or ""."""
    kinds = {type(dataset.given if isinstance(dataset, Custom) else dataset) for dataset in data.values()}
    if len(kinds) == 1 and all(dataset.arguments is not None for dataset in data.values()):
        config["DATASET"] = kinds.pop()
        config["DATASET_CONFIG"] = {split: dict(dataset.arguments) for split, dataset in data.items()}
        return ""
    if kinds == {config["DATASET"]} and config["DATASET_CONFIG"] is not None:
        return ""
    config["DATASET"] = config["DATASET_CONFIG"] = None  # what the config names is not what was given
    return "the datasets are not named: set DATASET to their class, and DATASET_CONFIG to their arguments"


def _data_problems(data: dict[str, TrainingData], num_classes: int | None, cache_file: Path) -> list[str]:
    problems: list[str] = []
    for split, dataset in data.items():
        if len(dataset) == 0:
            problems.append(f"the {split} data is empty")
            continue
        with _collect(problems, DataError):
            dataset.check(cache_file, num_classes, training=split == "train")
    return problems


def _split(data: dict[str, TrainingData], config: dict[str, Any]) -> list[Any]:
    """Return the datasets for training, validation and test."""
    train, validation, test = data["train"], data.get("validation"), data.get("test")
    if validation is None and config["VALIDATION_FRACTION"] > 0:
        train, validation = map(as_dataset, train.split(config["VALIDATION_FRACTION"], config["SEED"]))
    evaluated = (None if one is None else as_dataset(one.for_evaluation()) for one in (validation, test))
    return [train, *evaluated]


def _check_without_validation(config: dict[str, Any]) -> None:
    needs = "needs a validation set: give one, or set VALIDATION_FRACTION above 0."
    problems = [] if config["PATIENCE"] is None else [f"PATIENCE is {config['PATIENCE']}, which {needs}"]
    if config["SCHEDULER"] is not None and issubclass(config["SCHEDULER"], ReduceLROnPlateau):
        problems.append(f"SCHEDULER is ReduceLROnPlateau, which {needs}")
    if problems:
        raise ConfigError(problems)


def _hashes(data: dict[str, TrainingData], init_weights: Any) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of the files that the training reads, where the datasets tell."""
    hashes = {
        f"{split}/{file.parent.name}/{file.name}": {"bytes": file.stat().st_size, "sha256": facts["sha256"]}
        for split, dataset in data.items()
        for file, facts in dataset.scan().items()
    }
    if init_weights is not None:
        with open(init_weights, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            hashes["INIT_WEIGHTS"] = {"bytes": stream.tell(), "sha256": digest}
    return hashes


# --------------------------------------------------------------- the model and its first sample


@dataclass
class FirstSample:
    """The first training sample, and what the new model makes of it."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    predictions: Tensor

    @property
    def num_outputs(self) -> int | None:
        """Number of the model's output channels."""
        return self.predictions.shape[1] if self.predictions.ndim > 1 else None


def _try_model(config: dict[str, Any], dataset: TrainingData) -> FirstSample:
    """Build the model, and call it on the first sample."""
    name = config["MODEL"].__name__
    set_seed(config["SEED"])
    with config_errors("MODEL", f"MODEL {name} cannot be built with MODEL_CONFIG"):
        model = config["MODEL"](**config["MODEL_CONFIG"])
    path = config["INIT_WEIGHTS"]
    if path is not None:
        try:
            fill_model(model, model_state(load_weights(path)), f"INIT_WEIGHTS {path}")
        except ValueError as error:
            raise ConfigError([str(error)]) from error
    with config_errors(
        "DATASET", "the first training sample cannot be read as a pair of tensors (input, target)"
    ):
        inputs, targets = default_collate([dataset[0]])
    ch_in = config["MODEL_CONFIG"].get("ch_in")
    if ch_in is not None and inputs.ndim == 4 and inputs.shape[1] != ch_in:
        raise ConfigError([f"MODEL_CONFIG.ch_in is {ch_in}, but the images have {inputs.shape[1]} channels."])
    model.eval()
    with (
        config_errors("MODEL", f"MODEL {name} does not take inputs of the shape {tuple(inputs.shape)}"),
        torch.no_grad(),
    ):
        predictions = model(inputs)
    if not isinstance(predictions, Tensor):
        kind = type(predictions).__name__
        raise ConfigError([f"MODEL {name} returns a {kind}: wrap it in a class that returns a tensor."])
    return FirstSample(model, inputs, targets, predictions)


def _contract_of_values(dataset: TrainingData, first: FirstSample, config: dict[str, Any]) -> DataContract:
    """Return the contract of a dataset that gives what the model should see: no scaling, no normalization."""
    is_masked = any(getattr(metric, "masked", False) for metric in config["METRICS"].values())

    def unmasked(targets: Tensor) -> Tensor:
        """Remove a usability mask, and what stands where it is 0."""
        if not is_masked:
            return targets
        targets, usable = unmask(first.predictions, targets)
        return targets.masked_fill((usable if targets.ndim == usable.ndim else usable[:, None]) == 0, 0)

    channels, targets = first.inputs.shape[1] if first.inputs.ndim > 1 else 1, unmasked(first.targets)
    if is_multi_class(first.predictions, targets) and not targets.is_floating_point():
        return DataContract(channels, task="multi-class")
    some = [unmasked(torch.as_tensor(dataset[index][1])[None]) for index in range(min(16, len(dataset)))]
    is_mask = targets.ndim > 2 or not targets.is_floating_point()
    is_binary = all(bool(((target == 0) | (target == 1)).all()) for target in some)
    return DataContract(channels, task="multi-label" if is_mask and is_binary else "values")


def _dry_run(
    config: dict[str, Any], first: FirstSample, loss_fn: Loss, contract: DataContract, device: torch.device
) -> None:
    """Evaluate the first sample, so that what would fail after the first epoch fails now."""
    results: dict[str, float] = {}
    with config_errors("METRICS", "LOSS or METRICS do not fit the model's output and the target"):
        for fitted in (contract, None):  # as the test set will be evaluated, and the validation set
            about = (config["IGNORE_INDEX"], contract.class_names, fitted)
            evaluation = Evaluation(config["METRICS"], loss_fn, *about)
            with torch.no_grad():
                evaluation.update(first.predictions.float().to(device), first.targets.to(device))
            results = evaluation.results()
    goal = config["MONITOR"].split()[1]
    if goal not in results and f"{goal}_sample_mean" not in results:
        listed = ", ".join(results)
        raise ConfigError([f"MONITOR is {config['MONITOR']!r}: {goal} is not among the results ({listed})."])
