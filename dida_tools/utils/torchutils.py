"""Helpers for models: loading, a step forward and backward, freezing, and checks of parameters."""

import os
from collections.abc import Callable
from typing import Any

import torch
from dida_core.storage.weights import load_weights, model_state
from dida_core.training.modules import evaluation_mode, fill_model
from dida_core.training.modules import set_seed as set_seed
from torch import Tensor, nn


def load_model(
    path: str | os.PathLike,
    model: type[nn.Module] | nn.Module,
    model_config: dict[str, Any] | None = None,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """
    Build a model with the weights of a file: best or last of a run, or a plain state dict.

    :param path: the weights file
    :param model: class of the model, or a model to be filled
    :param model_config: arguments of the class
    :return: the model on the device, in evaluation mode
    :raises WeightsError: if the file is damaged or belongs to another model
    """
    built = model if isinstance(model, nn.Module) else model(**(model_config or {}))
    fill_model(built, model_state(load_weights(path)), str(path))
    return built.to(device).eval()


def forward(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return the model's output in evaluation mode, without gradients; the mode it was in is restored."""
    with evaluation_mode(model), torch.no_grad():
        return model(inputs)


def backprop(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    targets: Tensor,
) -> float:
    """Do one training step and return the loss before it. The gradients are left for inspection."""
    model.train()
    optimizer.zero_grad()
    value = loss(model(inputs), targets)
    value.backward()
    optimizer.step()
    return value.item()


def set_module_trainable(module: nn.Module, trainable: bool) -> None:
    """Freeze or free all parameters of a module."""
    for parameter in module.parameters():
        parameter.requires_grad_(trainable)


def assert_not_nan(values: Tensor | nn.Module) -> None:
    """Raise AssertionError if a tensor, or a parameter of a model, holds NaN."""
    _assert_all(values, lambda tensor: ~tensor.isnan(), "NaN")


def assert_isfinite(values: Tensor | nn.Module) -> None:
    """Raise AssertionError if a tensor, or a parameter of a model, holds NaN or infinite values."""
    _assert_all(values, torch.isfinite, "NaN or infinite")


def assert_nonzero(values: Tensor | nn.Module) -> None:
    """Raise AssertionError if a tensor, or a parameter of a model, is all zero."""
    for name, tensor in _named(values):
        if not bool((tensor != 0).any()):
            raise AssertionError(f"{name}: all {tensor.numel()} values are zero")


def assert_upperbound(values: Tensor | nn.Module, bound: float) -> None:
    """Raise AssertionError if a value of a tensor, or of a parameter of a model, is above a bound."""
    _assert_all(values, lambda tensor: tensor <= bound, f"above {bound:g}")


def assert_lowerbound(values: Tensor | nn.Module, bound: float) -> None:
    """Raise AssertionError if a value of a tensor, or of a parameter of a model, is below a bound."""
    _assert_all(values, lambda tensor: tensor >= bound, f"below {bound:g}")


def _named(values: Tensor | nn.Module) -> list[tuple[str, Tensor]]:
    return [("tensor", values)] if isinstance(values, Tensor) else list(values.named_parameters())


def _assert_all(values: Tensor | nn.Module, right: Callable[[Tensor], Tensor], wrong: str) -> None:
    for name, tensor in _named(values):
        bad = int((~right(tensor.detach())).sum())
        if bad:
            raise AssertionError(f"{name}: {bad} of {tensor.numel()} values are {wrong}")
