"""The first training sample, and what a new model makes of it: shapes, task and a dry run."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..config.check import takes
from ..data.contract import DataContract
from ..data.dataset import Stream, TrainingData
from ..data.images import DataError
from ..errors import ConfigError, UserError
from ..storage.weights import load_weights, model_state
from .device import DeviceContext, map_tensors, tensors_of
from .evaluation import Evaluation
from .loaders import Collate, Loaders
from .modules import call_model, fill_model, is_out_of_memory, set_seed
from .optimization import Loss, config_errors
from .targets import is_multi_class, main_output, unmask

_NUM_TRIED = 16  # samples of each split that are read before training, where nothing is known of its files


@dataclass
class FirstSample:
    """The model, new, and a batch of one sample on the CPU."""

    model: nn.Module
    inputs: Any
    targets: Any
    predictions: Any  # the main output, or all where there are several targets
    num_outputs: int | None  # channels of the predictions

    @property
    def shape(self) -> torch.Size:
        """Shape of the inputs, or of the first of them."""
        return tensors_of(self.inputs)[0].shape


def try_model(config: dict[str, Any], dataset: TrainingData) -> FirstSample:
    """
    Build the model, and call it on the first sample.

    :raises ConfigError: if one of the two does not work, or if they do not fit
    """
    name, weights = config["MODEL"].__name__, config["INIT_WEIGHTS"]
    set_seed(config["SEED"])
    with config_errors("MODEL", f"MODEL {name} cannot be built with MODEL_CONFIG"):
        model = config["MODEL"](**config["MODEL_CONFIG"])
    if weights is not None:
        try:
            fill_model(model, model_state(load_weights(weights)), f"INIT_WEIGHTS {weights}")
        except ValueError as error:
            raise ConfigError([str(error)]) from error
    with config_errors("DATASET", "the first training sample cannot be read"):
        sample, sample_name = dataset[0], str(dataset.sample_name(0))
    collate = Collate.of(config)
    (inputs, targets), pair = (collate([sample] * number, [sample_name] * number) for number in (1, 2))
    ch_in, shape = config["MODEL_CONFIG"].get("ch_in"), shapes_of(inputs)
    if ch_in is not None and isinstance(inputs, Tensor) and inputs.ndim == 4 and inputs.shape[1] != ch_in:
        raise ConfigError([f"MODEL_CONFIG.ch_in is {ch_in}, but the images have {inputs.shape[1]} channels."])
    model.eval()
    problem = f"MODEL {name} does not take inputs of the shape {shape}{_unusual(inputs, 'float32')}"
    with config_errors("MODEL", problem), torch.no_grad():
        predictions = main_output(call_model(model, inputs), targets)
    if not tensors_of(predictions):
        kind = type(predictions).__name__
        raise ConfigError([f"MODEL {name} returns a {kind}: wrap it in a class that returns a tensor."])
    main = tensors_of(predictions)[0]
    _try_training(model, pair, shape, main)
    return FirstSample(model, inputs, targets, predictions, main.shape[1] if main.ndim > 1 else None)


def _try_training(model: nn.Module, batch: tuple[Any, Any], shape: Any, main: Tensor) -> None:
    """Call a new model in training mode, and leave it as it was: of two samples, for BatchNorm."""
    name, buffers = type(model).__name__, [(one, one.clone()) for one in model.buffers()]
    model.train()
    try:
        with torch.no_grad():
            outputs = call_model(model, batch[0])
    except Exception as error:
        if is_out_of_memory(error):
            return  # which the device that trains may have more of
        problem = f"MODEL {name} does not take inputs of the shape {shape} in training mode"
        raise ConfigError([f"{problem}: {' '.join(str(error).split())}"]) from error
    finally:
        model.eval()
        for buffer, value in buffers:
            buffer.copy_(value)
    levels = [(one.ndim, *one.shape[1:2]) for one in tensors_of(outputs)]
    sizes = [one.shape[2:].numel() for one in tensors_of(outputs)]
    is_one = isinstance(batch[1], Tensor)
    if is_one and (set(levels) != {(main.ndim, *main.shape[1:2])} or sizes != sorted(sizes, reverse=True)):
        about = f"MODEL {name} returns outputs of the shapes {shapes_of(outputs)} in training mode"
        wanted = f"of {tuple(main.shape)[1:2]} channels, the largest first"
        remedy = "UNPACK may give several targets"
        raise ConfigError([f"{about}: with one target they must be {wanted}. {remedy}."])


def _unusual(value: Any, *usual: str) -> str:
    """Return a hint at the types of tensors, where they are others than the usual ones."""
    types = {str(one.dtype).removeprefix("torch.") for one in tensors_of(value)}
    is_usual = types <= {one.split()[0] for one in usual}
    wanted = f"let the dataset give {', '.join(usual)}"
    return "" if is_usual else f", of the type {', '.join(sorted(types))} ({wanted})"


def shapes_of(value: Any) -> Any:
    """Return the shape of a tensor, or of each one in a tuple, list or dict."""
    return map_tensors(lambda one: tuple(one.shape), value)


def contract_of_values(first: FirstSample, config: dict[str, Any], dataset: TrainingData) -> DataContract:
    """Return the contract of a dataset that gives what the model should see: no scale, no normalization."""
    is_masked = any(getattr(metric, "masked", False) for metric in config["METRICS"].values())

    def unmasked(targets: Tensor) -> Tensor:
        """Return targets without a usability mask, and 0 where it is 0: anything may stand there."""
        if not is_masked:
            return targets
        targets, usable = unmask(first.predictions, targets)
        return targets.masked_fill((usable if targets.ndim == usable.ndim else usable[:, None]) == 0, 0)

    channels = first.shape[1] if len(first.shape) > 1 else 1
    if not isinstance(first.targets, Tensor):
        return DataContract(channels, task="values")
    targets = unmasked(first.targets)
    if is_multi_class(first.predictions, targets) and not targets.is_floating_point():
        return DataContract(channels, task="multi-class")
    source = dataset if isinstance(dataset, Stream) else map(dataset.__getitem__, range(len(dataset)))
    collate, several = Collate.of(config), enumerate(itertools.islice(source, _NUM_TRIED))
    some = [unmasked(collate([sample], [f"sample {index}"])[1]) for index, sample in several]
    is_mask = targets.ndim > 2 or not targets.is_floating_point()
    is_binary = all(bool(((target == 0) | (target == 1)).all()) for target in some)
    ignored, may_ignore = config["IGNORE_INDEX"], is_mask and takes(config["LOSS"], "ignore_index", True)
    nothing_counts = all(bool(((target == 0) | (target == ignored)).all()) for target in some)
    if may_ignore and not is_binary and nothing_counts:
        about = f"the targets of the first training samples hold 0 and {ignored} alone"
        raise DataError([f"{about}, which is ignored: let the dataset give 1 for the class"])
    return DataContract(channels, task="multi-label" if is_mask and is_binary else "values")


@config_errors("LOSS", "LOSS or METRICS do not fit the model's output and the target")
@torch.no_grad()
def dry_run(
    first: FirstSample, config: dict[str, Any], loss_fn: Loss, contract: DataContract, context: DeviceContext
) -> None:
    """
    Evaluate the first sample, so that what would fail after the first epoch fails now.

    :raises ConfigError: if loss or metrics do not take the model's outputs, or if MONITOR is no result
    """
    both = (map_tensors(Tensor.float, first.predictions), first.targets)
    predictions, targets = map_tensors(lambda one: one.to(context.device), both)
    require_gradient(predictions, targets, loss_fn, config)
    for fitted in (contract, None):  # as the test set will be evaluated, and the validation set
        about = (config["IGNORE_INDEX"], contract.class_names, fitted, contract.task)
        evaluation = Evaluation(config["METRICS"], loss_fn, *about)
        evaluation.update(predictions, targets)
        results = evaluation.results()
    goal = config["MONITOR"].split()[1]
    if goal not in results and f"{goal}_sample_mean" not in results:
        listed = ", ".join(results)
        raise ConfigError([f"MONITOR is {config['MONITOR']!r}: {goal} is not among the results ({listed})."])


def try_splits(
    model: nn.Module,
    first: FirstSample,
    loaders: Loaders,
    metrics: Callable[[], Evaluation],
    context: DeviceContext,
) -> None:
    """
    Read some samples of each split, and evaluate one of those that are evaluated, before training starts.

    :param model: on its device
    :raises DataError: naming the split and the sample
    """
    for split in ("train", "test", "validation"):
        loader = getattr(loaders, split)
        if loader is None:
            continue
        samples, dataset, size = loader.dataset, loader.dataset.dataset, loaders.batches.batch_size
        number = min(len(dataset), 1 if dataset.scan() else _NUM_TRIED)
        last = number - 1 if isinstance(dataset, Stream) else len(dataset) - 1
        keys = [(0, round(index)) for index in np.linspace(0, last, number).tolist()]
        if len({dataset.sample_shape(index) for _, index in keys}) > 1:
            size = 1
        try:
            first_batch = samples.batch(keys[:1])
            for start in range(1, number, size):
                samples.batch(keys[start : start + size])
        except UserError as error:
            problems = getattr(error, "problems", [str(error)])
            raise DataError([f"the {split} data: {problem}" for problem in problems]) from error
        if split != "train":
            name = f"the {split} data: {dataset.sample_name(0)}"
            evaluation = None if dataset.scan() else metrics()  # whose targets have been checked
            _try_evaluation(model, first_batch, first, evaluation, context, name)


@torch.no_grad()
def _try_evaluation(
    model: nn.Module,
    batch: Any,
    first: FirstSample,
    evaluation: Evaluation | None,
    context: DeviceContext,
    name: str,
) -> None:
    """Evaluate a batch of one sample; name it where that fails, or where its target is of another kind."""
    try:
        own = [_num_channels(one, first) for one in tensors_of(batch[1])]
        if own != [_num_channels(one, first) for one in tensors_of(first.targets)]:
            raise ValueError("their targets have other channels")
        inputs, targets = context.move_pair(batch)
        with context.autocast():
            predictions = main_output(call_model(model, inputs), targets)
        if evaluation is not None:
            evaluation.update(map_tensors(Tensor.float, predictions), targets)
    except Exception as error:
        if is_out_of_memory(error):
            raise UserError(f"{name} is too large for the memory of {context.device}: {error}") from error
        about = f"{name} has inputs of the shape {shapes_of(batch[0])} and targets {shapes_of(batch[1])}"
        trained = f"the first training sample {shapes_of(first.inputs)} and {shapes_of(first.targets)}"
        raise DataError([f"{about}, {trained}: {' '.join(str(error).split())}"]) from error


def _num_channels(target: Tensor, first: FirstSample) -> tuple[int, ...]:
    """Return the number of axes of a target, and of its channels where it has some."""
    has_channels = target.ndim == tensors_of(first.predictions)[0].ndim > 1
    return (target.ndim, target.shape[1]) if has_channels else (target.ndim,)


@torch.enable_grad()
def require_gradient(predictions: Any, targets: Any, loss_fn: Loss, config: dict[str, Any]) -> None:
    """Raise ConfigError unless the loss is one number with a gradient, if any pixel counts."""
    predictions = map_tensors(lambda one: one.clone().requires_grad_(), predictions)
    name = getattr(config["LOSS"], "__name__", "")
    hint = _unusual(targets, "int64 for classes", "float32 for values")
    with config_errors("LOSS", f"LOSS or METRICS do not fit the model's output and the target{hint}"):
        loss = loss_fn(predictions, targets)
    if loss.numel() != 1:
        raise ConfigError([f"LOSS {name} returns {loss.numel()} numbers: it must be one, such as the mean."])
    outputs = tensors_of(predictions)
    gradients = torch.autograd.grad(loss, outputs, allow_unused=True) if loss.requires_grad else ()
    counts = any(bool((one != config["IGNORE_INDEX"]).any()) for one in tensors_of(targets))
    if counts and all(gradient is None for gradient in gradients):
        raise ConfigError([f"LOSS {name} has no gradient, so nothing is learned: as a metric it may serve."])
