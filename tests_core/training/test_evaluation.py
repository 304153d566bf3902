import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from dida_core.training.device import DeviceContext
from dida_core.training.evaluation import Evaluation, evaluate
from sklearn import metrics as reference
from torch import Tensor, nn
from torch.nn import functional

from dida_tools.utils.loss import (
    accuracy,
    dice_bce_sum,
    f1,
    iou,
    masked_accuracy,
    masked_dice_bce_sum,
    masked_f1,
    masked_iou,
    masked_multi_class_dice_ce_sum,
    masked_precision,
    masked_recall,
    multi_class_dice_ce_sum,
    precision,
    recall,
)

CPU = torch.device("cpu")
COUNTED = {"f1": f1, "precision": precision, "recall": recall, "iou": iou, "accuracy": accuracy}
MASKED_METRICS = (masked_f1, masked_precision, masked_recall, masked_iou, masked_accuracy)
MASKED = dict(zip(COUNTED, MASKED_METRICS, strict=True))
SCORES: dict[str, Callable] = {
    "f1": reference.f1_score,
    "precision": reference.precision_score,
    "recall": reference.recall_score,
    "iou": reference.jaccard_score,
}
Data = list[tuple[Tensor, Tensor]]


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


def make_data(task: str, num_samples: int = 13, shape: tuple[int, ...] = (6, 7), classes: int = 4) -> Data:
    generator = torch.Generator().manual_seed(0)
    data = []
    for index in range(num_samples):
        channels = 1 if task == "binary" else classes
        logits = torch.randn(channels, *shape, generator=generator)
        if task == "multi-class":
            # Small samples have one class or two, so that their own metrics differ much from those of all.
            target = torch.randint(index % classes + 1, shape, generator=generator)
            guess = functional.one_hot(target, classes).movedim(-1, 0)
        else:
            target = guess = (torch.rand(channels, *shape, generator=generator) < index / num_samples).long()
        data.append((logits + 1.5 * guess, target))
    return data


def batches(data: Data, batch_size: int, order: list[int] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    data = data if order is None else [data[index] for index in order]
    for start in range(0, len(data), batch_size):
        inputs, targets = zip(*data[start : start + batch_size], strict=True)
        yield torch.stack(inputs), torch.stack(targets)


def loss_of(data: Data) -> Callable[..., Tensor]:
    inputs, target = data[0]
    return multi_class_dice_ce_sum if target.ndim == inputs.ndim - 1 else dice_bce_sum


def run(
    data: Data, metrics: dict[str, Any], batch_size: int = 5, order: Any = None, **options: Any
) -> dict[str, float]:
    loss = options.pop("loss", None) or loss_of(data)
    model = options.pop("model", None) or Answer()
    evaluation = Evaluation(metrics, loss, **options)
    return evaluate(model, batches(data, batch_size, order), evaluation, DeviceContext(CPU))


def approx(value: float) -> Any:
    return pytest.approx(value, rel=1e-12, abs=1e-12, nan_ok=True)


def pixels(data: Data) -> tuple[list, list]:
    """Truth and guess of all pixels: class numbers, or a row of 0 and 1 for each."""
    truths, guesses = [], []
    for logits, target in data:
        if target.ndim == logits.ndim - 1:
            truths += target.flatten().tolist()
            guesses += logits.argmax(0).flatten().tolist()
        else:
            truths += target.reshape(len(target), -1).T.tolist()
            guesses += (logits >= 0).long().reshape(len(target), -1).T.tolist()
    return truths, guesses


# -------------------------------------------------------------------- the same for every batch size and order


@pytest.mark.parametrize("task", ["binary", "multi-class", "multi-label"])
def test_results_do_not_depend_on_batch_size_and_order(task):
    data = make_data(task)
    metrics = COUNTED | ({} if task == "multi-class" else {"distance": mean_distance})
    expected = run(data, metrics, batch_size=1)
    shuffled = torch.randperm(len(data), generator=torch.Generator().manual_seed(1)).tolist()
    for batch_size in (2, 3, 5, 13, 100):
        for order in (None, shuffled, list(reversed(range(len(data))))):
            found = run(data, metrics, batch_size, order)
            assert found.keys() == expected.keys()
            for name, value in found.items():
                is_mean = name == "loss" or "sample_mean" in name
                assert math.isclose(value, expected[name], rel_tol=1e-6 if is_mean else 0), name


def test_counts_are_those_of_all_pixels():
    data = make_data("multi-class")
    evaluation = Evaluation(COUNTED, multi_class_dice_ce_sum)
    evaluate(Answer(), batches(data, 4), evaluation, DeviceContext(CPU))
    truth, guess = pixels(data)
    assert evaluation.scores.confusion.tolist() == reference.confusion_matrix(truth, guess).tolist()
    assert evaluation.scores.confusion.dtype == torch.int64 and len(evaluation.sample_losses) == 13


# --------------------------------------------------------------------------------------- against scikit-learn


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("task", ["binary", "multi-class", "multi-label"])
def test_results_equal_scikit_learn(name, task, classes):
    data = make_data(task, classes=classes)
    (truth, guess), found = pixels(data), run(data, COUNTED)
    if task == "binary" or (task, classes) == ("multi-class", 2):  # summarized by the second class
        assert found[name] == approx(SCORES[name](truth, guess)) and not [key for key in found if "." in key]
    else:
        assert found[name] == approx(SCORES[name](truth, guess, average="macro"))
        each = SCORES[name](truth, guess, average=None)
        assert [found[f"{name}.{index}"] for index in range(classes)] == [approx(value) for value in each]
    if task != "multi-label":
        assert (
            found["accuracy"] == approx(reference.accuracy_score(truth, guess)) and "accuracy.0" not in found
        )
    for index in range(classes if task == "multi-label" else 0):
        of_class = [row[index] for row in truth], [row[index] for row in guess]
        assert found[f"accuracy.{index}"] == approx(reference.accuracy_score(*of_class))


@pytest.mark.parametrize("task", ["binary", "multi-class", "multi-label"])
@pytest.mark.parametrize("name", SCORES)
def test_classification_results_equal_scikit_learn(name, task):
    data = make_data(task, num_samples=60, shape=())
    truth, guess = pixels(data)
    average = {"binary": "binary", "multi-class": "macro", "multi-label": "macro"}[task]
    expected = SCORES[name](truth, guess, average=average, zero_division=0)
    for batch_size in (1, 7, 60):
        assert run(data, COUNTED, batch_size)[name] == approx(expected)


# --------------------------------------------------------------------------------------------------- averages


def test_a_mean_of_f1_over_batches_is_another_number():
    target = torch.zeros(8, 1, 10, 10)
    target[0] = 1
    logits = torch.full((8, 1, 10, 10), -1.0)
    logits[0] = 1
    logits[1:, :, 0, 0] = 1
    data = list(zip(logits, target, strict=True))
    found = run(data, {"f1": f1}, batch_size=1)["f1"]
    assert found == approx(200 / 207)
    over_batches = [f1(*batch).item() for batch in batches(data, 1)]
    assert sum(over_batches) / len(over_batches) == approx(1 / 8)
    other_size = [f1(*batch).item() for batch in batches(data, 4)]
    assert sum(other_size) / len(other_size) == approx((200 / 203 + 0) / 2)


@pytest.mark.parametrize("batch_size", [1, 4, 13])
def test_plain_functions_become_means_over_samples(batch_size):
    data = make_data("binary")
    each = [mean_distance(logits[None], target[None]).item() for logits, target in data]
    found = run(data, {"distance": mean_distance, "f1": f1}, batch_size)
    assert set(found) == {"loss", "distance_sample_mean", "f1"}
    assert found["distance_sample_mean"] == approx(sum(each) / len(each))


@pytest.mark.parametrize("batch_size", [1, 4, 13])
@pytest.mark.parametrize("task", ["binary", "multi-class", "multi-label"])
def test_the_loss_is_the_mean_over_samples(task, batch_size):
    data = make_data(task)
    each = [loss_of(data)(logits[None], target[None]).item() for logits, target in data]
    assert run(data, {}, batch_size) == {"loss": pytest.approx(sum(each) / len(each), rel=1e-6)}


def test_plain_functions_may_return_numbers():
    found = run(
        make_data("binary"), {"one": lambda prediction, target: 1, "size": lambda p, t: p.numel() / 2}
    )
    assert found["one_sample_mean"] == 1.0 and found["size_sample_mean"] == 21.0


@pytest.mark.parametrize("batch_size", [1, 4])
def test_regression_needs_no_counts(batch_size):
    data = [(torch.tensor([float(number)]), torch.tensor([0.0])) for number in range(6)]
    found = run(data, {"mae": functional.l1_loss}, batch_size, loss=functional.mse_loss)
    assert found == {"loss": approx(55 / 6), "mae_sample_mean": approx(2.5)}


# ------------------------------------------------------------------------------------------ masks and classes


@pytest.mark.parametrize("task", ["binary", "multi-class", "multi-label"])
def test_masked_metrics_equal_scikit_learn_on_the_usable_pixels(task):
    data = make_data(task, classes=3)
    generator = torch.Generator().manual_seed(2)
    masks = [(torch.rand(1, 6, 7, generator=generator) < 0.6).long() for _ in data]
    truth: Any = []
    guess: Any = []
    for sample, mask in zip(data, masks, strict=True):
        usable = mask.flatten().bool().tolist()
        for all_pixels, part in zip((truth, guess), pixels([sample]), strict=True):
            all_pixels += [pixel for pixel, is_usable in zip(part, usable, strict=True) if is_usable]
    masked = [
        (logits, torch.cat([mask, target[None] if target.ndim == 2 else target]))
        for (logits, target), mask in zip(data, masks, strict=True)
    ]
    loss = masked_multi_class_dice_ce_sum if task == "multi-class" else masked_dice_bce_sum
    average = {"average": "binary" if task == "binary" else "macro"}
    for batch_size in (1, 5, 13):
        found = run(masked, MASKED, batch_size, loss=loss)
        for name, score in SCORES.items():
            assert found[name] == approx(score(truth, guess, **average)), name


@pytest.mark.parametrize("ignore_index", [255, 7])
@pytest.mark.parametrize("task", ["binary", "multi-class", "multi-label"])
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


@pytest.mark.parametrize("task", ["multi-class", "multi-label"])
def test_results_of_classes_bear_their_names(task):
    data = make_data(task, classes=3)
    numbered = run(data, COUNTED)
    named = run(data, COUNTED, class_names=("water", "forest", "road"))
    assert named["f1.forest"] == numbered["f1.1"] and named["iou.road"] == numbered["iou.2"]
    assert list(named.values()) == list(numbered.values())


@pytest.mark.parametrize("class_names", [(), ("one",), ("a", "b", "c", "d")])
def test_without_a_name_for_each_class_they_are_numbered(class_names):
    found = run(make_data("multi-class", classes=3), {"f1": f1}, class_names=class_names)
    assert list(found) == ["loss", "f1", "f1.0", "f1.1", "f1.2"]


def test_a_class_that_occurs_nowhere_is_nan_and_left_out_of_the_mean():
    data = make_data("multi-class", classes=3)
    data = [(torch.cat([logits, torch.full((1, 6, 7), -99.0)]), target) for logits, target in data]
    found = run(data, COUNTED)
    for name, score in SCORES.items():
        assert math.isnan(found[f"{name}.3"])
        assert found[name] == approx(score(*pixels(data), average="macro"))


def test_a_class_that_is_only_in_the_target_or_only_predicted_is_zero():
    target = torch.tensor([[0, 0, 1, 1]])
    logits = functional.one_hot(torch.tensor([[0, 0, 2, 2]]), 3).movedim(-1, 0).float()
    found = run([(logits, target)], COUNTED)
    assert [found[f"f1.{index}"] for index in range(3)] == [1.0, 0.0, 0.0] and found["f1"] == approx(1 / 3)


def test_where_nothing_is_usable_results_are_nan():
    data = [(logits, torch.full_like(target, 255)) for logits, target in make_data("multi-class")]
    found = run(data, COUNTED)
    assert math.isnan(found["f1"]) and math.isnan(found["f1.0"]) and math.isnan(found["loss"])


# -------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("broken", ["nothing", "model", "loss", "data"])
def test_the_mode_of_the_model_is_restored(training, broken):
    def fails(*_: Any) -> Any:
        raise RuntimeError("it is broken")

    def data() -> Iterator[tuple[Tensor, Tensor]]:
        yield from batches(make_data("binary"), 4)
        if broken == "data":
            fails()

    model = Answer().train(training)
    model.norm.train(not training)
    if broken == "model":
        model.drop.forward = fails  # type: ignore[method-assign]
    evaluation = Evaluation(COUNTED, fails if broken == "loss" else dice_bce_sum)
    with (
        contextlib.nullcontext() if broken == "nothing" else pytest.raises(RuntimeError, match="it is broken")
    ):
        evaluate(model, data(), evaluation, DeviceContext(CPU))
    assert (model.training, model.drop.training, model.norm.training) == (training, training, not training)


def test_nothing_has_a_gradient():
    model = Answer()
    seen = []

    def watch(prediction: Tensor, target: Tensor) -> Tensor:
        seen.append((prediction.requires_grad, torch.is_grad_enabled()))
        return prediction.mean()

    run(make_data("binary"), {"watch": watch}, model=model, loss=watch)
    assert set(seen) == {(False, False)} and len(seen) == 26
    assert torch.is_grad_enabled() and model.factor.grad is None


def test_the_model_is_not_changed():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run(make_data("binary"), COUNTED, model=model)
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

    data, context = batches(make_data("binary"), 4), DeviceContext(CPU, precision)
    evaluate(Watched(1, 1, 1), data, Evaluation({}, watch), context)
    assert set(computed) == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert set(seen) == {(torch.float32, False)}


def test_a_sample_of_ignored_pixels_alone_does_not_count():
    predictions = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.randint(0, 2, (3, 4, 4), generator=torch.Generator().manual_seed(1))
    targets[1] = 255
    loss = torch.nn.CrossEntropyLoss(ignore_index=255)
    evaluation = Evaluation({}, loss)
    evaluation.update(predictions, targets)
    expected = (loss(predictions[:1], targets[:1]) + loss(predictions[2:], targets[2:])) / 2
    assert evaluation.results()["loss"] == pytest.approx(expected.item())
