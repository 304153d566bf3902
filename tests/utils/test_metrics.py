"""Metrics against scikit-learn, in what all of them share, and under the names that records hold."""

import math
import pickle
import re
import warnings
from typing import Any

import pytest
import torch
from dida_core.config.project import project_of
from dida_core.config.references import name_of, resolve
from sklearn import metrics as reference
from torch import Tensor

from dida_tools.utils import loss as loss_module
from dida_tools.utils import metrics as module
from dida_tools.utils.metrics import (
    CountMetric,
    accuracy,
    count_metric,
    f1,
    iou,
    masked_accuracy,
    masked_f1,
    masked_iou,
    masked_precision,
    masked_recall,
    precision,
    recall,
    tp_fp_fn,
)

from tests.helpers import PACKAGE

SCORES: dict[Any, Any] = {
    precision: reference.precision_score,
    recall: reference.recall_score,
    f1: reference.f1_score,
    iou: reference.jaccard_score,
}
METRICS = [*SCORES, accuracy]
MASKED_METRICS = (masked_precision, masked_recall, masked_f1, masked_iou, masked_accuracy)
MASKED = dict(zip(MASKED_METRICS, METRICS, strict=True))
RUBBISH = [0.0, 1.0, 99.0, 255.0, -1.0, math.nan, math.inf, -math.inf]

every_metric = pytest.mark.parametrize("metric", METRICS)
both_tasks = pytest.mark.parametrize("multi_class", [False, True])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def draw(multi_class: bool, shape: tuple[int, ...] = (2, 3, 6, 6)) -> tuple[Tensor, Tensor]:
    target = torch.randint(shape[1], (shape[0], *shape[2:])) if multi_class else torch.randint(2, shape)
    return torch.randn(*shape), target


def with_mask(target: Tensor, mask: Tensor, multi_class: bool) -> Tensor:
    target = target.unsqueeze(1) if multi_class else target
    return torch.cat([mask.unsqueeze(1).float(), target.float()], 1)


def approx(value: Any) -> Any:
    return pytest.approx(value, rel=1e-12, abs=1e-12, nan_ok=True)


# -------------------------------------------------------------------------------- values


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("spatial", [(), (6,), (5, 7), (2, 3, 4)])
def test_multi_class_metrics_equal_scikit_learn(classes: int, spatial: tuple[int, ...]) -> None:
    pred, target = draw(True, (60, classes, *spatial))
    target[torch.rand(target.shape) < 0.4] = 255
    truth, guess = target[target != 255], pred.argmax(1)[target != 255]
    for metric, score in SCORES.items():
        average = "binary" if classes == 2 else "macro"
        assert metric(pred, target).item() == approx(score(truth, guess, average=average))
    assert accuracy(pred, target).item() == approx(reference.accuracy_score(truth, guess))


@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.9])
def test_binary_and_multi_label_metrics_equal_scikit_learn(channels: int, threshold: float) -> None:
    pred, target = draw(False, (3, channels, 8, 8))
    truth, guess = (
        part.movedim(1, -1).reshape(-1, channels).int() for part in (target, pred.sigmoid() >= threshold)
    )
    options = {"average": "binary" if channels == 1 else "macro", "zero_division": 0}
    for metric, score in SCORES.items():
        expected = score(truth.squeeze(1), guess.squeeze(1), **options)
        assert metric(pred, target, threshold=threshold).item() == approx(expected)
    right = (truth == guess).double().mean().item()
    assert accuracy(pred, target, threshold=threshold).item() == approx(right)


@every_metric
def test_extremes_and_absence(metric: Any) -> None:
    target = torch.tensor([[[[1, 1, 0, 0]]]])
    assert metric(30 * (2.0 * target - 1), target) == 1
    assert metric(30 * (1 - 2.0 * target), target) == 0
    low, high = torch.full((1, 1, 2, 2), -9.0), torch.full((1, 1, 2, 2), 9.0)
    empty, full = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    assert metric(low, full) == metric(high, empty) == 0  # only there, or only predicted
    assert metric(low, empty).isnan() or metric is accuracy
    assert metric(low, torch.full_like(empty, 255)).isnan()
    pred = torch.full((1, 3, 2, 2), -9.0)
    pred[:, 0] = 9.0  # of three labels, two occur nowhere
    assert metric(pred, (pred > 0).int()) == 1


# -------------------------------------------------------------------- what metrics share


@every_metric
@both_tasks
@pytest.mark.parametrize("ignore_index", [255, 7])
def test_ignored_pixels_do_not_count(metric: Any, multi_class: bool, ignore_index: int) -> None:
    pred, target = draw(multi_class)
    ignored, moved = target.clone(), pred.clone()
    ignored[..., 3:] = ignore_index
    moved[..., 3:] = 1e4 * torch.randn(2, 3, 6, 3)
    for dtype in (torch.uint8, torch.int64):
        found = metric(moved, ignored.to(dtype), ignore_index=ignore_index)
        assert found == metric(pred[..., :3], target[..., :3])
    assert not metric(pred.requires_grad_(), target).requires_grad


@pytest.mark.parametrize("form", MASKED)
@both_tasks
def test_masked_metrics_equal_the_plain_ones_on_the_usable_pixels(form: Any, multi_class: bool) -> None:
    pred, target = draw(multi_class)
    clean = with_mask(target, (torch.arange(6) < 3).expand(2, 6, 6), multi_class)
    for rubbish in RUBBISH:  # whatever stands under the mask
        dirty, moved = clean.clone(), pred.clone()
        dirty[:, 1:, ..., 3:] = rubbish
        moved[..., 3:] = 1e4 * torch.randn(2, 3, 6, 3)
        assert form(moved, dirty) == form(pred, clean) == MASKED[form](pred[..., :3], target[..., :3])
    assert form(pred, with_mask(target, torch.zeros(2, 6, 6), multi_class)).isnan()
    pred, target = draw(multi_class, (8, 3))
    mask = torch.tensor([1.0, 1, 1, 1, 1, 0, 0, 0])
    assert form(pred, with_mask(target, mask, multi_class)) == MASKED[form](pred[:5], target[:5])


def test_shapes_that_disagree_are_refused_and_nothing_else_warns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for metric in METRICS:
            metric(*draw(False))
            with pytest.raises(ValueError, match=re.escape("(2, 3, 6, 6) and the target (2, 3, 6, 5)")):
                metric(torch.zeros(2, 3, 6, 6), torch.zeros(2, 3, 6, 5))
            with pytest.raises(ValueError, match=re.escape("(2, 1, 6, 6) and the target (2, 6, 6)")):
                metric(torch.zeros(2, 1, 6, 6), torch.zeros(2, 6, 6))
        for form in MASKED:
            with pytest.raises(
                ValueError, match=re.escape("(2, 3, 6, 6) and the masked target (2, 5, 6, 6)")
            ):
                form(torch.zeros(2, 3, 6, 6), torch.zeros(2, 5, 6, 6))


# --------------------------------------------------------------------------------- names


@pytest.mark.parametrize("metric", [*METRICS, *MASKED], ids=lambda metric: metric.__name__)
def test_metrics_keep_the_name_that_records_of_every_version_hold(metric: Any) -> None:
    name, project = metric.__name__, project_of(PACKAGE)
    assert getattr(module, name) is getattr(loss_module, name) is metric
    for place in ("loss", "metrics"):
        assert resolve(f".utils.{place}:{name}", project) is metric
    assert name_of(metric, project) == f".utils.loss:{name}"
    assert pickle.loads(pickle.dumps(metric)) is metric
    assert isinstance(metric, CountMetric) and metric.masked == name.startswith("masked_")
    assert metric.per_class.__doc__ in metric.__doc__


def specificity_per_class(counts: Tensor) -> Tensor:
    """(C,) fraction of the rest that is right."""
    tp, fp, fn = tp_fp_fn(counts)
    rest = counts.sum((-2, -1)) - tp - fn
    return (rest - fp) / rest


specificity = count_metric(specificity_per_class, "specificity")


def test_a_metric_of_ones_own_belongs_to_the_module_that_defines_it() -> None:
    assert (specificity.__module__, specificity.__qualname__) == (__name__, "specificity")
    assert isinstance(specificity, CountMetric) and not isinstance(specificity_per_class, CountMetric)
    pred, target = draw(True, (6, 2, 5, 5))
    expected = reference.recall_score(1 - target.flatten(), 1 - pred.argmax(1).flatten())
    assert specificity(pred, target).item() == approx(expected)
