"""Losses by hand, against torch, and in what all of them share; masked forms against the plain ones."""

import inspect
import math
import pickle
import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from dida_core.config.project import project_of
from dida_core.config.references import name_of, resolve
from torch import Tensor
from torch.nn import functional

from dida_tools.utils import loss as module
from dida_tools.utils.loss import (
    dice_bce_sum,
    masked,
    masked_dice_bce_sum,
    masked_multi_class_dice_ce_sum,
    masked_multi_class_smooth_dice_loss,
    masked_smooth_dice_beta_loss,
    masked_smooth_dice_loss,
    multi_class_dice_ce_sum,
    multi_class_smooth_dice_loss,
    smooth_dice_beta_loss,
    smooth_dice_loss,
)
from dida_tools.utils.metrics import f1

from tests.helpers import PACKAGE

DICE = [smooth_dice_loss, smooth_dice_beta_loss, multi_class_smooth_dice_loss]
PLAIN = [*DICE, dice_bce_sum, multi_class_dice_ce_sum]
LOSSES = [*PLAIN, partial(smooth_dice_beta_loss, beta=2.0)]
MASKED = {
    masked_smooth_dice_loss: smooth_dice_loss,
    masked_smooth_dice_beta_loss: smooth_dice_beta_loss,
    masked_dice_bce_sum: dice_bce_sum,
    masked_multi_class_smooth_dice_loss: multi_class_smooth_dice_loss,
    masked_multi_class_dice_ce_sum: multi_class_dice_ce_sum,
}
HALF = [torch.float16, torch.bfloat16]
RUBBISH = [0.0, 1.0, 99.0, 255.0, -1.0, math.nan, math.inf, -math.inf]

every_loss = pytest.mark.parametrize("loss", LOSSES)
every_masked = pytest.mark.parametrize("form", MASKED)


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


def with_mask(loss: Any, target: Tensor, mask: Tensor) -> Tensor:
    target = target.unsqueeze(1) if takes_class_numbers(loss) else target
    return torch.cat([mask.unsqueeze(1).float(), target.float()], 1)


def gradient(loss: Callable[..., Tensor], pred: Tensor, target: Tensor, **options: Any) -> Tensor:
    pred = pred.detach().clone().requires_grad_()
    loss(pred, target, **options).backward()
    assert pred.grad is not None and pred.grad.isfinite().all()
    return pred.grad


def approx(value: Any, tolerance: float = 1e-6) -> Any:
    value = value.item() if isinstance(value, Tensor) else value
    return pytest.approx(value, rel=tolerance, abs=tolerance)


# ------------------------------------------------------------------------------------------------- values

UNDECIDED, BOTH = torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 2, 2)
TWO, THREE = torch.tensor([[[[1, 1], [0, 0]]]]), torch.tensor([[[[1, 1], [1, 0]]]])
CORNER = torch.tensor([[[0, 0], [0, 1]]])
FIRST, SECOND = (2 * 1.5 + 1) / (2 * 1.5 + 1.5 + 0.5 + 1), (2 * 0.5 + 1) / (2 * 0.5 + 0.5 + 1.5 + 1)
CORNER_LOSS, WEIGHTED_LOSS = 1 - (FIRST + SECOND) / 2, 1 - (3 * FIRST + SECOND) / 4
PIXELS = torch.tensor([[[2.0, 1.0], [1.0, 0.0]]])


def beta_loss(beta: float, tp: float = 1.5, fp: float = 0.5, fn: float = 1.5) -> float:
    return 1 - ((1 + beta**2) * tp + 1) / ((1 + beta**2) * tp + beta**2 * fn + fp + 1)


def mixed(weight: float, dice: float) -> float:
    return weight * dice + (1 - weight) * math.log(2)


VALUES: list[tuple[Callable, Tensor, Tensor, dict, float]] = [
    *((smooth_dice_loss, UNDECIDED, TWO, {"smooth": s}, 1 - (2 + s) / (4 + s)) for s in (0, 0.5, 1, 9)),
    (smooth_dice_loss, UNDECIDED, TWO, {"pixel_weights": PIXELS}, 1 - 4 / (3 + 1.5 + 0.5 + 1)),
    *((smooth_dice_beta_loss, UNDECIDED, THREE, {"beta": b}, beta_loss(b)) for b in (0.5, 1, 2)),
    *((dice_bce_sum, UNDECIDED, TWO, {"dice_weight": w}, mixed(w, 0.4)) for w in (0, 0.3, 1)),
    (multi_class_smooth_dice_loss, BOTH, CORNER, {}, CORNER_LOSS),
    (multi_class_smooth_dice_loss, BOTH, CORNER, {"class_weights": [3, 1]}, WEIGHTED_LOSS),
    *(
        (multi_class_dice_ce_sum, BOTH, CORNER, {"dice_weight": w}, mixed(w, CORNER_LOSS))
        for w in (0, 0.3, 1)
    ),
]


@pytest.mark.parametrize(("loss", "pred", "target", "options", "expected"), VALUES)
def test_values_by_hand(loss: Any, pred: Tensor, target: Tensor, options: dict, expected: float) -> None:
    assert loss(pred, target, **options).item() == approx(expected)


@pytest.mark.parametrize("spatial", [(), (6,), (5, 7), (2, 3, 4)])
@pytest.mark.parametrize("class_weights", [None, [0.2, 1.0, 3.0]])
@pytest.mark.parametrize("has_pixel_weights", [False, True])
@pytest.mark.parametrize("loss", [dice_bce_sum, multi_class_dice_ce_sum])
def test_cross_entropy_equals_torch(
    loss: Any, spatial: tuple[int, ...], class_weights: list | None, has_pixel_weights: bool
) -> None:
    pred, target = example(loss, (4, 3, *spatial))
    pixel_weights = torch.rand(4, *spatial) if has_pixel_weights else None
    weights = torch.ones(4, *spatial) if pixel_weights is None else pixel_weights
    by_class, keep = torch.tensor(class_weights or [1.0, 1.0, 1.0]), torch.rand(target.shape) >= 0.3
    keep[0] = True
    if takes_class_numbers(loss):
        each = functional.cross_entropy(pred, target, by_class, reduction="none")
        expected = (each * weights)[keep].sum() / (by_class[target] * weights)[keep].sum()
    else:
        weights = (weights.unsqueeze(1) * by_class.reshape(3, *[1] * len(spatial))).expand(pred.shape)[keep]
        each = functional.binary_cross_entropy_with_logits(pred[keep], target[keep], reduction="none")
        expected = (each * weights).sum() / weights.sum()
    options = {"dice_weight": 0.0, "class_weights": class_weights, "pixel_weights": pixel_weights}
    assert loss(pred, target.masked_fill(~keep, 255), **options).item() == approx(expected, 1e-5)


# --------------------------------------------------------------------------------------- what all share


@every_loss
def test_the_mean_over_samples_and_with_batch_that_of_one_image_in_any_order(loss: Any) -> None:
    pred, target = example(loss, (4, 3, 5, 6))
    samples = torch.stack([loss(pred[i : i + 1], target[i : i + 1]) for i in range(4)])
    assert loss(pred, target).item() == approx(samples.mean())
    as_one = [torch.cat(list(part), -1)[None] for part in (pred, target)]
    assert loss(pred, target, batch=True).item() == approx(loss(*as_one))
    order = torch.randperm(4)
    for batch in (False, True):
        reordered = loss(pred[order], target[order], batch=batch)
        assert reordered.item() == approx(loss(pred, target, batch=batch))


@every_loss
def test_the_loss_is_a_float32_scalar_computed_in_float32_for_targets_of_any_dtype(loss: Any) -> None:
    pred, target = example(loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = loss(pred, target)
    for dtype in (*HALF, torch.float32):
        value = loss(pred.to(dtype), target)
        assert value.shape == () and value.dtype == torch.float32
        assert torch.equal(value, loss(pred.to(dtype).float(), target))
        assert gradient(loss, pred.to(dtype), target).all()  # at every pixel
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(pred, target)
    assert value.dtype == torch.float32 and value.item() == approx(expected)
    dtypes = [torch.uint8, torch.int16, torch.int32, torch.int64]
    for dtype in [*dtypes, *([] if takes_class_numbers(loss) else [torch.bool, torch.float16])]:
        assert torch.equal(loss(pred, target.to(dtype)), expected)


@every_loss
def test_descending_ends_at_the_target(loss: Any) -> None:
    pred, target = example(loss)
    if not takes_class_numbers(loss):
        assert torch.equal(gradient(loss, pred, target) < 0, target > 0.5)
    pred = torch.nn.Parameter(pred)
    optimizer = torch.optim.Adam([pred], lr=0.5)
    for _ in range(60):
        optimizer.zero_grad()
        loss(pred, target).backward()
        optimizer.step()
    assert loss(pred, target) < 0.02 and f1(pred, target) == 1


def extreme_cases(loss: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Certain predictions and targets by name."""

    def logits(target: Tensor) -> Tensor:
        if takes_class_numbers(loss):
            return 30 * (2.0 * functional.one_hot(target, 2).movedim(-1, 1) - 1)
        return 30 * (2.0 * target.float() - 1)

    half = torch.zeros(2, 8, 8, dtype=torch.int64) if takes_class_numbers(loss) else torch.zeros(2, 1, 8, 8)
    half[..., 4:] = 1
    cases = {"perfect": half, "empty": torch.zeros_like(half), "full": torch.ones_like(half)}
    same = {name: (logits(target), target) for name, target in cases.items()}
    return same | {"half": (logits(half.roll(2, -1)), half), "disjoint": (logits(1 - half), half)}


@every_loss
def test_right_predictions_have_no_loss_and_worse_ones_have_more(loss: Any) -> None:
    cases = extreme_cases(loss)
    for batch in (False, True):
        values = {name: loss(*case, batch=batch).item() for name, case in cases.items()}
        assert all(values[name] == approx(0, 1e-5) for name in ("perfect", "empty", "full"))
        assert values["perfect"] < values["half"] - 0.2 < values["disjoint"] - 0.4
    for name, expected in (("half", 0.5), ("disjoint", 1)) if loss in DICE else ():
        assert loss(*cases[name], smooth=0.0).item() == approx(expected)


@every_loss
def test_extreme_logits_have_a_finite_loss_and_gradient(loss: Any) -> None:
    for name, (pred, target) in extreme_cases(loss).items():
        assert loss(pred * 1e3, target, smooth=0.0).isfinite()
        gradient(loss, pred * 1e3, target, smooth=0.0)
        for dtype in (*HALF, torch.float32):
            extreme = (pred.sign() * 1e4).to(dtype)
            grad = gradient(loss, extreme, target)
            assert loss(extreme, target).isfinite() and grad.dtype == dtype
            if loss in (dice_bce_sum, multi_class_dice_ce_sum):
                assert bool(grad.any()) == (name in ("half", "disjoint"))


# --------------------------------------------------------------------------------- masks and ignore_index


@every_masked
def test_masked_losses_equal_the_plain_ones_on_the_usable_pixels(form: Any) -> None:
    pred, target = example(form)
    mask = torch.ones(2, 6, 6)
    mask[..., 3:] = 0
    clean = with_mask(form, target, mask)
    for batch in (False, True):
        expected = MASKED[form](pred[..., :3], target[..., :3], batch=batch)
        assert form(pred, clean, batch=batch).item() == approx(expected)
    for rubbish in RUBBISH:  # whatever stands under the mask
        dirty, moved = clean.clone(), pred.clone()
        dirty[:, 1:, ..., 3:] = rubbish
        moved[..., 3:] = 1e4 * torch.randn(2, 3, 6, 3)
        assert torch.equal(form(pred, dirty), form(pred, clean))
        assert torch.equal(form(moved, dirty), form(pred, clean))
        grad = gradient(form, pred, dirty)
        assert not grad[..., 3:].any() and grad[..., :3].all()
    pred, target = example(form, (8, 3))
    found = form(pred, with_mask(form, target, torch.tensor([1.0, 1, 1, 1, 1, 0, 0, 0])))
    assert found.item() == approx(MASKED[form](pred[:5], target[:5]))


@every_masked
def test_masks_may_hold_weights_and_options_are_handed_on(form: Any) -> None:
    (pred, target), weights = example(form), torch.rand(2, 6, 6)
    found = form(pred, with_mask(form, target, weights))
    assert torch.equal(found, MASKED[form](pred, target, pixel_weights=weights))
    options = {"smooth": 0.5, "class_weights": [1.0, 2.0, 3.0], "ignore_index": 1, "batch": True}
    found = form(pred, with_mask(form, target, torch.ones(2, 6, 6)), **options)
    assert torch.equal(found, MASKED[form](pred, target, **options))
    names = list(inspect.signature(form).parameters)
    assert names == [name for name in inspect.signature(MASKED[form]).parameters if name != "pixel_weights"]


@every_loss
@pytest.mark.parametrize("ignore_index", [255, 7])
def test_ignored_pixels_do_not_count(loss: Any, ignore_index: int) -> None:
    pred, target = example(loss)
    ignored, moved = target.clone(), pred.clone()
    ignored[..., 3:] = ignore_index
    moved[..., 3:] = 1e4 * torch.randn(2, 3, 6, 3)
    found = loss(pred, ignored, ignore_index=ignore_index)
    assert found.item() == approx(loss(pred[..., :3], target[..., :3]))
    assert torch.equal(loss(moved, ignored, ignore_index=ignore_index), found)
    for dtype in (torch.uint8, torch.int64):
        grad = gradient(loss, pred, ignored.to(dtype), ignore_index=ignore_index)
        assert not grad[..., 3:].any() and grad[..., :3].all()
    if not takes_class_numbers(loss):  # one class of a pixel alone
        target[:, 1, 2:] = 255
        grad = gradient(loss, pred, target)
        assert not grad[:, 1, 2:].any() and grad[:, [0, 2]].all() and grad[:, 1, :2].all()


@pytest.mark.parametrize("loss", [*LOSSES, *MASKED])
def test_where_nothing_counts_there_is_no_loss_and_no_gradient(loss: Any) -> None:
    pred, target = example(loss)
    unusable, ignored = with_mask(loss, target, torch.zeros(2, 6, 6)), torch.full_like(target, 255)
    nothing = unusable if loss in MASKED else ignored
    for smooth in (1.0, 0.0):
        assert loss(pred, nothing, smooth=smooth).isfinite() and loss(pred, nothing).item() == approx(0)
        assert not gradient(loss, pred, nothing, smooth=smooth).any()


# ------------------------------------------------------------------------------- what is given is checked


@pytest.mark.parametrize("loss", [*LOSSES, *MASKED])
def test_disagreeing_shapes_are_refused(loss: Any) -> None:
    plain = [(2, 3, 6, 5), (2, 1, 6, 6), (3, 3, 6, 6), (2, 6, 5), (3, 6, 6), (6, 6)]
    for shape in [(2, 3, 6, 6), (2, 5, 6, 6), (2, 6, 6), (2, 1, 6, 6)] if loss in MASKED else plain:
        with pytest.raises(ValueError, match=re.escape("(2, 3, 6, 6)") + ".*" + re.escape(str(shape))):
            loss(torch.zeros(2, 3, 6, 6), torch.zeros(shape, dtype=torch.int64))
        if loss in LOSSES:
            with pytest.raises(ValueError, match=re.escape(f"the shape {shape}, it needs (2, 6, 6)")):
                loss(*example(loss), pixel_weights=torch.ones(shape))


@pytest.mark.parametrize("loss", [*LOSSES, *MASKED])
@pytest.mark.parametrize("value", [2, -1, 3, 128, 254, 0.5, math.nan, math.inf])
def test_a_value_that_is_no_target_is_refused_wherever_it_counts(loss: Any, value: float) -> None:
    (pred, target), mask = example(loss), torch.ones(2, 6, 6)
    if takes_class_numbers(loss) and not (isinstance(value, int) and value != 2):
        return  # 2 is a class, and class numbers are integers
    target[1, ..., 2, 3] = value
    mask[1, 2, 3] = 0
    given = with_mask(loss, target, torch.ones(2, 6, 6)) if loss in MASKED else target
    message = f"the target holds (the class number )?{value:g}, .* 255 is ignored"
    with pytest.raises(ValueError, match=message):
        loss(pred, given)
    is_masked = loss in MASKED
    given, options = (with_mask(loss, target, mask), {}) if is_masked else (target, {"pixel_weights": mask})
    assert loss(pred, given, **options).isfinite()
    for wrong in (255, -1, 1.5, math.nan) if loss in MASKED else ():
        mask[0, 0, 0] = wrong
        with pytest.raises(ValueError, match=f"the usability mask holds {wrong:g}: it is 0 or 1"):
            loss(pred, with_mask(loss, target, mask))


@pytest.mark.parametrize("loss", [*PLAIN, *MASKED])
def test_on_another_device_no_value_is_asked_for_and_a_wrong_one_makes_the_loss_nan(loss: Any) -> None:
    pred, target = example(loss)
    given = with_mask(loss, target, torch.ones(2, 6, 6)) if loss in MASKED else target
    assert loss(pred.to("meta"), given.to("meta")).is_meta  # a value of which raises
    if loss not in MASKED:
        weights = torch.ones(2, 6, 6).index_fill_(0, torch.tensor(1), math.nan)  # what it becomes there
        assert loss(pred, target, pixel_weights=weights).isnan()


@every_loss
def test_class_weights_are_a_sequence_or_a_tensor_of_one_each(loss: Any) -> None:
    pred, target = example(loss)
    expected = loss(pred, target, class_weights=[1.0, 2.0, 3.0])
    for class_weights in ((1.0, 2.0, 3.0), torch.tensor([1, 2, 3]), torch.tensor([1.0, 2.0, 3.0])):
        assert torch.equal(loss(pred, target, class_weights=class_weights), expected)
    assert expected != loss(pred, target)
    assert loss(pred, target, class_weights=[2.0, 2.0, 2.0]).item() == approx(loss(pred, target))
    for wrong in ([1.0], [1.0, 2.0], torch.ones(4)):
        with pytest.raises(ValueError, match=f"there are {len(wrong)} class_weights.* 3 classes"):
            loss(pred, target, class_weights=wrong)


# -------------------------------------------------------------------------------------------------- names


def test_losses_are_found_and_pickled_under_their_own_names() -> None:
    project, public = project_of(PACKAGE), {function.__name__: function for function in (*PLAIN, *MASKED)}
    assert public.keys() <= vars(module).keys()  # and losses of your own
    for name, function in public.items():
        assert getattr(module, name) is function is pickle.loads(pickle.dumps(function))
        assert name_of(function, project) == f".utils.loss:{name}"
        assert resolve(f".utils.loss:{name}", project) is function


def absolute_loss(pred: Tensor, target: Tensor, pixel_weights: Tensor, power: float = 1.0) -> Tensor:
    return ((pred - target).abs() ** power * pixel_weights.unsqueeze(1)).sum()


masked_absolute_loss = masked(absolute_loss)


def test_a_loss_of_ones_own_gets_a_masked_form() -> None:
    form: Any = masked_absolute_loss
    assert (form.__module__, form.__name__) == (__name__, "masked_absolute_loss")
    target = with_mask(form, torch.ones(1, 1, 4), torch.tensor([[1.0, 1, 0, 0]]))
    assert form(torch.full((1, 1, 4), 3.0), target, power=2.0) == 8
