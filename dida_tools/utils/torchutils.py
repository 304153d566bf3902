"""Contains small helpers for models: seeds, loading, one step forward and backward, and checks of parameters."""

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .weights import WeightsError, load_weights, model_state


def set_seed(seed: int) -> None:
    """Seeds Python, numpy and PyTorch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def load_model(
    path: str | os.PathLike,
    model: type[nn.Module] | nn.Module,
    model_config: dict[str, Any] | None = None,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """
    Builds a model with the weights of a file: best or last of a run, or a bare state dict.

    :param path: the weights file
    :param model: class of the model, or a model to be filled
    :param model_config: arguments of the class
    :return: the model on the device, in evaluation mode
    :raises WeightsError: if the file is damaged or belongs to another model
    """
    built = model if isinstance(model, nn.Module) else model(**(model_config or {}))
    fill_model(built, model_state(load_weights(path)), str(path))
    return built.to(device).eval()


def fill_model(model: nn.Module, state: dict[str, Tensor], origin: str) -> None:
    """
    Loads parameters into a model.

    :param origin: where they come from, for the message
    :raises WeightsError: if they are not those of this model, saying what differs
    """
    own = model.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    other = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    problems = [f"{len(missing)} parameters are missing, such as {missing[0]}"] if missing else []
    problems += [f"{len(extra)} are not of this model, such as {extra[0]}"] if extra else []
    for name in sorted(other)[:1]:
        shapes = f"{tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        problems.append(f"{len(other)} have another shape, such as {name}: {shapes}")
    if problems:
        name = type(model).__name__
        raise WeightsError(
            f"{origin}: does not fit this {name}: {'; '.join(problems)}. Check MODEL and MODEL_CONFIG."
        )
    model.load_state_dict(state)


def forward(model: nn.Module, inputs: Tensor) -> Tensor:
    """The model's answer in evaluation mode, without gradients. The mode it was in is restored."""
    with evaluation_mode(model), torch.no_grad():
        return model(inputs)


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Has a model in evaluation mode. Afterwards each of its modules is in the mode it was in, frozen ones too."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


def backprop(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    targets: Tensor,
) -> float:
    """One training step. The gradients are left for inspection. Returns the loss before the step."""
    model.train()
    optimizer.zero_grad()
    value = loss(model(inputs), targets)
    value.backward()
    optimizer.step()
    return value.item()


def set_module_trainable(module: nn.Module, trainable: bool) -> None:
    """Freezes or frees all parameters of a module."""
    for parameter in module.parameters():
        parameter.requires_grad_(trainable)


def assert_not_nan(values: Tensor | nn.Module) -> None:
    """Raises AssertionError if a tensor, or a parameter of a model, holds NaN."""
    _assert_all(values, lambda tensor: ~tensor.isnan(), "NaN")


def assert_isfinite(values: Tensor | nn.Module) -> None:
    """Raises AssertionError if a tensor, or a parameter of a model, holds NaN or infinite values."""
    _assert_all(values, torch.isfinite, "NaN or infinite")


def assert_nonzero(values: Tensor | nn.Module) -> None:
    """Raises AssertionError if a tensor, or a parameter of a model, is all zero."""
    for name, tensor in _named(values):
        if not bool((tensor != 0).any()):
            raise AssertionError(f"{name}: all {tensor.numel()} values are zero")


def assert_upperbound(values: Tensor | nn.Module, bound: float) -> None:
    """Raises AssertionError if a value of a tensor, or of a parameter of a model, is above a bound."""
    _assert_all(values, lambda tensor: tensor <= bound, f"above {bound:g}")


def assert_lowerbound(values: Tensor | nn.Module, bound: float) -> None:
    """Raises AssertionError if a value of a tensor, or of a parameter of a model, is below a bound."""
    _assert_all(values, lambda tensor: tensor >= bound, f"below {bound:g}")


def _named(values: Tensor | nn.Module) -> list[tuple[str, Tensor]]:
    return [("tensor", values)] if isinstance(values, Tensor) else list(values.named_parameters())


def _assert_all(values: Tensor | nn.Module, right: Callable[[Tensor], Tensor], wrong: str) -> None:
    for name, tensor in _named(values):
        bad = int((~right(tensor.detach())).sum())
        if bad:
            raise AssertionError(f"{name}: {bad} of {tensor.numel()} values are {wrong}")
