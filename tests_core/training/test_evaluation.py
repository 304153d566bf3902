"""The evaluation of a dataset: the same for every batch size and order, and what goes into it."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from dida_core.errors import ConfigError
from dida_core.training.device import DeviceContext
from dida_core.training.evaluation import Evaluation, evaluate
from sklearn import metrics as reference
from torch import Tensor, nn
from torch.nn import functional

from dida_tools.utils.loss import accuracy, dice_bce_sum, f1, iou, multi_class_dice_ce_sum, precision, recall

CPU, TASKS = DeviceContext(torch.device("cpu")), ("binary", "multi-class", "multi-label")
COUNTED = {"f1": f1, "precision": precision, "recall": recall, "iou": iou, "accuracy": accuracy}
SCORES: dict[str, Callable] = {
    "f1": reference.f1_score,
    "precision": reference.precision_score,
    "recall": reference.recall_score,
    "iou": reference.jaccard_score,
}
Data = list[tuple[Tensor, Tensor]]
every_task = pytest.mark.parametrize("task", TASKS)


class Answer(nn.Module):
    """Answers with its inputs, in evaluation mode; in training mode with noise."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm2d(1)
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.drop(inputs) * self.factor


def mean_distance(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction.sigmoid().mean() - target.float().mean()).abs()


def make_data(task: str, classes: int = 4) -> Data:
    generator = torch.Generator().manual_seed(0)
    data = []
    for index in range(13):
        channels = 1 if task == "binary" else classes
        logits = torch.randn(channels, 6, 7, generator=generator)
        if task == "multi-class":
            # Small samples have one class or two, so that their own metrics differ much from those of all.
            target = torch.randint(index % classes + 1, (6, 7), generator=generator)
            guess = functional.one_hot(target, classes).movedim(-1, 0)
        else:
            target = guess = (torch.rand(channels, 6, 7, generator=generator) < index / 13).long()
        data.append((logits + 1.5 * guess, target))
    return data


def batches(data: Data, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(data), batch_size):
        inputs, targets = zip(*data[start : start + batch_size], strict=True)
        yield torch.stack(inputs), torch.stack(targets)


def loss_of(data: Data) -> Callable[..., Tensor]:
    inputs, target = data[0]
    return multi_class_dice_ce_sum if target.ndim == inputs.ndim - 1 else dice_bce_sum


def run(data: Data, metrics: dict[str, Any], batch_size: int = 5, **options: Any) -> dict[str, float]:
    loss, model = options.pop("loss", loss_of(data)), options.pop("model", Answer())
    return evaluate(model, batches(data, batch_size), Evaluation(metrics, loss, **options), CPU)


def approx(value: float) -> Any:
    return pytest.approx(value, rel=1e-12, abs=1e-12, nan_ok=True)


def pixels(data: Data) -> tuple[Any, Any]:
    """Truth and guess of all pixels: class numbers, or a row of 0 and 1 for each."""
    logits, targets = (torch.stack(part) for part in zip(*data, strict=True))
    if targets.ndim < logits.ndim:
        return targets.flatten().numpy(), logits.argmax(1).flatten().numpy()
    return tuple(part.movedim(1, -1).flatten(0, -2).long().numpy() for part in (targets, logits >= 0))


# ---------------------------------------------------------------------------------------------------- results


@every_task
def test_results_do_not_depend_on_batch_size_and_order(task):
    data = make_data(task)
    metrics = COUNTED | ({} if task == "multi-class" else {"distance": mean_distance})
    expected = run(data, metrics, 1)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(1)).tolist()
    for batch_size in (2, 5, 13):
        for found in (run(some, metrics, batch_size) for some in (data, [data[index] for index in order])):
            assert found.keys() == expected.keys()
            for name, value in found.items():
                is_mean = name == "loss" or "sample_mean" in name
                assert math.isclose(value, expected[name], rel_tol=1e-6 if is_mean else 0), name


@pytest.mark.parametrize("classes", [2, 4])
@every_task
def test_results_equal_scikit_learn(task, classes):
    data = make_data(task, classes)
    (truth, guess), found = pixels(data), run(data, COUNTED)
    for name, score in SCORES.items():
        if task == "binary" or (task, classes) == ("multi-class", 2):  # summarized by the second class
            assert found[name] == approx(score(truth, guess))
            assert not [key for key in found if "." in key]
            continue
        assert found[name] == approx(score(truth, guess, average="macro"))
        each = score(truth, guess, average=None)
        assert [found[f"{name}.{index}"] for index in range(classes)] == [approx(value) for value in each]
    assert found["accuracy"] == approx((truth == guess).mean())
    assert ("accuracy.0" in found) == (task == "multi-label")


@pytest.mark.parametrize("batch_size", [1, 4, 13])
@every_task
def test_the_loss_and_plain_functions_are_means_over_samples(task, batch_size):
    data, metrics = (
        make_data(task),
        {"distance": mean_distance, "one": lambda prediction, target: 1, "f1": f1},
    )
    loss = [loss_of(data)(logits[None], target[None]).item() for logits, target in data]
    distance = [mean_distance(logits[None], target[None]).item() for logits, target in data]
    found = run(data, metrics, batch_size)
    assert found["loss"] == pytest.approx(sum(loss) / 13, rel=1e-6)
    assert found["distance_sample_mean"] == pytest.approx(sum(distance) / 13, rel=1e-6)
    assert found["one_sample_mean"] == 1.0 and "one" not in found and "f1_sample_mean" not in found


def test_regression_needs_no_counts():
    data = [(torch.tensor([float(number)]), torch.tensor([0.0])) for number in range(6)]
    found = run(data, {"mae": functional.l1_loss}, 4, loss=functional.mse_loss)
    assert found == {"loss": approx(55 / 6), "mae_sample_mean": approx(2.5)}


@pytest.mark.parametrize("ignore_index", [255, 7])
@every_task
def test_ignored_pixels_count_nowhere(task, ignore_index):
    data = make_data(task)
    expected = run([(logits[..., :4], target[..., :4]) for logits, target in data], COUNTED)
    for _, target in data:
        target[..., 4:] = ignore_index

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        return loss_of(data)(prediction, target, ignore_index=ignore_index)

    found = run(data, COUNTED, loss=loss, ignore_index=ignore_index)
    assert found.pop("loss") == pytest.approx(expected.pop("loss"), rel=1e-5)
    assert found == expected
    for _, target in data[1:]:
        target[:] = ignore_index  # such a sample does not count in means
    assert run(data, {}, loss=loss, ignore_index=ignore_index) == run(data[:1], {}, loss=loss)
    data[0][1][:] = ignore_index
    found = run(data, COUNTED, loss=loss, ignore_index=ignore_index)
    assert all(math.isnan(value) for value in found.values())


def test_results_of_classes_bear_their_names_or_numbers():
    data = make_data("multi-class", classes=3)
    numbered = run(data, COUNTED)
    named = run(data, COUNTED, class_names=("water", "forest", "road"))
    assert named["f1.forest"] == numbered["f1.1"] and named["iou.road"] == numbered["iou.2"]
    assert list(named.values()) == list(numbered.values())
    for too_few_or_many in (("one",), ("a", "b", "c", "d")):
        found = run(data, {"f1": f1}, class_names=too_few_or_many)
        assert list(found) == ["loss", "f1", "f1.0", "f1.1", "f1.2"]


# -------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("broken", ["nothing", "model", "loss", "data"])
def test_the_mode_of_the_model_is_restored(broken):
    def fails(*_: Any) -> Any:
        raise RuntimeError("it is broken")

    def data() -> Iterator[tuple[Tensor, Tensor]]:
        yield from batches(make_data("binary"), 4)
        if broken == "data":
            fails()

    for training in (True, False):
        model = Answer().train(training)
        model.norm.train(not training)
        if broken == "model":
            model.drop.forward = fails  # type: ignore[method-assign]
        evaluation = Evaluation(COUNTED, fails if broken == "loss" else dice_bce_sum)
        error = pytest.raises(RuntimeError, match="it is broken")
        with contextlib.nullcontext() if broken == "nothing" else error:
            evaluate(model, data(), evaluation, CPU)
        assert model.training == model.drop.training == training != model.norm.training


def test_nothing_has_a_gradient_and_the_model_is_not_changed():
    model, seen = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)).train(), []
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def watch(prediction: Tensor, target: Tensor) -> Tensor:
        seen.append((prediction.requires_grad, torch.is_grad_enabled()))
        return prediction.mean()

    run(make_data("binary"), {"watch": watch}, model=model, loss=watch)
    assert set(seen) == {(False, False)} and len(seen) == 26
    assert torch.is_grad_enabled() and all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_loss_and_metrics_are_computed_in_float32_outside_of_autocast(precision):
    computed, seen = [], []

    class Watched(nn.Conv2d):
        def forward(self, inputs: Tensor) -> Tensor:
            computed.append(super().forward(inputs).dtype)
            return super().forward(inputs)

    def watch(prediction: Tensor, target: Tensor) -> Tensor:
        seen.append((prediction.dtype, torch.is_autocast_enabled("cpu")))
        return prediction.mean()

    context = DeviceContext(CPU.device, precision)
    evaluate(Watched(1, 1, 1), batches(make_data("binary"), 4), Evaluation({}, watch), context)
    assert set(computed) == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert set(seen) == {(torch.float32, False)}


# ------------------------------------------------------------------------------------ objects that accumulate


@every_task
def test_metrics_of_torchmetrics_are_those_of_the_whole_set(task):
    torchmetrics = pytest.importorskip("torchmetrics")
    data, options = make_data(task), {"num_classes": 4, "num_labels": 4, "task": task.replace("-", "")}
    kind = "multi-label" if task == "binary" else task
    score = functools.partial(torchmetrics.F1Score, average="macro", **options)
    metrics = COUNTED | {
        "theirs": score,
        "built": score(ignore_index=255),
        "each": functools.partial(score, average=None),
    }
    for batch_size in (1, 4, 13):
        found = run(data, metrics, batch_size, task=kind, class_names=("a", "b", "c", "d"))
        assert found["theirs"] == found["built"] == pytest.approx(found["f1"], rel=1e-6)
        each = ["each"] if task == "binary" else [f"each.{name}" for name in "abcd"]
        assert sum(found[name] for name in each) / len(each) == pytest.approx(found["f1"], rel=1e-6)
    data[7][1][..., 0] = 255
    assert run(data, metrics, task=kind)["theirs"] != found["theirs"]
    with pytest.raises(ConfigError, match=r"METRICS\.built does not ignore 255"):
        run(data, {"built": score()}, task=kind)


def test_an_object_that_accumulates_values_gets_them_as_they_are(monkeypatch):
    torchmetrics = pytest.importorskip("torchmetrics")
    data = [(torch.tensor([number / 4]), torch.tensor([number / 2 - 1])) for number in range(6)]
    found = run(data, {"error": torchmetrics.MeanAbsoluteError}, 4, loss=functional.mse_loss, task="values")
    assert found["error"] == pytest.approx(sum(abs(1 - number / 4) for number in range(6)) / 6)
    monkeypatch.setattr("dida_core.training.accumulated.num_processes", lambda: 2)
    with pytest.raises(ConfigError, match="several processes cannot share it"):
        run(data, {"error": torchmetrics.MeanAbsoluteError}, loss=functional.mse_loss, task="values")


def test_results_of_a_regression_are_those_of_the_targets_that_are_known():
    torchmetrics = pytest.importorskip("torchmetrics")
    pred, target = torch.randn(4, 1, 5, 6), torch.randn(4, 1, 5, 6)
    target[0, :, :2] = target[3] = torch.nan
    metrics = {"mse": torchmetrics.MeanSquaredError, "error": functional.l1_loss}
    evaluation = Evaluation(metrics, functional.mse_loss, task="values")
    for index in range(4):
        evaluation.update(pred[[index]], target[[index]])
    results, known = evaluation.results(), ~target.isnan()
    error = torch.stack([(pred[i] - target[i])[known[i]].abs().mean() for i in range(3)]).mean()
    assert results["mse"] == pytest.approx((pred - target)[known].square().mean().item())
    assert results["error_sample_mean"] == pytest.approx(error.item())
    assert [math.isnan(loss) for loss in evaluation.sample_losses] == [False, False, False, True]
