"""
The suite for a model, new or trained: edit the config, or run it on weights:

    python -m pytest tests/test_models -n 0 --weights weights/NAME/best.pt
"""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from dida_tools.config.device import get_device
from dida_tools.models import UNET
from dida_tools.utils.loss import multi_class_dice_ce_sum
from dida_tools.utils.torchutils import (
    assert_isfinite,
    assert_lowerbound,
    assert_nonzero,
    assert_not_nan,
    assert_upperbound,
    backprop,
    forward,
    load_model,
    set_seed,
)

DEFAULT_WEIGHTS = None  # <- a weights file; None tests a new model
INPUT_DIM = (2, 12, 64, 64)
OUTPUT_DIM = (2, 5, 64, 64)
LOSS = multi_class_dice_ce_sum
MODEL = UNET
MODEL_CONFIG = {"ch_in": 12, "ch_out": 5, "bulk_ch": 16, "n_recursions": 3, "norm": partial(nn.GroupNorm, 8)}
OPTIMIZER = torch.optim.AdamW
OPTIMIZER_CONFIG = {"lr": 1e-2}
DEVICE = "auto"

LARGEST_PARAMETER = 1e3


@pytest.fixture
def device() -> torch.device:
    return get_device(DEVICE)


@pytest.fixture
def model(request: pytest.FixtureRequest, device: torch.device) -> nn.Module:
    set_seed(0)
    weights = request.config.getoption("--weights") or DEFAULT_WEIGHTS
    if weights is None:
        return MODEL(**MODEL_CONFIG).to(device)
    return load_model(weights, MODEL, MODEL_CONFIG, device)


@pytest.fixture
def batch(device: torch.device) -> tuple[Tensor, Tensor]:
    """Noise, and a target that follows from it."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(INPUT_DIM, generator=generator)
    smooth = nn.functional.avg_pool2d(inputs[:, : OUTPUT_DIM[1]], 9, stride=1, padding=4)
    return inputs.to(device), smooth.argmax(1).to(device)


def test_parameters_are_finite_and_within_bounds(model):
    assert_not_nan(model)
    assert_isfinite(model)
    assert_upperbound(model, LARGEST_PARAMETER)
    assert_lowerbound(model, -LARGEST_PARAMETER)


def test_output_has_the_right_shape_and_is_finite(model, batch):
    output = forward(model, batch[0])
    assert tuple(output.shape) == OUTPUT_DIM
    assert_isfinite(output)


@pytest.mark.parametrize("size", [(64, 64), (65, 63), (33, 100), (8, 8)])
def test_every_size_comes_out_as_it_went_in(model, device, size):
    output = forward(model, torch.randn(1, INPUT_DIM[1], *size, device=device))
    assert tuple(output.shape) == (1, OUTPUT_DIM[1], *size)


def test_evaluation_is_deterministic_and_depends_on_the_input(model, batch):
    first, again = forward(model, batch[0]), forward(model, batch[0])
    assert torch.equal(first, again)
    assert not torch.equal(first, forward(model, batch[0] + 1))


def test_a_step_reaches_every_parameter(model, batch):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = OPTIMIZER(model.parameters(), **OPTIMIZER_CONFIG)
    backprop(model, LOSS, optimizer, *batch)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert_isfinite(parameter.grad)
        assert_nonzero(parameter.grad)
        assert not torch.equal(parameter, before[name]), name


def test_one_batch_can_be_learned_by_heart(model, batch):
    optimizer = OPTIMIZER(model.parameters(), **OPTIMIZER_CONFIG)
    losses = [backprop(model, LOSS, optimizer, *batch) for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]
