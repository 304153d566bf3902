"""The first training sample, and what a new model makes of it: shapes, task and a dry run."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from ..data.contract import DataContract
from ..data.dataset import TrainingData
from ..errors import ConfigError
from ..storage.weights import load_weights, model_state
from .device import DeviceContext
from .evaluation import Evaluation
from .modules import fill_model, set_seed
from .optimization import Loss, config_errors
from .targets import is_multi_class, unmask


@dataclass
class FirstSample:
    """The model, new, and a batch of one sample on the CPU."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    predictions: Tensor
    num_outputs: int | None  # channels of the predictions


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
    with config_errors("DATASET", "the first training sample is no pair of tensors (input, target)"):
        inputs, targets = default_collate([dataset[0]])
    ch_in, shape = config["MODEL_CONFIG"].get("ch_in"), tuple(inputs.shape)
    if ch_in is not None and len(shape) == 4 and shape[1] != ch_in:
        raise ConfigError([f"MODEL_CONFIG.ch_in is {ch_in}, but the images have {shape[1]} channels."])
    model.eval()
    with config_errors("MODEL", f"MODEL {name} does not take inputs of the shape {shape}"), torch.no_grad():
        predictions = model(inputs)
    if not isinstance(predictions, Tensor):
        kind = type(predictions).__name__
        raise ConfigError([f"MODEL {name} returns a {kind}: wrap it in a class that returns a tensor."])
    num_outputs = predictions.shape[1] if predictions.ndim > 1 else None
    return FirstSample(model, inputs, targets, predictions, num_outputs)


def contract_of_values(first: FirstSample, config: dict[str, Any], dataset: TrainingData) -> DataContract:
    """Return the contract of a dataset that gives what the model should see: no scale, no normalization."""
    is_masked = any(getattr(metric, "masked", False) for metric in config["METRICS"].values())

    def unmasked(targets: Tensor) -> Tensor:
        """Return targets without a usability mask, and 0 where it is 0: anything may stand there."""
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


@config_errors("LOSS", "LOSS or METRICS do not fit the model's output and the target")
@torch.no_grad()
def dry_run(
    first: FirstSample, config: dict[str, Any], loss_fn: Loss, contract: DataContract, context: DeviceContext
) -> None:
    """
    Evaluate the first sample, so that what would fail after the first epoch fails now.

    :raises ConfigError: if loss or metrics do not take the model's outputs, or if MONITOR is no result
    """
    predictions, targets = first.predictions.float().to(context.device), first.targets.to(context.device)
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


@torch.enable_grad()
def require_gradient(predictions: Tensor, targets: Tensor, loss_fn: Loss, config: dict[str, Any]) -> None:
    """Raise ConfigError unless the loss is one number with a gradient, if any pixel counts."""
    predictions, name = predictions.clone().requires_grad_(), getattr(config["LOSS"], "__name__", "")
    loss = loss_fn(predictions, targets)
    if loss.numel() != 1:
        raise ConfigError([f"LOSS {name} returns {loss.numel()} numbers: it must be one, such as the mean."])
    is_learning = (
        loss.requires_grad and torch.autograd.grad(loss, predictions, allow_unused=True)[0] is not None
    )
    if not is_learning and not bool((targets == config["IGNORE_INDEX"]).all()):
        raise ConfigError([f"LOSS {name} has no gradient, so nothing is learned: as a metric it may serve."])
