"""
Metrics of (prediction, target), which are computed from counts of pixels.

Averaging F1 over batches is not F1. So a metric here carries its count form, ``f1.from_counts``, by which
evaluation computes it once, from the counts of the whole dataset: it does not depend on the batch size. A
metric of your own:

    def false_alarms_per_class(counts: Tensor) -> Tensor:
        tp, fp, _ = tp_fp_fn(counts)
        return fp / (tp + fp).clamp(min=1)

    false_alarms = count_metric(false_alarms_per_class, "false_alarms")

The ``masked_`` forms take a target whose first channel is the usability mask.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from dida_core.errors import checked_call
from dida_core.training.counts import (
    CountMetric,
    accuracy_per_class,
    count,
    f1_per_class,
    iou_per_class,
    precision_per_class,
    recall_per_class,
    summarize,
    tp_fp_fn,
)
from dida_core.training.targets import IGNORE_INDEX, unmask
from torch import Tensor

__all__ = ["CountMetric", "count_metric", "tp_fp_fn"]


def count_metric(
    per_class: Callable[[Tensor], Tensor], name: str, masked: bool = False, module: str | None = None
) -> CountMetric:
    """
    Make a metric of (prediction, target) that carries its count form.

    :param per_class: returns the value of each class (C,) from counts
    :param name: of the variable that holds the metric, by which records name it
    :param masked: whether the first target channel is the usability mask
    :param module: where that variable is; None: where per_class is defined
    """

    def metric(
        pred: Tensor, target: Tensor, *, threshold: float = 0.5, ignore_index: int = IGNORE_INDEX
    ) -> Tensor:
        valid = None
        if masked:
            target, valid = unmask(pred, target)
        return from_counts(count(pred, target, valid, threshold, ignore_index))

    def from_counts(counts: Tensor) -> Tensor:
        return summarize(per_class(counts), counts)

    metric.__name__ = metric.__qualname__ = name
    metric.__module__ = module or per_class.__module__
    metric.__doc__ = f"{per_class.__doc__} This is their summary: see summarize in counts.py."
    form: Any = checked_call(metric)
    form.from_counts, form.per_class, form.masked = from_counts, per_class, masked
    return form


# Records name these by loss.py, which offers them too, so that those of every version agree.
_metric = partial(count_metric, module=f"{__package__}.loss")

precision = _metric(precision_per_class, "precision")
recall = _metric(recall_per_class, "recall")
f1 = _metric(f1_per_class, "f1")
iou = _metric(iou_per_class, "iou")
accuracy = _metric(accuracy_per_class, "accuracy")
masked_precision = _metric(precision_per_class, "masked_precision", masked=True)
masked_recall = _metric(recall_per_class, "masked_recall", masked=True)
masked_f1 = _metric(f1_per_class, "masked_f1", masked=True)
masked_iou = _metric(iou_per_class, "masked_iou", masked=True)
masked_accuracy = _metric(accuracy_per_class, "masked_accuracy", masked=True)
