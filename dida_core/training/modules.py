"""Helpers for models: seeds, loading, evaluation mode, and what goes wrong with numbers and memory."""

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..storage.weights import WeightsError


def set_seed(seed: int) -> None:
    """Seed Python, numpy and PyTorch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def fill_model(model: nn.Module, state: dict[str, Tensor], origin: str) -> None:
    """
    Load parameters into a model.

    :param origin: where they come from, for the message
    :raises WeightsError: if they are not those of this model, with what differs
    """
    if not all(isinstance(value, Tensor) and isinstance(name, str) for name, value in state.items()):
        raise WeightsError(f"{origin}: holds something else than the tensors of a model.")
    own = model.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    other = sorted(name for name in own.keys() & state.keys() if own[name].shape != state[name].shape)
    problems = []
    if missing:
        problems.append(f"{len(missing)} parameters are missing, such as {missing[0]}")
    if extra:
        problems.append(f"{len(extra)} are not of this model, such as {extra[0]}")
    if other:
        name = other[0]
        shapes = f"{tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        problems.append(f"{len(other)} have another shape, such as {name}: {shapes}")
    if problems:
        about = f"{origin}: does not fit this {type(model).__name__}: {'; '.join(problems)}"
        raise WeightsError(f"{about}. Check MODEL and MODEL_CONFIG.")
    model.load_state_dict(state)


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Call a model with the inputs of a batch: one tensor, several in a tuple or list, or a dict by name."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode. Afterwards each module is in the mode it was in, frozen ones too."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


def find_nonfinite(model: nn.Module) -> str | None:
    """Return which parameter of a model holds NaN or infinite values, and how many; None if none does."""
    for name, parameter in model.named_parameters():
        number = int((~parameter.detach().isfinite()).sum())
        if number:
            return f"{name}: {number} of {parameter.numel()} values are NaN or infinite"
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error is one of the many that mean it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    texts = ("can't allocate memory", "not enough memory")  # of the CPU, an ordinary RuntimeError
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
