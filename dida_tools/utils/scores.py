"""
Contains histograms of what a model is sure of: how many pixels got which probability, by class and truth. Those of
batches add up to those of the data set; precision and recall for every threshold follow from them.
"""

import torch
from torch import Tensor

from .loss import IGNORE_INDEX, check_shapes, is_multi_class

NUM_BINS = 128


@torch.no_grad()
def count_scores(pred: Tensor, target: Tensor, valid: Tensor | None = None, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """
    Counts probabilities, each class against the rest.

    :param pred: (N, C, ...) logits
    :param target: by the convention of loss.py
    :param valid: (N, ...), 0 where a pixel does not count
    :return: (C, 2, NUM_BINS) int64: [class, is it there, probability from 0 to 1]
    """
    check_shapes(pred, target)
    classes = pred.shape[1]
    if is_multi_class(pred, target):
        keep = (target != ignore_index).unsqueeze(1).expand_as(pred)
        numbers = torch.arange(classes, device=pred.device).reshape(1, -1, *[1] * (pred.ndim - 2))
        truth = target.unsqueeze(1) == numbers
        probabilities = pred.float().softmax(1)
    else:
        keep, truth = target != ignore_index, target > 0.5
        probabilities = pred.float().sigmoid()
    if valid is not None:
        keep = keep & (valid > 0).unsqueeze(1)
    bins = (probabilities * NUM_BINS).long().clamp_(0, NUM_BINS - 1)
    place = torch.arange(classes, device=pred.device).reshape(1, -1, *[1] * (pred.ndim - 2))
    flat = ((place * 2 + truth) * NUM_BINS + bins)[keep]
    return torch.bincount(flat, minlength=classes * 2 * NUM_BINS).reshape(classes, 2, NUM_BINS)


def counts_by_threshold(scores: Tensor) -> dict[str, Tensor]:
    """
    Hits and errors for each threshold at a bin's lower edge.

    :param scores: (2, NUM_BINS), one class of count_scores
    :return: "true_positives", "false_positives", "true_negatives", "false_negatives", each (NUM_BINS,) int64, for
        thresholds that rise
    """
    at_least = scores.flip(-1).cumsum(-1).flip(-1)  # pixels with this probability or a higher one
    below = scores.sum(-1, keepdim=True) - at_least
    return {
        "true_positives": at_least[1],
        "false_positives": at_least[0],
        "true_negatives": below[0],
        "false_negatives": below[1],
    }
