"""
Scores of a dataset, counted: a confusion matrix, and how many pixels got which probability, by class and
truth. All of it is int64 and adds up, so what follows is the same for every batch size, order, tile size and
number of processes.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from . import counts as by_counts
from .counts import count, count_cells, summarize
from .targets import IGNORE_INDEX, counting, precise

NUM_BINS = 2048  # a power of two: whether a probability reaches a bin's edge is the same in floating point
CALIBRATION_BINS = 16
_METRICS = {
    "iou": by_counts.iou_per_class,
    "f1": by_counts.f1_per_class,
    "precision": by_counts.precision_per_class,
    "recall": by_counts.recall_per_class,
}


class Scores:
    """
    Counts of a dataset, and every metric that follows from them.

    The rules, for all metrics: pixels whose target is ignore_index, or that are not valid, count nowhere but
    in num_ignored. A class that is neither in the target nor predicted is NaN, and left out of means; one
    that is predicted where there is none, as in an empty mask, is 0. Average precision is NaN for a class
    that is not in the target. Where no pixel counts, everything is NaN.

    What is taken from bins is exact for thresholds at their edges, multiples of 1 / NUM_BINS. Average
    precision is that of scikit-learn for probabilities rounded down to the edges; from that of the
    probabilities themselves it differs, for each positive pixel, by at most the fraction of the pixels with
    its probability or a higher one that are in its own bin. Calibration errors differ by at most half a bin.

    :param num_classes: C
    :param multi_class: whether classes exclude each other (softmax, otherwise sigmoid)
    :param threshold: from which probability a pixel belongs to a class, unless multi-class; one, or one each
    :param temperature: divides the logits
    :param with_histograms: whether to count probabilities; otherwise, what needs them is NaN
    """

    def __init__(
        self,
        num_classes: int,
        multi_class: bool,
        ignore_index: int = IGNORE_INDEX,
        threshold: float | Sequence[float] = 0.5,
        temperature: float = 1.0,
        with_histograms: bool = True,
    ) -> None:
        self.multi_class, self.ignore_index = multi_class, ignore_index
        self.threshold, self.temperature, self.with_histograms = threshold, temperature, with_histograms
        shape = (num_classes, num_classes) if multi_class else (num_classes, 2, 2)
        self.confusion = torch.zeros(shape, dtype=torch.int64)  # [target, prediction], or one for each class
        # [class, is it there, probability from 0 to 1], each class against the rest
        self.histograms = torch.zeros(num_classes, 2, NUM_BINS, dtype=torch.int64)
        # [is it right, probability], of the predicted class; multi-class only
        self.confidences = torch.zeros(2, NUM_BINS, dtype=torch.int64)
        self.num_ignored = 0  # unless multi-class, a pixel counts once for each class

    @torch.no_grad()
    def update(self, logits: Tensor, targets: Tensor, valid: Tensor | None = None) -> None:
        """
        Add pixels.

        :param logits: (N, C, ...)
        :param targets: by the conventions of targets.py
        :param valid: (N, ...), 0 where a pixel does not count
        :raises ValueError: if shapes or class numbers do not fit
        """
        logits = logits.float() / self.temperature
        confusion = count(logits, targets, valid, self.threshold, self.ignore_index).cpu()
        if confusion.shape != self.confusion.shape:
            task = f"{len(self.histograms)} {'classes' if self.multi_class else 'labels'}"
            raise ValueError(f"these scores are of {task}; the prediction has the shape {(*logits.shape,)}.")
        keep = counting(logits, targets, valid, self.ignore_index)
        self.confusion += confusion
        self.num_ignored += keep.numel() - int(keep.sum())
        if not self.with_histograms:
            return
        classes = len(self.histograms)
        numbers = torch.arange(classes, device=logits.device).reshape(1, -1, *[1] * (logits.ndim - 2))
        if self.multi_class:
            probabilities, truth = precise(logits).softmax(1).float(), targets.unsqueeze(1) == numbers
            is_right = logits.max(1).indices == targets
            self.confidences += _histogram(is_right, probabilities.amax(1), keep, 2)
            keep = keep.unsqueeze(1)
        else:
            probabilities, truth = precise(logits).sigmoid().float(), targets > 0.5
        histograms = _histogram(numbers * 2 + truth, probabilities, keep, classes * 2)
        self.histograms += histograms.reshape(classes, 2, NUM_BINS)

    def __add__(self, other: "Scores") -> "Scores":
        """The scores of both datasets together, counted in the same way."""
        total = copy.copy(self)
        for name in ("confusion", "histograms", "confidences", "num_ignored"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    def results(self, class_names: Sequence[str] = ()) -> dict[str, float]:
        """
        Return every metric by its name.

        "f1" is the summary that the metric f1 returns (see summarize), "f1_macro" the mean over the classes,
        "f1_micro" that of all classes' counts together, "f1.NAME" that of a class; and so for the others.
        Macro and micro average precision are those of scikit-learn. Micro precision, recall and F1 of classes
        that exclude each other are the accuracy: look at macro.

        :param class_names: one for each class; otherwise they are numbered
        """
        tp, fp, fn = (int(part.sum()) for part in by_counts.tp_fp_fn(self.confusion))
        pooled = torch.tensor([[[0, fp], [fn, tp]]])  # true negatives count in none
        values = {"accuracy": by_counts.accuracy_per_class(self.confusion)}
        results: dict[str, float] = {}
        for name, metric in _METRICS.items():
            values[name], results[f"{name}_micro"] = metric(self.confusion), metric(pooled).item()
            results[f"{name}_macro"] = values[name].nanmean().item()
        results["average_precision_macro"] = self.average_precision().nanmean().item()
        results["average_precision_micro"] = _average_precision(self.histograms.sum(0))
        for name, one in values.items():
            results |= self.summary(name, one, class_names)
        return results | self.reliability(class_names) | {"valid_pixels": int(self.confusion.sum())}

    def reliability(self, class_names: Sequence[str] = ()) -> dict[str, float]:
        """Return those of the results that say how far probabilities can be trusted, and what is ignored."""
        results = self.summary("average_precision", self.average_precision(), class_names)
        return results | {"ece": self.expected_calibration_error(), "ignored_pixels": self.num_ignored}

    def summary(self, name: str, values: Tensor, class_names: Sequence[str] = ()) -> dict[str, float]:
        """Return the summary of values of the classes (C,), and of several each as "name.class"."""
        names = class_names if len(class_names) == len(values) else range(len(values))
        each = {f"{name}.{one}": value for one, value in zip(names, values.tolist(), strict=True)}
        return {name: summarize(values, self.confusion).item()} | (each if len(values) > 1 else {})

    def average_precision(self) -> Tensor:
        """(C,) float64: sum over thresholds of precision times recall gained, each class against the rest."""
        return torch.tensor([_average_precision(one) for one in self.histograms], dtype=torch.float64)

    def best_threshold(self, number: int) -> float:
        """
        Return the threshold with the highest F1 of a class, of several such the one nearest to 0.5; 0.5 for a
        class that is not in the target. Thresholds are the edges of bins: with one between two edges F1 can
        be higher, by at most the number of pixels in that bin over the number of positive and found ones.
        """
        counts = counts_by_threshold(self.histograms[number])
        doubled = 2 * counts["true_positives"].double()
        f1 = doubled / (doubled + counts["false_positives"] + counts["false_negatives"]).clamp(min=1)
        candidates = (f1 == f1.max()).nonzero().flatten() / NUM_BINS
        return candidates[(candidates - 0.5).abs().argmin()].item() if f1.max() > 0 else 0.5

    def expected_calibration_error(self) -> float:
        """
        Return the mean distance between probability and frequency, in CALIBRATION_BINS bins of equal width
        (https://arxiv.org/abs/1706.04599): multi-class of the predicted class, otherwise the mean over the
        classes of the distance between a class's probability and how often it is there.
        """
        histograms = self.confidences.unsqueeze(0) if self.multi_class else self.histograms
        centers = (torch.arange(NUM_BINS, dtype=torch.float64) + 0.5) / NUM_BINS
        gaps = histograms[:, 1] - histograms.sum(1) * centers
        gaps = gaps.reshape(len(histograms), CALIBRATION_BINS, -1).sum(-1).abs().sum(-1)
        return (gaps / histograms.sum((1, 2))).nanmean().item()  # 0 / 0 is NaN


def _histogram(cells: Tensor, probabilities: Tensor, keep: Tensor, num_cells: int) -> Tensor:
    """Return how many probabilities of each cell are in each bin, (num_cells, NUM_BINS) int64."""
    bins = (probabilities * NUM_BINS).int().clamp_(0, NUM_BINS - 1)  # scaling by a power of two is exact
    flat = cells.int() * NUM_BINS + bins
    return count_cells(flat, keep, num_cells * NUM_BINS).cpu().reshape(num_cells, NUM_BINS)


def counts_by_threshold(histogram: Tensor) -> dict[str, Tensor]:
    """Return each of the four counts (bins,) of a class by threshold, a bin's lower edge, from (2, bins)."""
    at_least = histogram.flip(-1).cumsum(-1).flip(-1)  # pixels with this probability or a higher one
    below = histogram.sum(-1, keepdim=True) - at_least
    positives = {"true_positives": at_least[1], "false_positives": at_least[0]}
    return positives | {"true_negatives": below[0], "false_negatives": below[1]}


def _average_precision(histogram: Tensor) -> float:
    counts = counts_by_threshold(histogram)
    tp = counts["true_positives"].double()
    precision = tp / (tp + counts["false_positives"]).clamp(min=1)
    recall = torch.cat([tp / histogram[1].sum(), torch.zeros(1)])  # 0 / 0 is NaN; no pixel reaches the last
    return -(recall.diff() * precision).sum().item()
