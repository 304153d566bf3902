"""Temperature and thresholds fit the validation data, are stored with the best weights, and are used."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dida_core.data.contract import DataContract
from dida_core.runs import run as run_module
from dida_core.storage.weights import load_weights
from dida_core.training.calibration import NLL, TEMPERATURES, describe_fit
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from sklearn import metrics as reference
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from dida_tools.training.pytorch_training import train
from dida_tools.utils.loss import dice_bce_sum, f1, masked_dice_bce_sum, masked_f1

from tests.helpers import fingerprint, rows_of

pytestmark = pytest.mark.usefixtures("quick")


# -------------------------------------------------------------------------------------------- the temperature


def draw(task: str, scale: float, seed: int = 0, size: int = 20) -> tuple[Tensor, Tensor]:
    """Return logits that are too confident by this factor, and targets, some of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(3, 3, size, size, generator=generator)
    if task == "multi-class":
        chances = logits.softmax(1).movedim(1, -1).reshape(-1, 3)
        targets = torch.multinomial(chances, 1, generator=generator).reshape(3, size, size)
    else:
        targets = (torch.rand(logits.shape, generator=generator) < logits.sigmoid()).long()
    targets[0, ..., :5] = 255
    return scale * logits, targets


def best_temperature(logits: Tensor, targets: Tensor, keep: Tensor) -> float:
    def likelihood(steps: float) -> float:
        scaled = logits.double() / math.exp(steps)
        if targets.ndim == 3:
            loss = functional.cross_entropy(scaled, targets.where(keep, 0), reduction="none")
        else:
            truth = targets.where(keep, 0).double()
            loss = functional.binary_cross_entropy_with_logits(scaled, truth, reduction="none")
        return loss[keep].sum().item()

    return math.exp(minimize_scalar(likelihood, bounds=(-2, 2), method="bounded", options={"xatol": 1e-9}).x)


def fit(logits: Tensor, targets: Tensor, **options: Any) -> float:
    nll = NLL(**options)
    nll.update(logits, targets)
    return nll.results()["temperature"]


@pytest.mark.parametrize("scale", [0.2, 0.9, 1.6, 5.5])
@pytest.mark.parametrize("task", ["multi-class", "multi-label"])
def test_the_temperature_is_that_of_an_optimizer_within_one_percent(task, scale):
    logits, targets = draw(task, scale)
    expected = best_temperature(logits, targets, targets != 255)
    assert expected == pytest.approx(scale, rel=0.15)
    assert fit(logits, targets) == pytest.approx(expected, rel=0.01)
    mask = (torch.rand(3, 1, 20, 20, generator=torch.Generator().manual_seed(1)) < 0.6).long()
    if task == "multi-label":
        masked = fit(logits, torch.cat([mask, targets], 1), is_masked=True)
        expected = best_temperature(logits, targets, (targets != 255) & (mask == 1))
        assert masked == pytest.approx(expected, rel=0.01)


@settings(max_examples=10, deadline=None)
@given(st.data(), st.sampled_from(["multi-class", "multi-label"]), st.integers(1, 3), st.integers(2, 20))
def test_the_nll_is_the_same_for_all_batches_tiles_and_orders(data, task, batch_size, width):
    logits, targets = draw(task, 2.0)
    whole, parts = (NLL() for _ in range(2))
    whole.update(logits, targets)
    pieces = [
        (logits[batch, ..., left], targets[batch, ..., left])
        for batch in map(slice, range(0, 3, batch_size), range(batch_size, 3 + batch_size, batch_size))
        for left in map(slice, range(0, 20, width), range(width, 20 + width, width))
    ]
    for piece in data.draw(st.permutations(pieces)):
        parts.update(*piece)
    assert parts.sums == whole.sums and all(type(one) is int for one in parts.sums)


def test_where_nothing_is_to_be_fitted_the_temperature_is_one():
    assert NLL().results() == {"temperature": 1.0}
    logits, targets = draw("multi-class", 2.0)
    assert fit(logits, torch.full_like(targets, 255)) == 1.0
    assert fit(torch.zeros_like(logits), targets) == 1.0
    assert fit(logits, logits[:, :2]) == 1.0  # no classes


def test_the_temperature_stays_in_its_range():
    targets = torch.tensor([0, 1, 2])
    right, wrong = 3.0 * functional.one_hot(targets, 3), 3.0 * functional.one_hot(targets.roll(1), 3)
    assert TEMPERATURES[0] <= fit(right, targets) < 0.2 and fit(wrong, targets) == TEMPERATURES[-1]
    huge = torch.tensor([[math.inf, 0.0], [1e30, -1e30], [math.nan, 1.0]])
    assert TEMPERATURES[0] <= fit(huge, torch.tensor([0, 1, 1])) <= TEMPERATURES[-1]


@pytest.mark.parametrize("temperature", [TEMPERATURES[0], 0.1251, 1.0, 7.999, TEMPERATURES[-1]])
def test_a_temperature_at_the_bound_of_its_search_is_not_reported_as_fitted(temperature):
    name = "temperature_at_bound" if temperature in (0.125, 8.0) else "temperature"
    assert describe_fit(DataContract(3, temperature=temperature)) == {name: temperature}


# ------------------------------------------------------------------------------------------------ whole runs


def make_labels(number: int, seed: int) -> TensorDataset:
    """Two labels that overlap, the second a rare one; the third channel has nothing to do with them."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(number, 3, 12, 12, generator=generator)
    noisy = images[:, :2] + 0.7 * torch.randn(number, 2, 12, 12, generator=generator)
    return TensorDataset(images, (noisy > torch.tensor([0.2, 1.8]).reshape(1, 2, 1, 1)).float())


TRAIN, VALIDATION, TEST = make_labels(20, 0), make_labels(12, 1), make_labels(12, 2)


@pytest.fixture
def label_config(tiny_config) -> dict[str, Any]:
    model = {"in_channels": 3, "out_channels": 2, "kernel_size": 1}
    tiny_config |= {"MODEL": nn.Conv2d, "MODEL_CONFIG": model, "OPTIMIZER_CONFIG": {"lr": 0.2}}
    return tiny_config | {"LOSS": dice_bce_sum, "METRICS": {"f1": f1}, "EPOCHS": 4}


def logits_of(result: Any, dataset: TensorDataset) -> Tensor:
    model = nn.Conv2d(3, 2, 1)
    model.load_state_dict(load_weights(result.weights["best"])["model"])
    with torch.no_grad():
        return model(dataset.tensors[0])


def contract_of(result: Any) -> DataContract:
    return DataContract.from_dict(load_weights(result.weights["best"])["contract"])


def test_they_are_those_of_the_validation_data_and_the_test_set_is_evaluated_with_them(
    label_config, global_config
):
    result = train(TRAIN, TEST, label_config, global_config, VALIDATION)
    contract, (logits, targets) = contract_of(result), (logits_of(result, VALIDATION), VALIDATION.tensors[1])
    expected = best_temperature(logits, targets, torch.ones_like(targets, dtype=torch.bool))
    assert contract.temperature == pytest.approx(expected, rel=0.01) and abs(expected - 1) > 0.05
    assert contract.temperature == result.metrics["validation.temperature"]
    probabilities = contract.probabilities(logits)
    for number in range(2):
        assert contract.threshold[number] == result.metrics[f"validation.threshold.{number}"]
        truth, chance = targets[:, number].flatten().numpy(), probabilities[:, number].flatten().numpy()
        precision, recall, _ = reference.precision_recall_curve(truth, chance)
        best = (2 * precision * recall / np.maximum(precision + recall, 1e-9)).max()
        reached = reference.f1_score(truth, chance >= np.float32(contract.threshold[number]))
        assert best - 0.01 < reached <= best + 1e-12
        assert reached > reference.f1_score(truth, chance >= 0.5)
    assert len({*contract.threshold, 0.5}) == 3

    probabilities = contract.probabilities(logits_of(result, TEST))
    truth, guess, chances = (
        one.movedim(1, -1).reshape(-1, 2).numpy()
        for one in (TEST.tensors[1], contract.classes(probabilities), probabilities)
    )
    each = reference.f1_score(truth, guess, average=None)
    assert [result.metrics["test.f1.0"], result.metrics["test.f1.1"]] == pytest.approx(each, abs=1e-12)
    assert abs(each - reference.f1_score(truth, chances >= 0.5, average=None)).min() > 1e-4
    average_precision = reference.average_precision_score(truth, chances)
    assert result.metrics["test.average_precision"] == pytest.approx(average_precision, abs=0.01)
    assert result.metrics["test.ignored_pixels"] == 0


def test_the_fit_changes_the_contract_of_the_best_weights_alone_and_is_reported(
    datasets, tiny_config, global_config, monkeypatch, capsys
):
    before: dict[str, Any] = {}

    def look(setup: Any, model: nn.Module) -> Any:
        (file,) = Path(global_config["WEIGHT_DIR"]).glob("*/best.pt")
        before.update(load_weights(file))
        return calibrate(setup, model)

    calibrate = run_module.calibrate
    monkeypatch.setattr(run_module, "calibrate", look)
    result = train(*datasets, tiny_config | {"EMA": 0.9}, global_config)
    after = load_weights(result.weights["best"])
    assert before["model"].keys() == after["model"].keys()
    assert all(torch.equal(tensor, after["model"][name]) for name, tensor in before["model"].items())
    changed = {key for key, value in after["contract"].items() if before["contract"][key] != value}
    assert changed == {"temperature"}
    (row,), said = rows_of(global_config), capsys.readouterr()
    assert row["validation.temperature"] == after["contract"]["temperature"] != 1
    assert "validation.threshold" not in row and row["test.ignored_pixels"] == 0
    assert {f"test.average_precision.{number}" for number in range(3)} <= row.keys()
    lines = (said.out + said.err).splitlines()
    line = next(line for line in lines if "average precision" in line)
    for name, column in (("average precision", "test.average_precision"), ("calibration error", "test.ece")):
        assert 0 < row[column] <= 1 and f"{name} {row[column]:.4f}" in line
    assert f"temperature {row['validation.temperature']:.4f}" in line and "threshold" not in line
    assert "ignored" not in "".join(lines) and len(line) < 120


def test_masked_targets_are_fitted_to_the_usable_pixels(label_config, global_config, capsys):
    def masked(dataset: TensorDataset) -> TensorDataset:
        images, labels = dataset.tensors
        mask = torch.ones(len(images), 1, 12, 12)
        mask[:, :, :6] = 0
        wrong = labels.clone()
        wrong[:, :, :6] = 1 - wrong[:, :, :6]
        return TensorDataset(images, torch.cat([mask, wrong], 1))

    def half(dataset: TensorDataset) -> TensorDataset:
        return TensorDataset(*(tensor[:, :, 6:].contiguous() for tensor in dataset.tensors))

    results = []
    for change, loss, metric in ((masked, masked_dice_bce_sum, masked_f1), (half, dice_bce_sum, f1)):
        config = label_config | {"LOSS": loss, "METRICS": {"f1": metric}, "OPTIMIZER_CONFIG": {"lr": 0.0}}
        sets = [change(one) for one in (TRAIN, TEST, VALIDATION)]
        results.append(train(*sets[:2], config, global_config, sets[2]))
    first, second = (contract_of(result) for result in results)
    assert (first.temperature, first.threshold) == (second.temperature, second.threshold)
    assert results[0].metrics["test.f1"] == results[1].metrics["test.f1"]
    assert [one.metrics["test.ignored_pixels"] for one in results] == [12 * 2 * 6 * 12, 0]
    said = capsys.readouterr()
    assert "; 1,728 pixels are ignored" in said.out + said.err


def test_a_single_label_without_counted_metrics_has_a_plain_threshold(label_config, global_config):
    sets = [TensorDataset(images, labels[:, 1:]) for images, labels in (TRAIN.tensors, TEST.tensors)]
    label_config |= {"METRICS": {}, "MONITOR": "min loss"}
    label_config["MODEL_CONFIG"] = label_config["MODEL_CONFIG"] | {"out_channels": 1}
    result = train(*sets, label_config, global_config)
    assert contract_of(result).threshold == result.metrics["validation.threshold"] != 0.5
    assert contract_of(result).temperature == result.metrics["validation.temperature"] != 1
    assert result.metrics["test.average_precision"] > 0.5


@pytest.mark.parametrize("missing", ["validation data", "classes"])
def test_without_validation_data_or_classes_nothing_is_fitted(label_config, global_config, missing):
    if missing == "classes":
        values = TensorDataset(TRAIN.tensors[0], TRAIN.tensors[0][:, :2] + 0.5)
        changes: dict[str, Any] = {"LOSS": nn.MSELoss, "METRICS": {}, "MONITOR": "min loss"}
        result = train(values, values, label_config | changes, global_config)
        assert set(result.metrics) == {"validation.loss", "test.loss"}
    else:
        result = train(TRAIN, TEST, label_config | {"VALIDATION_FRACTION": 0.0}, global_config)
        logits, targets = logits_of(result, TEST), TEST.tensors[1]
        each = [reference.f1_score(targets[:, n].flatten(), logits[:, n].flatten() >= 0) for n in range(2)]
        assert [result.metrics["test.f1.0"], result.metrics["test.f1.1"]] == pytest.approx(each, abs=1e-12)
    assert (contract_of(result).temperature, contract_of(result).threshold) == (1.0, 0.5)
    assert not [key for key in result.metrics if key.startswith(("validation.temp", "validation.thres"))]


def test_a_run_that_ends_while_it_is_fitted_or_tested_resumes_to_the_same_end(
    label_config, global_config, tmp_path, monkeypatch
):
    whole = train(TRAIN, TEST, label_config, {key: str(tmp_path / f"whole_{key}") for key in global_config})
    for ended_in in ("calibrate", "evaluate"):

        def fail(*_: Any) -> Any:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(run_module, ended_in, fail)
            train(TRAIN, TEST, label_config, global_config)
        again = train(TRAIN, TEST, label_config | {"RESUME": "auto"}, global_config)
        best, best_of_whole = (load_weights(result.weights["best"]) for result in (again, whole))
        assert (best.pop("run"), best_of_whole.pop("run")) == (again.name, whole.name)
        assert fingerprint(best) == fingerprint(best_of_whole)
        assert again.metrics == whole.metrics
    longer = train(TRAIN, TEST, label_config | {"RESUME": again.name, "EPOCHS": 6}, global_config)
    assert longer.state.epoch == 6
    assert contract_of(longer).temperature == longer.metrics["validation.temperature"]
