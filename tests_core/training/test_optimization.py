"""Schedules of all kinds and lengths, and what is trained besides the model as it was built."""

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from dida_core.config.keys import complete
from dida_core.errors import ConfigError
from dida_core.runs.failures import Pruned
from dida_core.storage.checkpoint import load_checkpoint, save_checkpoint
from dida_core.training.modules import set_seed
from dida_core.training.optimization import (
    build_loss,
    build_optimizer,
    build_scheduler,
    catch_up,
    learning_rate,
    load_optimizer,
    warm_up,
)
from dida_core.training.targets import OutputLoss
from torch import nn
from torch.nn import functional
from torch.optim import lr_scheduler as lr

from tests.helpers import FIRST, ROUTINES, events_of, load_routine

pytestmark = pytest.mark.usefixtures("quick")
slow = pytest.mark.slow
OTHERS = [routine for routine in ROUTINES if routine != FIRST]


class OwnSchedule(lr.LRScheduler):
    def __init__(self, optimizer, T_max: int, max_lr: float):
        self.T_max, self.max_lr = T_max, max_lr
        super().__init__(optimizer)

    def get_lr(self):
        return [self.max_lr * (1 - self.last_epoch / self.T_max) for _ in self.base_lrs]


def use(scheduler: Any, config: Any = None, **changes: Any) -> dict[str, Any]:
    return {"SCHEDULER": scheduler, "SCHEDULER_CONFIG": config or {}} | changes


def falling(step: int) -> float:
    return max(0.0, 1 - step / 4)


SLOW_START = partial(lr.LinearLR, start_factor=0.2)
# Rates of 8 steps in 4 epochs, of the learning rate 1.
RATES: dict[str, tuple[dict[str, Any], list[float]]] = {
    "cosine": (use(lr.CosineAnnealingLR), [1, 0.962, 0.854, 0.691, 0.5, 0.309, 0.146, 0.038]),
    "cosine-epochs": (use(lr.CosineAnnealingLR, SCHEDULER_STEP="epoch"), [1, 0.854, 0.5, 0.146]),
    "restarts": (use(lr.CosineAnnealingWarmRestarts), [1, 0.962, 0.854, 0.691, 0.5, 0.309, 0.146, 0.038]),
    "polynomial": (use(lr.PolynomialLR), [1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
    "linear": (use(lr.LinearLR, {"start_factor": 0.2}), [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]),
    "constant": (use(lr.ConstantLR, {"factor": 0.5}), [0.5] * 8),
    "own": (use(OwnSchedule), [1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
    "cyclic": (use(lr.CyclicLR, {"base_lr": 0, "step_size_up": 2}), [0, 0.5, 1, 0.5, 0, 0.5, 1, 0.5]),
    "multi-step": (use(lr.MultiStepLR, {"milestones": [2, 5]}), [1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01]),
    "one-cycle-epochs": (
        use(lr.OneCycleLR, {"epochs": 4, "pct_start": 0.5}), [0.04, 0.28, 0.76, 1, 0.854, 0.5, 0.146, 0]),
    "two": (
        use([lr.LinearLR, lr.CosineAnnealingLR], [{"total_iters": 4, "start_factor": 0.2}, {}]),
        [0.2, 0.4, 0.6, 0.8, 1, 0.854, 0.5, 0.146]),
    "three": (
        use([lr.ConstantLR, lr.LinearLR, lr.PolynomialLR],
            [{"length": 2}, {"start_factor": 0.5}, {"length": 0.5}]),
        [1 / 3, 1 / 3, 0.5, 0.75, 1, 0.75, 0.5, 0.25]),
    "sequential": (
        use(lr.SequentialLR, {"schedulers": [SLOW_START, lr.PolynomialLR], "milestones": [4]}),
        [0.2, 0.4, 0.6, 0.8, 1, 0.75, 0.5, 0.25]),
    "chained": (
        use(lr.ChainedScheduler, {"schedulers": [lr.PolynomialLR, partial(lr.ExponentialLR, gamma=0.5)]}),
        [1, 0.438, 0.188, 0.078, 0.031, 0.012, 0.004, 0.001]),
    "warm-up": (use(lr.PolynomialLR, WARMUP=0.5), [0.25, 0.438, 0.562, 0.625, 0.5, 0.375, 0.25, 0.125]),
    "warm-up-alone": ({"WARMUP": 4}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
    "warm-up-plateau": (use(lr.ReduceLROnPlateau, SCHEDULER_STEP="epoch", WARMUP=4), [0.25, 0.5, 0.75, 1]),
}  # fmt: skip


class Schedule:
    """An optimizer of one weight, or of several groups, and a schedule of 4 epochs of 2 steps."""

    def __init__(self, *groups: float, epochs: int = 4, **changes: Any) -> None:
        weights = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in groups or (1.0,)]
        config = {"MODEL": nn.Linear, "LOSS": nn.MSELoss, "OPTIMIZER": torch.optim.SGD, "EPOCHS": epochs}
        self.config = complete(config | changes)
        self.optimizer = torch.optim.SGD(weights, momentum=0.9)
        warm_up(self.config, self.optimizer, 2 * epochs)
        self.scheduler = build_scheduler(self.config, self.optimizer, 2)

    def rates(self, num_steps: int, group: int = 0) -> list[float]:
        rates = []
        for _ in range(num_steps):
            rates.append(learning_rate(self.optimizer.param_groups[group]))
            self.optimizer.step()
            if self.scheduler is not None and not isinstance(self.scheduler, lr.ReduceLROnPlateau):
                self.scheduler.step()
        return rates


@pytest.mark.parametrize("name", RATES)
def test_a_schedule_of_any_kind_is_as_long_as_the_training_and_resumes(name, tmp_path):
    changes, expected = RATES[name]
    number, half = len(expected), len(expected) // 2
    rates = Schedule(**changes).rates(number)
    assert rates == pytest.approx(expected, abs=6e-4)
    first, second = Schedule(**changes), Schedule(**changes)
    first.rates(half)
    parts = {"optimizer": first.optimizer.state_dict()}
    parts |= {"scheduler": first.scheduler.state_dict()} if first.scheduler else {}
    save_checkpoint(tmp_path, half, parts)
    stored = load_checkpoint(tmp_path, print)
    load_optimizer(second.optimizer, stored["optimizer"])
    if second.scheduler:
        second.scheduler.load_state_dict(stored["scheduler"])
    assert second.rates(number - half) == rates[half:]


@pytest.mark.parametrize("name", [name for name in RATES if "plateau" not in name])
def test_a_prolonged_schedule_has_the_rates_of_the_longer_one(name):
    changes, expected = RATES[name]
    short = Schedule(**changes, epochs=3)
    half = len(short.rates(len(expected) // 2))
    longer = Schedule(**changes)
    set_rates = catch_up(longer.scheduler, longer.optimizer, half) if longer.scheduler else lambda: None
    load_optimizer(longer.optimizer, short.optimizer.state_dict())
    set_rates()
    assert longer.rates(half) == pytest.approx(expected[half:], abs=6e-4) and min(expected[half:]) >= 0


def test_each_parameter_group_has_its_own_largest_rate():
    for scheduler, options in (
        (lr.OneCycleLR, {"pct_start": 0.5}),
        (lr.CyclicLR, {"base_lr": 0.0, "step_size_up": 2}),
    ):
        changes = {"SCHEDULER": scheduler, "SCHEDULER_CONFIG": options}
        tops = [max(Schedule(1.0, 0.1, **changes).rates(8, group)) for group in (0, 1)]
        assert tops == pytest.approx([1.0, 0.1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (use(lr.OneCycleLR, {"total_steps": 5}), "fails after step 6 of 8"),
        (use(lr.OneCycleLR, {"epochs": 3}), "fails after step 7 of 8"),
        (use(lr.LambdaLR, {"lr_lambda": lambda step: 1 - step / 4}), r"-0.25 in step 6"),
        (use(lr.LambdaLR, {"lr_lambda": lambda step: 1 / (4 - step)}), "division by zero"),
        ({"SCHEDULER": [lr.LinearLR, lr.CosineAnnealingLR]}, "lengths the rest, the rest, .* 8 steps"),
        (
            use([lr.LinearLR, lr.CosineAnnealingLR], [{"length": 8}, {}]),
            "lengths 8, the rest, and the training has 8 steps",
        ),
        ({"WARMUP": 9}, "WARMUP is 9, and the training has 8 steps"),
    ],
)
def test_a_schedule_that_does_not_reach_the_end_is_refused_before_the_first_step(changes, message):
    with pytest.raises(ConfigError, match=message):
        Schedule(**changes)


def test_a_rate_that_stays_0_is_reported():
    for changes, steps in (
        (use(lr.LambdaLR, {"lr_lambda": falling}), "5 to 8 of 8"),
        (use(lr.PolynomialLR, {"total_iters": 6}), "7 to 8 of 8"),
        (use(lr.LambdaLR, {"lr_lambda": float}, SCHEDULER_STEP="epoch"), "1 to 1 of 4"),
    ):
        with pytest.warns(UserWarning, match=f"learning rate is 0 in the steps {steps}"):
            Schedule(**changes)
    late = {"milestones": [2, 50]}
    with pytest.warns(UserWarning, match=r"milestones has \[50\], and the training has 8 steps"):
        Schedule(SCHEDULER=lr.MultiStepLR, SCHEDULER_CONFIG=late)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Schedule(SCHEDULER=lr.LambdaLR, SCHEDULER_CONFIG={"lr_lambda": float})  # 0 in the first step alone


# -------------------------------------------------------------------------------------------- whole trainings


class Weighted(nn.CrossEntropyLoss):
    """A loss that learns a factor for each class."""

    def __init__(self) -> None:
        super().__init__(ignore_index=255)
        self.factors, self.unused = nn.Parameter(torch.rand(3)), nn.Linear(2, 2)

    def forward(self, prediction, target):
        factors = self.factors.softmax(0)[None, :, None, None]
        return super().forward(prediction + factors, target)


class Thawing(nn.Sequential):
    """A model whose first layer is frozen; thaw is given as AFTER_EPOCH."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1))
        self[0].requires_grad_(False)


def thaw(run) -> None:
    run.setup.model[0].requires_grad_(True)


class Forgetful(torch.optim.SGD):
    def __init__(self, params, lr):
        super().__init__(params[:-1], lr)


@pytest.fixture
def fit(datasets, tiny_config, global_config):
    def train(routine: str = FIRST, **changes: Any) -> Any:
        config = tiny_config | {"MODEL": Thawing, "MODEL_CONFIG": {}, "SEED": 1} | changes
        return load_routine(routine).train(*datasets, config, global_config)

    return train


def state_of(result: Any) -> dict[str, Any]:
    return load_checkpoint(result.weight_dir, print)


@pytest.mark.parametrize("routine", [FIRST, *(pytest.param(one, marks=slow) for one in OTHERS)])
def test_a_loss_with_parameters_and_a_thawed_layer_train_and_resume_to_the_same(routine, fit):
    rich = {"LOSS": Weighted, "AFTER_EPOCH": thaw, "CLIP_NORM": 0.1, "EPOCHS": 3, "WARMUP": 0.5}
    rich |= {"SCHEDULER": [lr.LinearLR, lr.CosineAnnealingLR], "SCHEDULER_CONFIG": [{"length": 2}, {}]}

    def stop(run) -> bool:
        thaw(run)
        return run.state.epoch == 2

    expected = fit(FIRST, **rich)
    with pytest.raises(Pruned, match="after epoch 2"):
        fit(routine, **rich | {"AFTER_EPOCH": stop, "CHECKPOINT_SECONDS": 0, "SESSION_NAME": "stopped"})
    result = fit(routine, **rich | {"RESUME": "auto", "SESSION_NAME": "stopped"})
    assert result.digest == expected.digest
    first, last = state_of(expected), state_of(result)
    assert all(torch.equal(first["loss"][name], last["loss"][name]) for name in first["loss"])
    for part, kind in (("loss", lambda: OutputLoss(Weighted())), ("model", Thawing)):
        set_seed(1)
        for name, tensor in kind().state_dict().items():
            assert torch.equal(tensor, last[part][name]) == ("unused" in name), name


def test_a_prolonged_run_says_its_rate_and_never_trains_with_0(fit, capsys):
    short = fit(SCHEDULER=lr.CosineAnnealingLR, OPTIMIZER_CONFIG={"lr": 0.1})
    longer = fit(SCHEDULER=lr.CosineAnnealingLR, OPTIMIZER_CONFIG={"lr": 0.1}, EPOCHS=4, RESUME=short.name)
    rates = [event["learning_rate"] for event in events_of(longer.log_dir, "step")][8:]
    assert rates == pytest.approx([0.05, 0.0402, 0.0309, 0.0222, 0.0146, 0.0084, 0.0038, 0.001], abs=1e-4)
    said = "The learning rate was 0, and continues at 0.05, by the schedule of 4 epochs."
    assert said in capsys.readouterr().out


def test_a_frozen_layer_of_a_run_of_version_0_2_resumes():
    model = Thawing()
    config = {"OPTIMIZER": torch.optim.AdamW, "OPTIMIZER_CONFIG": {"lr": 0.1}}
    old = torch.optim.AdamW(model[2].parameters(), lr=0.1)
    model(torch.ones(1, 3, 2, 2)).sum().backward()
    old.step()
    new = build_optimizer(config, model, nn.Identity())
    load_optimizer(new, old.state_dict())
    for parameter in model[2].parameters():
        assert torch.equal(new.state[parameter]["exp_avg"], old.state[parameter]["exp_avg"])
    assert len(new.param_groups[0]["params"]) == 4 and len(new.state) == 2


def test_a_parameter_that_no_optimizer_has_is_reported_once(fit):
    with pytest.warns(UserWarning, match=r"1 parameters, such as 2\.bias, have a gradient") as caught:
        fit(OPTIMIZER=Forgetful)
    assert sum("have a gradient" in str(one.message) for one in caught) == 1


# ---------------------------------------------------------------------------------------- weights of classes


class Summed(nn.Module):
    """Several losses in one."""

    def __init__(self, losses: list[Any]) -> None:
        super().__init__()
        self.losses = nn.ModuleList([loss() for loss in losses])

    def forward(self, prediction, target):
        return sum(loss(prediction, target) for loss in self.losses)


def test_weights_of_classes_may_be_lists_in_any_loss_of_torch():
    prediction, weight = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)), [1, 2, 5.0]
    classes, tensor = torch.arange(40).reshape(2, 4, 5) % 3, torch.tensor(weight)
    several = functional.one_hot(classes, 3).movedim(-1, 1).float()
    cross_entropy = functional.cross_entropy(prediction, classes, tensor)
    binary = functional.binary_cross_entropy_with_logits
    per_class = binary(prediction, several, pos_weight=tensor[:, None, None])
    for loss, options, target, expected in (
        (nn.CrossEntropyLoss, {"weight": weight}, classes, cross_entropy),
        (functional.cross_entropy, {"weight": weight}, classes, cross_entropy),
        (partial(functional.cross_entropy, weight=(1, 2, 5)), {}, classes, cross_entropy),
        (partial(nn.CrossEntropyLoss, weight=weight), {}, classes, cross_entropy),
        (Summed, {"losses": [partial(nn.CrossEntropyLoss, weight=weight)] * 2}, classes, 2 * cross_entropy),
        (nn.BCEWithLogitsLoss, {"pos_weight": weight}, several, per_class),
        (partial(binary, pos_weight=weight), {}, several, per_class),
    ):
        config = {"LOSS": loss, "LOSS_CONFIG": options, "IGNORE_INDEX": 255}
        assert build_loss(config, torch.device("cpu"))(prediction, target).item() == expected.item()
