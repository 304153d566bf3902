"""The raw routine: it trains what it is told, evaluates honestly, and leaves what it promises."""

import copy
import io
import itertools
import json
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from dida_tools.config.capture import capture
from dida_tools.config.errors import ConfigError, UserError
from dida_tools.config.project import project_of
from dida_tools.models import UNET
from dida_tools.training import pytorch_training
from dida_tools.training.pytorch_training import train
from dida_tools.training.run import NonFiniteLoss, OutOfMemory
from dida_tools.training.setup import prepare
from dida_tools.utils.data import NpyDataset
from dida_tools.utils.data.contract import DataContract
from dida_tools.utils.data.images import DataError
from dida_tools.utils.logging import read_log
from dida_tools.utils.logging.journal import read_journal
from dida_tools.utils.loss import (
    accuracy,
    f1,
    masked_dice_bce_sum,
    masked_f1,
    masked_multi_class_dice_ce_sum,
    multi_class_dice_ce_sum,
    smooth_dice_loss,
)
from dida_tools.utils.torchutils import load_model, set_seed
from dida_tools.utils.weights import load_weights, save_weights, weights_digest

pytestmark = pytest.mark.usefixtures("quick")


def last_state(result) -> dict:
    return load_weights(result.weights["last"])


def the_row(global_config: dict) -> dict:
    rows = read_log(Path(global_config["LOG_DIR"]) / "experiments.csv")
    assert len(rows) == 1
    return rows[0]


def initial_model(config: dict) -> nn.Module:
    set_seed(config.get("SEED", 0))
    return config["MODEL"](**config["MODEL_CONFIG"])


# ------------------------------------------------------------------------------------------------------ what it learns


def test_it_learns(datasets, tiny_config, global_config):
    result = train(*datasets, tiny_config | {"EPOCHS": 25}, global_config)
    losses = [event["train.loss"] for event in result.history]
    assert len(losses) == 25
    assert losses[-1] < 0.6 * losses[0]
    assert result.metrics["test.f1"] > 0.8
    before, after = initial_model(tiny_config).state_dict(), last_state(result)["model"]
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_the_same_config_gives_the_same_weights_and_another_seed_others(datasets, tiny_config, global_config):
    digests = [train(*datasets, tiny_config | {"SEED": seed}, global_config).digest for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_number_of_workers_does_not_change_the_weights(datasets, tiny_config, global_config, precision):
    tiny_config["PRECISION"] = precision
    loader = tiny_config["DATA_LOADER_CONFIG"]
    results = [
        train(
            *datasets, tiny_config | {"DATA_LOADER_CONFIG": loader | {"num_workers": workers}}, global_config
        )
        for workers in (0, 2)
    ]
    assert results[0].digest == results[1].digest
    assert [event["train.loss"] for event in results[0].history] == [
        event["train.loss"] for event in results[1].history
    ]


def test_what_happens_to_the_generators_outside_does_not_matter(datasets, tiny_config, global_config):
    first = train(*datasets, tiny_config, global_config)
    torch.manual_seed(1234)
    np.random.seed(99)
    assert train(*datasets, tiny_config, global_config).digest == first.digest


# --------------------------------------------------------------------------------------------- modes, order, selection


class ModeLog(nn.Module):
    """A pixel-wise model that notes the mode of each forward pass."""

    modes: list[tuple[bool, int]] = []  # noqa: RUF012

    def __init__(self, ch_in: int, ch_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(ch_in, ch_out, 1)
        self.norm = nn.BatchNorm2d(ch_out)

    def forward(self, x: Tensor) -> Tensor:
        ModeLog.modes.append((self.training, len(x)))
        return self.norm(self.conv(x))


def test_every_epoch_trains_in_training_mode_and_evaluates_in_evaluation_mode(
    datasets, tiny_config, global_config
):
    ModeLog.modes.clear()
    config = tiny_config | {"MODEL": ModeLog, "MODEL_CONFIG": {"ch_in": 3, "ch_out": 3}, "EPOCHS": 3}
    result = train(*datasets, config, global_config)
    trained = [size for training, size in ModeLog.modes if training]
    assert len(trained) == 3 * 4
    evaluated = [size for training, size in ModeLog.modes if not training]
    assert len(evaluated) > 3
    running = last_state(result)["model"]["norm.num_batches_tracked"]
    assert running == 3 * 4  # evaluation left the statistics alone


class Recorded(Dataset):
    """Notes which samples are asked for."""

    def __init__(self, dataset, log: list[int]) -> None:
        self.dataset, self.log = dataset, log

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        self.log.append(index)
        return self.dataset[index]


def test_training_is_shuffled_and_complete_and_the_test_set_is_read_in_order_and_once(
    pairs_dir, tiny_config, global_config
):
    sets = [NpyDataset(pairs_dir / part / "x", pairs_dir / part / "y") for part in ("train", "test")]
    train_log, test_log = [], []
    config = tiny_config | {"EPOCHS": 3, "VALIDATION_FRACTION": 0}
    train(Recorded(sets[0], train_log), Recorded(sets[1], test_log), config, global_config)
    epochs = [train_log[start : start + 10] for start in range(len(train_log) - 30, len(train_log), 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != list(range(10))
    in_order = [index for index, following in itertools.pairwise(test_log) if following == index + 1]
    assert in_order[:3] == [0, 1, 2]


class CountedTestSet(NpyDataset):
    """Counts how often each sample is read."""

    reads: dict[int, int] = {}  # noqa: RUF012

    def __getitem__(self, index: int):
        if self._windows is not None:
            CountedTestSet.reads[index] = CountedTestSet.reads.get(index, 0) + 1
        return super().__getitem__(index)


def test_the_test_set_takes_no_part_in_selection(datasets, pairs_dir, tiny_config, global_config):
    usual = train(*datasets, tiny_config, global_config)
    swapped = NpyDataset(pairs_dir / "train" / "x", pairs_dir / "train" / "y")
    other = train(datasets[0], swapped, tiny_config, global_config)
    assert usual.digest == other.digest
    assert usual.state.best_epoch == other.state.best_epoch
    assert usual.metrics["test.f1"] != other.metrics["test.f1"]


def test_without_a_test_set_it_trains_too(datasets, tiny_config, global_config):
    result = train(datasets[0], None, tiny_config, global_config)
    assert not any(key.startswith("test.") for key in result.metrics)
    assert any(key.startswith("validation.") for key in result.metrics)


def test_the_best_weights_are_those_of_the_best_epoch_and_give_the_test_result(
    datasets, tiny_config, global_config
):
    # The smallest F1 is wanted, so that the best epoch is not the last one.
    result = train(*datasets, tiny_config | {"EPOCHS": 6, "MONITOR": "min f1"}, global_config)
    scores = [event["validation.f1"] for event in result.history]
    assert result.state.best_epoch == 1 + int(np.argmin(scores)) != 6
    assert result.metrics["validation.f1"] == min(scores)
    model = load_model(result.weights["best"], UNET, tiny_config["MODEL_CONFIG"])
    contract = DataContract.from_dict(load_weights(result.weights["best"])["contract"])
    test_set = datasets[1].with_contract(contract).for_evaluation()
    with torch.no_grad():
        pairs = [
            (model(image[None])[0].argmax(0), mask)
            for image, mask in (test_set[i] for i in range(len(test_set)))
        ]
    predicted = torch.cat([guess.flatten() for guess, _ in pairs])
    target = torch.cat([mask.flatten() for _, mask in pairs])
    assert result.metrics["test.f1"] == pytest.approx(f1_score(target, predicted, average="macro"), abs=1e-12)
    per_class = f1_score(target, predicted, average=None)
    assert [result.metrics[f"test.f1.{label}"] for label in range(3)] == pytest.approx(per_class, abs=1e-12)


def test_the_contract_holds_the_statistics_of_the_training_part_alone(datasets, tiny_config, global_config):
    result = train(*datasets, tiny_config, global_config)
    contract = load_weights(result.weights["best"])["contract"]
    train_part, _ = datasets[0].split(0.2, seed=0)
    pixels = np.concatenate([np.load(file).reshape(-1, 3) for file in train_part.images]) / 255
    assert contract["mean"] == pytest.approx(pixels.mean(0))
    assert contract["std"] == pytest.approx(pixels.std(0))
    assert len(train_part.images) == 8


def test_a_given_validation_set_selects(datasets, tiny_config, global_config):
    result = train(*datasets, tiny_config, global_config, validation_dataset=datasets[1])
    assert result.metrics["validation.f1"] == result.metrics["test.f1"]


def test_without_validation_the_last_weights_are_the_best(datasets, tiny_config, global_config):
    result = train(*datasets, tiny_config | {"VALIDATION_FRACTION": 0}, global_config)
    best = load_weights(result.weights["best"])["model"]
    assert weights_digest(best) == result.digest
    assert result.state.best_epoch == 2


def test_it_stops_when_nothing_improves(datasets, tiny_config, global_config, capsys):
    config = tiny_config | {"EPOCHS": 30, "PATIENCE": 2, "OPTIMIZER_CONFIG": {"lr": 0.0}}
    result = train(*datasets, config, global_config)
    assert result.state.stopped
    assert len(result.history) == result.state.best_epoch + 2 < 30
    assert "training stops here" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------- the optimization


def test_accumulation_makes_the_steps_of_larger_batches(datasets, tiny_config, global_config):
    tiny_config |= {
        "OPTIMIZER": torch.optim.SGD,
        "OPTIMIZER_CONFIG": {"lr": 0.1},
        "EPOCHS": 1,
        "VALIDATION_FRACTION": 0,
    }
    tiny_config["MODEL_CONFIG"] |= {"dropout": 0.0, "norm": None}
    states = []
    for batch_size, accumulate in ((8, 1), (4, 2), (2, 4)):
        config = tiny_config | {"DATA_LOADER_CONFIG": {"batch_size": batch_size}, "ACCUMULATE": accumulate}
        result = train(*datasets, config, global_config)
        assert result.state.step == 3  # 20 samples: 8, 8, and 4 in fewer batches
        states.append(last_state(result)["model"])
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(states[0][name], states[2][name], rtol=1e-4, atol=1e-5)


def test_the_norm_of_the_gradient_is_clipped(datasets, tiny_config, global_config):
    tiny_config |= {"OPTIMIZER": torch.optim.SGD, "OPTIMIZER_CONFIG": {"lr": 1.0}, "EPOCHS": 1}
    tiny_config |= {"DATA_LOADER_CONFIG": {"batch_size": 100}}
    before = initial_model(tiny_config)
    moved = {}
    for clip in (None, 1e-3):
        after = last_state(train(*datasets, tiny_config | {"CLIP_NORM": clip}, global_config))["model"]
        steps = [
            (after[name] - parameter.detach()).flatten() for name, parameter in before.named_parameters()
        ]
        moved[clip] = torch.cat(steps).norm().item()
    assert moved[1e-3] == pytest.approx(1e-3, rel=1e-2)
    assert moved[None] > 10 * moved[1e-3]


def test_the_moving_average_is_evaluated_and_becomes_the_best(datasets, tiny_config, global_config):
    tiny_config |= {"OPTIMIZER": SteppedSGD, "OPTIMIZER_CONFIG": {"lr": 0.1}, "EPOCHS": 1, "EMA": 0.5}
    SteppedSGD.after_steps.clear()
    result = train(*datasets, tiny_config, global_config)
    expected = SteppedSGD.after_steps[0]
    for weights in SteppedSGD.after_steps[1:]:
        expected = [0.5 * old + 0.5 * new for old, new in zip(expected, weights, strict=True)]
    best = load_weights(result.weights["best"])["model"]
    names = [name for name, _ in initial_model(tiny_config).named_parameters()]
    for name, tensor in zip(names, expected, strict=True):
        torch.testing.assert_close(best[name], tensor)
        assert not torch.equal(best[name], last_state(result)["model"][name])


class SteppedSGD(torch.optim.SGD):
    """Notes the weights after each step."""

    after_steps: list[list[Tensor]] = []  # noqa: RUF012

    def step(self, closure=None):
        super().step(closure)
        SteppedSGD.after_steps.append(
            [p.detach().clone() for group in self.param_groups for p in group["params"]]
        )


@pytest.mark.parametrize(
    ("scheduler", "options", "when", "expected"),
    [
        (torch.optim.lr_scheduler.StepLR, {"step_size": 1, "gamma": 0.5}, "epoch", [0.1] * 4 + [0.05] * 4),
        (torch.optim.lr_scheduler.StepLR, {"step_size": 4, "gamma": 0.1}, "step", [0.1] * 4 + [0.01] * 4),
        (
            torch.optim.lr_scheduler.LinearLR,
            {"start_factor": 0.5, "total_iters": 1},
            "epoch",
            [0.05] * 4 + [0.1] * 4,
        ),
    ],
)
def test_the_schedule_steps_when_it_is_told_to(
    datasets, tiny_config, global_config, scheduler, options, when, expected
):
    tiny_config |= {"SCHEDULER": scheduler, "SCHEDULER_CONFIG": options, "SCHEDULER_STEP": when}
    result = train(*datasets, tiny_config | {"OPTIMIZER_CONFIG": {"lr": 0.1}}, global_config)
    events = read_journal(result.log_dir / "journal.jsonl")
    rates = [event["learning_rate"] for event in events if event["event"] == "step"]
    assert rates == pytest.approx(expected)


def test_length_and_rate_of_a_schedule_are_filled_in(datasets, tiny_config, global_config):
    tiny_config |= {"SCHEDULER": torch.optim.lr_scheduler.OneCycleLR, "EPOCHS": 3}
    result = train(*datasets, tiny_config, global_config)
    events = read_journal(result.log_dir / "journal.jsonl")
    rates = [event["learning_rate"] for event in events if event["event"] == "step"]
    assert len(rates) == 12
    assert max(rates) <= 1e-2
    assert rates[-1] < 1e-3 < rates[3]


def test_a_schedule_can_follow_the_monitored_result(datasets, tiny_config, global_config):
    tiny_config |= {
        "SCHEDULER": torch.optim.lr_scheduler.ReduceLROnPlateau,
        "SCHEDULER_STEP": "epoch",
        "EPOCHS": 6,
    }
    tiny_config |= {"SCHEDULER_CONFIG": {"mode": "max", "patience": 0, "threshold": 10.0}}
    result = train(*datasets, tiny_config, global_config)
    events = read_journal(result.log_dir / "journal.jsonl")
    rates = [event["learning_rate"] for event in events if event["event"] == "step"]
    assert rates[0] == 1e-2
    assert rates[-1] < 1e-4


def test_it_starts_from_given_weights(datasets, tiny_config, global_config, tmp_path):
    torch.manual_seed(7)
    given = UNET(**tiny_config["MODEL_CONFIG"])
    for kind, file in (("ours", tmp_path / "a.pt"), ("bare", tmp_path / "b.pt")):
        if kind == "ours":
            save_weights(file, {"model": given.state_dict()})
        else:
            torch.save(given.state_dict(), file)
        config = tiny_config | {
            "INIT_WEIGHTS": str(file),
            "OPTIMIZER_CONFIG": {"lr": 0.0, "weight_decay": 0.0},
        }
        after = last_state(train(*datasets, config, global_config))["model"]
        assert all(torch.equal(after[name], tensor) for name, tensor in given.named_parameters())


def test_bf16_trains_to_nearly_the_same_and_keeps_weights_in_float32(datasets, tiny_config, global_config):
    results = [
        train(*datasets, tiny_config | {"PRECISION": kind}, global_config) for kind in ("fp32", "bf16")
    ]
    assert results[0].digest != results[1].digest
    assert all(
        tensor.dtype == torch.float32 for tensor in last_state(results[1])["model"].values() if tensor.ndim
    )
    losses = [result.history[-1]["train.loss"] for result in results]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_it_trains_on_a_gpu_repeatably(datasets, tiny_config, global_config, precision):
    config = tiny_config | {"DEVICE": "cuda", "PRECISION": precision, "EPOCHS": 10}
    results = [train(*datasets, config, global_config) for _ in range(2)]
    assert results[0].digest == results[1].digest
    assert results[0].history[-1]["train.loss"] < results[0].history[0]["train.loss"]


# ------------------------------------------------------------------------------------- any model, any data, any metric


def test_a_classifier_of_another_library_trains(tiny_config, global_config):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(120, 5, generator=generator)
    labels = (features[:, 0] + features[:, 1] > 0).long()
    sets = TensorDataset(features[:90], labels[:90]), TensorDataset(features[90:], labels[90:])
    tiny_config |= {"MODEL": nn.Linear, "MODEL_CONFIG": {"in_features": 5, "out_features": 2}, "EPOCHS": 30}
    tiny_config |= {"LOSS": nn.CrossEntropyLoss, "METRICS": {"accuracy": accuracy, "f1": f1}}
    result = train(*sets, tiny_config, global_config)
    assert result.metrics["test.accuracy"] > 0.9
    assert the_row(global_config)["RERUNNABLE"].startswith("no: the datasets are not named")


def absolute_error(pred: Tensor, target: Tensor) -> Tensor:
    return (pred - target).abs().mean()


def test_a_regression_trains_and_plain_metrics_are_means_over_samples(tiny_config, global_config):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(150, 4, generator=generator)
    values = features @ torch.tensor([[1.0], [-2.0], [0.5], [0.0]])
    sets = TensorDataset(features[:120], values[:120]), TensorDataset(features[120:], values[120:])
    tiny_config |= {"MODEL": nn.Linear, "MODEL_CONFIG": {"in_features": 4, "out_features": 1}, "EPOCHS": 60}
    tiny_config |= {
        "LOSS": nn.functional.mse_loss,
        "METRICS": {"error": absolute_error},
        "MONITOR": "min error",
    }
    result = train(*sets, tiny_config, global_config)
    model = load_model(result.weights["best"], nn.Linear, {"in_features": 4, "out_features": 1})
    with torch.no_grad():
        expected = (model(features[120:]) - values[120:]).abs().mean().item()
    assert result.metrics["test.error_sample_mean"] == pytest.approx(expected, rel=1e-5)
    assert expected < 0.2


def test_binary_masks_of_0_and_255_are_mapped_by_the_config(pairs_dir, tmp_path, tiny_config, global_config):
    for part in ("train", "test"):
        for kind in ("x", "y"):
            (tmp_path / part / kind).mkdir(parents=True)
            for file in (pairs_dir / part / kind).iterdir():
                array = np.load(file)
                np.save(
                    tmp_path / part / kind / file.name, array if kind == "x" else np.uint8(255) * (array > 0)
                )
    make = partial(NpyDataset, task="multi-label")
    sets = [make(tmp_path / part / "x", tmp_path / part / "y") for part in ("train", "test")]
    tiny_config["MODEL_CONFIG"]["ch_out"] = 1
    tiny_config |= {"LOSS": smooth_dice_loss, "EPOCHS": 30, "MASK_VALUES": {255: 1}}
    result = train(*sets, tiny_config, global_config)
    assert result.metrics["test.f1"] > 0.7
    with pytest.raises(DataError, match=r"255.*MASK_VALUES"):
        train(*sets, tiny_config | {"MASK_VALUES": None}, global_config)


def test_a_lambda_trains_where_the_user_asks_for_it_and_the_row_says_so(datasets, tiny_config, global_config):
    config = tiny_config | {"LOSS": lambda pred, target: multi_class_dice_ce_sum(pred, target)}
    with pytest.raises(ConfigError, match="lambda"):
        train(*datasets, config, global_config)
    train(*datasets, config | {"REQUIRE_RERUNNABLE": False}, global_config)
    assert "LOSS" in the_row(global_config)["RERUNNABLE"]


class LabeledImages(Dataset):
    """Bright or dark images with plain numbers as labels, as torchvision's datasets give them."""

    def __init__(self, number: int, seed: int) -> None:
        self.labels = [index % 2 for index in range(number)]
        generator = torch.Generator().manual_seed(seed)
        self.images = [torch.randn(3, 8, 8, generator=generator) + label for label in self.labels]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.labels[index]


class MeanClassifier(nn.Module):
    """Classifies by the mean color."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean((-2, -1)))


def test_images_with_plain_numbers_as_labels_train(tiny_config, global_config):
    tiny_config |= {
        "MODEL": MeanClassifier,
        "MODEL_CONFIG": {},
        "EPOCHS": 20,
        "OPTIMIZER_CONFIG": {"lr": 0.1},
    }
    tiny_config |= {"LOSS": nn.CrossEntropyLoss, "METRICS": {"accuracy": accuracy}, "MONITOR": "max accuracy"}
    result = train(LabeledImages(40, 0), LabeledImages(20, 1), tiny_config, global_config)
    assert result.metrics["test.accuracy"] == 1.0
    assert load_weights(result.weights["best"])["contract"]["task"] == "multi-class"


@pytest.mark.parametrize(
    ("loss", "channels", "task"),
    [(masked_multi_class_dice_ce_sum, 2, "multi-class"), (masked_dice_bce_sum, 4, "multi-label")],
)
def test_the_task_of_masked_targets_is_that_of_what_is_under_the_mask(
    tiny_config, global_config, loss, channels, task
):
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 2 if task == "multi-label" else 3, (8, channels, 16, 16), generator=generator)
    targets[:, 0] = 1  # all usable
    targets[:, 0, :4], targets[:, 1:, :4] = 0, 77  # but these, where anything may stand
    tiny_config |= {"LOSS": loss, "METRICS": {"f1": masked_f1}}
    for anything in (targets, targets.float().masked_fill(targets == 77, math.nan)):
        if task == "multi-class" and anything.is_floating_point():
            continue  # NaN is no class number, not even one that does not count
        train_set = TensorDataset(torch.rand(8, 3, 16, 16, generator=generator), anything)
        contract = prepare(train_set, train_set, tiny_config, global_config, None, "dida_tools").contract
        assert contract.task == task
    result = train(train_set, train_set, tiny_config, global_config)
    assert load_weights(result.weights["best"])["contract"]["task"] == task


def test_data_that_the_config_does_not_name_is_not_recorded_under_its_name(tiny_config, global_config):
    shipped = pytorch_training.small()
    tiny_config |= {key: shipped[key] for key in ("DATASET", "DATASET_CONFIG")}
    tiny_config |= {"MODEL": MeanClassifier, "MODEL_CONFIG": {}, "LOSS": nn.CrossEntropyLoss, "METRICS": {}}
    train(LabeledImages(20, 0), LabeledImages(8, 1), tiny_config | {"MONITOR": "min loss"}, global_config)
    row = the_row(global_config)
    assert row["RERUNNABLE"].startswith("no: the datasets are not named")
    assert row["DATASET"] is None


def test_a_regression_whose_first_target_is_zero_is_no_classification(tiny_config, global_config):
    values = torch.tensor([[0.0], [3.7], [1.0], [2.5]] * 5)
    sets = [TensorDataset(values.repeat(1, 4), values)] * 2
    tiny_config |= {"MODEL": nn.Linear, "MODEL_CONFIG": {"in_features": 4, "out_features": 1}}
    tiny_config |= {"LOSS": nn.MSELoss, "METRICS": {}, "MONITOR": "min loss"}
    result = train(*sets, tiny_config, global_config)
    assert load_weights(result.weights["best"])["contract"]["task"] == "values"


# ----------------------------------------------------------------------------------------------------- what it leaves


def test_config_files_row_and_result_agree(datasets, tiny_config, global_config, capsys, monkeypatch):
    monkeypatch.undo()  # with a picture and the list of packages
    before = copy.deepcopy(capture(tiny_config, project_of("dida_tools")))
    result = train(*datasets, tiny_config, global_config)
    assert capture(tiny_config, project_of("dida_tools")) == before
    row = the_row(global_config)
    assert row["NAME"] == result.name == result.log_dir.name == result.weight_dir.name
    assert row["STATUS"] == "finished"
    assert row["RERUNNABLE"] == "yes"
    assert row["test.f1"] == result.metrics["test.f1"]
    assert row["MODEL"] == ".models.unet:UNET"
    assert row["OPTIMIZER_CONFIG.lr"] == 1e-2
    assert row["DATASET_CONFIG.train.crop"] == 16
    assert row["WEIGHTS_DIGEST"] == result.digest == weights_digest(last_state(result)["model"])
    assert row["ROUTINE_NAME"] == ".training.pytorch_training"
    assert sorted(path.name for path in result.log_dir.iterdir() if not path.name.startswith(".")) == [
        "config.json", "environment.json", "journal.jsonl", "picture.png", "tensorboard",
    ]  # fmt: skip
    weights = sorted(path.name for path in result.weight_dir.iterdir())
    assert weights == ["best.pt", "last-00000004.pt", "last-00000008.pt"]
    environment = json.loads((result.log_dir / "environment.json").read_text())
    assert (environment["device"], environment["precision"]) == ("cpu", "fp32")
    assert row["RAN_ON"] == "cpu fp32"
    assert environment["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert len(environment["data"]) == 28
    printed = capsys.readouterr().out
    for text in (result.name, "best.pt", "experiments.csv", "picture.png", "run_prediction.py"):
        assert text in printed
    assert (result.log_dir / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_lines_that_cannot_be_printed_end_no_training(datasets, tiny_config, global_config, monkeypatch):
    with open("/dev/full", "wb", buffering=0) as file:  # as a job's output on a disk that is full
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file, write_through=True))
        with pytest.raises(OSError):
            print("anything")
        train(*datasets, tiny_config, global_config)
        monkeypatch.undo()
    assert the_row(global_config)["STATUS"] == "finished"


def test_two_runs_within_a_second_get_two_names(datasets, tiny_config, global_config):
    config = tiny_config | {"EPOCHS": 1, "DATE": "2021-01-01"}
    names = [train(*datasets, config, global_config).name for _ in range(2)]
    assert names == ["2021-01-01_tiny", "2021-01-01_tiny-2"]
    assert len(read_log(Path(global_config["LOG_DIR"]) / "experiments.csv")) == 2


def test_tensorboard_holds_scalars_and_pictures(datasets, tiny_config, global_config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(*datasets, tiny_config, global_config)
    events = EventAccumulator(str(result.log_dir / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 9))
    assert [event.value for event in events.Scalars("train/learning_rate")] == pytest.approx([1e-2] * 8)
    written = [event.value for event in events.Scalars("validation/f1")]
    assert written == pytest.approx([event["validation.f1"] for event in result.history])
    pictures = events.Tags()["images"]
    assert pictures == [f"test/image_{number:02d}.npy" for number in range(4)]
    assert len(events.Images(pictures[0])) == 2
    assert events.Images(pictures[0])[0].width == 3 * 32 + 2 * 4


def test_the_journal_has_every_step_and_epoch(datasets, tiny_config, global_config):
    result = train(*datasets, tiny_config, global_config)
    events = read_journal(result.log_dir / "journal.jsonl")
    assert [event["step"] for event in events if event["event"] == "step"] == list(range(1, 9))
    assert [event["epoch"] for event in events if event["event"] == "epoch"] == [1, 2]
    assert [event["event"] for event in events][-1] == "test"


# --------------------------------------------------------------------------------------------- what cannot go well


def test_all_problems_are_told_at_once_and_nothing_is_written(datasets, tiny_config, global_config):
    config = tiny_config | {"EPOCH": 3, "DEVICE": "cuda:77", "LOSS": lambda a, b: a, "ACCUMULATE": 0}
    config["MODEL_CONFIG"] = tiny_config["MODEL_CONFIG"] | {"dropuot": 0.1}
    with pytest.raises(ConfigError) as caught:
        train(*datasets, config, global_config)
    for part in ("EPOCHS?", "cuda:77", "lambda", "ACCUMULATE", "dropout?"):
        assert part in str(caught.value)
    assert not Path(global_config["ROOT_PATH"]).exists() or not list(
        Path(global_config["ROOT_PATH"]).rglob("config.json")
    )


def test_problems_of_config_and_data_are_told_together(
    tmp_path, pairs_dir, datasets, tiny_config, global_config
):
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    np.save(tmp_path / "x" / "broken.npy", np.full((32, 32, 3), np.nan, np.float32))
    np.save(tmp_path / "y" / "broken.npy", np.full((32, 32), 77, np.uint8))
    broken = NpyDataset(tmp_path / "x", tmp_path / "y", crop=16)
    with pytest.raises(ConfigError) as caught:
        train(broken, datasets[1], tiny_config | {"EPOCHS": 0}, global_config)
    for part in ("EPOCHS", "broken.npy", "NaN", "77"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MODEL_CONFIG": {"ch_in": 12, "ch_out": 3}}, "ch_in is 12, but the images have 3 channels"),
        ({"MODEL_CONFIG": {"ch_in": 3, "ch_out": 2}}, r"the values 2 are outside of the classes 0 to 1"),
        ({"LOSS": smooth_dice_loss}, "LOSS or METRICS do not fit"),
        ({"MONITOR": "max f1.nonsense"}, "f1.nonsense is not among the results"),
        ({"INIT_WEIGHTS": "nowhere.pt"}, "no such weights file"),
        ({"PRECISION": "fp16"}, "fp16"),
        ({"RESUME": "no-such-run"}, "no such run"),
        ({"PATIENCE": 3, "VALIDATION_FRACTION": 0}, "PATIENCE is 3, which needs a validation set"),
        ({"OPTIMIZER_CONFIG": {"lr": -1.0}}, "OPTIMIZER cannot be built"),
        ({"DATA_LOADER_CONFIG": {"batch_size": 4, "num_workers": -1}}, "DATA_LOADER cannot be built"),
        ({"SCHEDULER": torch.optim.lr_scheduler.ReduceLROnPlateau}, "SCHEDULER_STEP=epoch"),
        ({"IGNORE_INDEX": 9}, "IGNORE_INDEX is 9, but the train data ignores 255"),
    ],
)
def test_what_does_not_fit_is_told_before_training(datasets, tiny_config, global_config, changes, message):
    with pytest.raises(ValueError, match=message):
        train(*datasets, tiny_config | changes, global_config)
    assert not list(Path(global_config["ROOT_PATH"]).rglob("journal.jsonl"))


def test_a_schedule_that_follows_results_knows_which_way_is_better(datasets, tiny_config, global_config):
    tiny_config |= {"SCHEDULER": torch.optim.lr_scheduler.ReduceLROnPlateau, "SCHEDULER_STEP": "epoch"}
    setup = prepare(*datasets, tiny_config, global_config, None, "dida_tools")
    assert setup.scheduler.mode == "max"
    setup = prepare(*datasets, tiny_config | {"MONITOR": "min loss"}, global_config, None, "dida_tools")
    assert setup.scheduler.mode == "min"


def test_parts_with_several_tasks_are_refused(datasets, pairs_dir, tiny_config, global_config):
    other = NpyDataset(pairs_dir / "test" / "x", pairs_dir / "test" / "y", task="values")
    with pytest.raises(ConfigError, match="several tasks"):
        train(datasets[0], other, tiny_config, global_config)


def test_a_batch_too_small_for_batchnorm_is_explained(pairs_dir, tiny_config, global_config):
    sets = [NpyDataset(pairs_dir / part / "x", pairs_dir / part / "y", crop=2) for part in ("train", "test")]
    config = tiny_config | {"DATA_LOADER_CONFIG": {"batch_size": 1}}
    with pytest.raises(UserError, match=r"BatchNorm.*drop_last=True.*GroupNorm"):
        train(*sets, config, global_config)


class NanAfterSomeSteps(nn.Module):
    """A loss that breaks."""

    calls = 0

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            NanAfterSomeSteps.calls += 1
        value = multi_class_dice_ce_sum(pred, target)
        return value * (float("nan") if NanAfterSomeSteps.calls == 6 and torch.is_grad_enabled() else 1.0)


def test_a_loss_that_becomes_nan_stops_the_run_and_names_step_files_and_checkpoint(
    datasets, tiny_config, global_config
):
    NanAfterSomeSteps.calls = 0
    config = tiny_config | {"LOSS": NanAfterSomeSteps, "CHECKPOINT_SECONDS": 0}
    with pytest.raises(NonFiniteLoss) as caught:
        train(*datasets, config, global_config)
    message = str(caught.value)
    assert "step 6 (epoch 2, batch 2)" in message
    assert message.count(".npy") == 4
    assert "last-00000005.pt" in message
    row = the_row(global_config)
    assert row["STATUS"] == "failed"
    assert "NonFiniteLoss" in row["ERROR"]
    state = load_weights(Path(global_config["WEIGHT_DIR"]) / row["NAME"] / "last-00000005.pt")
    assert all(torch.isfinite(tensor).all() for tensor in state["model"].values())


def test_weights_that_are_not_finite_are_never_saved(datasets, tiny_config, global_config):
    config = tiny_config | {
        "OPTIMIZER": torch.optim.SGD,
        "OPTIMIZER_CONFIG": {"lr": 1e38},
        "CHECKPOINT_SECONDS": 0,
    }
    with pytest.raises(NonFiniteLoss):
        train(*datasets, config, global_config)
    for file in Path(global_config["WEIGHT_DIR"]).rglob("last-*.pt"):
        assert all(torch.isfinite(tensor).all() for tensor in load_weights(file)["model"].values())


class Glutton(nn.Module):
    """Wants more memory than there is, in training."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            torch.empty(2**60, dtype=torch.uint8)
        return self.conv(x)


def test_memory_that_runs_out_is_explained(datasets, tiny_config, global_config):
    with pytest.raises(OutOfMemory, match=r"batch_size=4.*batch_size=2 ACCUMULATE=2"):
        train(*datasets, tiny_config | {"MODEL": Glutton, "MODEL_CONFIG": {}}, global_config)
    assert the_row(global_config)["STATUS"] == "failed"


# ------------------------------------------------------------------------------------------------------ its own config


def test_the_shipped_configs_are_sound_and_round_trip():
    from dida_tools.config.capture import restore
    from dida_tools.config.check import check

    project = project_of("dida_tools")
    for config in (pytorch_training.train_config, pytorch_training.small()):
        captured = check(config, project)
        restored = restore(json.loads(json.dumps(captured)), project)
        assert capture(restored, project) == captured
    full = pytorch_training.train_config["MODEL_CONFIG"]
    assert sum(parameter.numel() for parameter in UNET(**full).parameters()) > 30e6
    assert math.isclose(pytorch_training.train_config["OPTIMIZER_CONFIG"]["lr"], 1e-3)


def test_only_the_folders_that_are_written_to_are_made(datasets, tiny_config, global_config, tmp_path):
    """An earlier generation made a folder of every value of the global config."""
    train(*datasets, tiny_config, global_config | {"NOTE": str(tmp_path / "no folder")})
    assert not (tmp_path / "no folder").exists()
    assert sorted(path.name for path in Path(global_config["ROOT_PATH"]).iterdir()) == ["logs", "weights"]


def write_set(folder: Path, change, num_images: int = 4) -> NpyDataset:
    rng = np.random.default_rng(5)
    for kind in "xy":
        (folder / kind).mkdir(parents=True)
    for number in range(num_images):
        image = rng.integers(1, 200, (16, 16, 3)).astype(np.float32)
        np.save(folder / "x" / f"{number}.npy", change(image).astype(np.float32))
        np.save(folder / "y" / f"{number}.npy", (image[..., 0] > 100).astype(np.uint8))
    return NpyDataset(folder / "x", folder / "y")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda image: image / 1000, "as if they had been divided by a number"),
        (lambda image: image + 5000, "with another offset"),
        (lambda image: image * [1, 0, 1], "channel 1 is constant"),
    ],
)
def test_test_images_unlike_those_of_training_are_refused_before_it(
    tmp_path, tiny_config, global_config, change, message
):
    train_set = write_set(tmp_path / "train", lambda image: image)
    test_set = write_set(tmp_path / "test", change)
    with pytest.raises(DataError, match=message):
        train(train_set, test_set, tiny_config | {"EPOCHS": 1}, global_config)
    assert not list(Path(global_config["LOG_DIR"]).glob("*/journal.jsonl"))


def test_a_channel_that_is_constant_in_training_is_said_and_trained_with(
    tmp_path, tiny_config, global_config
):
    sets = [write_set(tmp_path / part, lambda image: image * [1, 0, 1]) for part in ("train", "test")]
    with pytest.warns(UserWarning, match="channel 1 of the training images has the same value everywhere"):
        train(*sets, tiny_config | {"EPOCHS": 1}, global_config)
