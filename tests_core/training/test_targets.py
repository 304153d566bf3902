"""Conventions of predictions and targets, and counts of right and wrong pixels by hand."""

import math
import re
from typing import Any

import pytest
import torch
from dida_core.training.counts import (
    accuracy_per_class,
    count,
    f1_per_class,
    iou_per_class,
    precision_per_class,
    recall_per_class,
    summarize,
    tp_fp_fn,
)
from dida_core.training.optimization import of_known
from dida_core.training.targets import check_shapes, is_multi_class, unmask
from torch import nn
from torch.nn import functional

SPATIAL = [(), (6,), (5, 7), (2, 3, 4)]


def approx(value: Any) -> Any:
    return pytest.approx(value, rel=1e-15, abs=1e-15, nan_ok=True)


@pytest.mark.parametrize("spatial", SPATIAL)
def test_shapes_of_the_conventions_pass_and_masks_come_off(spatial):
    for classes in (1, 3):
        check_shapes(torch.zeros(2, classes, *spatial), torch.zeros(2, classes, *spatial))
    pred, numbers = torch.zeros(2, 3, *spatial), torch.zeros(2, *spatial, dtype=torch.uint8)
    check_shapes(pred, numbers)
    assert is_multi_class(pred, numbers) and not is_multi_class(pred, pred)
    target = torch.rand(2, 4, *spatial)
    rest, mask = unmask(pred, target)
    assert torch.equal(rest, target[:, 1:]) and torch.equal(mask, target[:, 0])


@pytest.mark.parametrize(("channels", "wanted"), [(1, (4, 1, 5)), (2, (4, 5)), (3, (4, 5))])
def test_two_channels_of_a_masked_target_are_class_numbers_for_several_classes(channels, wanted):
    rest, mask = unmask(torch.zeros(4, channels, 5), torch.ones(4, 2, 5, dtype=torch.uint8))
    assert rest.shape == wanted and mask.shape == (4, 5) and mask.dtype == torch.float32
    assert channels == 1 or rest.dtype == torch.int64


WRONG = [(2, 3, 6, 5), (2, 1, 6, 6), (3, 3, 6, 6), (2, 6, 5), (3, 6, 6), (6, 6)]
WRONG_MASKED = [(2, 3, 6, 6), (2, 5, 6, 6), (2, 6, 6), (2, 1, 6, 6)]


@pytest.mark.parametrize(
    ("check", "pred", "target", "expected"),
    [
        *((count, (2, 3, 6, 6), shape, f"(2, 3, 6, 6) and the target {shape}") for shape in WRONG),
        (count, (2, 1, 6, 6), (2, 6, 6), "(2, 1, 6, 6) and the target (2, 6, 6): with one channel"),
        (count, (4,), (4,), "(4,)"),
        *(
            (unmask, (2, 3, 6, 6), shape, f"(2, 3, 6, 6) and the masked target {shape}")
            for shape in WRONG_MASKED
        ),
    ],
)
def test_disagreeing_shapes_are_refused(check, pred, target, expected):
    with pytest.raises(ValueError, match=re.escape(expected)):
        check(torch.zeros(pred), torch.zeros(target, dtype=torch.int64))


def test_float_class_numbers_and_masks_of_other_shapes_are_refused():
    pred = torch.zeros(2, 3, 6, 6)
    with pytest.raises(ValueError, match="float16: class numbers are integers"):
        count(pred, torch.zeros(2, 6, 6, dtype=torch.float16))
    for shape in [(2, 1, 6, 6), (6, 6), (1, 6, 6)]:
        with pytest.raises(ValueError, match=re.escape(f"the shape {shape}, it needs (2, 6, 6)")):
            count(pred, pred, valid=torch.ones(shape))


def test_counts_by_hand():
    counts = count(torch.tensor([[[[9.0, 9, -9], [-9, 0, 9]]]]), torch.tensor([[[[1, 0, 1], [0, 1, 255]]]]))
    assert counts.tolist() == [[[1, 1], [1, 2]]] and counts.dtype == torch.int64
    assert [part.item() for part in tp_fp_fn(counts)] == [2, 1, 1]
    assert [one(counts).item() for one in (f1_per_class, iou_per_class)] == [approx(2 / 3), approx(2 / 4)]
    rows = count(torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([2]))  # are the target
    assert rows.tolist() == [[0, 0, 0], [0, 0, 0], [0, 1, 0]]
    assert count(torch.zeros(1, 1), torch.ones(1, 1), threshold=0.5)[0, 1, 1] == 1  # at the threshold
    for dtype in (torch.float16, torch.bfloat16):
        pred, target = torch.randn(8, 3).to(dtype), torch.randint(3, (8,))
        assert torch.equal(count(pred, target), count(pred.float(), target))


ABSENT = torch.tensor([[3, 1, 0, 0], [2, 4, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]])


@pytest.mark.parametrize(
    ("per_class", "expected"),
    [
        (precision_per_class, [3 / 5, 4 / 6, math.nan, 0]),
        (recall_per_class, [3 / 4, 4 / 6, math.nan, 0]),
        (f1_per_class, [6 / 9, 8 / 12, math.nan, 0]),
        (iou_per_class, [3 / 6, 4 / 8, math.nan, 0]),
    ],
)
def test_absent_classes_are_nan_and_left_out_of_the_mean(per_class, expected):
    assert per_class(ABSENT).tolist() == approx(expected)
    assert summarize(per_class(ABSENT), ABSENT).item() == approx(sum(expected[:2]) / 3)


def test_summaries():
    two, exclusive = torch.tensor([0.2, 0.8]), torch.tensor([[50, 10], [5, 35]])
    assert summarize(two, exclusive) == 0.8  # of two classes that exclude each other: class 1
    assert accuracy_per_class(exclusive).tolist() == [0.85]
    assert summarize(two, torch.zeros(2, 2, 2)) == 0.5  # labels that may overlap
    assert summarize(torch.full((3,), math.nan), torch.zeros(3, 3)).isnan()


@pytest.mark.slow
@pytest.mark.parametrize("multi_class", [False, True])
def test_counting_is_exact_beyond_the_integers_of_float32(multi_class):
    pixels = 2**24 + 3
    pred = torch.zeros(1, 1, 1).expand(1, 2 if multi_class else 1, pixels)
    target = torch.zeros(1, pixels, dtype=torch.uint8)
    target[:, :5] = 1
    counts = count(pred, target if multi_class else target[:, None])
    assert counts.flatten().tolist() == ([pixels - 5, 0, 5, 0] if multi_class else [0, pixels - 5, 0, 5])


@pytest.mark.parametrize(
    "loss", [functional.mse_loss, functional.smooth_l1_loss, nn.L1Loss(), nn.HuberLoss()]
)
def test_targets_of_a_regression_that_are_nan_count_nowhere(loss):
    generator = torch.Generator().manual_seed(0)
    pred, target = (torch.randn(3, 2, 4, 5, generator=generator) for _ in range(2))
    is_known = torch.rand(target.shape, generator=generator) < 0.6
    pred.requires_grad_()
    expected = loss(pred[is_known], target[is_known])
    clean = loss(pred, target)
    of_values = of_known(loss)
    assert torch.equal(of_values(pred, target), clean)
    value = of_values(pred, target.masked_fill(~is_known, torch.nan))
    value.backward()
    assert torch.equal(value, expected) and torch.equal(pred.grad != 0, is_known)
    pred.grad = None
    nothing = of_values(pred, torch.full_like(target, torch.nan))
    nothing.backward()
    assert nothing == 0 and (pred.grad == 0).all()
