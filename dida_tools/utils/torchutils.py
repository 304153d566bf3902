"""Helpers for models: loading, a step forward and backward, freezing, and checks of parameters."""

import os
from collections.abc import Callable
from typing import Any

import torch
from dida_core.errors import checked_call
from dida_core.storage.weights import load_weights, model_state
from dida_core.training.modules import evaluation_mode, fill_model
from dida_core.training.modules import set_seed as set_seed
from torch import Tensor, nn


@checked_call
def load_model(
    path: Any, model: Any, model_config: Any = None, device: str | torch.device = "cpu"
) -> nn.Module:
    """
    Build a model with the weights of a file: best or last of a run, or a plain state dict.

    The order of 2021, load_model(model, model_config, path, device), is taken as well.

    :param path: the weights file
    :param model: class of the model, or a model to be filled
    :param model_config: arguments of the class, a dict
    :return: the model on the device, in evaluation mode
    :raises WeightsError: if the file is damaged or belongs to another model
    """
    if not isinstance(path, str | os.PathLike):
        path, model, model_config = model_config, path, model
    built = model if isinstance(model, nn.Module) else model(**(model_config or {}))
    fill_model(built, model_state(load_weights(path)), str(path))
    return built.to(device).eval()


@checked_call
def forward(model: nn.Module, inputs: Tensor, device: str | torch.device | None = None) -> Tensor:
    """
    Return the model's output in evaluation mode, without gradients; the mode it was in is restored.

    :param device: where to compute it; None: where model and inputs are
    """
    if device is not None:
        model, inputs = model.to(device), inputs.to(device)
    with evaluation_mode(model), torch.no_grad():
        return model(inputs)


@checked_call
def backprop(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    inputs: Any,
    targets: Any,
) -> float:
    """
    Do one training step and return the loss before it. The gradients are left for inspection.

    The last two may be a batch (inputs, targets) and a device, as in 2021.
    """
    if not isinstance(targets, Tensor):
        model.to(targets)
        inputs, targets = (tensor.to(targets) for tensor in inputs[:2])
    model.train()
    optimizer.zero_grad()
    value = loss(model(inputs), targets)
    value.backward()
    optimizer.step()
    return value.item()


@checked_call
def set_module_trainable(module: nn.Module, trainable: bool) -> None:
    """Freeze or free all parameters of a module."""
    for parameter in module.parameters():
        parameter.requires_grad_(trainable)


@checked_call
def assert_not_nan(values: Tensor | nn.Module) -> None:
    """Raise AssertionError if a tensor, or a parameter of a model, holds NaN."""
    _assert_all(values, lambda tensor: ~tensor.isnan(), "NaN")


@checked_call
def assert_isfinite(values: Tensor | nn.Module) -> None:
    """Raise AssertionError if a tensor, or a parameter of a model, holds NaN or infinite values."""
    _assert_all(values, torch.isfinite, "NaN or infinite")


@checked_call
def assert_nonzero(values: Tensor | nn.Module) -> None:
    """Raise AssertionError if a value of a tensor, or of a parameter of a model, is zero."""
    _assert_all(values, lambda tensor: tensor != 0, "zero")


@checked_call
def assert_upperbound(values: Tensor | nn.Module, bound: float) -> None:
    """Raise AssertionError if a value of a tensor, or of a parameter of a model, is not below a bound."""
    _assert_all(values, lambda tensor: tensor < bound, f"not below {bound:g}")


@checked_call
def assert_lowerbound(values: Tensor | nn.Module, bound: float) -> None:
    """Raise AssertionError if a value of a tensor, or of a parameter of a model, is not above a bound."""
    _assert_all(values, lambda tensor: tensor > bound, f"not above {bound:g}")


def _named(values: Tensor | nn.Module) -> list[tuple[str, Tensor]]:
    return [("tensor", values)] if isinstance(values, Tensor) else list(values.named_parameters())


def _assert_all(values: Tensor | nn.Module, right: Callable[[Tensor], Tensor], wrong: str) -> None:
    for name, tensor in _named(values):
        bad = int((~right(tensor.detach())).sum())
        if bad:
            raise AssertionError(f"{name}: {bad} of {tensor.numel()} values are {wrong}")
