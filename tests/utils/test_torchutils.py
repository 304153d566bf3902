"""Helpers for models: draws, weights of every kind of file, steps, and checks that name what is wrong."""

import math
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from dida_core.storage.weights import WeightsError, save_weights, weights_digest
from dida_core.training.modules import fill_model
from torch import Tensor, nn

from dida_tools.utils.torchutils import (
    assert_isfinite,
    assert_lowerbound,
    assert_nonzero,
    assert_not_nan,
    assert_upperbound,
    backprop,
    forward,
    load_model,
    set_module_trainable,
    set_seed,
)


class Net(nn.Module):
    def __init__(self, width: int = 4, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(3, width, bias=bias)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(width, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.drop(self.norm(self.first(inputs).relu())))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def digest(model: nn.Module) -> str:
    return weights_digest(model.state_dict())


def test_a_seed_decides_the_draws_of_python_numpy_and_torch() -> None:
    def draws(seed: int) -> tuple:
        set_seed(seed)
        return random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist()

    seeds = (*range(20), 2**31, 2**40 + 7, 2**63 - 1)
    found = [draws(seed) for seed in seeds]
    assert found == [draws(seed) for seed in seeds]
    assert all(len({str(value) for value in values[:20]}) == 20 for values in zip(*found, strict=True))


# ------------------------------------------------------------------------------------------------- loading

SAVERS: dict[str, Callable[[Path, nn.Module], None]] = {
    "a run's best": lambda file, model: save_weights(file, {"model": model.state_dict(), "contract": {}}),
    "our own": lambda file, model: save_weights(file, model.state_dict()),
    "torch's": lambda file, model: torch.save(model.state_dict(), file),
}


@pytest.mark.parametrize("save", SAVERS.values(), ids=list(SAVERS))
def test_models_are_loaded_from_every_kind_of_file(tmp_path: Path, save: Callable) -> None:
    model, target, file = Net(), Net(), tmp_path / "w.pt"
    model(torch.randn(8, 3))
    save(file, model)
    for loaded in (load_model(file, Net, {"width": 4}), load_model(str(file), Net), load_model(file, target)):
        assert digest(loaded) == digest(model) and not any(module.training for module in loaded.modules())
    assert loaded is target
    inputs = torch.randn(4, 3)
    assert torch.equal(target(inputs), model.eval()(inputs))


@pytest.mark.parametrize(
    ("saved", "expected"),
    [
        (Net(bias=False), "1 parameters are missing, such as first.bias"),
        (Net(width=6), "7 have another shape, such as first.bias: (6,) instead of (4,)"),
        (nn.Linear(1, 1), "2 are not of this model, such as bias"),
    ],
)
def test_weights_of_another_model_are_refused_with_what_differs(
    tmp_path: Path, saved: nn.Module, expected: str
) -> None:
    save_weights(tmp_path / "w.pt", {"model": saved.state_dict()})
    model = Net()
    before = digest(model)
    with pytest.raises(WeightsError, match=re.escape(expected)) as error:
        load_model(tmp_path / "w.pt", model)
    assert "does not fit this Net" in str(error.value) and str(tmp_path / "w.pt") in str(error.value)
    assert digest(model) == before


def test_all_differences_are_reported_at_once_and_damaged_files_are_refused(tmp_path: Path) -> None:
    state = Net(width=6, bias=False).state_dict() | {"more": torch.ones(1)}
    with pytest.raises(WeightsError, match=r"memory: .*1 parameters are.*1 are not of.*6 have another shape"):
        fill_model(Net(), state, "memory")
    save_weights(tmp_path / "w.pt", Net().state_dict())
    content = bytearray((tmp_path / "w.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "w.pt").write_bytes(content)
    for name in ("w.pt", "other.pt"):
        with pytest.raises(WeightsError, match=name):
            load_model(tmp_path / name, Net)


# ------------------------------------------------------------------------------------------------ one step


@pytest.mark.parametrize("training", [True, False])
def test_forward_evaluates_without_gradients_and_restores_the_mode_of_each_module(training: bool) -> None:
    model, inputs = Net().train(training), torch.randn(4, 3)
    model.norm.eval()
    before = digest(model)
    found = forward(model, inputs)
    with pytest.raises(RuntimeError):
        forward(model, torch.randn(4, 99))
    assert model.training == model.drop.training == training and not model.norm.training
    assert digest(model) == before and not found.requires_grad
    assert torch.equal(found, model.eval()(inputs))


def test_backprop_changes_every_parameter_that_is_trainable_and_leaves_the_gradients() -> None:
    model, data = Net().eval(), (torch.randn(64, 3), torch.randint(2, (64,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for trainable in (True, False):
        set_module_trainable(model.first, trainable)
        optimizer.zero_grad(set_to_none=True)
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        loss = backprop(model, nn.functional.cross_entropy, optimizer, *data)
        assert isinstance(loss, float) and loss > 0 and model.training
        for name, parameter in model.named_parameters():
            is_frozen = name.startswith("first") and not trainable
            assert (parameter.grad is None) == torch.equal(parameter, before[name]) == is_frozen, name


def test_backprop_returns_the_loss_before_the_step_and_starts_without_gradients() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 3.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    data = torch.ones(1, 1), torch.zeros(1, 1)
    assert [backprop(model, nn.functional.mse_loss, optimizer, *data) for _ in range(2)] == [9.0, 0.0]
    assert model.weight.item() == 0.0


# -------------------------------------------------------------------------------------------------- checks

NAN, INF = math.nan, math.inf
CHECKS: list[tuple[Callable, tuple, list[float], str]] = [
    (assert_not_nan, (), [1.0, NAN, NAN], "2 of 3 values are NaN"),
    (assert_not_nan, (), [1.0, INF, -INF], ""),
    (assert_isfinite, (), [INF, 0.0, NAN, -INF], "3 of 4 values are NaN or infinite"),
    (assert_isfinite, (), [1.0, 3e38, -0.0], ""),
    (assert_nonzero, (), [0.0, -0.0, 1.0], "2 of 3 values are zero"),
    (assert_nonzero, (), [-1.0, 1e-30], ""),
    (assert_nonzero, (), [0.0, NAN], "1 of 2 values are zero"),
    (assert_upperbound, (1.5,), [1.5, 1.6, INF, -9.0], "3 of 4 values are not below 1.5"),
    (assert_upperbound, (2,), [NAN, 1.0], "1 of 2 values are not below 2"),
    (assert_upperbound, (1.5,), [1.4, -INF], ""),
    (assert_lowerbound, (-1,), [-1.0, -1.5, 2.0], "2 of 3 values are not above -1"),
    (assert_lowerbound, (0,), [NAN, -INF], "2 of 2 values are not above 0"),
    (assert_lowerbound, (-1,), [-0.9, INF], ""),
]


@pytest.mark.parametrize(("check", "bounds", "values", "expected"), CHECKS)
def test_checks_fail_with_names_and_numbers(
    check: Callable, bounds: tuple, values: list[float], expected: str
) -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.ParameterDict({"odd": torch.tensor(values)}))
    nn.init.constant_(model[0].bias, 0.5)
    for place, given in (("tensor", torch.tensor(values, requires_grad=True)), ("1.odd", model)):
        if expected:
            with pytest.raises(AssertionError, match=re.escape(f"{place}: {expected}")):
                check(given, *bounds)
        else:
            check(given, *bounds)
