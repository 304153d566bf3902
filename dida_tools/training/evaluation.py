"""Contains evaluation: one result for a dataset, the same for every batch size, order and number of processes."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..utils.data.contract import DataContract
from ..utils.counts import CountMetric
from ..utils.scores import Scores
from ..utils.signals import Preempted, raise_if_stop_requested, stop_requested
from ..utils.targets import check_shapes, is_multi_class, unmask
from .device import DeviceContext
from .distributed import gather, num_processes
from .modules import evaluation_mode


class Accumulator(Protocol):
    """What takes a dataset batch by batch; each process brings its part, and results are those of all."""

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Adds a batch."""

    def results(self) -> dict[str, float]:
        """What follows from all batches."""
        ...


class Evaluation:
    """
    Accumulates the loss and the metrics of a dataset.

    Metrics that carry a count form (those of loss.py) are computed once from the counts of all pixels, which scores
    holds. The loss, and any other function, is the mean over samples; its name ends in _sample_mean then.
    """

    def __init__(
        self,
        metrics: dict[str, Callable[..., Any]],
        loss_function: Callable[[Tensor, Tensor], Tensor],
        ignore_index: int = 255,
        class_names: Sequence[str] = (),
        contract: DataContract | None = None,
    ) -> None:
        """
        :param contract: whether to tell, besides the metrics, how far probabilities can be trusted and what is ignored;
            all is counted with its threshold and temperature, then, as in prediction. None: with 0.5 and 1
        """
        self.counted = {key: one for key, one in metrics.items() if isinstance(one, CountMetric)}
        self.averaged = {"loss": loss_function} | {
            f"{key}_sample_mean": one for key, one in metrics.items() if key not in self.counted
        }
        self.ignore_index, self.class_names = ignore_index, class_names
        self.num_samples = 0
        self.is_masked = any(metric.masked for metric in self.counted.values())
        self.scores: Scores | None = None  # of classes, once there are any
        self.sample_losses: list[
            float
        ] = []  # of each sample in the order they came in; NaN where no pixel counts
        self._contract = contract
        self._values: dict[str, list[float]] = {name: [] for name in self.averaged}

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """
        Adds a batch.

        :param predictions: (N, C, ...) logits in float32
        :param targets: by the convention of loss.py
        """
        if self.counted or (
            self._contract is not None and holds_classes(predictions, targets, self._contract)
        ):
            bare, valid = unmask(predictions, targets) if self.is_masked else (targets, None)
            if self.scores is None:
                how = self._contract or DataContract(1)
                about = (predictions.shape[1], is_multi_class(predictions, bare), self.ignore_index)
                self.scores = Scores(*about, how.threshold, how.temperature, self._contract is not None)
            self.scores.update(predictions, bare, valid)
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
        The loss and each metric, and of metrics with several classes also "name.class". With a contract also
        average_precision, ece (the expected calibration error) and ignored_pixels.

        :raises Preempted: if a signal has asked any of the processes to end, so that parts may be missing
        """
        self._gather()
        number = self.num_samples or float("nan")
        results = {name: _sum(values) / number for name, values in self._values.items()}
        return results if self.scores is None else results | self._counted_results(self.scores)

    def _counted_results(self, scores: Scores) -> dict[str, float]:
        has_classes = (
            len(scores.confusion) > 2 or not scores.multi_class
        )  # of two, the summary is that of class 1
        results: dict[str, float] = {}
        if self._contract is not None:
            results = scores.reliability(self.class_names)
            if not has_classes:
                results = {key: value for key, value in results.items() if "." not in key}
        for name, metric in self.counted.items():
            results[name] = metric.from_counts(scores.confusion).item()
            if has_classes:
                results |= scores.by_class(name, metric.per_class(scores.confusion), self.class_names)
        return results

    def _gather(self) -> None:
        """Adds up what the processes have; called by all of them."""
        parts = gather_unless_stopped((self.num_samples, self._values, self.scores, self.sample_losses))
        self.num_samples = sum(part[0] for part in parts)
        self._values = {name: [value for part in parts for value in part[1][name]] for name in self.averaged}
        scores = [part[2] for part in parts if part[2] is not None]
        self.scores = sum(scores[1:], scores[0]) if scores else None
        self.sample_losses = [loss for part in parts for loss in part[3]]


def gather_unless_stopped(value: Any) -> list[Any]:
    """
    The values of all processes, by rank.

    :raises Preempted: if a signal has asked any of them to end, so that parts may be missing
    """
    if num_processes() == 1:
        raise_if_stop_requested()
        return [value]
    parts = gather((stop_requested(), value))
    if any(stopped for stopped, _ in parts):
        raise Preempted("a signal was received")
    return [part for _, part in parts]


def holds_classes(predictions: Tensor, targets: Tensor, contract: DataContract) -> bool:
    """Whether targets hold classes by the convention of loss.py, so that they can be counted."""
    if contract.task == "values":
        return False
    try:
        check_shapes(predictions, targets)
    except ValueError:
        return False
    return True


def _sum(values: list[float]) -> float:
    # Exactly rounded, so the order does not matter; it refuses inf - inf.
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)


@torch.no_grad()
def evaluate_batch(
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    evaluation: Accumulator,
    context: DeviceContext,
) -> None:
    """
    Adds one batch to an evaluation; the model has to be in evaluation mode. Nothing once a signal has asked to end,
    since there will be no results then.

    :param batch: (inputs, targets)
    """
    if stop_requested():
        return
    inputs, targets = context.move(batch[0]), batch[1].to(context.device)
    with context.autocast():
        predictions = model(inputs)
    evaluation.update(predictions.float(), targets)


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    evaluation: Accumulator,
    context: DeviceContext,
) -> dict[str, float]:
    """
    Evaluates a model on a dataset. The mode that the model was in is restored.

    :param batches: (inputs, targets); of several processes, each brings its own part
    :param evaluation: an empty one, which holds the counts afterwards
    :raises Preempted: if a signal has asked to end
    """
    with evaluation_mode(model):
        for batch in batches:
            if stop_requested():
                break
            evaluate_batch(model, batch, evaluation, context)
    return evaluation.results()
