"""Counts of right and wrong pixels, which add up over batches and processes, and what follows from them."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .targets import IGNORE_INDEX, counting, is_multi_class, precise, refuse_values, wrong_values


@runtime_checkable
class CountMetric(Protocol):
    """A metric that follows from counts: that of a whole dataset, instead of a mean over batches."""

    masked: bool  # whether the first target channel is the usability mask

    def __call__(self, pred: Tensor, target: Tensor) -> Tensor:
        """Return the metric of a batch."""

    def from_counts(self, counts: Tensor) -> Tensor:
        """Return the metric, one number, of what count gives."""

    def per_class(self, counts: Tensor) -> Tensor:
        """Return its value for each class, (C,)."""


@torch.no_grad()
def count(
    pred: Tensor,
    target: Tensor,
    valid: Tensor | None = None,
    threshold: float | Sequence[float] = 0.5,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """
    Count right and wrong pixels. Counts of batches add up to those of the dataset.

    :param pred: (N, C, ...) logits
    :param target: by the conventions of targets.py
    :param valid: (N, ...), 0 where a pixel does not count
    :param threshold: from which probability a pixel belongs to a class, unless multi-class; one, or one each
    :return: int64 [target, prediction]: the confusion matrix (C, C) if multi-class, else (C, 2, 2), one each
    :raises ValueError: if the shapes disagree, or the target holds another value than its task's
    """
    keep, classes = counting(pred, target, valid, ignore_index), pred.shape[1]
    multi_class = is_multi_class(pred, target)
    known = classes if multi_class else None
    refuse_values(target, wrong_values(target, keep, known), known, ignore_index)
    if multi_class:
        pairs = target.long() * classes + pred.max(1).indices  # argmax takes many times as long
        return count_cells(pairs, keep, classes**2).reshape(classes, classes)
    probability, shape = precise(pred.float()).sigmoid().float(), (1, -1, *[1] * (pred.ndim - 2))
    edges = torch.as_tensor(threshold, dtype=probability.dtype, device=pred.device).reshape(shape)
    first_cells = torch.arange(0, 4 * classes, 4, dtype=torch.int32, device=pred.device).reshape(shape)
    cells = first_cells + 2 * (target > 0.5).int() + (probability >= edges)
    return count_cells(cells, keep, 4 * classes).reshape(classes, 2, 2)


def count_cells(cells: Tensor, keep: Tensor, num_cells: int) -> Tensor:
    """
    Return how often each cell occurs, (num_cells,) int64.

    :param cells: integers from 0 to num_cells - 1 where keep is True, anything elsewhere
    """
    # The others get a cell of their own, which is faster than indexing. bincount counts in int64; histc
    # counts in float32 and loses pixels beyond 2 ** 24.
    cells = cells.masked_fill(~keep, num_cells).flatten()
    return torch.bincount(cells, minlength=num_cells + 1)[:num_cells]


def tp_fp_fn(counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return true positives, false positives, false negatives of the classes, float64 (C,) each."""
    counts = counts.cpu().double()  # Apple GPUs have no float64
    if counts.ndim == 3:
        return counts[:, 1, 1], counts[:, 0, 1], counts[:, 1, 0]
    tp = counts.diagonal()
    return tp, counts.sum(0) - tp, counts.sum(1) - tp


def summarize(per_class: Tensor, counts: Tensor) -> Tensor:
    """
    Return one number for the values of the classes, as scikit-learn's default: with two classes that exclude
    each other, the value of class 1; otherwise the mean over the classes, without those that are NaN (that
    occur nowhere).
    """
    is_binary = counts.ndim == 2 and len(per_class) == 2
    return per_class[1] if is_binary else per_class.nanmean()


def precision_per_class(counts: Tensor) -> Tensor:
    """(C,) right / predicted. 0 where a class is never predicted, NaN where it is not there either."""
    tp, fp, fn = tp_fp_fn(counts)
    return (tp / (tp + fp).clamp(min=1)).masked_fill(tp + fp + fn == 0, torch.nan)


def recall_per_class(counts: Tensor) -> Tensor:
    """(C,) found / there. 0 where a class is not there, NaN where it is not predicted either."""
    tp, fp, fn = tp_fp_fn(counts)
    return (tp / (tp + fn).clamp(min=1)).masked_fill(tp + fp + fn == 0, torch.nan)


def f1_per_class(counts: Tensor) -> Tensor:
    """(C,) harmonic mean of precision and recall, NaN where a class is neither there nor predicted."""
    tp, fp, fn = tp_fp_fn(counts)
    return 2 * tp / (2 * tp + fp + fn)  # 0 / 0 is NaN


def iou_per_class(counts: Tensor) -> Tensor:
    """(C,) intersection over union, NaN where a class is neither there nor predicted."""
    tp, fp, fn = tp_fp_fn(counts)
    return tp / (tp + fp + fn)


def accuracy_per_class(counts: Tensor) -> Tensor:
    """(1,) fraction of all pixels that is right, multi-class; (C,) the same for each class otherwise."""
    counts = counts.cpu().double()
    right = counts.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (right / counts.sum((-2, -1))).reshape(-1)
