"""
Losses for images, and for anything else of the same shapes: see targets.py for predictions and targets.

All are scalars, computed in float32 whatever comes in, so that extreme logits in fp16 or bf16 have finite
gradients. Their options, which LOSS_CONFIG may hold, and which are given by name but for beta and smooth of
the Dice losses:

- smooth: added above and below, so that an empty mask predicted empty has no loss
- beta: weight of recall over precision: above 1 recall counts more, below 1 precision
- dice_weight: weight of the Dice loss; cross-entropy has the rest
- class_weights: C weights of the classes
- pixel_weights: (N, ...) weights of the pixels; the target may be anything where they are 0
- ignore_index: target value of pixels that do not count
- batch: take the batch as one image

Dice losses are the mean over samples and classes, and with ``batch=True`` (in classification always) the mean
over classes of the whole batch as one image, which is steadier where classes are missing in many samples, but
depends on the batch size. All raise ValueError if the shapes disagree, or the target holds other values than
its task's; on a GPU, where to ask would be to wait, the loss is NaN instead.

The ``masked_`` forms take a target whose first channel is the usability mask; it becomes their pixel_weights.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from dida_core.errors import UserError, checked_call
from dida_core.training.targets import (
    IGNORE_INDEX,
    check_pixels,
    check_shapes,
    refuse_values,
    unmask,
    wrong_values,
)
from torch import Tensor
from torch.nn import functional

from .metrics import (  # noqa: F401  records name them here
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

ClassWeights = Sequence[float] | Tensor | None
Loss = Callable[..., Tensor]


@checked_call
def smooth_dice_loss(
    pred: Tensor,
    target: Tensor,
    smooth: float = 1.0,
    *,
    class_weights: ClassWeights = None,
    pixel_weights: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    batch: bool = False,
) -> Tensor:
    """
    1 - Dice of the sigmoid, for binary and multi-label targets (V-Net, https://arxiv.org/abs/1606.04797).
    """
    target, weights = _weighted(pred, target, pixel_weights, ignore_index, multi_class=False)
    return _dice(pred.float().sigmoid(), target, weights, class_weights, smooth, batch)


@checked_call
def smooth_dice_beta_loss(
    pred: Tensor,
    target: Tensor,
    beta: float = 1.0,
    smooth: float = 1.0,
    *,
    class_weights: ClassWeights = None,
    pixel_weights: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    batch: bool = False,
) -> Tensor:
    """1 - F-beta of the sigmoid: beta above 1 weighs recall higher, below 1 precision."""
    target, weights = _weighted(pred, target, pixel_weights, ignore_index, multi_class=False)
    return _dice(pred.float().sigmoid(), target, weights, class_weights, smooth, batch, beta)


@checked_call
def dice_bce_sum(
    pred: Tensor,
    target: Tensor,
    *,
    smooth: float = 1.0,
    dice_weight: float = 0.5,
    class_weights: ClassWeights = None,
    pixel_weights: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    batch: bool = False,
) -> Tensor:
    """dice_weight of smooth_dice_loss, and the rest of binary cross-entropy."""
    target, weights = _weighted(pred, target, pixel_weights, ignore_index, multi_class=False)
    dice = _dice(pred.float().sigmoid(), target, weights, class_weights, smooth, batch)
    weights = weights * _per_class(class_weights, pred)
    cross_entropy = functional.binary_cross_entropy_with_logits(
        pred.float(), target, weights, reduction="sum"
    )
    return dice_weight * dice + (1 - dice_weight) * cross_entropy / weights.sum().clamp(min=1e-6)


@checked_call
def multi_class_smooth_dice_loss(
    pred: Tensor,
    target: Tensor,
    smooth: float = 1.0,
    *,
    class_weights: ClassWeights = None,
    pixel_weights: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    batch: bool = False,
) -> Tensor:
    """1 - Dice of the softmax, the mean over the classes."""
    target, weights = _weighted(pred, target, pixel_weights, ignore_index, multi_class=True)
    one_hot = functional.one_hot(target, pred.shape[1]).movedim(-1, 1)
    return _dice(pred.float().softmax(1), one_hot, weights.unsqueeze(1), class_weights, smooth, batch)


@checked_call
def multi_class_dice_ce_sum(
    pred: Tensor,
    target: Tensor,
    *,
    smooth: float = 1.0,
    dice_weight: float = 0.5,
    class_weights: ClassWeights = None,
    pixel_weights: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    batch: bool = False,
) -> Tensor:
    """dice_weight of multi_class_smooth_dice_loss, and the rest of cross-entropy."""
    target, weights = _weighted(pred, target, pixel_weights, ignore_index, multi_class=True)
    one_hot = functional.one_hot(target, pred.shape[1]).movedim(-1, 1)
    dice = _dice(pred.float().softmax(1), one_hot, weights.unsqueeze(1), class_weights, smooth, batch)
    if class_weights is not None:
        weights = weights * _per_class(class_weights, pred).flatten()[target]
    cross_entropy = (functional.cross_entropy(pred.float(), target, reduction="none") * weights).sum()
    return dice_weight * dice + (1 - dice_weight) * cross_entropy / weights.sum().clamp(min=1e-6)


def masked(loss: Loss, multi_class: bool = False) -> Loss:
    """
    Make the masked form of a loss, ``masked_`` and its name, with the same options but for pixel_weights.

    :param loss: takes pixel_weights
    :param multi_class: whether its target holds class numbers
    """

    def masked_loss(pred: Tensor, target: Tensor, *first: float, **options: Any) -> Tensor:
        target, mask = unmask(pred, target, multi_class)
        wrong = ~((mask >= 0) & (mask <= 1))
        if mask.device.type == "cpu" and wrong.any():
            raise UserError(
                f"the usability mask holds {mask[wrong][0]:g}: it is 0 or 1, or a weight in between."
            )
        return loss(pred, target, *first, pixel_weights=mask.masked_fill(wrong, torch.nan), **options)

    parameters = [one for one in inspect.signature(loss).parameters.values() if one.name != "pixel_weights"]
    form: Any = masked_loss
    form.__signature__ = inspect.Signature(parameters, return_annotation=Tensor)
    form.__name__ = form.__qualname__ = f"masked_{loss.__name__}"
    form.__module__ = loss.__module__
    form.__doc__ = f"{loss.__name__} where the first target channel is the usability mask."
    return checked_call(form)


masked_smooth_dice_loss = masked(smooth_dice_loss)
masked_smooth_dice_beta_loss = masked(smooth_dice_beta_loss)
masked_dice_bce_sum = masked(dice_bce_sum)
masked_multi_class_smooth_dice_loss = masked(multi_class_smooth_dice_loss, multi_class=True)
masked_multi_class_dice_ce_sum = masked(multi_class_dice_ce_sum, multi_class=True)


def _weighted(
    pred: Tensor, target: Tensor, pixel_weights: Tensor | None, ignore_index: int, multi_class: bool
) -> tuple[Tensor, Tensor]:
    """Return the target, int64 or float32, 0 where it does not count, and its weights in the same shape."""
    check_shapes(pred, target, multi_class)
    weights = (target != ignore_index).float()
    if pixel_weights is not None:
        check_pixels("pixel_weights", pixel_weights, pred)
        pixel_weights = pixel_weights.float()
        weights = weights * (pixel_weights if multi_class else pixel_weights.unsqueeze(1))
    classes = pred.shape[1] if multi_class else None
    wrong = wrong_values(target, weights != 0, classes)
    if wrong.device.type == "cpu":
        refuse_values(target, wrong, classes, ignore_index)
    else:  # asking would wait for the device: the loss is NaN instead, which a run reports with the files
        weights = weights.masked_fill(wrong, torch.nan)
    target = target.long() if multi_class else target.float()
    return target.masked_fill((weights == 0) | wrong, 0), weights


def _dice(
    probability: Tensor,
    target: Tensor,
    weights: Tensor,
    class_weights: ClassWeights,
    smooth: float,
    batch: bool,
    beta: float = 1.0,
) -> Tensor:
    """Return 1 - F-beta, the core of all; probability and target (N, C, ...), weights broadcast with them."""
    spatial = list(range(2, probability.ndim))
    dims = [0, *spatial] if batch or not spatial else spatial  # classification has the batch only
    tp = (probability * target * weights).sum(dims)
    fp = (probability * (1 - target) * weights).sum(dims)
    fn = ((1 - probability) * target * weights).sum(dims)
    total = (1 + beta**2) * tp + beta**2 * fn + fp + smooth
    score = ((1 + beta**2) * tp + smooth) / total.clamp(min=1e-12)
    per_class = _per_class(class_weights, probability).flatten()
    return 1 - (score * per_class).sum(-1).div(per_class.sum()).mean()


def _per_class(class_weights: ClassWeights, pred: Tensor) -> Tensor:
    """Return weights (C, 1, ...) that broadcast with (N, C, ...)."""
    shape = (pred.shape[1], *[1] * (pred.ndim - 2))
    if class_weights is None:
        return torch.ones(shape, device=pred.device)
    weights = torch.as_tensor(class_weights, dtype=torch.float32, device=pred.device)
    if weights.numel() != pred.shape[1]:
        given, classes = weights.numel(), pred.shape[1]
        raise ValueError(f"there are {given} class_weights, but the prediction has {classes} classes.")
    return weights.reshape(shape)
