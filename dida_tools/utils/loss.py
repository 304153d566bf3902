"""
Contains losses and metrics for images, and for anything else of the same shapes.

The convention for predictions and targets, everywhere in this project:

=============  ======================  ==============================================================================
task           prediction (logits)     target
=============  ======================  ==============================================================================
binary         (N, 1, H, W), float     (N, 1, H, W), 0 or 1, of any dtype
multi-label    (N, C, H, W), float     (N, C, H, W), 0 or 1, of any dtype; classes may overlap
multi-class    (N, C, H, W), float     (N, H, W), class numbers 0 to C - 1, of an integer dtype
=============  ======================  ==============================================================================

Without H and W the same holds for classification: (N, C) with (N, C) or (N,). Target values equal to ignore_index count
nowhere. The ``masked_`` forms take a target with one more channel, the first: a usability mask of 0 and 1 (weights in
between work too). A multi-class target is then (N, 2, H, W), the mask and the class numbers.

Losses are computed in float32 whatever comes in, so extreme logits in fp16 or bf16 have finite gradients. Dice losses
are the mean over samples and classes, and with ``batch=True`` (in classification always) the mean over classes of the
whole batch as one image, which is steadier where classes are missing in many samples, but depends on the batch size.

A metric is computed from counts over all pixels. ``f1.from_counts`` gives it from the counts of a whole dataset:
unlike a mean over batches, this does not depend on the batch size.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

IGNORE_INDEX = 255

ClassWeights = Sequence[float] | Tensor | None


# --------------------------------------------------------------------------------------------------------------- losses


def smooth_dice_loss(
    pred: Tensor,
    target: Tensor,
    smooth: float = 1.0,
    class_weights: ClassWeights = None,
    pixel_weights: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    batch: bool = False,
) -> Tensor:
    """
    1 - Dice of the sigmoid, for binary and multi-label targets (V-Net, https://arxiv.org/abs/1606.04797).

    :param pred: (N, C, ...) logits
    :param target: (N, C, ...) of 0 and 1
    :param smooth: added above and below, so that an empty mask predicted empty has no loss
    :param class_weights: C weights of the classes
    :param pixel_weights: (N, ...) weights of the pixels; the target may be anything where they are 0
    :param ignore_index: target value of pixels that do not count
    :param batch: take the batch as one image
    :return: scalar in 0..1
    :raises ValueError: if the shapes disagree
    """
    target, weights = _binary(pred, target, pixel_weights, ignore_index)
    return _dice(pred.float().sigmoid(), target, weights, 1.0, smooth, class_weights, batch)


def smooth_dice_beta_loss(
    pred: Tensor,
    target: Tensor,
    beta: float = 1.0,
    smooth: float = 1.0,
    class_weights: ClassWeights = None,
    pixel_weights: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    batch: bool = False,
) -> Tensor:
    """1 - F-beta of the sigmoid: beta above 1 weighs recall higher, below 1 precision. See smooth_dice_loss."""
    target, weights = _binary(pred, target, pixel_weights, ignore_index)
    return _dice(pred.float().sigmoid(), target, weights, beta, smooth, class_weights, batch)


def dice_bce_sum(
    pred: Tensor,
    target: Tensor,
    smooth: float = 1.0,
    dice_weight: float = 0.5,
    class_weights: ClassWeights = None,
    pixel_weights: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    batch: bool = False,
) -> Tensor:
    """dice_weight of smooth_dice_loss, and the rest of binary cross-entropy."""
    dice = smooth_dice_loss(pred, target, smooth, class_weights, pixel_weights, ignore_index, batch)
    target, weights = _binary(pred, target, pixel_weights, ignore_index)
    weights = weights * _per_class(class_weights, pred)
    cross_entropy = functional.binary_cross_entropy_with_logits(
        pred.float(), target, weights, reduction="sum"
    )
    return dice_weight * dice + (1 - dice_weight) * cross_entropy / weights.sum().clamp(min=1e-6)


def multi_class_smooth_dice_loss(
    pred: Tensor,
    target: Tensor,
    smooth: float = 1.0,
    class_weights: ClassWeights = None,
    pixel_weights: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    batch: bool = False,
) -> Tensor:
    """
    1 - Dice of the softmax, the mean over the classes.

    :param pred: (N, C, ...) logits
    :param target: (N, ...) class numbers; see smooth_dice_loss for the rest
    """
    target, weights = _multi_class(pred, target, pixel_weights, ignore_index)
    one_hot = functional.one_hot(target, pred.shape[1]).movedim(-1, 1)
    return _dice(pred.float().softmax(1), one_hot, weights.unsqueeze(1), 1.0, smooth, class_weights, batch)


def multi_class_dice_ce_sum(
    pred: Tensor,
    target: Tensor,
    smooth: float = 1.0,
    dice_weight: float = 0.5,
    class_weights: ClassWeights = None,
    pixel_weights: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    batch: bool = False,
) -> Tensor:
    """dice_weight of multi_class_smooth_dice_loss, and the rest of cross-entropy."""
    dice = multi_class_smooth_dice_loss(
        pred, target, smooth, class_weights, pixel_weights, ignore_index, batch
    )
    target, weights = _multi_class(pred, target, pixel_weights, ignore_index)
    if class_weights is not None:
        weights = weights * _per_class(class_weights, pred).flatten()[target]
    cross_entropy = (functional.cross_entropy(pred.float(), target, reduction="none") * weights).sum()
    return dice_weight * dice + (1 - dice_weight) * cross_entropy / weights.sum().clamp(min=1e-6)


def masked_smooth_dice_loss(pred: Tensor, target: Tensor, **options: Any) -> Tensor:
    """smooth_dice_loss where the first target channel is the usability mask."""
    target, mask = unmask(pred, target)
    return smooth_dice_loss(pred, target, pixel_weights=mask, **options)


def masked_smooth_dice_beta_loss(pred: Tensor, target: Tensor, **options: Any) -> Tensor:
    """smooth_dice_beta_loss where the first target channel is the usability mask."""
    target, mask = unmask(pred, target)
    return smooth_dice_beta_loss(pred, target, pixel_weights=mask, **options)


def masked_dice_bce_sum(pred: Tensor, target: Tensor, **options: Any) -> Tensor:
    """dice_bce_sum where the first target channel is the usability mask."""
    target, mask = unmask(pred, target)
    return dice_bce_sum(pred, target, pixel_weights=mask, **options)


def masked_multi_class_smooth_dice_loss(pred: Tensor, target: Tensor, **options: Any) -> Tensor:
    """multi_class_smooth_dice_loss where the first target channel is the usability mask."""
    target, mask = unmask(pred, target, multi_class=True)
    return multi_class_smooth_dice_loss(pred, target, pixel_weights=mask, **options)


def masked_multi_class_dice_ce_sum(pred: Tensor, target: Tensor, **options: Any) -> Tensor:
    """multi_class_dice_ce_sum where the first target channel is the usability mask."""
    target, mask = unmask(pred, target, multi_class=True)
    return multi_class_dice_ce_sum(pred, target, pixel_weights=mask, **options)


def _dice(
    probability: Tensor,
    target: Tensor,
    weights: Tensor,
    beta: float,
    smooth: float,
    class_weights: ClassWeights,
    batch: bool,
) -> Tensor:
    spatial = list(range(2, probability.ndim))
    dims = [0, *spatial] if batch or not spatial else spatial  # classification has the batch only
    hits = (probability * target * weights).sum(dims)
    extra = (probability * (1 - target) * weights).sum(dims)
    missed = ((1 - probability) * target * weights).sum(dims)
    whole = (1 + beta**2) * hits + beta**2 * missed + extra + smooth
    score = ((1 + beta**2) * hits + smooth) / whole.clamp(min=1e-12)
    per_class = _per_class(class_weights, probability).flatten()
    return 1 - (score * per_class).sum(-1).div(per_class.sum()).mean()


def _per_class(class_weights: ClassWeights, pred: Tensor) -> Tensor:
    """(C, 1, ...) weights that broadcast with (N, C, ...)."""
    shape = (pred.shape[1], *[1] * (pred.ndim - 2))
    if class_weights is None:
        return torch.ones(shape, device=pred.device)
    weights = torch.as_tensor(class_weights, dtype=torch.float32, device=pred.device)
    if weights.numel() != pred.shape[1]:
        raise ValueError(
            f"there are {weights.numel()} class_weights, but the prediction has {pred.shape[1]} classes."
        )
    return weights.reshape(shape)


def _binary(
    pred: Tensor, target: Tensor, pixel_weights: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """The target in float, 0 where it does not count, and the weights, both (N, C, ...)."""
    check_shapes(pred, target, multi_class=False)
    weights = (target != ignore_index).float()
    if pixel_weights is not None:
        _check_pixels("pixel_weights", pixel_weights, pred)
        weights = weights * pixel_weights.float().unsqueeze(1)
    return target.float().masked_fill(weights == 0, 0.0), weights


def _multi_class(
    pred: Tensor, target: Tensor, pixel_weights: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """The target in int64, 0 where it does not count, and the weights, both (N, ...)."""
    check_shapes(pred, target, multi_class=True)
    weights = (target != ignore_index).float()
    if pixel_weights is not None:
        _check_pixels("pixel_weights", pixel_weights, pred)
        weights = weights * pixel_weights.float()
    return target.long().masked_fill(weights == 0, 0), weights


# ----------------------------------------------------------------------------------------------------- shapes and masks


def is_multi_class(pred: Tensor, target: Tensor) -> bool:
    """Whether a target holds class numbers, by the convention above: it has no channels."""
    return target.ndim == pred.ndim - 1


def check_shapes(pred: Tensor, target: Tensor, multi_class: bool | None = None) -> None:
    """
    Checks a prediction and its target against the convention above.

    :param multi_class: which of the two is wanted; None takes both
    :raises ValueError: naming both shapes and what is wanted
    """
    shapes = f"the prediction has the shape {tuple(pred.shape)} and the target {tuple(target.shape)}"
    if pred.ndim < 2:
        raise ValueError(f"{shapes}: a prediction has the shape (N, C, ...).")
    without_channels = (pred.shape[0], *pred.shape[2:])
    if multi_class is None:
        multi_class = is_multi_class(pred, target)
    if multi_class and pred.shape[1] < 2:
        raise ValueError(f"{shapes}: with one channel, the target has the shape of the prediction.")
    if multi_class and target.shape != without_channels:
        raise ValueError(
            f"{shapes}: a multi-class target holds class numbers in the shape {without_channels}."
        )
    if multi_class and target.is_floating_point():
        raise ValueError(
            f"the multi-class target is {target.dtype}: class numbers are integers, such as torch.int64."
        )
    if not multi_class and target.shape != pred.shape:
        raise ValueError(f"{shapes}: a binary or multi-label target has the shape of the prediction.")


def _check_pixels(what: str, pixels: Tensor, pred: Tensor) -> None:
    wanted = (pred.shape[0], *pred.shape[2:])
    if pixels.shape != wanted:
        raise ValueError(f"{what} has the shape {tuple(pixels.shape)}, it needs {wanted}.")


def unmask(pred: Tensor, target: Tensor, multi_class: bool | None = None) -> tuple[Tensor, Tensor]:
    """
    Takes the usability mask off a target.

    :param target: (N, 1 + C, ...), or (N, 2, ...) for multi-class
    :param multi_class: None decides by the number of channels
    :return: the target without it, and the mask (N, ...)
    :raises ValueError: if the target has not one channel more
    """
    channels = pred.shape[1]
    if multi_class is None:
        multi_class = channels > 1 and target.ndim == pred.ndim and target.shape[1] == 2
    wanted = 2 if multi_class else channels + 1
    if target.ndim != pred.ndim or target.shape[1] != wanted:
        raise ValueError(
            f"the prediction has the shape {tuple(pred.shape)} and the masked target {tuple(target.shape)}: "
            f"it needs {wanted} channels, the first of them the usability mask."
        )
    rest = target[:, 1].long() if multi_class else target[:, 1:]
    return rest, target[:, 0].float()


# -------------------------------------------------------------------------------------------------------------- metrics


def counting(
    pred: Tensor, target: Tensor, valid: Tensor | None = None, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """
    Which pixels count: those that are not to be ignored, and that are valid.

    :param valid: (N, ...), 0 where a pixel does not count
    :return: bool in the shape of the target
    :raises ValueError: if the shapes disagree
    """
    check_shapes(pred, target)
    keep = target != ignore_index
    if valid is None:
        return keep
    _check_pixels("valid", valid, pred)
    return keep & (valid > 0 if is_multi_class(pred, target) else (valid > 0).unsqueeze(1))


@torch.no_grad()
def count(
    pred: Tensor,
    target: Tensor,
    valid: Tensor | None = None,
    threshold: float | Sequence[float] = 0.5,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """
    Counts hits and errors. Counts of batches add up to those of the dataset.

    :param pred: (N, C, ...) logits
    :param target: by the convention above
    :param valid: (N, ...), 0 where a pixel does not count
    :param threshold: probability from which a pixel belongs to a class (binary and multi-label); one, or one each
    :return: int64: multi-class the (C, C) confusion matrix [target, prediction], otherwise (C, 2, 2), one for each
        class
    :raises ValueError: if the shapes disagree, or a class number is none of the prediction's
    """
    keep = counting(pred, target, valid, ignore_index)
    if is_multi_class(pred, target):
        classes = pred.shape[1]
        wrong = keep & ((target < 0) | (target >= classes))
        if wrong.any():
            raise ValueError(
                f"the target holds the class number {target[wrong][0]}, the prediction has the classes 0 to "
                f"{classes - 1}, and {ignore_index} is ignored: map the mask's values, or set IGNORE_INDEX."
            )
        pairs = target.long() * classes + pred.max(1).indices  # argmax takes many times as long
        return count_places(pairs, keep, classes**2).reshape(classes, classes)
    probability = precise(pred.float()).sigmoid().float()
    edges = torch.as_tensor(threshold, dtype=probability.dtype, device=pred.device)
    guess = probability >= edges.reshape(1, -1, *[1] * (pred.ndim - 2))
    truth = target > 0.5
    cases = [[~truth & ~guess, ~truth & guess], [truth & ~guess, truth & guess]]
    dims = [0, *range(2, pred.ndim)]
    return torch.stack([torch.stack([(case & keep).sum(dims) for case in row], -1) for row in cases], -2)


def precise(logits: Tensor) -> Tensor:
    """
    Logits in float64, so that what is computed from them, rounded to float32, is the same wherever in a tensor a pixel
    stands: in float32, softmax and sigmoid differ in the last bits for what is left over at the end of vector units.
    """
    return logits if logits.device.type == "mps" else logits.double()  # Apple GPUs have no float64


def count_places(places: Tensor, keep: Tensor, num_places: int) -> Tensor:
    """
    How often each place occurs.

    :param places: integers from 0 to num_places - 1 where keep is True, anything elsewhere
    :return: (num_places,) int64
    """
    # The others get a place of their own, which is quicker than to pick. bincount counts in int64; histc counts in
    # float32 and loses pixels beyond 2 ** 24.
    places = places.masked_fill(~keep, num_places).flatten()
    return torch.bincount(places, minlength=num_places + 1)[:num_places]


def hits_and_errors(counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """True positives, false positives and false negatives of each class, float64 (C,), from counts of either form."""
    counts = counts.cpu().double()  # Apple GPUs have no float64
    if counts.ndim == 3:
        return counts[:, 1, 1], counts[:, 0, 1], counts[:, 1, 0]
    hits = counts.diagonal()
    return hits, counts.sum(0) - hits, counts.sum(1) - hits


def summarize(per_class: Tensor, counts: Tensor) -> Tensor:
    """
    One number from the values of the classes, as scikit-learn's default: with two classes that exclude each other, the
    value of class 1; otherwise the mean over the classes, without those that are NaN (that occur nowhere).
    """
    if counts.ndim == 2 and len(per_class) == 2:
        return per_class[1]
    return per_class.nanmean()


def precision_per_class(counts: Tensor) -> Tensor:
    """(C,) right / predicted. 0 where a class is never predicted, NaN where it is not in the target either."""
    hits, extra, missed = hits_and_errors(counts)
    return _ratio(hits, hits + extra, occurs=hits + extra + missed > 0)


def recall_per_class(counts: Tensor) -> Tensor:
    """(C,) found / there. 0 where a class is not in the target, NaN where it is not predicted either."""
    hits, extra, missed = hits_and_errors(counts)
    return _ratio(hits, hits + missed, occurs=hits + extra + missed > 0)


def f1_per_class(counts: Tensor) -> Tensor:
    """(C,) harmonic mean of precision and recall, NaN where a class is neither in the target nor predicted."""
    hits, extra, missed = hits_and_errors(counts)
    return _ratio(2 * hits, 2 * hits + extra + missed, occurs=hits + extra + missed > 0)


def iou_per_class(counts: Tensor) -> Tensor:
    """(C,) intersection over union, NaN where a class is neither in the target nor predicted."""
    hits, extra, missed = hits_and_errors(counts)
    return _ratio(hits, hits + extra + missed, occurs=hits + extra + missed > 0)


def accuracy_per_class(counts: Tensor) -> Tensor:
    """(1,) part of all pixels that is right, multi-class; (C,) the same for each class, binary and multi-label."""
    counts = counts.cpu().double()
    total = counts.sum((-2, -1)).reshape(-1)
    right = counts.diagonal(dim1=-2, dim2=-1).sum(-1).reshape(-1)
    return _ratio(right, total, occurs=total > 0)


def _ratio(part: Tensor, whole: Tensor, occurs: Tensor) -> Tensor:
    ratio = torch.where(whole > 0, part / whole.clamp(min=1), torch.zeros_like(part))
    return torch.where(occurs, ratio, torch.full_like(ratio, torch.nan))


Metric = Callable[..., Tensor]


def count_metric(per_class: Callable[[Tensor], Tensor], name: str, masked: bool = False) -> Metric:
    """
    Makes a metric of (prediction, target) that carries its count form, by which the routines accumulate it.

    :param per_class: gives the value of each class from counts
    :param masked: whether the first target channel is the usability mask
    """

    def metric(
        pred: Tensor, target: Tensor, threshold: float = 0.5, ignore_index: int = IGNORE_INDEX
    ) -> Tensor:
        valid = None
        if masked:
            target, valid = unmask(pred, target)
        return from_counts(count(pred, target, valid, threshold, ignore_index))

    def from_counts(counts: Tensor) -> Tensor:
        return summarize(per_class(counts), counts)

    metric.__name__ = metric.__qualname__ = name
    metric.__module__ = (
        per_class.__module__
    )  # your own, defined in your module, is found there under its name
    metric.__doc__ = f"{per_class.__doc__} This is their summary: see summarize. Logits and targets as in all of this module."
    metric.from_counts = from_counts  # type: ignore[attr-defined]
    metric.per_class = per_class  # type: ignore[attr-defined]
    metric.masked = masked  # type: ignore[attr-defined]
    return metric


precision = count_metric(precision_per_class, "precision")
recall = count_metric(recall_per_class, "recall")
f1 = count_metric(f1_per_class, "f1")
iou = count_metric(iou_per_class, "iou")
accuracy = count_metric(accuracy_per_class, "accuracy")
masked_precision = count_metric(precision_per_class, "masked_precision", masked=True)
masked_recall = count_metric(recall_per_class, "masked_recall", masked=True)
masked_f1 = count_metric(f1_per_class, "masked_f1", masked=True)
masked_iou = count_metric(iou_per_class, "masked_iou", masked=True)
masked_accuracy = count_metric(accuracy_per_class, "masked_accuracy", masked=True)
