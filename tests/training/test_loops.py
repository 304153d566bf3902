"""
The training loops: each that is there trains, and all end with the same bits.

Values of your own that a loop logs, other listeners and other columns change nothing here.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dida_core.report.listener import Result
from dida_core.storage.weights import load_weights
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from dida_tools.training.config import train_config
from dida_tools.utils.loss import multi_class_dice_ce_sum

from tests.helpers import FIRST, ROUTINES, global_config_of, load_routine, rows_of

pytestmark = pytest.mark.usefixtures("quick")

OTHERS = [routine for routine in ROUTINES if routine != FIRST]
Fit = Callable[..., Result]


class Loss(nn.Module):
    """The usual loss, which can interrupt a training, as a second Ctrl-C would."""

    interrupt_at = calls = 0

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        Loss.calls += torch.is_grad_enabled()
        if torch.is_grad_enabled() and Loss.calls == Loss.interrupt_at:
            raise KeyboardInterrupt
        return multi_class_dice_ce_sum(pred, target)


@pytest.fixture
def fit(datasets: tuple[Any, Any], tiny_config: dict[str, Any], tmp_path: Path) -> Fit:
    """Train by a routine; with everything that has a state: 6 steps of 2 batches."""
    tiny_config |= {"LOSS": Loss, "EPOCHS": 3, "ACCUMULATE": 2, "EMA": 0.9, "CLIP_NORM": 1.0}
    tiny_config |= {"SCHEDULER": OneCycleLR, "CHECKPOINT_SECONDS": 0, "DATE": "2021-01-01"}

    def train(routine: str, interrupt_at: int = 0, **changes: Any) -> Result:
        loop = load_routine(routine)
        Loss.interrupt_at, Loss.calls = interrupt_at, 0
        return loop.train(*datasets, tiny_config | changes, global_config_of(tmp_path))

    return train


@pytest.fixture(scope="module")
def ends() -> dict[str, Result]:
    """What each routine has made of the config."""
    return {}


@pytest.fixture
def end_of(fit: Fit, ends: dict[str, Result]) -> Callable[[str], Result]:
    """Return what a routine makes of the config, trained once."""

    def end(routine: str) -> Result:
        if routine not in ends:
            ends[routine] = fit(routine)
        return ends[routine]

    return end


@pytest.mark.parametrize("routine", ROUTINES)
def test_a_loop_learns_and_leaves_files_and_a_row(end_of, routine):
    load_routine(routine)
    result = end_of(routine)
    losses = [epoch["train.loss"] for epoch in result.history]
    assert len(losses) == 3 and losses[-1] < 0.9 * losses[0]
    assert result.metrics["test.f1"] > 0.3 and result.state.step == 6
    files = {file.name for file in result.log_dir.iterdir()}
    assert {"config.json", "environment.json", "journal.jsonl"} <= files
    weights = [load_weights(result.weights[kind])["model"] for kind in ("best", "last")]
    assert weights[0].keys() == weights[1].keys()
    (row,) = rows_of({"LOG_DIR": str(result.log_dir.parent)})
    assert (row["NAME"], row["STATUS"], row["EPOCH"]) == (result.name, "finished", 3)
    assert row["WEIGHTS_DIGEST"] == result.digest and row["test.f1"] == result.metrics["test.f1"]
    assert row["ROUTINE_NAME"] == f".training.{routine}_training"


@pytest.mark.parametrize("routine", OTHERS)
def test_every_loop_ends_with_the_same_bits(end_of, routine):
    load_routine(routine)
    result, expected = end_of(routine), end_of(FIRST)
    assert result.digest == expected.digest
    assert result.metrics == expected.metrics
    best, wanted = (load_weights(one.weights["best"])["model"] for one in (result, expected))
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in best.items())


@pytest.mark.parametrize("routine", ROUTINES)
def test_an_interrupted_loop_resumes_to_the_same_bits(fit, end_of, routine, tmp_path):
    load_routine(routine)
    expected = end_of(routine)
    with pytest.raises(KeyboardInterrupt):
        fit(routine, interrupt_at=9, SESSION_NAME="interrupted")  # within the second step of an epoch
    (row,) = (row for row in rows_of(global_config_of(tmp_path)) if row["STATUS"] == "interrupted")
    result = fit(routine, SESSION_NAME="interrupted", RESUME=row["NAME"])
    assert Loss.calls == 1 + 12 - 6  # the dry run's one; it did not begin anew
    assert (result.name, result.digest) == (row["NAME"], expected.digest)
    assert result.metrics == expected.metrics


@pytest.mark.parametrize("routine", ROUTINES)
def test_every_loop_takes_the_shared_config(routine):
    module = load_routine(routine)
    parameters = inspect.signature(module.train).parameters
    names = ["train_dataset", "test_dataset", "training_config", "global_config", "validation_dataset"]
    assert list(parameters) == names
    assert parameters["training_config"].default is train_config is module.train_config
