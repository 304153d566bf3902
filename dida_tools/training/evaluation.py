"""Contains evaluation: one result for a data set, the same for every batch size, order and number of processes."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config.device import autocast
from ..utils.loss import count, unmask
from ..utils.scores import count_scores
from ..utils.signals import Preempted, raise_if_stop_requested, stop_requested
from ..utils.torchutils import evaluation_mode
from .distributed import gather, num_processes


class Evaluation:
    """
    Accumulates the loss and the metrics of a data set.

    Metrics that carry a count form (those of loss.py) are computed once from the counts of all pixels. The loss, and
    any other function, is the mean over samples; its name ends in _sample_mean then.
    """

    def __init__(
        self,
        metrics: dict[str, Callable[..., Any]],
        loss_function: Callable[[Tensor, Tensor], Tensor],
        ignore_index: int = 255,
        class_names: Sequence[str] = (),
        with_scores: bool = False,
    ) -> None:
        """
        :param with_scores: whether to count probabilities, too; see utils/scores.py
        """
        self.counted: dict[str, Any] = {key: one for key, one in metrics.items() if hasattr(one, "from_counts")}
        self.averaged = {"loss": loss_function} | {
            f"{key}_sample_mean": one for key, one in metrics.items() if key not in self.counted
        }
        self.ignore_index, self.class_names = ignore_index, class_names
        self.num_samples = 0
        self.counts: dict[bool, Tensor] = {}  # by whether the target's first channel is a usability mask
        self.scores: Tensor | None = None
        self.sample_losses: list[float] = []  # of each sample in the order they came in; NaN where no pixel counts
        self._with_scores = with_scores
        self._values: dict[str, list[float]] = {name: [] for name in self.averaged}

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """
        Adds a batch.

        :param predictions: (N, C, ...) logits in float32
        :param targets: by the convention of loss.py
        """
        kinds = sorted({metric.masked for metric in self.counted.values()})
        for masked in kinds:
            bare, valid = unmask(predictions, targets) if masked else (targets, None)
            counts = count(predictions, bare, valid, ignore_index=self.ignore_index).cpu()
            self.counts[masked] = self.counts[masked] + counts if masked in self.counts else counts
            if self._with_scores and masked == kinds[-1]:
                scores = count_scores(predictions, bare, valid, self.ignore_index).cpu()
                self.scores = scores if self.scores is None else self.scores + scores
        for index in range(len(predictions)):
            prediction, target = predictions[index : index + 1], targets[index : index + 1]
            if not target.is_floating_point() and bool((target == self.ignore_index).all()):
                self.sample_losses.append(math.nan)
                continue  # no pixel counts, and some losses answer NaN to that
            self.num_samples += 1
            for name, function in self.averaged.items():
                self._values[name].append(float(function(prediction, target)))
            self.sample_losses.append(self._values["loss"][-1])

    def results(self) -> dict[str, float]:
        """
        The loss and each metric, and of metrics with several classes also "name.class".

        :raises Preempted: if a signal has asked any of the processes to end, so that parts may be missing
        """
        self._gather()
        number = self.num_samples or float("nan")
        results = {name: _sum(values) / number for name, values in self._values.items()}
        for name, metric in self.counted.items():
            counts = self.counts[metric.masked]
            results[name] = metric.from_counts(counts).item()
            per_class = metric.per_class(counts).tolist()
            if len(per_class) > 2 or (len(per_class) == 2 and counts.ndim == 3):
                names = self.class_names if len(self.class_names) == len(per_class) else range(len(per_class))
                results |= {f"{name}.{class_name}": value for class_name, value in zip(names, per_class, strict=True)}
        return results

    def _gather(self) -> None:
        """Adds up what the processes have; called by all of them."""
        if num_processes() == 1:
            raise_if_stop_requested()
            return
        parts = gather((stop_requested(), self.num_samples, self.counts, self._values, self.scores, self.sample_losses))
        if any(part[0] for part in parts):
            raise Preempted("a signal was received")
        self.num_samples = sum(part[1] for part in parts)
        self.counts = {}
        for part in parts:
            for masked, one in part[2].items():
                self.counts[masked] = self.counts[masked] + one if masked in self.counts else one
        self._values = {name: [value for part in parts for value in part[3][name]] for name in self.averaged}
        scores = [part[4] for part in parts if part[4] is not None]
        self.scores = sum(scores[1:], scores[0]) if scores else None
        self.sample_losses = [loss for part in parts for loss in part[5]]


def _sum(values: list[float]) -> float:
    # Exactly rounded, so the order does not matter; it refuses inf - inf.
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)


@torch.no_grad()
def evaluate_batch(
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    evaluation: Evaluation,
    device: torch.device,
    precision: str,
    channels_last: bool = True,
) -> None:
    """
    Adds one batch to an evaluation; the model has to be in evaluation mode. Nothing once a signal has asked to end,
    since there will be no results then.

    :param batch: (inputs, targets)
    """
    if stop_requested():
        return
    inputs, targets = to_device(batch[0], device, channels_last), batch[1].to(device)
    with autocast(device, precision):
        predictions = model(inputs)
    evaluation.update(predictions.float(), targets)


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    evaluation: Evaluation,
    device: torch.device,
    precision: str,
    channels_last: bool = True,
) -> dict[str, float]:
    """
    Evaluates a model on a data set. The mode that the model was in is restored.

    :param batches: (inputs, targets); of several processes, each brings its own part
    :param evaluation: an empty one, which holds the counts afterwards
    :raises Preempted: if a signal has asked to end
    """
    with evaluation_mode(model):
        for batch in batches:
            if stop_requested():
                break
            evaluate_batch(model, batch, evaluation, device, precision, channels_last)
    return evaluation.results()


def to_device(inputs: Tensor, device: torch.device, channels_last: bool) -> Tensor:
    """Moves inputs to the device; images (N, C, H, W) into the memory format that convolutions are fastest with."""
    if channels_last and inputs.ndim == 4:
        return inputs.to(device, non_blocking=True, memory_format=torch.channels_last)
    return inputs.to(device, non_blocking=True)
