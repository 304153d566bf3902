"""
Contains what happens before training, the same for all routines: the config and the data are checked against each
other, and model, optimizer, schedule, loss and loaders are built from them. Nothing is written yet.
"""

import functools
import hashlib
import inspect
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Subset, default_collate

from ..config.capture import capture, restore
from ..config.check import find_problems
from ..config.device import get_device, get_precision
from ..config.errors import ConfigError, UserError
from ..config.keys import UNRECORDED, complete
from ..config.project import Project, project_of
from ..utils.data.contract import DataContract
from ..utils.data.images import DataError
from ..utils.loss import is_multi_class, unmask
from ..utils.name import date_now
from ..utils.redact import Redactor
from ..utils.torchutils import fill_model, set_seed
from ..utils.weights import load_weights, model_state
from .determinism import EvaluationBatches, Loader, Samples, TrainingBatches
from .distributed import num_processes, own_device, rank
from .evaluation import Evaluation, evaluate


@dataclass
class Preparation:
    """Everything that a routine trains with. Evaluation datasets are None where there are none."""

    config: dict[str, Any]
    project: Project
    record: dict[str, Any]  # the captured config
    not_rerunnable: str  # why a run cannot be done again from its record, or ""
    device: torch.device
    precision: str
    contract: DataContract
    train_set: Any
    validation_set: Any
    test_set: Any
    train_batches: TrainingBatches
    train_loader: Loader
    validation_loader: Loader | None
    test_loader: Loader | None
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler | None
    scaler: torch.amp.GradScaler
    ema: AveragedModel | None
    loss_function: Callable[[Tensor, Tensor], Tensor]
    data_hashes: dict[
        str, dict[str, Any]
    ]  # size and SHA-256 of each file of the data, where the dataset tells
    redactor: Redactor  # keeps secrets out of what is written

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch; the last one may be made of fewer batches."""
        return -(-self.train_batches.num_batches // self.config["ACCUMULATE"])

    @property
    def place(self) -> tuple[torch.device, str, bool]:
        """Where and how an evaluation is computed: device, precision, memory format."""
        return self.device, self.precision, self.config["CHANNELS_LAST"]

    def step_schedule_of_epochs(self, value: float | None) -> None:
        """
        Steps a schedule that goes by epochs.

        :param value: the monitored result, for a schedule that looks at it
        """
        if self.scheduler is None or self.config["SCHEDULER_STEP"] != "epoch":
            return
        if isinstance(self.scheduler, ReduceLROnPlateau):
            assert value is not None  # _check_without_validation has seen to it
            self.scheduler.step(value)
        else:
            self.scheduler.step()

    def evaluated_model(self) -> nn.Module:
        """The model whose weights count: the moving average, if there is one."""
        return self.model if self.ema is None else self.ema.module

    def new_evaluation(self, contract: DataContract | None = None) -> Evaluation:
        """An empty evaluation by the config; with the contract that predictions are made with, see there."""
        config, class_names = self.config, self.contract.class_names
        return Evaluation(
            config["METRICS"], self.loss_function, config["IGNORE_INDEX"], class_names, contract
        )


def prepare(
    train_dataset: Any,
    test_dataset: Any,
    training_config: dict[str, Any],
    global_config: dict[str, str],
    validation_dataset: Any = None,
    routine: str | None = None,
) -> Preparation:
    """
    Checks everything, and builds everything.

    :param train_dataset: (input, target) pairs; see datasets.py for what else it may offer
    :param test_dataset: likewise, or None
    :param validation_dataset: None takes VALIDATION_FRACTION of the training set
    :param routine: name of the module that trains
    :raises ConfigError: with all problems of the config, and of the data if there are both
    :raises DataError: with all problems of the data
    """
    project = project_of(routine or __name__)
    config = complete(training_config) | {"ROUTINE_NAME": sys.modules.get(routine or "", routine)}
    config["DATE"] = config["DATE"] or date_now()
    given = {"train": train_dataset, "test": test_dataset, "validation": validation_dataset}
    given = {part: dataset for part, dataset in given.items() if dataset is not None}
    given, problems = _with_mask_values(given, config["MASK_VALUES"])
    problems += _disagreements(config, given)
    data_reason = _enter_data(config, given)
    problems += find_problems(config, project)
    device, precision = torch.device("cpu"), "fp32"
    try:
        device = own_device(get_device(config["DEVICE"]))
        precision = get_precision(device, config["PRECISION"])
    except (ValueError, TypeError, RuntimeError) as error:
        problems.append(str(error))
    model, num_outputs = None, None
    if not any(problem.startswith(("MODEL", "INIT_WEIGHTS", "SEED")) for problem in problems):
        model, num_outputs, more = _build_model(config, given["train"])
        problems += more

    cache_file = Path(global_config["LOG_DIR"]) / "data_facts.json"
    data_problems = _data_problems(given, num_outputs, cache_file)
    if problems:
        raise ConfigError(problems + data_problems)
    if data_problems:
        raise DataError(data_problems)
    assert model is not None

    train_set, validation_set, test_set = _split(given, config)
    if hasattr(train_set, "contract"):
        contract = train_set.contract(config["NORMALIZE"], cache_file)
    else:
        contract = _contract_of_foreign(train_set, model, config["METRICS"])
    contract = replace(contract, outputs=num_outputs or 1)
    if contract.constant_channels():
        warnings.warn(
            f"{contract.constant_channels()} of the training images has the same value everywhere: the model learns "
            "nothing from it, and prediction will refuse images where it has others.",
            stacklevel=3,
        )
    train_set, validation_set, test_set = (
        dataset.with_contract(contract) if hasattr(dataset, "with_contract") else dataset
        for dataset in (train_set, validation_set, test_set)
    )
    if validation_set is None:
        _check_without_validation(config)
    loss_function = _made("LOSS", lambda: _build_loss(config, device))
    batches, loaders = _made(
        "DATA_LOADER", lambda: _build_loaders(config, train_set, (validation_set, test_set), device)
    )
    _rehearse(config, train_set, model, loss_function, contract, device)

    model = model.to(device)
    if config["CHANNELS_LAST"]:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    parameters = _trainable(model)
    optimizer = _made("OPTIMIZER", lambda: config["OPTIMIZER"](parameters, **config["OPTIMIZER_CONFIG"]))
    steps_per_epoch = -(-batches.num_batches // config["ACCUMULATE"])
    reasons: list[str] = []
    record = capture({key: value for key, value in config.items() if key not in UNRECORDED}, project, reasons)
    redactor = Redactor(config=config)
    record["config"] = _without_secrets(record["config"], redactor, "")
    try:
        restore(record, project)
    except ConfigError as error:
        reasons += error.problems
    return Preparation(
        config=config,
        project=project,
        record=record,
        not_rerunnable="; ".join([*([data_reason] if data_reason else []), *reasons]),
        device=device,
        precision=precision,
        contract=contract,
        train_set=train_set,
        validation_set=validation_set,
        test_set=test_set,
        train_batches=batches,
        train_loader=loaders[0],
        validation_loader=loaders[1],
        test_loader=loaders[2],
        model=model,
        optimizer=optimizer,
        scheduler=_made("SCHEDULER", lambda: build_scheduler(config, optimizer, steps_per_epoch)),
        scaler=torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
        ema=_build_ema(config, model),
        loss_function=loss_function,
        data_hashes=_hashes(given, config["INIT_WEIGHTS"]),
        redactor=redactor,
    )


def _without_secrets(value: Any, redactor: Redactor, path: str) -> Any:
    """A captured config without the strings that hold secrets; it cannot be restored then."""
    if isinstance(value, list):
        return [_without_secrets(item, redactor, path) for item in value]
    if isinstance(value, dict):
        return {
            key: one
            if key in ("@ref", "@module")
            else _without_secrets(one, redactor, f"{path}.{key}".strip("."))
            for key, one in value.items()
        }
    redacted = redactor.data(value, path.rpartition(".")[2])
    return (
        redacted
        if redacted == value or path in ("SESSION_NAME", "__COMMENT")
        else {"@unrecorded": "it holds a secret"}
    )


# ----------------------------------------------------------------------------------------------------------------- data


def _with_mask_values(given: dict[str, Any], mask_values: dict | None) -> tuple[dict[str, Any], list[str]]:
    if not mask_values:
        return given, []
    lacking = [part for part, dataset in given.items() if not hasattr(dataset, "with_mask_values")]
    if lacking:
        return given, [
            f"MASK_VALUES is set, but the {' and '.join(lacking)} data has no with_mask_values: map them there."
        ]
    return {part: dataset.with_mask_values(mask_values) for part, dataset in given.items()}, []


def _disagreements(config: dict[str, Any], given: dict[str, Any]) -> list[str]:
    wanted = config["IGNORE_INDEX"]
    problems = [
        f"IGNORE_INDEX is {wanted}, but the {part} data ignores {dataset.ignore_index}: give both the same."
        for part, dataset in given.items()
        if getattr(dataset, "ignore_index", wanted) != wanted
    ]
    tasks = {part: dataset.task for part, dataset in given.items() if hasattr(dataset, "task")}
    if len(set(tasks.values())) > 1:
        shown = ", ".join(f"{task!r} for {part}" for part, task in tasks.items())
        problems.append(f"DATASET_CONFIG has several tasks ({shown}): give all parts the same.")
    return problems


def _enter_data(config: dict[str, Any], given: dict[str, Any]) -> str:
    """Enters the datasets into the config. Returns why the record cannot name them, or ""."""
    kinds = {type(dataset) for dataset in given.values()}
    if len(kinds) == 1 and all(hasattr(dataset, "arguments") for dataset in given.values()):
        config["DATASET"] = kinds.pop()
        config["DATASET_CONFIG"] = {part: dict(dataset.arguments) for part, dataset in given.items()}
        return ""
    if kinds == {config["DATASET"]} and config["DATASET_CONFIG"] is not None:
        return ""
    config["DATASET"] = config["DATASET_CONFIG"] = None  # what the config names is not what was given
    return "the datasets are not named: set DATASET to their class, and DATASET_CONFIG to their arguments"


def _data_problems(given: dict[str, Any], num_classes: int | None, cache_file: Path) -> list[str]:
    problems = []
    for part, dataset in given.items():
        if len(dataset) == 0:
            problems.append(f"the {part} data is empty")
        elif hasattr(dataset, "check"):
            try:
                dataset.check(cache_file, num_classes, training=part == "train")
            except DataError as error:
                problems += error.problems
    return problems


def _split(given: dict[str, Any], config: dict[str, Any]) -> tuple[Any, Any, Any]:
    train, validation, test = given["train"], given.get("validation"), given.get("test")
    fraction = config["VALIDATION_FRACTION"]
    if validation is None and fraction > 0:
        if hasattr(train, "split"):
            train, validation = train.split(fraction, config["SEED"])
        elif len(train) < 2:
            raise DataError(["one sample cannot be split: give a validation set, or VALIDATION_FRACTION=0"])
        else:
            order = np.random.default_rng(config["SEED"]).permutation(len(train))
            number = min(max(1, round(fraction * len(train))), len(train) - 1)
            train, validation = (
                Subset(train, sorted(part.tolist())) for part in (order[number:], order[:number])
            )
    return train, _for_evaluation(validation), _for_evaluation(test)


def _for_evaluation(dataset: Any) -> Any:
    return dataset.for_evaluation() if hasattr(dataset, "for_evaluation") else dataset


def _check_without_validation(config: dict[str, Any]) -> None:
    needs = "needs a validation set: give one, or set VALIDATION_FRACTION above 0."
    problems = [] if config["PATIENCE"] is None else [f"PATIENCE is {config['PATIENCE']}, which {needs}"]
    if config["SCHEDULER"] is not None and issubclass(config["SCHEDULER"], ReduceLROnPlateau):
        problems.append(f"SCHEDULER is ReduceLROnPlateau, which {needs}")
    if problems:
        raise ConfigError(problems)


def _hashes(given: dict[str, Any], init_weights: Any) -> dict[str, dict[str, Any]]:
    scanned = {part: dataset.scan() for part, dataset in given.items() if hasattr(dataset, "scan")}
    hashes = {
        f"{part}/{file.parent.name}/{file.name}": {"bytes": file.stat().st_size, "sha256": fact["sha256"]}
        for part, facts in scanned.items()
        for file, fact in facts.items()
    }
    if init_weights is not None:
        with open(init_weights, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            hashes["INIT_WEIGHTS"] = {"bytes": stream.tell(), "sha256": digest}
    return hashes


def _contract_of_foreign(dataset: Any, model: nn.Module, metrics: dict[str, Any]) -> DataContract:
    """Foreign datasets give what the model should see: no scaling, no normalization."""
    is_masked = any(getattr(metric, "masked", False) for metric in metrics.values())
    inputs, targets = default_collate([dataset[0]])
    with torch.no_grad():
        predictions = model(inputs)

    def bare(targets: Tensor) -> Tensor:
        """Without a usability mask, and 0 where it is 0: anything may stand there."""
        if not is_masked:
            return targets
        targets, usable = unmask(predictions, targets)
        return targets.masked_fill((usable if targets.ndim == usable.ndim else usable[:, None]) == 0, 0)

    targets = bare(targets)
    if is_multi_class(predictions, targets) and not targets.is_floating_point():
        task = "multi-class"
    else:
        some = [bare(torch.as_tensor(dataset[index][1])[None]) for index in range(min(16, len(dataset)))]
        is_mask = targets.ndim > 2 or not targets.is_floating_point()
        is_binary = all(bool(((target == 0) | (target == 1)).all()) for target in some)
        task = "multi-label" if is_mask and is_binary else "values"
    return DataContract(inputs.shape[1] if inputs.ndim > 1 else 1, task=task)


def _build_loaders(
    config: dict[str, Any], train_set: Any, evaluation_sets: tuple[Any, Any], device: torch.device
) -> tuple[TrainingBatches, list[Any]]:
    options = dict(config["DATA_LOADER_CONFIG"])
    batch_size, shuffle = options.pop("batch_size", 1), options.pop("shuffle", True)
    drop_last = options.pop("drop_last", False)
    options["pin_memory"] = (
        options.get("pin_memory", False) and device.type == "cuda"
    )  # useless, and a warning, elsewhere
    if options.get("num_workers", 0) > 0:
        options.setdefault("persistent_workers", True)
    seed = config["SEED"]
    place = (rank(), num_processes())
    batches = TrainingBatches(len(train_set), batch_size, shuffle, drop_last, seed, *place)
    if batches.num_batches == 0:
        raise ConfigError([f"drop_last leaves no batch: {len(train_set)} samples, batch_size {batch_size}."])
    inputs = train_set[0][0]
    max_pixels = batch_size * inputs.shape[-2] * inputs.shape[-1] if inputs.ndim == 3 else None
    loaders: list[Any] = [Loader(Samples(train_set, seed), batch_sampler=batches, **options)]
    for dataset in evaluation_sets:
        if dataset is None:
            loaders.append(None)
        else:
            order = EvaluationBatches(dataset, batch_size, max_pixels, *place)
            loaders.append(Loader(Samples(dataset, seed), batch_sampler=order, **options))
    return batches, loaders


# ------------------------------------------------------------------------------------------------- model and optimizer


def _build_model(config: dict[str, Any], dataset: Any) -> tuple[nn.Module | None, int | None, list[str]]:
    """Builds the model and asks it for the first sample. Returns the model, its number of outputs, and problems."""
    set_seed(config["SEED"])
    name = config["MODEL"].__name__
    try:
        model = config["MODEL"](**config["MODEL_CONFIG"])
    except Exception as error:  # whatever the user's class raises
        return None, None, [f"MODEL {name} cannot be built with MODEL_CONFIG: {error}"]
    if config["INIT_WEIGHTS"] is not None:
        try:
            fill_model(
                model,
                model_state(load_weights(config["INIT_WEIGHTS"])),
                f"INIT_WEIGHTS {config['INIT_WEIGHTS']}",
            )
        except ValueError as error:
            return None, None, [str(error)]
    try:
        inputs, _ = default_collate([dataset[0]])
    except DataError:
        return model, None, []  # the check of the data will say so
    except Exception as error:  # whatever the user's dataset raises
        return (
            None,
            None,
            [f"the first training sample cannot be read as a pair of tensors (input, target): {error}"],
        )
    ch_in = config["MODEL_CONFIG"].get("ch_in")
    if ch_in is not None and inputs.ndim == 4 and inputs.shape[1] != ch_in:
        return None, None, [f"MODEL_CONFIG.ch_in is {ch_in}, but the images have {inputs.shape[1]} channels."]
    model.eval()
    try:
        with torch.no_grad():
            predictions = model(inputs)
    except Exception as error:  # whatever the user's model raises
        if is_out_of_memory(error):
            raise UserError(
                f"the memory does not suffice for a single sample of the shape {tuple(inputs.shape)}: take a smaller "
                "crop or a smaller model."
            ) from error
        return None, None, [f"MODEL {name} does not take inputs of the shape {tuple(inputs.shape)}: {error}"]
    if not isinstance(predictions, Tensor):
        return (
            None,
            None,
            [
                f"MODEL {name} returns a {type(predictions).__name__}: wrap it in a class that returns a tensor."
            ],
        )
    return model, predictions.shape[1] if predictions.ndim > 1 else None, []


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is one of the many that mean it."""
    is_cpu = any(text in str(error) for text in ("can't allocate memory", "not enough memory"))
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and is_cpu
    )


def _rehearse(
    config: dict[str, Any],
    dataset: Any,
    model: nn.Module,
    loss_function: Callable[[Tensor, Tensor], Tensor],
    contract: DataContract,
    device: torch.device,
) -> None:
    """Evaluates one sample, so that what would fail after the first epoch fails now."""
    results: dict[str, float] = {}
    try:
        for with_contract in (contract, None):  # as the test set will be evaluated, and the validation set
            about = (config["IGNORE_INDEX"], contract.class_names, with_contract)
            evaluation = Evaluation(config["METRICS"], loss_function, *about)
            results = evaluate(
                model.to(device), [default_collate([dataset[0]])], evaluation, device, "fp32", False
            )
    except Exception as error:  # whatever the user's functions raise
        if is_out_of_memory(error):
            raise UserError(
                f"the memory of {device} does not suffice for a single sample: {error}"
            ) from error
        raise ConfigError(
            [f"LOSS or METRICS do not fit the model's output and the target: {error}"]
        ) from error
    goal = config["MONITOR"].split()[1]
    if goal not in results and f"{goal}_sample_mean" not in results:
        raise ConfigError(
            [f"MONITOR is {config['MONITOR']!r}: {goal} is not among the results ({', '.join(results)})."]
        )


def _build_loss(config: dict[str, Any], device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    loss, options = config["LOSS"], dict(config["LOSS_CONFIG"])
    try:
        if "ignore_index" in inspect.signature(loss).parameters:
            options.setdefault("ignore_index", config["IGNORE_INDEX"])
    except ValueError:
        pass  # C functions do not tell
    if isinstance(loss, type):
        return loss(**options).to(device)
    return functools.partial(loss, **options) if options else loss


def _made(key: str, make: Callable[[], Any]) -> Any:
    """What make returns; what it raises becomes a problem of the config."""
    try:
        return make()
    except UserError:
        raise
    except Exception as error:  # whatever the user's class raises
        raise ConfigError(
            [f"{key} cannot be built with {key}_CONFIG: {' '.join(str(error).split())}"]
        ) from error


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ConfigError([f"MODEL {type(model).__name__} has no parameter to train."])
    return parameters


def build_scheduler(
    config: dict[str, Any], optimizer: torch.optim.Optimizer, steps_per_epoch: int
) -> LRScheduler | None:
    """The learning rate's schedule. Its length and largest rate are filled in where they are missing."""
    if config["SCHEDULER"] is None:
        return None
    options = dict(config["SCHEDULER_CONFIG"])
    length = config["EPOCHS"] * (steps_per_epoch if config["SCHEDULER_STEP"] == "step" else 1)
    wanted = inspect.signature(config["SCHEDULER"]).parameters
    filled_in = {"T_max": length, "max_lr": optimizer.param_groups[0]["lr"]}
    if "epochs" not in options:
        filled_in["total_steps"] = length
    if issubclass(config["SCHEDULER"], ReduceLROnPlateau):
        filled_in["mode"] = config["MONITOR"].split()[0]
    filled_in = {key: value for key, value in filled_in.items() if key in wanted}
    return config["SCHEDULER"](optimizer, **(filled_in | options))


def _build_ema(config: dict[str, Any], model: nn.Module) -> AveragedModel | None:
    if config["EMA"] is None:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config["EMA"]), use_buffers=True)
