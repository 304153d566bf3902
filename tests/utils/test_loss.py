import itertools
import math
import pickle
import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torchmetrics.functional.classification as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics
from torch import Tensor
from torch.nn import functional

from dida_tools.config.project import project_of
from dida_tools.config.references import name_of, resolve
from dida_tools.utils import loss as module
from dida_tools.utils.loss import (
    accuracy,
    accuracy_per_class,
    check_shapes,
    count,
    count_metric,
    dice_bce_sum,
    f1,
    f1_per_class,
    hits_and_errors,
    iou,
    is_multi_class,
    masked_accuracy,
    masked_dice_bce_sum,
    masked_f1,
    masked_iou,
    masked_multi_class_dice_ce_sum,
    masked_multi_class_smooth_dice_loss,
    masked_precision,
    masked_recall,
    masked_smooth_dice_beta_loss,
    masked_smooth_dice_loss,
    multi_class_dice_ce_sum,
    multi_class_smooth_dice_loss,
    precision,
    precision_per_class,
    recall,
    recall_per_class,
    smooth_dice_beta_loss,
    smooth_dice_loss,
    summarize,
    unmask,
)

Loss = Callable[..., Tensor]

BINARY_LOSSES = [
    smooth_dice_loss,
    smooth_dice_beta_loss,
    dice_bce_sum,
    partial(smooth_dice_beta_loss, beta=2.0),
]
MULTI_LOSSES = [multi_class_smooth_dice_loss, multi_class_dice_ce_sum]
DICE_LOSSES = [smooth_dice_loss, smooth_dice_beta_loss, multi_class_smooth_dice_loss]
LOSSES = [*BINARY_LOSSES, *MULTI_LOSSES]
MASKED_LOSSES = {
    masked_smooth_dice_loss: smooth_dice_loss,
    masked_smooth_dice_beta_loss: smooth_dice_beta_loss,
    masked_dice_bce_sum: dice_bce_sum,
    masked_multi_class_smooth_dice_loss: multi_class_smooth_dice_loss,
    masked_multi_class_dice_ce_sum: multi_class_dice_ce_sum,
}
METRICS = [precision, recall, f1, iou, accuracy]
MASKED_METRICS = {
    masked_precision: precision,
    masked_recall: recall,
    masked_f1: f1,
    masked_iou: iou,
    masked_accuracy: accuracy,
}
SPATIAL = [(), (6,), (5, 7), (2, 3, 4)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def takes_class_numbers(loss: Any) -> bool:
    return "multi_class" in getattr(loss, "func", loss).__name__


def example(loss: Any, shape: tuple[int, ...] = (2, 3, 6, 6)) -> tuple[Tensor, Tensor]:
    pred = torch.randn(*shape)
    if takes_class_numbers(loss):
        return pred, torch.randint(shape[1], (shape[0], *shape[2:]))
    return pred, (torch.rand(*shape) > 0.5).float()


def logits_for(loss: Any, target: Tensor, classes: int = 2, size: float = 30.0) -> Tensor:
    if takes_class_numbers(loss):
        return size * (2.0 * functional.one_hot(target, classes).movedim(-1, 1) - 1)
    return size * (2.0 * target.float() - 1)


def with_mask(target: Tensor, mask: Tensor, multi_class: bool) -> Tensor:
    target = target.unsqueeze(1) if multi_class else target
    return torch.cat([mask.unsqueeze(1).float(), target.float()], 1)


def gradient(loss: Loss, pred: Tensor, target: Tensor, **options: Any) -> Tensor:
    pred = pred.detach().clone().requires_grad_()
    loss(pred, target, **options).backward()
    assert pred.grad is not None
    return pred.grad


def approx(value: float, tolerance: float = 1e-6) -> Any:
    return pytest.approx(value, rel=tolerance, abs=tolerance)


# --------------------------------------------------------------------------------------------------- values by hand


QUARTERS = torch.tensor([[[[1, 1], [0, 0]]]])
UNDECIDED = torch.zeros(1, 1, 2, 2)


def test_dice_by_hand() -> None:
    assert smooth_dice_loss(UNDECIDED, QUARTERS).item() == approx(1 - (2 * 1 + 1) / (2 * 1 + 1 + 1 + 1))


@pytest.mark.parametrize("smooth", [0.0, 0.5, 10.0])
def test_smooth_by_hand(smooth: float) -> None:
    expected = 1 - (2 + smooth) / (4 + smooth)
    assert smooth_dice_loss(UNDECIDED, QUARTERS, smooth).item() == approx(expected)


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_beta_by_hand(beta: float) -> None:
    target = torch.tensor([[[[1, 1], [1, 0]]]])
    hits, extra, missed = 1.5, 0.5, 1.5
    score = ((1 + beta**2) * hits + 1) / ((1 + beta**2) * hits + beta**2 * missed + extra + 1)
    assert smooth_dice_beta_loss(UNDECIDED, target, beta).item() == approx(1 - score)


def test_beta_of_one_is_dice() -> None:
    pred, target = example(smooth_dice_loss)
    assert torch.equal(smooth_dice_beta_loss(pred, target), smooth_dice_loss(pred, target))


def test_large_beta_weighs_what_was_missed() -> None:
    target = torch.tensor([[[[1, 1, 0, 0]]]])
    missing, exceeding = torch.tensor([[[[9.0, -9, -9, -9]]]]), torch.tensor([[[[9.0, 9, 9, -9]]]])
    assert smooth_dice_beta_loss(missing, target, 4.0) > smooth_dice_beta_loss(exceeding, target, 4.0)
    assert smooth_dice_beta_loss(missing, target, 0.25) < smooth_dice_beta_loss(exceeding, target, 0.25)


@pytest.mark.parametrize("dice_weight", [0.0, 0.3, 1.0])
def test_dice_and_binary_cross_entropy_by_hand(dice_weight: float) -> None:
    expected = dice_weight * 0.4 + (1 - dice_weight) * math.log(2)
    assert dice_bce_sum(UNDECIDED, QUARTERS, dice_weight=dice_weight).item() == approx(expected)


CORNER = torch.tensor([[[0, 0], [0, 1]]])
CORNER_DICE = ((2 * 1.5 + 1) / (2 * 1.5 + 1.5 + 0.5 + 1), (2 * 0.5 + 1) / (2 * 0.5 + 0.5 + 1.5 + 1))


def test_multi_class_dice_by_hand() -> None:
    assert multi_class_smooth_dice_loss(torch.zeros(1, 2, 2, 2), CORNER).item() == approx(
        1 - sum(CORNER_DICE) / 2
    )


@pytest.mark.parametrize("dice_weight", [0.0, 0.3, 1.0])
def test_multi_class_dice_and_cross_entropy_by_hand(dice_weight: float) -> None:
    loss = multi_class_dice_ce_sum(torch.zeros(1, 2, 2, 2), CORNER, dice_weight=dice_weight)
    assert loss.item() == approx(dice_weight * (1 - sum(CORNER_DICE) / 2) + (1 - dice_weight) * math.log(2))


def test_class_weights_by_hand() -> None:
    loss = multi_class_smooth_dice_loss(torch.zeros(1, 2, 2, 2), CORNER, class_weights=[3, 1])
    assert loss.item() == approx(1 - (3 * CORNER_DICE[0] + CORNER_DICE[1]) / 4)


def test_pixel_weights_by_hand() -> None:
    weights = torch.tensor([[[2.0, 1.0], [1.0, 0.0]]])
    hits, missed, extra = 0.5 * 3, 0.5 * 3, 0.5 * 1
    expected = 1 - (2 * hits + 1) / (2 * hits + missed + extra + 1)
    assert smooth_dice_loss(UNDECIDED, QUARTERS, pixel_weights=weights).item() == approx(expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_dice_is_the_mean_over_samples_and_with_batch_that_of_one_image(loss: Any) -> None:
    pred, target = example(loss, (4, 3, 5, 6))
    samples = torch.stack([loss(pred[i : i + 1], target[i : i + 1]) for i in range(4)])
    assert loss(pred, target).item() == approx(samples.mean().item())
    as_one = [torch.cat(list(part), -1)[None] for part in (pred, target)]
    assert loss(pred, target, batch=True).item() == approx(loss(*as_one).item())


@pytest.mark.parametrize("loss", LOSSES)
def test_batch_does_not_depend_on_the_order_of_samples(loss: Any) -> None:
    pred, target = example(loss, (5, 3, 4, 4))
    order = torch.randperm(5)
    for batch in (False, True):
        assert loss(pred[order], target[order], batch=batch).item() == approx(
            loss(pred, target, batch=batch).item()
        )


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_is_a_float32_scalar(loss: Any) -> None:
    pred, target = example(loss)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        value = loss(pred.to(dtype), target)
        assert value.shape == () and value.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_logits_are_taken_as_their_float32_values(loss: Any, dtype: torch.dtype) -> None:
    pred, target = example(loss)
    pred = pred.to(dtype)
    assert torch.equal(loss(pred, target), loss(pred.float(), target))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float32])
@pytest.mark.parametrize("loss", BINARY_LOSSES)
def test_binary_target_may_be_of_any_dtype(loss: Any, dtype: torch.dtype) -> None:
    pred, target = example(loss)
    assert torch.equal(loss(pred, target.to(dtype)), loss(pred, target))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("loss", MULTI_LOSSES)
def test_class_numbers_may_be_of_any_integer_dtype(loss: Any, dtype: torch.dtype) -> None:
    pred, target = example(loss)
    assert torch.equal(loss(pred, target.to(dtype)), loss(pred, target))


# ---------------------------------------------------------------------------------------------------- against torch


@pytest.mark.parametrize("spatial", SPATIAL)
@pytest.mark.parametrize("class_weights", [None, [0.2, 1.0, 3.0]])
@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_cross_entropy_equals_torch(
    spatial: tuple[int, ...], class_weights: list | None, ignored: float
) -> None:
    pred, target = example(multi_class_dice_ce_sum, (4, 3, *spatial))
    target[torch.rand(target.shape) < ignored] = 255
    weight = None if class_weights is None else torch.tensor(class_weights)
    expected = functional.cross_entropy(pred, target, weight, ignore_index=255)
    found = multi_class_dice_ce_sum(pred, target, dice_weight=0.0, class_weights=class_weights)
    assert found.item() == approx(expected.item())


@pytest.mark.parametrize("class_weights", [None, [0.2, 1.0, 3.0]])
def test_cross_entropy_with_pixel_weights_equals_torch(class_weights: list | None) -> None:
    pred, target = example(multi_class_dice_ce_sum)
    weights = torch.rand(2, 6, 6)
    by_class = torch.tensor(class_weights or [1.0, 1.0, 1.0])
    losses = functional.cross_entropy(pred, target, by_class, reduction="none")
    expected = (losses * weights).sum() / (by_class[target] * weights).sum()
    options = {"dice_weight": 0.0, "class_weights": class_weights, "pixel_weights": weights}
    assert multi_class_dice_ce_sum(pred, target, **options).item() == approx(expected.item())


@pytest.mark.parametrize("spatial", SPATIAL)
@pytest.mark.parametrize("class_weights", [None, [0.2, 1.0, 3.0]])
@pytest.mark.parametrize("has_pixel_weights", [False, True])
@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_binary_cross_entropy_equals_torch(
    spatial: tuple[int, ...], class_weights: list | None, has_pixel_weights: bool, ignored: float
) -> None:
    pred, target = example(dice_bce_sum, (4, 3, *spatial))
    weights = torch.ones_like(target)
    pixel_weights = torch.rand(4, *spatial) if has_pixel_weights else None
    if pixel_weights is not None:
        weights = weights * pixel_weights.unsqueeze(1)
    if class_weights is not None:
        weights = weights * torch.tensor(class_weights).reshape(3, *[1] * len(spatial))
    keep = torch.rand(target.shape) >= ignored
    expected = functional.binary_cross_entropy_with_logits(
        pred[keep], target[keep], weights[keep], reduction="sum"
    )
    options = {"dice_weight": 0.0, "class_weights": class_weights, "pixel_weights": pixel_weights}
    found = dice_bce_sum(pred, target.masked_fill(~keep, 255), **options)
    assert found.item() == approx((expected / weights[keep].sum()).item(), 1e-5)


def test_binary_cross_entropy_without_weights_is_the_plain_mean() -> None:
    pred, target = example(dice_bce_sum)
    expected = functional.binary_cross_entropy_with_logits(pred, target)
    assert dice_bce_sum(pred, target, dice_weight=0.0).item() == approx(expected.item())


# --------------------------------------------------------------------------------------------------------- extremes


def extreme_cases(loss: Any) -> dict[str, tuple[Tensor, Tensor]]:
    if takes_class_numbers(loss):
        half = torch.zeros(2, 8, 8, dtype=torch.int64)
        half[:, :, 4:] = 1
        empty, full = torch.zeros_like(half), torch.ones_like(half)
    else:
        half = torch.zeros(2, 1, 8, 8)
        half[..., 4:] = 1
        empty, full = torch.zeros_like(half), torch.ones_like(half)
    shifted = half.roll(2, -1)
    return {
        "perfect": (logits_for(loss, half), half),
        "empty": (logits_for(loss, empty), empty),
        "full": (logits_for(loss, full), full),
        "half": (logits_for(loss, shifted), half),
        "disjoint": (logits_for(loss, 1 - half), half),
    }


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("case", ["perfect", "empty", "full"])
@pytest.mark.parametrize("loss", LOSSES)
def test_right_predictions_have_no_loss(loss: Any, case: str, batch: bool) -> None:
    assert loss(*extreme_cases(loss)[case], batch=batch).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_perfect_is_better_than_half_is_better_than_disjoint(loss: Any, batch: bool) -> None:
    perfect, half, disjoint = (
        loss(*extreme_cases(loss)[case], batch=batch).item() for case in ("perfect", "half", "disjoint")
    )
    assert perfect < half - 0.2 < disjoint - 0.4


@pytest.mark.parametrize("loss", DICE_LOSSES)
def test_dice_of_disjoint_masks_is_near_one(loss: Any) -> None:
    assert 0.9 < loss(*extreme_cases(loss)["disjoint"]).item() <= 1
    assert loss(*extreme_cases(loss)["disjoint"], smooth=0.0).item() == approx(1)


@pytest.mark.parametrize("loss", DICE_LOSSES)
def test_dice_of_masks_that_overlap_by_half_is_a_half(loss: Any) -> None:
    assert loss(*extreme_cases(loss)["half"], smooth=0.0).item() == approx(0.5)


@pytest.mark.parametrize("case", ["perfect", "empty", "full", "half", "disjoint"])
@pytest.mark.parametrize("loss", LOSSES)
def test_without_smoothing_nothing_is_nan(loss: Any, case: str) -> None:
    pred, target = extreme_cases(loss)[case]
    pred = pred * 1e3
    assert loss(pred, target, smooth=0.0).isfinite()
    assert gradient(loss, pred, target, smooth=0.0).isfinite().all()


@pytest.mark.parametrize("case", ["perfect", "empty", "full", "half", "disjoint"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_of_extreme_logits_are_finite(loss: Any, dtype: torch.dtype, case: str) -> None:
    pred, target = extreme_cases(loss)[case]
    pred = (pred.sign() * 1e4).to(dtype)
    grad = gradient(loss, pred, target)
    assert loss(pred, target).isfinite() and grad.dtype == dtype and grad.isfinite().all()
    wrong = case in ("half", "disjoint")
    if loss in (dice_bce_sum, multi_class_dice_ce_sum):
        assert bool(grad.any()) == wrong


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("loss", LOSSES)
def test_ordinary_logits_have_a_gradient_at_every_pixel(loss: Any, dtype: torch.dtype) -> None:
    pred, target = example(loss)
    assert gradient(loss, pred.to(dtype), target).all()


@pytest.mark.parametrize("loss", BINARY_LOSSES)
def test_gradients_point_to_the_target(loss: Any) -> None:
    pred, target = example(loss)
    assert torch.equal(gradient(loss, pred, target) < 0, target > 0.5)


@pytest.mark.parametrize("loss", LOSSES)
def test_descending_ends_at_the_target(loss: Any) -> None:
    pred, target = example(loss)
    pred = torch.nn.Parameter(pred)
    optimizer = torch.optim.Adam([pred], lr=0.5)
    for _ in range(60):
        optimizer.zero_grad()
        loss(pred, target).backward()
        optimizer.step()
    assert loss(pred, target) < 0.02 and f1(pred, target) == 1


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_is_computed_in_float32_under_autocast(loss: Any) -> None:
    pred, target = example(loss)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(pred, target)
    assert value.dtype == torch.float32 and value.item() == approx(loss(pred, target).item())


# ------------------------------------------------------------------------------------------------------------ masks


def right_half(pred: Tensor) -> Tensor:
    mask = torch.ones(pred.shape[0], *pred.shape[2:])
    mask[..., pred.shape[-1] // 2 :] = 0
    return mask


@pytest.mark.parametrize("masked", MASKED_LOSSES)
@pytest.mark.parametrize("batch", [False, True])
def test_masked_losses_equal_the_plain_ones_on_the_usable_pixels(masked: Any, batch: bool) -> None:
    pred, target = example(masked)
    found = masked(pred, with_mask(target, right_half(pred), takes_class_numbers(masked)), batch=batch)
    assert found.item() == approx(MASKED_LOSSES[masked](pred[..., :3], target[..., :3], batch=batch).item())


@pytest.mark.parametrize("masked", MASKED_METRICS)
@pytest.mark.parametrize("loss", [smooth_dice_loss, multi_class_smooth_dice_loss])
def test_masked_metrics_equal_the_plain_ones_on_the_usable_pixels(masked: Any, loss: Any) -> None:
    pred, target = example(loss)
    found = masked(pred, with_mask(target, right_half(pred), takes_class_numbers(loss)))
    assert found == MASKED_METRICS[masked](pred[..., :3], target[..., :3])


@pytest.mark.parametrize("masked", [*MASKED_LOSSES, *MASKED_METRICS])
@pytest.mark.parametrize("rubbish", [0.0, 1.0, 99.0, 255.0, -1.0, math.nan, math.inf, -math.inf])
def test_what_stands_under_the_mask_does_not_matter(masked: Any, rubbish: float) -> None:
    pred, target = example(masked)
    mask = right_half(pred)
    options = {"multi_class": takes_class_numbers(masked)}
    clean = with_mask(target, mask, **options)
    dirty = clean.clone()
    dirty[:, 1:, ..., 3:] = rubbish
    moved = pred.clone()
    moved[..., 3:] = 1e4 * torch.randn(2, 3, 6, 3)
    assert torch.equal(masked(pred, dirty), masked(pred, clean))
    assert torch.equal(masked(moved, dirty), masked(pred, clean))


@pytest.mark.parametrize("masked", MASKED_LOSSES)
@pytest.mark.parametrize("rubbish", [0.0, 99.0, math.nan])
def test_gradient_is_zero_under_the_mask_only(masked: Any, rubbish: float) -> None:
    pred, target = example(masked)
    target = with_mask(target, right_half(pred), takes_class_numbers(masked))
    target[:, 1:, ..., 3:] = rubbish
    grad = gradient(masked, pred, target)
    assert not grad[..., 3:].any() and grad[..., :3].all() and grad.isfinite().all()


@pytest.mark.parametrize("masked", MASKED_LOSSES)
def test_nothing_usable_means_no_loss_and_no_gradient(masked: Any) -> None:
    pred, target = example(masked)
    target = with_mask(target, torch.zeros(2, 6, 6), takes_class_numbers(masked))
    for smooth in (1.0, 0.0):
        assert masked(pred, target).item() == approx(0)
        grad = gradient(masked, pred, target, smooth=smooth)
        assert grad.isfinite().all() and not grad.any()


@pytest.mark.parametrize("masked", MASKED_METRICS)
def test_metric_of_nothing_usable_is_nan(masked: Any) -> None:
    pred, target = example(smooth_dice_loss)
    assert masked(pred, with_mask(target, torch.zeros(2, 6, 6), False)).isnan()


@pytest.mark.parametrize("masked", MASKED_LOSSES)
def test_mask_may_hold_weights(masked: Any) -> None:
    pred, target = example(masked)
    weights = torch.rand(2, 6, 6)
    found = masked(pred, with_mask(target, weights, takes_class_numbers(masked)))
    assert torch.equal(found, MASKED_LOSSES[masked](pred, target, pixel_weights=weights))


@pytest.mark.parametrize("masked", MASKED_LOSSES)
def test_masked_losses_hand_options_on(masked: Any) -> None:
    pred, target = example(masked)
    options = {"smooth": 0.5, "class_weights": [1.0, 2.0, 3.0], "ignore_index": 1, "batch": True}
    found = masked(pred, with_mask(target, torch.ones(2, 6, 6), takes_class_numbers(masked)), **options)
    assert torch.equal(found, MASKED_LOSSES[masked](pred, target, **options))


@pytest.mark.parametrize("spatial", SPATIAL)
def test_unmask_takes_the_first_channel_off(spatial: tuple[int, ...]) -> None:
    target = torch.rand(4, 4, *spatial)
    rest, mask = unmask(torch.zeros(4, 3, *spatial), target)
    assert torch.equal(rest, target[:, 1:]) and torch.equal(mask, target[:, 0])


@pytest.mark.parametrize("channels, wanted", [(1, (4, 1, 5)), (2, (4, 5)), (3, (4, 5))])
def test_unmask_of_two_channels_gives_class_numbers_for_several_classes(channels: int, wanted: tuple) -> None:
    rest, mask = unmask(torch.zeros(4, channels, 5), torch.ones(4, 2, 5, dtype=torch.uint8))
    assert rest.shape == wanted and mask.shape == (4, 5) and mask.dtype == torch.float32
    assert channels == 1 or rest.dtype == torch.int64


@pytest.mark.parametrize("masked", [*MASKED_LOSSES, *MASKED_METRICS])
@pytest.mark.parametrize("target_shape", [(2, 3, 6, 6), (2, 5, 6, 6), (2, 6, 6), (2, 1, 6, 6)])
def test_masked_target_of_wrong_shape_is_refused(masked: Any, target_shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape("(2, 3, 6, 6)") + ".*" + re.escape(str(target_shape))):
        masked(torch.zeros(2, 3, 6, 6), torch.zeros(target_shape))


# ----------------------------------------------------------------------------------------------------- ignore_index


@pytest.mark.parametrize("ignore_index", [255, 7])
@pytest.mark.parametrize("loss", [*LOSSES, *METRICS])
def test_ignored_pixels_do_not_count(loss: Any, ignore_index: int) -> None:
    pred, target = example(loss)
    ignored = target.clone()
    ignored[..., 3:] = ignore_index
    found, expected = loss(pred, ignored, ignore_index=ignore_index), loss(pred[..., :3], target[..., :3])
    assert found.item() == approx(expected.item())
    moved = pred.clone()
    moved[..., 3:] = 1e4 * torch.randn(2, 3, 6, 3)
    assert torch.equal(loss(moved, ignored, ignore_index=ignore_index), found)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_ignored_pixels_do_not_count_in_multi_class_metrics(metric: Any, dtype: torch.dtype) -> None:
    pred, target = example(multi_class_smooth_dice_loss)
    ignored = target.clone().to(dtype)
    ignored[..., 3:] = 255
    assert metric(pred, ignored) == metric(pred[..., :3], target[..., :3])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_gradient_is_zero_at_ignored_pixels_only(loss: Any, dtype: torch.dtype) -> None:
    pred, target = example(loss)
    target[..., 3:] = 255
    grad = gradient(loss, pred, target.to(dtype))
    assert not grad[..., 3:].any() and grad[..., :3].all()


@pytest.mark.parametrize("loss", BINARY_LOSSES)
def test_one_class_of_a_pixel_may_be_ignored(loss: Any) -> None:
    pred, target = example(loss)
    target[:, 1, 2:] = 255
    grad = gradient(loss, pred, target)
    assert not grad[:, 1, 2:].any() and grad[:, [0, 2]].all() and grad[:, 1, :2].all()


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_but_ignored_pixels_means_no_loss_and_no_gradient(loss: Any) -> None:
    pred, target = example(loss)
    target = torch.full_like(target, 255)
    assert loss(pred, target).item() == approx(0)
    grad = gradient(loss, pred, target)
    assert grad.isfinite().all() and not grad.any()


# ----------------------------------------------------------------------------------------------------------- shapes


WRONG_BINARY_SHAPES = [(2, 3, 6, 5), (2, 1, 6, 6), (3, 3, 6, 6), (2, 6, 6), (6, 6)]
WRONG_MULTI_SHAPES = [(2, 6, 5), (3, 6, 6), (2, 3, 6, 6), (2, 1, 6, 6), (6, 6)]


@pytest.mark.parametrize(
    "loss, shape",
    [
        *itertools.product(BINARY_LOSSES, WRONG_BINARY_SHAPES),
        *itertools.product(MULTI_LOSSES, WRONG_MULTI_SHAPES),
    ],
)
def test_disagreeing_shapes_are_refused_by_losses(loss: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape("(2, 3, 6, 6)") + ".*" + re.escape(str(shape))):
        loss(torch.zeros(2, 3, 6, 6), torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", [(2, 3, 6, 5), (2, 1, 6, 6), (3, 3, 6, 6), (2, 6, 5), (3, 6, 6), (6, 6)])
def test_disagreeing_shapes_are_refused_by_metrics(metric: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape("(2, 3, 6, 6)") + ".*" + re.escape(str(shape))):
        metric(torch.zeros(2, 3, 6, 6), torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("loss", [*MULTI_LOSSES, *METRICS])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_float_class_numbers_are_refused(loss: Any, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"{dtype}: class numbers are integers"):
        loss(torch.zeros(2, 3, 6, 6), torch.zeros(2, 6, 6, dtype=dtype))


@pytest.mark.parametrize("loss", [*MULTI_LOSSES, *METRICS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_class_numbers_for_one_channel_are_refused(loss: Any, dtype: torch.dtype) -> None:
    with pytest.raises(
        ValueError, match=re.escape("(2, 1, 6, 6) and the target (2, 6, 6): with one channel")
    ):
        loss(torch.zeros(2, 1, 6, 6), torch.zeros(2, 6, 6, dtype=dtype))


def test_prediction_without_channels_is_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("(4,)")):
        f1(torch.zeros(4), torch.zeros(4))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", [(2, 1, 6, 6), (2, 3, 6, 6), (6, 6), (1, 6, 6), (2, 6, 5)])
def test_pixel_weights_of_wrong_shape_are_refused(loss: Any, shape: tuple[int, ...]) -> None:
    pred, target = example(loss)
    with pytest.raises(ValueError, match=re.escape(f"the shape {shape}, it needs (2, 6, 6)")):
        loss(pred, target, pixel_weights=torch.ones(shape))


@pytest.mark.parametrize("loss", [smooth_dice_loss, multi_class_smooth_dice_loss])
@pytest.mark.parametrize("shape", [(2, 1, 6, 6), (6, 6), (1, 6, 6)])
def test_valid_pixels_of_wrong_shape_are_refused(loss: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"the shape {shape}, it needs (2, 6, 6)")):
        count(*example(loss), valid=torch.ones(shape))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("class_weights", [[1.0], [1.0, 2.0], torch.ones(4)])
def test_class_weights_of_wrong_length_are_refused(loss: Any, class_weights: Any) -> None:
    with pytest.raises(ValueError, match=f"there are {len(class_weights)} class_weights.* 3 classes"):
        loss(*example(loss), class_weights=class_weights)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "class_weights", [(1.0, 2.0, 3.0), torch.tensor([1, 2, 3]), torch.tensor([1.0, 2.0, 3.0])]
)
def test_class_weights_may_be_a_sequence_or_a_tensor(loss: Any, class_weights: Any) -> None:
    pred, target = example(loss)
    expected = loss(pred, target, class_weights=[1.0, 2.0, 3.0])
    assert torch.equal(loss(pred, target, class_weights=class_weights), expected)
    assert expected != loss(pred, target)


@pytest.mark.parametrize("loss", LOSSES)
def test_equal_class_weights_change_nothing(loss: Any) -> None:
    pred, target = example(loss)
    assert loss(pred, target, class_weights=[2.0, 2.0, 2.0]).item() == approx(loss(pred, target).item())


def test_is_multi_class_by_the_number_of_dimensions() -> None:
    assert is_multi_class(torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4)) and is_multi_class(
        torch.zeros(2, 3), torch.zeros(2)
    )
    assert not is_multi_class(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4))


@pytest.mark.parametrize("spatial", SPATIAL)
def test_shapes_of_the_convention_pass(spatial: tuple[int, ...]) -> None:
    check_shapes(torch.zeros(2, 1, *spatial), torch.zeros(2, 1, *spatial))
    check_shapes(torch.zeros(2, 3, *spatial), torch.zeros(2, 3, *spatial))
    check_shapes(torch.zeros(2, 3, *spatial), torch.zeros(2, *spatial, dtype=torch.uint8))


# --------------------------------------------------------------------------------------------------- classification


@pytest.mark.parametrize("loss", LOSSES)
def test_classification_is_an_image_of_one_row(loss: Any) -> None:
    pred, target = example(loss, (8, 3))
    image = [part.movedim(0, -1)[None] for part in (pred, target)]
    assert loss(pred, target).item() == approx(loss(*image).item())
    assert torch.equal(loss(pred, target, batch=True), loss(pred, target))
    assert gradient(loss, pred, target).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("loss", [smooth_dice_loss, multi_class_smooth_dice_loss])
def test_metrics_of_classification_are_those_of_an_image_of_one_row(metric: Any, loss: Any) -> None:
    pred, target = example(loss, (8, 3))
    assert metric(pred, target) == metric(*(part.movedim(0, -1)[None] for part in (pred, target)))


@pytest.mark.parametrize("masked", [*MASKED_LOSSES, *MASKED_METRICS])
def test_masked_classification(masked: Any) -> None:
    pred, target = example(masked, (8, 3))
    mask = torch.tensor([1.0, 1, 1, 1, 1, 0, 0, 0])
    plain = {**MASKED_LOSSES, **MASKED_METRICS}[masked]
    found = masked(pred, with_mask(target, mask, takes_class_numbers(masked)))
    assert found.item() == approx(plain(pred[:5], target[:5]).item())


# ---------------------------------------------------------------------------------------------------------- metrics


def flat(pred: Tensor, target: Tensor, ignore_index: int = 255) -> tuple[Tensor, Tensor]:
    """Right and guessed class numbers of all pixels that count."""
    keep = target != ignore_index
    return target[keep], pred.argmax(1)[keep]


def multi_class_example(classes: int, spatial: tuple[int, ...], ignored: float) -> tuple[Tensor, Tensor]:
    pred, target = torch.randn(6, classes, *spatial), torch.randint(classes, (6, *spatial))
    target[torch.rand(target.shape) < ignored] = 255
    return pred, target


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("spatial", SPATIAL)
@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_confusion_matrix_equals_sklearn(classes: int, spatial: tuple[int, ...], ignored: float) -> None:
    pred, target = multi_class_example(classes, spatial, ignored)
    expected = sklearn_metrics.confusion_matrix(*flat(pred, target), labels=range(classes))
    assert count(pred, target).tolist() == expected.tolist()


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_multi_class_metrics_equal_sklearn(classes: int, ignored: float) -> None:
    pred, target = multi_class_example(classes, (9, 9), ignored)
    truth, guess = flat(pred, target)
    options = {"labels": range(classes), "average": None, "zero_division": 0}
    expected = sklearn_metrics.precision_recall_fscore_support(truth, guess, **options)[:3]
    counts = count(pred, target)
    for metric, values in zip((precision, recall, f1), expected, strict=True):
        assert metric.per_class(counts).tolist() == approx(values.tolist(), 1e-12)
    assert iou.per_class(counts).tolist() == approx(
        sklearn_metrics.jaccard_score(truth, guess, **options).tolist(), 1e-12
    )
    assert accuracy(pred, target).item() == approx(sklearn_metrics.accuracy_score(truth, guess), 1e-12)
    average = "binary" if classes == 2 else "macro"
    assert f1(pred, target).item() == approx(sklearn_metrics.f1_score(truth, guess, average=average), 1e-12)
    assert iou(pred, target).item() == approx(
        sklearn_metrics.jaccard_score(truth, guess, average=average), 1e-12
    )


@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.9])
def test_binary_and_multi_label_metrics_equal_sklearn(channels: int, threshold: float) -> None:
    pred, target = example(smooth_dice_loss, (3, channels, 8, 8))
    truth, guess = (
        part.movedim(1, -1).reshape(-1, channels).int() for part in (target, pred.sigmoid() >= threshold)
    )
    counts = count(pred, target, threshold=threshold)
    assert counts.shape == (channels, 2, 2)
    for index in range(channels):
        expected = sklearn_metrics.confusion_matrix(truth[:, index], guess[:, index], labels=[0, 1])
        assert counts[index].tolist() == expected.tolist()
    average = "binary" if channels == 1 else "macro"
    options = {"average": average, "zero_division": 0}
    for metric, name in ((precision, "precision"), (recall, "recall"), (f1, "f1"), (iou, "jaccard")):
        expected = getattr(sklearn_metrics, f"{name}_score")(truth.squeeze(1), guess.squeeze(1), **options)
        assert metric(pred, target, threshold=threshold).item() == approx(expected, 1e-12)
    right = [sklearn_metrics.accuracy_score(truth[:, index], guess[:, index]) for index in range(channels)]
    assert accuracy(pred, target, threshold).item() == approx(sum(right) / channels, 1e-12)


@pytest.mark.parametrize("classes", [3, 5])
@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_multi_class_metrics_equal_torchmetrics(classes: int, ignored: float) -> None:
    pred, target = multi_class_example(classes, (9, 9), ignored)
    options = {"num_classes": classes, "average": "macro", "ignore_index": 255}
    names = {precision: "precision", recall: "recall", f1: "f1_score", iou: "jaccard_index"}
    for metric, name in names.items():
        expected = getattr(reference, f"multiclass_{name}")(pred, target, **options)
        assert metric(pred, target).item() == approx(expected.item())
    options["average"] = "micro"
    assert accuracy(pred, target).item() == approx(
        reference.multiclass_accuracy(pred, target, **options).item()
    )


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_binary_and_multi_label_metrics_equal_torchmetrics(channels: int, ignored: float) -> None:
    pred, target = example(smooth_dice_loss, (3, channels, 8, 8))
    target = target.long().masked_fill(torch.rand(target.shape) < ignored, 255)
    options: dict[str, Any] = {"ignore_index": 255}
    kind = "binary"
    if channels > 1:
        kind, options = "multilabel", {**options, "num_labels": channels, "average": "macro"}
    names = {
        precision: "precision",
        recall: "recall",
        f1: "f1_score",
        iou: "jaccard_index",
        accuracy: "accuracy",
    }
    for metric, name in names.items():
        expected = getattr(reference, f"{kind}_{name}")(pred, target, **options)
        assert metric(pred, target).item() == approx(expected.item())


def test_counts_by_hand() -> None:
    pred = torch.tensor([[[[9.0, 9, -9], [-9, 0, 9]]]])
    target = torch.tensor([[[[1, 0, 1], [0, 1, 255]]]])
    counts = count(pred, target)
    assert counts.tolist() == [[[1, 1], [1, 2]]]
    assert [part.item() for part in hits_and_errors(counts)] == [2, 1, 1]
    assert precision(pred, target).item() == approx(2 / 3, 1e-15)
    assert recall(pred, target).item() == approx(2 / 3, 1e-15)
    assert f1(pred, target).item() == approx(2 / 3, 1e-15)
    assert iou(pred, target).item() == approx(2 / 4, 1e-15)
    assert accuracy(pred, target).item() == approx(3 / 5, 1e-15)


def test_rows_of_the_confusion_matrix_are_the_target() -> None:
    pred = torch.tensor([[0.0, 1.0, 0.0]])
    assert count(pred, torch.tensor([2])).tolist() == [[0, 0, 0], [0, 0, 0], [0, 1, 0]]


def test_probability_at_the_threshold_belongs_to_the_class() -> None:
    assert count(torch.zeros(1, 1), torch.ones(1, 1), threshold=0.5)[0, 1, 1] == 1


@pytest.mark.parametrize("loss", [smooth_dice_loss, multi_class_smooth_dice_loss])
def test_valid_leaves_pixels_out(loss: Any) -> None:
    pred, target = example(loss)
    assert torch.equal(count(pred, target, right_half(pred)), count(pred[..., :3], target[..., :3]))


@pytest.mark.parametrize("metric", METRICS)
def test_extremes_of_metrics(metric: Any) -> None:
    target = torch.tensor([[[[1, 1, 0, 0]]]])
    assert metric(30 * (2.0 * target - 1), target) == 1
    assert metric(30 * (1 - 2.0 * target), target) == 0


@pytest.mark.parametrize("metric", [precision, recall, f1, iou])
def test_empty_predicted_empty_is_nan(metric: Any) -> None:
    assert metric(torch.full((1, 1, 2, 2), -9.0), torch.zeros(1, 1, 2, 2)).isnan()


@pytest.mark.parametrize("metric", [precision, recall, f1, iou])
def test_class_that_is_only_there_or_only_predicted_is_zero(metric: Any) -> None:
    assert metric(torch.full((1, 1, 2, 2), -9.0), torch.ones(1, 1, 2, 2)) == 0
    assert metric(torch.full((1, 1, 2, 2), 9.0), torch.zeros(1, 1, 2, 2)) == 0


ABSENT = torch.tensor([[3, 1, 0, 0], [2, 4, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]])


@pytest.mark.parametrize(
    "metric, expected",
    [
        (precision, [3 / 5, 4 / 6, math.nan, 0]),
        (recall, [3 / 4, 4 / 6, math.nan, 0]),
        (f1, [6 / 9, 8 / 12, math.nan, 0]),
        (iou, [3 / 6, 4 / 8, math.nan, 0]),
    ],
)
def test_absent_classes_are_nan_and_left_out_of_the_mean(metric: Any, expected: list[float]) -> None:
    assert metric.per_class(ABSENT).tolist() == pytest.approx(expected, nan_ok=True, abs=1e-15)
    there = [value for value in expected if not math.isnan(value)]
    assert metric.from_counts(ABSENT).item() == approx(sum(there) / 3, 1e-15)


def test_absent_classes_in_multi_label() -> None:
    pred = torch.full((1, 3, 2, 2), -9.0)
    pred[:, 0] = 9.0
    target = (pred > 0).int()
    assert f1.per_class(count(pred, target)).tolist() == pytest.approx([1, math.nan, math.nan], nan_ok=True)
    assert f1(pred, target) == 1


def test_two_classes_that_exclude_each_other_give_the_value_of_class_one() -> None:
    counts = torch.tensor([[50, 10], [5, 35]])
    assert f1.from_counts(counts).item() == approx(70 / 85, 1e-15)
    assert summarize(torch.tensor([0.2, 0.8]), counts) == 0.8


def test_two_labels_that_may_overlap_give_the_mean() -> None:
    assert summarize(torch.tensor([0.2, 0.8]), torch.zeros(2, 2, 2)) == 0.5


def test_several_classes_give_the_mean_of_those_that_occur() -> None:
    assert summarize(torch.tensor([0.25, math.nan, 0.75]), torch.zeros(3, 3)) == 0.5
    assert summarize(torch.tensor([math.nan, math.nan, math.nan]), torch.zeros(3, 3)).isnan()


def test_accuracy_of_two_classes_counts_both() -> None:
    assert accuracy_per_class(torch.tensor([[50, 10], [5, 35]])).tolist() == [0.85]
    assert accuracy.from_counts(torch.tensor([[50, 10], [5, 35]])).item() == 0.85


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("loss", [smooth_dice_loss, multi_class_smooth_dice_loss])
def test_metric_is_that_of_its_counts(metric: Any, loss: Any) -> None:
    pred, target = example(loss)
    counts = count(pred, target)
    assert metric(pred, target) == metric.from_counts(counts)
    assert metric.from_counts(counts) == summarize(metric.per_class(counts), counts)


def test_metrics_need_no_gradient() -> None:
    pred, target = example(smooth_dice_loss)
    assert not f1(pred.requires_grad_(), target).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_count_as_their_float32_values(dtype: torch.dtype) -> None:
    for loss in (smooth_dice_loss, multi_class_smooth_dice_loss):
        pred, target = example(loss)
        pred = pred.to(dtype)
        assert torch.equal(count(pred, target), count(pred.float(), target))


# --------------------------------------------------------------------------------------------------------- counting


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32), st.lists(st.integers(0, 12), max_size=4), st.booleans(), st.integers(2, 4))
def test_counts_of_any_split_add_up(seed: int, cuts: list[int], multi_class: bool, classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pred = torch.randn(12, classes, 3, 3, generator=generator)
    shape = (12, 3, 3) if multi_class else pred.shape
    target = torch.randint(classes if multi_class else 2, shape, generator=generator)
    target[torch.rand(shape, generator=generator) < 0.2] = 255
    whole = count(pred, target)
    edges = [0, *sorted(cuts), 12]
    parts = [count(pred[low:high], target[low:high]) for low, high in itertools.pairwise(edges)]
    assert torch.equal(torch.stack(parts).sum(0), whole)
    for metric in METRICS:
        assert (
            torch.equal(metric.from_counts(sum(parts)), metric.from_counts(whole))
            or metric(pred, target).isnan()
        )


def test_mean_of_f1_over_batches_is_not_that_of_the_whole() -> None:
    pred = torch.full((2, 1, 1, 10), 9.0)
    target = torch.ones(2, 1, 1, 10)
    target[1, ..., 1:] = 0
    batches = [f1(pred[i : i + 1], target[i : i + 1]).item() for i in range(2)]
    counts = count(pred[:1], target[:1]) + count(pred[1:], target[1:])
    assert f1.from_counts(counts) == f1(pred, target)
    assert f1(pred, target).item() == approx(22 / 31, 1e-15)
    assert sum(batches) / 2 == approx((1 + 2 / 11) / 2, 1e-15)


def test_empty_batch_counts_nothing() -> None:
    assert count(torch.zeros(0, 3, 4, 4), torch.zeros(0, 4, 4, dtype=torch.int64)).sum() == 0
    assert count(torch.zeros(0, 3, 4, 4), torch.zeros(0, 3, 4, 4)).sum() == 0


@pytest.mark.parametrize("loss", [smooth_dice_loss, multi_class_smooth_dice_loss])
def test_counts_are_int64(loss: Any) -> None:
    assert count(*example(loss)).dtype == torch.int64


@pytest.mark.slow
@pytest.mark.parametrize("multi_class", [False, True])
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


# ------------------------------------------------------------------------------------------------------------ names


PUBLIC = [*METRICS, *MASKED_METRICS, *BINARY_LOSSES[:3], *MULTI_LOSSES, *MASKED_LOSSES]


@pytest.mark.parametrize("function", PUBLIC, ids=lambda function: function.__name__)
def test_losses_and_metrics_are_found_under_their_own_names(function: Any) -> None:
    assert getattr(module, function.__name__) is function
    assert name_of(function, project_of("dida_tools")) == f".utils.loss:{function.__name__}"
    assert resolve(name_of(function, project_of("dida_tools")), project_of("dida_tools")) is function
    assert pickle.loads(pickle.dumps(function)) is function


@pytest.mark.parametrize("metric", [*METRICS, *MASKED_METRICS], ids=lambda metric: metric.__name__)
def test_metrics_say_what_they_are(metric: Any) -> None:
    assert metric.masked == metric.__name__.startswith("masked_")
    assert metric.per_class.__doc__ in metric.__doc__


def test_every_loss_and_metric_is_tested_under_its_name() -> None:
    endings = ("_loss", "_sum", *(metric.__name__ for metric in METRICS))
    assert {name for name in vars(module) if name.endswith(endings)} == {
        function.__name__ for function in PUBLIC
    }


def specificity_per_class(counts: Tensor) -> Tensor:
    """(C,) part of the rest that is right."""
    hits, extra, missed = hits_and_errors(counts)
    rest = counts.sum((-2, -1)) - hits - missed
    return (rest - extra) / rest


specificity = count_metric(specificity_per_class, "specificity")


def test_own_metric_belongs_to_the_module_that_defines_it() -> None:
    assert (specificity.__module__, specificity.__qualname__) == (__name__, "specificity")
    pred, target = multi_class_example(2, (5, 5), 0.0)
    truth, guess = flat(pred, target)
    assert specificity(pred, target).item() == approx(
        sklearn_metrics.recall_score(1 - truth, 1 - guess), 1e-12
    )


def test_harmonic_mean_of_precision_and_recall_is_f1() -> None:
    counts = torch.randint(1, 100, (5, 5))
    right, found = precision_per_class(counts), recall_per_class(counts)
    assert torch.allclose(f1_per_class(counts), 2 * right * found / (right + found))


def test_nothing_warns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for loss in LOSSES:
            loss(*example(loss))
        for metric in METRICS:
            metric(*example(smooth_dice_loss))
