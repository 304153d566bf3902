import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dida_tools.utils.torchutils import (
    assert_isfinite,
    assert_lowerbound,
    assert_nonzero,
    assert_not_nan,
    assert_upperbound,
    backprop,
    evaluation_mode,
    fill_model,
    forward,
    load_model,
    set_module_trainable,
    set_seed,
)
from dida_tools.utils.weights import WeightsError, save_weights, weights_digest


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


# ---------------------------------------------------------------------------------------------------------------- seeds


def draws() -> tuple:
    return random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist()


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**40 + 7, 2**63 - 1])
def test_a_seed_gives_the_same_draws_of_python_numpy_and_torch(seed: int) -> None:
    set_seed(seed)
    first = draws()
    assert draws() != first
    set_seed(seed)
    assert draws() == first


def test_seeds_give_different_draws() -> None:
    found = []
    for seed in range(20):
        set_seed(seed)
        found.append(draws())
    assert all(len({str(value) for value in values}) == 20 for values in zip(*found, strict=True))


# -------------------------------------------------------------------------------------------------------------- loading


SAVERS: dict[str, Callable[[Path, nn.Module], None]] = {
    "a run's best": lambda file, model: save_weights(file, {"model": model.state_dict(), "contract": {}}),
    "our bare": lambda file, model: save_weights(file, model.state_dict()),
    "bare": lambda file, model: torch.save(model.state_dict(), file),
}


@pytest.mark.parametrize("save", SAVERS.values(), ids=list(SAVERS))
@pytest.mark.parametrize("as_class", [True, False])
def test_models_are_loaded_from_every_kind_of_file(tmp_path: Path, save: Callable, as_class: bool) -> None:
    model = Net(width=5)
    model(torch.randn(8, 3))
    save(tmp_path / "w.pt", model)
    target = Net(width=5)
    loaded = (
        load_model(tmp_path / "w.pt", Net, {"width": 5})
        if as_class
        else load_model(tmp_path / "w.pt", target)
    )
    assert digest(loaded) == digest(model) and not any(module.training for module in loaded.modules())
    assert as_class or loaded is target
    inputs = torch.randn(4, 3)
    assert torch.equal(loaded(inputs), model.eval()(inputs))


def test_a_class_without_arguments_needs_no_config(tmp_path: Path) -> None:
    save_weights(tmp_path / "w.pt", (model := Net()).state_dict())
    assert digest(load_model(str(tmp_path / "w.pt"), Net)) == digest(model)


@pytest.mark.parametrize(
    "saved, said",
    [
        (Net(bias=False), "1 parameters are missing, such as first.bias"),
        (nn.ModuleDict({"first": nn.Linear(3, 4)}), "7 parameters are missing, such as last.bias"),
        (Net(width=6), "7 have another shape, such as first.bias: (6,) instead of (4,)"),
        (
            nn.ModuleDict({**dict(Net().named_children()), "more": nn.Linear(1, 1)}),
            "2 are not of this model, such as more.bias",
        ),
        (nn.Linear(1, 1), "2 are not of this model, such as bias"),
    ],
)
def test_what_differs_from_a_wrong_model_is_said(tmp_path: Path, saved: nn.Module, said: str) -> None:
    save_weights(tmp_path / "w.pt", {"model": saved.state_dict()})
    model = Net()
    before = digest(model)
    with pytest.raises(WeightsError, match=re.escape(said)) as error:
        load_model(tmp_path / "w.pt", model)
    assert "does not fit this Net" in str(error.value) and str(tmp_path / "w.pt") in str(error.value)
    assert digest(model) == before


def test_all_differences_are_said_at_once() -> None:
    state = Net(width=6, bias=False).state_dict() | {"more": torch.ones(1)}
    with pytest.raises(
        WeightsError, match=r"memory: .*1 parameters are missing.*1 are not of.*6 have another shape"
    ):
        fill_model(Net(), state, "memory")


def test_damaged_and_missing_files_are_refused(tmp_path: Path) -> None:
    save_weights(tmp_path / "w.pt", Net().state_dict())
    content = bytearray((tmp_path / "w.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "w.pt").write_bytes(content)
    for name in ("w.pt", "other.pt"):
        with pytest.raises(WeightsError, match=name):
            load_model(tmp_path / name, Net)


# ------------------------------------------------------------------------------------------------------------- one step


@pytest.mark.parametrize("training", [True, False])
def test_forward_evaluates_without_gradients_and_restores_the_mode(training: bool) -> None:
    model = Net().train(training)
    inputs = torch.randn(4, 3)
    before = digest(model)
    found = forward(model, inputs)
    assert model.training == training and digest(model) == before and not found.requires_grad
    assert torch.equal(found, forward(model, inputs)) and torch.equal(found, model.eval()(inputs))


def test_forward_restores_the_mode_after_an_error() -> None:
    model = Net().train()
    with pytest.raises(RuntimeError):
        forward(model, torch.randn(4, 99))
    assert all(module.training for module in model.modules())


def test_evaluation_mode_leaves_frozen_parts_frozen() -> None:
    model = Net().train()
    model.norm.eval()
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
    assert not model.norm.training and model.training and model.drop.training
    forward(model, torch.randn(4, 3))
    assert not model.norm.training and model.first.training


def test_backprop_changes_every_parameter_and_leaves_the_gradients() -> None:
    model = Net().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    loss = backprop(
        model, nn.functional.cross_entropy, optimizer, torch.randn(64, 3), torch.randint(2, (64,))
    )
    assert isinstance(loss, float) and loss > 0 and model.training
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not torch.equal(parameter, before[name]), name


def test_backprop_returns_the_loss_before_the_step_and_starts_without_gradients() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 3.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    inputs, targets = torch.ones(1, 1), torch.zeros(1, 1)
    assert backprop(model, nn.functional.mse_loss, optimizer, inputs, targets) == 9.0
    assert model.weight.item() == 0.0
    assert backprop(model, nn.functional.mse_loss, optimizer, inputs, targets) == 0.0
    assert model.weight.item() == 0.0


def test_modules_are_frozen_and_freed() -> None:
    model = Net()
    set_module_trainable(model.first, False)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"first.weight", "first.bias"}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = model.first.weight.clone()
    backprop(model, nn.functional.cross_entropy, optimizer, torch.randn(8, 3), torch.randint(2, (8,)))
    assert torch.equal(model.first.weight, before)
    set_module_trainable(model, True)
    assert all(parameter.requires_grad for parameter in model.parameters())


# --------------------------------------------------------------------------------------------------------------- checks


NAN, INF = math.nan, math.inf
FAILING: list[tuple[Callable, tuple, list[float], str]] = [
    (assert_not_nan, (), [1.0, NAN, NAN], "2 of 3 values are NaN"),
    (assert_isfinite, (), [INF, 0.0, NAN, -INF], "3 of 4 values are NaN or infinite"),
    (assert_nonzero, (), [0.0, -0.0], "all 2 values are zero"),
    (assert_upperbound, (1.5,), [1.5, 1.6, INF, -9.0], "2 of 4 values are above 1.5"),
    (assert_upperbound, (1,), [NAN, 1.0], "1 of 2 values are above 1"),
    (assert_lowerbound, (-1,), [-1.0, -1.5, 2.0], "1 of 3 values are below -1"),
    (assert_lowerbound, (0,), [NAN, -INF], "2 of 2 values are below 0"),
]
PASSING: list[tuple[Callable, tuple, list[float]]] = [
    (assert_not_nan, (), [1.0, INF, -INF]),
    (assert_isfinite, (), [1.0, 3e38, -0.0]),
    (assert_nonzero, (), [0.0, 1e-30]),
    (assert_nonzero, (), [0.0, NAN]),
    (assert_upperbound, (1.5,), [1.5, -INF]),
    (assert_lowerbound, (-1,), [-1.0, INF]),
]


def with_parameter(values: list[float]) -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.Module())
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.5)
    model[1].register_parameter("odd", nn.Parameter(torch.tensor(values)))
    return model


@pytest.mark.parametrize("check, bounds, values, said", FAILING)
def test_checks_fail_with_names_and_numbers(
    check: Callable, bounds: tuple, values: list[float], said: str
) -> None:
    with pytest.raises(AssertionError, match=re.escape(f"tensor: {said}")):
        check(torch.tensor(values), *bounds)
    with pytest.raises(AssertionError, match=re.escape(f"1.odd: {said}")):
        check(with_parameter(values), *bounds)


@pytest.mark.parametrize("check, bounds, values", PASSING)
def test_checks_pass(check: Callable, bounds: tuple, values: list[float]) -> None:
    check(torch.tensor(values, requires_grad=True), *bounds)
    check(with_parameter(values), *bounds)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.bfloat16])
def test_checks_take_other_dtypes(dtype: torch.dtype) -> None:
    values: Any = torch.tensor([1, 0, 1]).to(dtype)
    assert_not_nan(values)
    assert_isfinite(values)
    assert_nonzero(values)
    assert_upperbound(values, 1)
    assert_lowerbound(values, 0)
    with pytest.raises(AssertionError, match="1 of 3 values are below 1"):
        assert_lowerbound(values, 1)
