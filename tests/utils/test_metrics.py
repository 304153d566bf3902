"""Conventions of shapes, counts, and metrics that follow from them, against scikit-learn and torchmetrics."""

import itertools
import math
import pickle
import re
import warnings
from typing import Any

import pytest
import torch
import torchmetrics.functional.classification as reference
from dida_core.config.project import project_of
from dida_core.config.references import name_of, resolve
from dida_core.training.counts import (
    CountMetric,
    accuracy_per_class,
    count,
    f1_per_class,
    precision_per_class,
    recall_per_class,
    summarize,
    tp_fp_fn,
)
from dida_core.training.targets import check_shapes, is_multi_class, unmask
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics
from torch import Tensor

from dida_tools.utils import loss as loss_module
from dida_tools.utils import metrics as module
from dida_tools.utils.metrics import (
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
)

from tests.helpers import PACKAGE

METRICS = [precision, recall, f1, iou, accuracy]
MASKED = {
    masked_precision: precision,
    masked_recall: recall,
    masked_f1: f1,
    masked_iou: iou,
    masked_accuracy: accuracy,
}
SPATIAL = [(), (6,), (5, 7), (2, 3, 4)]

every_metric = pytest.mark.parametrize("metric", METRICS)
every_masked = pytest.mark.parametrize("form", MASKED)
both_tasks = pytest.mark.parametrize("multi_class", [False, True])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def example(multi_class: bool, *spatial: int, number: int = 2, ignored: float = 0.0) -> tuple[Tensor, Tensor]:
    shape = (number, 3, *(spatial or (6, 6)))
    return draw(shape, multi_class, ignored)


def draw(shape: tuple[int, ...], multi_class: bool, ignored: float = 0.0) -> tuple[Tensor, Tensor]:
    without_channels = (shape[0], *shape[2:])
    target = torch.randint(shape[1], without_channels) if multi_class else torch.randint(2, shape)
    target[torch.rand(target.shape) < ignored] = 255
    return torch.randn(*shape), target


def with_mask(target: Tensor, mask: Tensor, multi_class: bool) -> Tensor:
    target = target.unsqueeze(1) if multi_class else target
    return torch.cat([mask.unsqueeze(1).float(), target.float()], 1)


def right_half() -> Tensor:
    return (torch.arange(6) < 3).float().expand(2, 6, 6)


def flat(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Right and guessed class numbers of all pixels that count."""
    keep = target != 255
    return target[keep], pred.argmax(1)[keep]


def approx(value: Any, tolerance: float = 1e-6) -> Any:
    return pytest.approx(value, rel=tolerance, abs=tolerance, nan_ok=True)


# ------------------------------------------------------------------------------- against other libraries


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("spatial", SPATIAL)
@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_multi_class_metrics_equal_scikit_learn(
    classes: int, spatial: tuple[int, ...], ignored: float
) -> None:
    pred, target = draw((9, classes, *spatial), True, ignored)
    truth, guess = flat(pred, target)
    counts = count(pred, target)
    assert counts.dtype == torch.int64
    confusion = sklearn_metrics.confusion_matrix(truth, guess, labels=range(classes))
    assert counts.tolist() == confusion.tolist()
    options = {"labels": range(classes), "average": None, "zero_division": 0}
    for metric, name in ((precision, "precision"), (recall, "recall"), (f1, "f1"), (iou, "jaccard")):
        score = getattr(sklearn_metrics, f"{name}_score")
        values = metric.per_class(counts)
        there = ~values.isnan()
        assert values[there].tolist() == approx(score(truth, guess, **options)[there.numpy()].tolist(), 1e-12)
        if there.all():
            average = "binary" if classes == 2 else "macro"
            expected = score(truth, guess, average=average, zero_division=0)
            assert metric(pred, target).item() == approx(expected, 1e-12)
    assert accuracy(pred, target).item() == approx(sklearn_metrics.accuracy_score(truth, guess), 1e-12)


@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.9])
def test_binary_and_multi_label_metrics_equal_scikit_learn(channels: int, threshold: float) -> None:
    pred, target = draw((3, channels, 8, 8), False)
    truth, guess = (
        part.movedim(1, -1).reshape(-1, channels).int() for part in (target, pred.sigmoid() >= threshold)
    )
    counts = count(pred, target, threshold=threshold)
    assert counts.shape == (channels, 2, 2)
    right = []
    for index in range(channels):
        pair = truth[:, index], guess[:, index]
        assert counts[index].tolist() == sklearn_metrics.confusion_matrix(*pair, labels=[0, 1]).tolist()
        right.append(sklearn_metrics.accuracy_score(*pair))
    options = {"average": "binary" if channels == 1 else "macro", "zero_division": 0}
    for metric, name in ((precision, "precision"), (recall, "recall"), (f1, "f1"), (iou, "jaccard")):
        expected = getattr(sklearn_metrics, f"{name}_score")(truth.squeeze(1), guess.squeeze(1), **options)
        assert metric(pred, target, threshold=threshold).item() == approx(expected, 1e-12)
    assert accuracy(pred, target, threshold).item() == approx(sum(right) / channels, 1e-12)


@pytest.mark.parametrize("kind", ["multiclass", "multilabel", "binary"])
@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_metrics_equal_torchmetrics(kind: str, ignored: float) -> None:
    number = 1 if kind == "binary" else 4
    pred, target = draw((6, number, 9, 9), kind == "multiclass", ignored)
    options: dict[str, Any] = {"ignore_index": 255}
    if kind != "binary":
        options |= {"num_classes" if kind == "multiclass" else "num_labels": number, "average": "macro"}
    names = {precision: "precision", recall: "recall", f1: "f1_score", iou: "jaccard_index"}
    for metric, name in (names | {accuracy: "accuracy"}).items():
        if kind == "multiclass" and metric is accuracy:
            options["average"] = "micro"
        expected = getattr(reference, f"{kind}_{name}")(pred, target, **options)
        assert metric(pred, target).item() == approx(expected.item())


# ----------------------------------------------------------------------------------------- values by hand


def test_counts_by_hand() -> None:
    pred = torch.tensor([[[[9.0, 9, -9], [-9, 0, 9]]]])
    target = torch.tensor([[[[1, 0, 1], [0, 1, 255]]]])
    counts = count(pred, target)
    assert counts.tolist() == [[[1, 1], [1, 2]]]
    assert [part.item() for part in tp_fp_fn(counts)] == [2, 1, 1]
    expected = {precision: 2 / 3, recall: 2 / 3, f1: 2 / 3, iou: 2 / 4, accuracy: 3 / 5}
    for metric, value in expected.items():
        assert metric(pred, target).item() == approx(value, 1e-15)
    rows = count(torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([2]))  # are the target
    assert rows.tolist() == [[0, 0, 0], [0, 0, 0], [0, 1, 0]]
    assert count(torch.zeros(1, 1), torch.ones(1, 1), threshold=0.5)[0, 1, 1] == 1  # at the threshold


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


ABSENT = torch.tensor([[3, 1, 0, 0], [2, 4, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]])


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (precision, [3 / 5, 4 / 6, math.nan, 0]),
        (recall, [3 / 4, 4 / 6, math.nan, 0]),
        (f1, [6 / 9, 8 / 12, math.nan, 0]),
        (iou, [3 / 6, 4 / 8, math.nan, 0]),
    ],
)
def test_absent_classes_are_nan_and_left_out_of_the_mean(metric: Any, expected: list[float]) -> None:
    assert metric.per_class(ABSENT).tolist() == approx(expected, 1e-15)
    there = [value for value in expected if not math.isnan(value)]
    assert metric.from_counts(ABSENT).item() == approx(sum(there) / 3, 1e-15)
    pred = torch.full((1, 3, 2, 2), -9.0)
    pred[:, 0] = 9.0  # multi-label
    assert metric.per_class(count(pred, pred > 0)).tolist() == approx([1, math.nan, math.nan])
    assert metric(pred, (pred > 0).int()) == 1


def test_summaries() -> None:
    two, exclusive = torch.tensor([0.2, 0.8]), torch.tensor([[50, 10], [5, 35]])
    assert summarize(two, exclusive) == 0.8  # of two classes that exclude each other: class 1
    assert f1.from_counts(exclusive).item() == approx(70 / 85, 1e-15)
    assert accuracy_per_class(exclusive).tolist() == [0.85] and accuracy.from_counts(exclusive) == 0.85
    assert summarize(two, torch.zeros(2, 2, 2)) == 0.5  # labels that may overlap
    assert summarize(torch.tensor([0.25, math.nan, 0.75]), torch.zeros(3, 3)) == 0.5
    assert summarize(torch.full((3,), math.nan), torch.zeros(3, 3)).isnan()
    counts = torch.randint(1, 100, (5, 5))
    right, found = precision_per_class(counts), recall_per_class(counts)
    assert torch.allclose(f1_per_class(counts), 2 * right * found / (right + found))


# ------------------------------------------------------------------------------------ what metrics share


@every_metric
@both_tasks
def test_a_metric_is_that_of_its_counts_whatever_the_shape_and_dtype(metric: Any, multi_class: bool) -> None:
    pred, target = example(multi_class)
    counts = count(pred, target)
    assert metric(pred, target) == metric.from_counts(counts) == summarize(metric.per_class(counts), counts)
    assert not metric(pred.requires_grad_(), target).requires_grad
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(count(pred.to(dtype), target), count(pred.to(dtype).float(), target))
    pred, target = draw((8, 3), multi_class)
    assert metric(pred, target) == metric(*(part.movedim(0, -1)[None] for part in (pred, target)))


@every_metric
@both_tasks
@pytest.mark.parametrize("ignore_index", [255, 7])
def test_ignored_pixels_do_not_count(metric: Any, multi_class: bool, ignore_index: int) -> None:
    pred, target = example(multi_class)
    ignored, moved = target.clone(), pred.clone()
    ignored[..., 3:] = ignore_index
    moved[..., 3:] = 1e4 * torch.randn(2, 3, 6, 3)
    for logits, dtype in itertools.product((pred, moved), (torch.uint8, torch.int64)):
        found = metric(logits, ignored.to(dtype), ignore_index=ignore_index)
        assert found == metric(pred[..., :3], target[..., :3])


@every_masked
@both_tasks
def test_masked_metrics_equal_the_plain_ones_on_the_usable_pixels(form: Any, multi_class: bool) -> None:
    pred, target = example(multi_class)
    clean = with_mask(target, right_half(), multi_class)
    expected = MASKED[form](pred[..., :3], target[..., :3])
    assert form(pred, clean) == expected
    for rubbish in (0.0, 1.0, 99.0, 255.0, -1.0, math.nan, math.inf, -math.inf):
        dirty, moved = clean.clone(), pred.clone()
        dirty[:, 1:, ..., 3:] = rubbish
        moved[..., 3:] = 1e4 * torch.randn(2, 3, 6, 3)
        assert form(pred, dirty) == form(moved, dirty) == expected
    assert form(pred, with_mask(target, torch.zeros(2, 6, 6), multi_class)).isnan()
    pred, target = draw((8, 3), multi_class)
    mask = torch.tensor([1.0, 1, 1, 1, 1, 0, 0, 0])
    assert form(pred, with_mask(target, mask, multi_class)) == MASKED[form](pred[:5], target[:5])


@both_tasks
def test_pixels_that_are_not_valid_do_not_count(multi_class: bool) -> None:
    pred, target = example(multi_class)
    assert torch.equal(count(pred, target, right_half()), count(pred[..., :3], target[..., :3]))
    for shape in [(2, 1, 6, 6), (6, 6), (1, 6, 6)]:
        with pytest.raises(ValueError, match=re.escape(f"the shape {shape}, it needs (2, 6, 6)")):
            count(pred, target, valid=torch.ones(shape))


# ------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("spatial", SPATIAL)
def test_shapes_of_the_conventions_pass_and_masks_come_off(spatial: tuple[int, ...]) -> None:
    for classes in (1, 3):
        check_shapes(torch.zeros(2, classes, *spatial), torch.zeros(2, classes, *spatial))
    pred, numbers = torch.zeros(2, 3, *spatial), torch.zeros(2, *spatial, dtype=torch.uint8)
    check_shapes(pred, numbers)
    assert is_multi_class(pred, numbers) and not is_multi_class(pred, pred)
    target = torch.rand(2, 4, *spatial)
    rest, mask = unmask(pred, target)
    assert torch.equal(rest, target[:, 1:]) and torch.equal(mask, target[:, 0])


@pytest.mark.parametrize(("channels", "wanted"), [(1, (4, 1, 5)), (2, (4, 5)), (3, (4, 5))])
def test_two_channels_of_a_masked_target_are_class_numbers_for_several_classes(
    channels: int, wanted: tuple[int, ...]
) -> None:
    rest, mask = unmask(torch.zeros(4, channels, 5), torch.ones(4, 2, 5, dtype=torch.uint8))
    assert rest.shape == wanted and mask.shape == (4, 5) and mask.dtype == torch.float32
    assert channels == 1 or rest.dtype == torch.int64


WRONG = [(2, 3, 6, 5), (2, 1, 6, 6), (3, 3, 6, 6), (2, 6, 5), (3, 6, 6), (6, 6)]


@pytest.mark.parametrize(
    ("metrics", "pred", "target", "told"),
    [
        *((METRICS, (2, 3, 6, 6), shape, f"(2, 3, 6, 6) and the target {shape}") for shape in WRONG),
        (METRICS, (2, 1, 6, 6), (2, 6, 6), "(2, 1, 6, 6) and the target (2, 6, 6): with one channel"),
        (METRICS, (4,), (4,), "(4,)"),
        *(
            (MASKED, (2, 3, 6, 6), shape, f"(2, 3, 6, 6) and the masked target {shape}")
            for shape in [(2, 3, 6, 6), (2, 5, 6, 6), (2, 6, 6), (2, 1, 6, 6)]
        ),
    ],
)
def test_disagreeing_shapes_are_refused(metrics: Any, pred: tuple, target: tuple, told: str) -> None:
    for metric in metrics:
        with pytest.raises(ValueError, match=re.escape(told)):
            metric(torch.zeros(pred), torch.zeros(target, dtype=torch.int64))


@every_metric
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_float_class_numbers_are_refused(metric: Any, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"{dtype}: class numbers are integers"):
        metric(torch.zeros(2, 3, 6, 6), torch.zeros(2, 6, 6, dtype=dtype))


# ------------------------------------------------------------------------------------------------- adding


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32), st.lists(st.integers(0, 12), max_size=4), st.booleans(), st.integers(2, 4))
def test_counts_of_any_split_add_up(seed: int, cuts: list[int], multi_class: bool, classes: int) -> None:
    torch.manual_seed(seed)
    pred, target = draw((12, classes, 3, 3), multi_class, 0.2)
    total, edges = count(pred, target), [0, *sorted(cuts), 12]
    parts = [count(pred[low:high], target[low:high]) for low, high in itertools.pairwise(edges)]
    assert torch.equal(torch.stack(parts).sum(0), total)
    for metric in METRICS:
        assert metric.from_counts(sum(parts)).item() == approx(metric(pred, target).item(), 0.0)


def test_the_mean_of_f1_over_batches_is_not_that_of_all() -> None:
    pred, target = torch.full((2, 1, 1, 10), 9.0), torch.ones(2, 1, 1, 10)
    target[1, ..., 1:] = 0
    batches = [f1(pred[i : i + 1], target[i : i + 1]).item() for i in range(2)]
    counts = count(pred[:1], target[:1]) + count(pred[1:], target[1:])
    assert f1.from_counts(counts) == f1(pred, target)
    assert f1(pred, target).item() == approx(22 / 31, 1e-15)
    assert sum(batches) / 2 == approx((1 + 2 / 11) / 2, 1e-15)


@both_tasks
def test_an_empty_batch_counts_nothing(multi_class: bool) -> None:
    assert count(*example(multi_class, number=0)).sum() == 0


@pytest.mark.slow
@both_tasks
def test_counting_is_exact_beyond_the_integers_of_float32(multi_class: bool) -> None:
    pixels = 2**24 + 3
    pred = torch.zeros(1, 1, 1).expand(1, 2 if multi_class else 1, pixels)
    target = torch.zeros(1, pixels, dtype=torch.uint8)
    target[:, :5] = 1
    counts = count(pred, target if multi_class else target[:, None])
    assert counts.flatten().tolist() == ([pixels - 5, 0, 5, 0] if multi_class else [0, pixels - 5, 0, 5])


@pytest.mark.parametrize("big", [2**24, 2**40])
def test_added_counts_are_exact(big: int) -> None:
    counts = torch.tensor([[big, 0], [0, big]]) + count(torch.tensor([[0.0, 1.0]]), torch.tensor([0]))
    assert counts.tolist() == [[big, 1], [0, big]]
    assert precision.from_counts(counts).item() == big / (big + 1) < 1
    assert recall.from_counts(counts) == 1


# -------------------------------------------------------------------------------------------------- names


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
    pred, target = draw((6, 2, 5, 5), True)
    truth, guess = flat(pred, target)
    expected = sklearn_metrics.recall_score(1 - truth, 1 - guess)
    assert specificity(pred, target).item() == approx(expected, 1e-12)


def test_nothing_warns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for metric in METRICS:
            metric(*example(False))
