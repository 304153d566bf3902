"""Every routine, given one config, ends with the same bits, and writes the same files, events and row."""

import functools
import inspect
import json
import os
import random
import re
import signal
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dida_core.report.listener import Result
from dida_core.runs.failures import NonFiniteLoss
from dida_core.storage.weights import load_weights, weights_digest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import Dataset, TensorDataset

from dida_tools.training import config as config_module
from dida_tools.utils.loss import accuracy, multi_class_dice_ce_sum
from dida_tools.utils.torchutils import set_seed

from tests.helpers import (
    FIRST,
    ROUTINES,
    VOLATILE,
    differing,
    events_of,
    global_config_of,
    load_routine,
    rows_of,
)

pytestmark = pytest.mark.usefixtures("quick")

OTHERS = [routine for routine in ROUTINES if routine != FIRST]
OWN = VOLATILE | {"ROUTINE_NAME"}  # what may differ between routines


# --------------------------------------------------------------------------------- other kinds of data


class Labeled(Dataset):
    """Noisy images (3, 8, 8) with plain numbers as labels; other noise each time a sample is read."""

    def __init__(self, number: int, seed: int) -> None:
        self.labels = np.random.default_rng(seed).integers(0, 3, number).tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = torch.randn(3, 8, 8) + random.random() + torch.from_numpy(np.random.rand(3, 1, 1)).float()
        image[self.labels[index]] += 1.5
        return image, self.labels[index]


class Values(TensorDataset):
    """Eight numbers, and two that follow from them; some of these may not be known."""

    def __init__(self, number: int, seed: int, unknown: bool = False) -> None:
        inputs = torch.randn(number, 8, generator=torch.Generator().manual_seed(seed))
        targets = torch.stack([inputs[:, :4].sum(1), inputs[:, 4] * inputs[:, 5]], dim=1)
        if unknown:
            targets[::7, 1] = targets[3] = torch.nan
        super().__init__(inputs, targets)


class Classifier(nn.Module):
    """A first layer that is not trained, BatchNorm, and dropout of two kinds."""

    def __init__(self, channels: int = 8, dropout: float = 0.1) -> None:
        super().__init__()
        self.frozen = nn.Conv2d(3, channels, 3)
        self.frozen.requires_grad_(False)
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 3)
        self.linear = nn.Linear(channels, 3)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.frozen(x)))
        x = nn.functional.dropout2d(torch.relu(self.conv(x)), self.dropout, self.training)
        return self.linear(nn.functional.dropout(x.mean((-2, -1)), self.dropout, self.training))


class Mlp(nn.Module):
    """Two layers with dropout between them."""

    def __init__(self, hidden: int = 32, dropout: float = 0.05) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, hidden), nn.ELU(), nn.Dropout(dropout), nn.Linear(hidden, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def absolute_error(pred: Tensor, target: Tensor) -> Tensor:
    return (pred - target).abs().mean()


# --------------------------------------------------------------------------------------------- configs

SGD = {"OPTIMIZER": torch.optim.SGD, "OPTIMIZER_CONFIG": {"lr": 0.1, "momentum": 0.9, "nesterov": True}}
CLASSIFICATION = {
    "MODEL": Classifier,
    "MODEL_CONFIG": {},
    "DATASET": Labeled,
    "DATASET_CONFIG": {"train": {"number": 50, "seed": 0}, "test": {"number": 12, "seed": 1}},
    "LOSS": nn.CrossEntropyLoss,
    "METRICS": {"accuracy": accuracy},
    "MONITOR": "max accuracy",
}
REGRESSION = {
    "MODEL": Mlp,
    "MODEL_CONFIG": {},
    "DATASET": Values,
    "DATASET_CONFIG": {"train": {"number": 48, "seed": 0}, "test": {"number": 12, "seed": 1}},
    "LOSS": nn.MSELoss,
    "METRICS": {"error": absolute_error},
    "REQUIRE_RERUNNABLE": False,  # a record names classes of the tests alone
    "MONITOR": "min error",
}
# "has" is how the data is given; "batches" how many an epoch has; MODEL_CONFIG changes the tiny U-Net's.
CASES: dict[str, dict[str, Any]] = {
    "sgd-onecycle-batchnorm-droplast-accumulate2-clip": SGD | {
        "batches": 5, "EPOCHS": 4, "ACCUMULATE": 2, "CLIP_NORM": 1.0, "SCHEDULER": OneCycleLR,
        "MODEL_CONFIG": {"norm": nn.BatchNorm2d}, "DATA_LOADER_CONFIG": {"batch_size": 3, "drop_last": True},
    },
    "adamw-steplr-groupnorm-ema-accumulate3": {
        "batches": 4, "EPOCHS": 4, "ACCUMULATE": 3, "EMA": 0.6, "SCHEDULER": StepLR,
        "SCHEDULER_STEP": "epoch", "SCHEDULER_CONFIG": {"step_size": 2},
        "MODEL_CONFIG": {"norm": functools.partial(nn.GroupNorm, 2)},
    },
    "adamw-plateau-dropout-patience": {
        "batches": 4, "EPOCHS": 30, "PATIENCE": 2, "MONITOR": "min f1", "SCHEDULER": ReduceLROnPlateau,
        "SCHEDULER_STEP": "epoch", "SCHEDULER_CONFIG": {"patience": 0, "factor": 0.8},
        "MODEL_CONFIG": {"dropout": 0.3},
    },
    "bf16-onecycle-ema-clip-2workers": {
        "batches": 4, "EPOCHS": 3, "PRECISION": "bf16", "EMA": 0.7, "CLIP_NORM": 0.5, "SCHEDULER": OneCycleLR,
        "DATA_LOADER_CONFIG": {"batch_size": 4, "shuffle": True, "num_workers": 2},
    },
    "bf16-sgd-an-epoch-shorter-than-accumulate": SGD | {
        "batches": 6, "EPOCHS": 6, "PRECISION": "bf16", "ACCUMULATE": 10,
        "DATA_LOADER_CONFIG": {"batch_size": 3},
    },
    "no-validation-no-test-seed7": {
        "has": "no test", "batches": 4, "EPOCHS": 4, "VALIDATION_FRACTION": 0, "ACCUMULATE": 3, "SEED": 7,
        "DATA_LOADER_CONFIG": {"batch_size": 6, "shuffle": True},
    },
    "own-validation-in-order-plain-sgd": {
        "has": "validation", "batches": 4, "EPOCHS": 3, "CHANNELS_LAST": False, "OPTIMIZER": torch.optim.SGD,
        "OPTIMIZER_CONFIG": {"lr": 0.3}, "DATA_LOADER_CONFIG": {"batch_size": 6, "shuffle": False},
    },
    "steplr-each-step-accumulate3-new-workers": {
        "batches": 8, "EPOCHS": 3, "ACCUMULATE": 3, "SCHEDULER": StepLR, "SCHEDULER_CONFIG": {"step_size": 5},
        "DATA_LOADER_CONFIG": {"batch_size": 2, "num_workers": 2, "persistent_workers": False},
    },
    "classifier-sgd-onecycle-frozen-layer-2workers": CLASSIFICATION | SGD | {
        "batches": 7, "EPOCHS": 5, "SCHEDULER": OneCycleLR, "LOSS_CONFIG": {"label_smoothing": 0.1},
        "ACCUMULATE": 2, "DATA_LOADER_CONFIG": {"batch_size": 6, "num_workers": 2},
    },
    "classifier-bf16-adamw-ema-patience": CLASSIFICATION | {
        "batches": 4, "EPOCHS": 40, "PRECISION": "bf16", "EMA": 0.5, "PATIENCE": 3,
        "DATA_LOADER_CONFIG": {"batch_size": 12},
    },
    "regression-plateau-accumulate2-ema": REGRESSION | {
        "batches": 8, "EPOCHS": 6, "ACCUMULATE": 3, "EMA": 0.5, "SCHEDULER": ReduceLROnPlateau,
        "SCHEDULER_STEP": "epoch", "SCHEDULER_CONFIG": {"patience": 0}, "CLIP_NORM": 1.0,
        "DATA_LOADER_CONFIG": {"batch_size": 5},
    },
    "regression-rmsprop-no-validation": REGRESSION | {
        "batches": 6, "EPOCHS": 6, "OPTIMIZER": torch.optim.RMSprop, "VALIDATION_FRACTION": 0,
        "DATA_LOADER_CONFIG": {"batch_size": 8, "drop_last": True},
    },
    "regression-some-targets-unknown-accumulate2": REGRESSION | {
        "batches": 8, "EPOCHS": 6, "ACCUMULATE": 2, "DATA_LOADER_CONFIG": {"batch_size": 5},
        "DATASET_CONFIG": {split: {"number": 48, "seed": seed, "unknown": True}
                           for seed, split in enumerate(("train", "test"))},
    },
}  # fmt: skip


# What a framework does in its own way, besides what the project tests of its loops; the rest is slow.
BY_DEFAULT = (
    "adamw-plateau-dropout-patience",
    "bf16-onecycle-ema-clip-2workers",
    "no-validation-no-test-seed7",
)
EACH_CASE = [pytest.param(n, marks=() if n in BY_DEFAULT else pytest.mark.slow) for n in CASES]


@dataclass
class End:
    """A training that has ended, and what it has printed, warned of and logged."""

    config: dict[str, Any]
    result: Result
    left: dict[str, Any]
    said: tuple[Any, ...]


@pytest.fixture
def end_of(datasets, tiny_config, tmp_path, capfd, caplog):
    """Train in a folder of its own, under the same name. The process is left as it was."""

    def train(routine: str, case: dict[str, Any] | None = None, **changes: Any) -> End:
        config = tiny_config | {"DATE": "2021-01-01"} | (case or {}) | changes
        has, batches = config.pop("has", ""), config.pop("batches", None)
        # Made anew: the package's own remember what they know of their files, which is written only once.
        sets: list[Any] = [type(one)(**one.arguments) for one in datasets]
        if "DATASET" in config:
            sets = [config["DATASET"](**config["DATASET_CONFIG"][split]) for split in ("train", "test")]
        if config["MODEL"] is tiny_config["MODEL"]:
            config["MODEL_CONFIG"] = tiny_config["MODEL_CONFIG"] | config["MODEL_CONFIG"]
        validation_set = sets[1] if has == "validation" else None
        if has == "no test":
            sets[1] = None
        global_config = global_config_of(tmp_path / f"run-{len(list(tmp_path.glob('run-*')))}")
        train, modules = load_routine(routine).train, len(sys.modules)
        capfd.readouterr()
        caplog.clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for category in (DeprecationWarning, FutureWarning):  # of one library about another
                warnings.simplefilter("ignore", category)
            before = state_of_the_process()
            result = train(*sets, config, global_config, validation_set)
            assert state_of_the_process() == before or len(sys.modules) > modules  # which imports may change
        printed = capfd.readouterr()
        text = re.sub(r"in \d+ s", "in 0 s", printed.out.replace(global_config["ROOT_PATH"], "project"))
        said = (text, printed.err, [str(one.message) for one in caught], caplog.messages)
        steps = result.state.epoch * -(-(batches or 0) // config.get("ACCUMULATE", 1))
        assert batches is None or result.state.step == steps
        return End(config, result, what_is_left(routine, result, global_config), said)

    return train


def state_of_the_process() -> dict[str, Any]:
    return {
        "handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "environment": {name: hash(value) for name, value in os.environ.items()},  # so no secret is shown
        "filters": list(warnings.filters),
    }


def what_is_left(routine: str, result: Result, global_config: dict[str, str]) -> dict[str, Any]:
    root = Path(global_config["ROOT_PATH"])
    (row,) = rows_of(global_config)
    assert row["ROUTINE_NAME"] == f".training.{routine}_training"
    shown = EventAccumulator(str(result.log_dir / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    shown.Reload()
    tags = shown.Tags()
    files = [file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file()]
    pictures = {tag: shown.Images(tag) for tag in tags["images"]}
    return {
        "digest": result.digest,
        "state": asdict(result.state),
        "history": result.history,
        "metrics": result.metrics,
        "last": load_weights(result.weights["last"]),
        "best": load_weights(result.weights["best"]),
        "events": events_of(result.log_dir),
        "record": json.loads((result.log_dir / "config.json").read_text())["config"],
        "environment": json.loads((result.log_dir / "environment.json").read_text()),
        "row": row,
        "files": sorted(re.sub(r"(events\.out\.tfevents)\..*", r"\1", file) for file in files),
        "scalars": {tag: [(one.step, one.value) for one in shown.Scalars(tag)] for tag in tags["scalars"]},
        "images": {tag: [(one.step, one.encoded_image_string) for one in pictures[tag]] for tag in pictures},
    }


def assert_learned(end: End) -> None:
    losses = [event["train.loss"] for event in end.result.history]
    assert losses[-1] < 0.85 * losses[0]
    set_seed(end.config.get("SEED", 0))
    model, last = end.config["MODEL"](**end.config["MODEL_CONFIG"]), end.left["last"]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, last["model"][name]) == (name not in trained), name
    states = last["optimizer"]["state"]
    if end.config["OPTIMIZER_CONFIG"].keys() != {"lr"} or end.config["OPTIMIZER"] is not torch.optim.SGD:
        assert len(states) == len(trained)
    # Weight decay alone would change the weights, too; moments are made of gradients.
    moments = [value for state in states.values() for value in state.values() if isinstance(value, Tensor)]
    assert all(tensor.any() for tensor in moments)


# ---------------------------------------------------------------------------------------- the same end


@pytest.fixture(scope="module")
def firsts() -> dict[str, End]:
    """What the first routine makes of each case."""
    return {}


@pytest.mark.parametrize("routine", OTHERS)
@pytest.mark.parametrize("case", EACH_CASE)
def test_every_routine_ends_the_same_and_says_the_same(end_of, firsts, case, routine):
    load_routine(routine)
    if case not in firsts:
        firsts[case] = end_of(FIRST, CASES[case])
    expected, end = firsts[case], end_of(routine, CASES[case])
    assert_learned(end)
    assert end.left["digest"] == weights_digest(end.left["last"]["model"]) == expected.left["digest"]
    for part, value in expected.left.items():
        assert differing(end.left[part], value, OWN) == [], part
    assert end.said == expected.said
    assert end.result.state.stopped == ("patience" in case)
    assert len(end.left["scalars"]["train/loss"]) == end.result.state.step
    assert bool(end.left["images"]) == (CASES[case].get("has") != "no test" and "MODEL" not in CASES[case])


def test_the_comparison_sees_a_single_bit():
    state = {"weights": torch.ones(3), "rates": [0.1, 1], "seconds": 5}
    assert differing(state, state | {"weights": torch.ones(3), "seconds": 6}) == []
    bits = torch.ones(3).view(torch.int32) ^ torch.tensor([0, 0, 1], dtype=torch.int32)
    assert differing(state, state | {"weights": bits.view(torch.float32)}) == ["/weights"]
    assert differing(state, state | {"weights": torch.ones(3, dtype=torch.float64)}) == ["/weights"]
    assert differing(state, state | {"rates": [0.1, 1.0]}) == ["/rates/1"]
    assert differing(state, state | {"rates": [0.1]}) == ["/rates", "/rates/1"]
    assert differing({"zero": 0.0}, {"zero": -0.0}) == ["/zero"]


# ------------------------------------------------------------------------------- what does not go well


class NanInTheSixthBatch(nn.Module):
    """A loss that breaks in training."""

    calls = 0

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        NanInTheSixthBatch.calls += torch.is_grad_enabled()
        is_sixth = torch.is_grad_enabled() and NanInTheSixthBatch.calls == 6
        return multi_class_dice_ce_sum(pred, target) * (float("nan") if is_sixth else 1.0)


class WrongInTraining(nn.Module):
    """A loss that raises an error of its own, after the dry run."""

    calls = 0

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        WrongInTraining.calls += torch.is_grad_enabled()
        if torch.is_grad_enabled() and WrongInTraining.calls > 1:
            raise LookupError("this and nothing else")
        return multi_class_dice_ce_sum(pred, target)


@pytest.mark.parametrize("routine", ROUTINES)
def test_what_goes_wrong_is_reported_in_the_same_words(end_of, tmp_path, routine):
    load_routine(routine)
    NanInTheSixthBatch.calls = -1  # the first one is the dry run's
    with pytest.raises(NonFiniteLoss) as caught:
        end_of(routine, LOSS=NanInTheSixthBatch, CHECKPOINT_SECONDS=0)
    message = str(caught.value)
    assert message.startswith("the loss is nan in step 6 (epoch 2, batch 2), with image_")
    assert message.count(".npy") == 4
    assert "last-00000005.pt; try a smaller learning rate, CLIP_NORM=1, or" in message
    (row,) = rows_of(global_config_of(tmp_path / "run-0"))
    assert row["STATUS"] == "failed" and row["ERROR"].startswith("NonFiniteLoss: the loss is nan in step 6")
    weights = load_weights(tmp_path / "run-0" / "weights" / row["NAME"] / "last-00000005.pt")["model"]
    assert all(tensor.isfinite().all() for tensor in weights.values())
    WrongInTraining.calls = 0
    with pytest.raises(LookupError) as own:
        end_of(routine, LOSS=WrongInTraining)
    assert str(own.value) == "this and nothing else"
    (row,) = rows_of(global_config_of(tmp_path / "run-1"))
    assert (row["STATUS"], row["ERROR"]) == ("failed", "LookupError: this and nothing else")


@pytest.mark.parametrize("routine", ROUTINES)
def test_a_routine_can_be_read_in_one_sitting_and_offers_the_shared_config(routine):
    module = load_routine(routine)
    lines = Path(inspect.getfile(module)).read_text().splitlines()
    assert len(lines) < (110 if routine == "pytorch" else 180)
    assert module.train_config is config_module.train_config and module.VARIANTS is config_module.VARIANTS
