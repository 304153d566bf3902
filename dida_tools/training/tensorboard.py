"""Contains what TensorBoard shows besides numbers and images: precision-recall curves, and runs by their config."""

from collections.abc import Sequence
from typing import Any

from ..utils.scores import Scores, counts_by_threshold

_NUM_THRESHOLDS = 128  # more take the browser long


def write_pr_curves(writer: Any, scores: Scores, class_names: Sequence[str], step: int) -> None:
    """
    Writes the precision-recall curve of each class for the PR CURVES tab.

    :param writer: a SummaryWriter
    """
    histograms = scores.histograms.unflatten(-1, (_NUM_THRESHOLDS, -1)).sum(-1)
    names = class_names if len(class_names) == len(histograms) else range(len(histograms))
    for name, one in zip(names, histograms, strict=True):
        counts = counts_by_threshold(one)
        hits = counts["true_positives"].double()
        precision = hits / (hits + counts["false_positives"]).clamp(min=1)
        recall = hits / (hits + counts["false_negatives"]).clamp(min=1)
        columns = [counts[key] for key in ("true_positives", "false_positives", "true_negatives", "false_negatives")]
        curve = [column.numpy() for column in (*columns, precision, recall)]
        writer.add_pr_curve_raw(f"test/{name}", *curve, step, _NUM_THRESHOLDS)


def write_hparams(writer: Any, config: dict[str, Any], metrics: dict[str, float]) -> None:
    """
    Writes config and results for the HPARAMS tab, in which runs can be sorted and compared.

    :param config: dotted keys, as flatten gives them
    :param metrics: by the tags of the scalars that were written
    """
    # Not by the writer's add_hparams, which makes a run of its own for them.
    from torch.utils.tensorboard.summary import hparams

    plain = {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in config.items()}
    for summary in hparams(plain, metrics):
        writer.file_writer.add_summary(summary)
