"""Evaluation: one result for a dataset, the same for every batch size, order and number of processes."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..data.contract import DataContract
from .accumulated import Accumulated, is_accumulated, is_averaged
from .counts import CountMetric
from .determinism import seed_step
from .device import DeviceContext, map_tensors, one_of, tensors_of
from .distributed import gather, num_processes
from .modules import call_model, evaluation_mode
from .scores import Scores
from .signals import Preempted, raise_if_stop_requested, stop_requested
from .targets import check_shapes, is_multi_class, known, main_output, unmask


class Accumulator(Protocol):
    """Takes a dataset batch by batch. Each process brings its part; the results are those of all."""

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Add a batch."""

    def results(self) -> dict[str, float]:
        """Return what follows from all batches."""
        ...


class Evaluation:
    """
    Loss and metrics of a dataset.

    A CountMetric (those of metrics.py) is computed once, from the counts of all pixels, and one with update
    and compute (those of torchmetrics) is accumulated. The loss and any other function is averaged over
    samples; the name of such a metric ends in _sample_mean.
    """

    def __init__(
        self,
        metrics: dict[str, Callable[..., Any]],
        loss_function: Callable[[Tensor, Tensor], Tensor],
        ignore_index: int = 255,
        class_names: Sequence[str] = (),
        contract: DataContract | None = None,
        task: str = "",
    ) -> None:
        """
        :param contract: adds how reliable probabilities are and what is ignored; all is counted with its
            threshold and temperature then, as in prediction. None: with 0.5 and 1
        :param task: see TASKS; that of the contract, if there is one
        """
        task = contract.task if contract else task
        self.accumulated = [
            Accumulated(name, one, task, ignore_index) for name, one in metrics.items() if is_accumulated(one)
        ]
        self.counted = {key: one for key, one in metrics.items() if isinstance(one, CountMetric)}
        others = {f"{key}_sample_mean": one for key, one in metrics.items() if is_averaged(one)}
        self.averaged = {"loss": loss_function} | others
        self.ignore_index, self.class_names = ignore_index, class_names
        self.is_masked = any(metric.masked for metric in self.counted.values())
        self.scores: Scores | None = None  # of classes, once there are any
        self.sample_losses: list[float] = []  # in the order of the samples; NaN where no pixel counts
        self._contract = contract
        self._values: dict[str, list[float]] = {name: [] for name in self.averaged}

    def update(self, predictions: Any, targets: Any) -> None:
        """
        Add a batch.

        :param predictions: (N, C, ...) logits in float32; where there are several targets, all outputs
        :param targets: by the conventions of targets.py
        """
        for metric in self.accumulated:
            metric.update(predictions, targets)
        contract = self._contract
        counts_classes = contract is not None and contract.task != "values"
        if self.counted or (counts_classes and holds_classes(predictions, targets)):
            unmasked, valid = unmask(predictions, targets) if self.is_masked else (targets, None)
            if self.scores is None:
                how = contract or DataContract(1)
                about = (predictions.shape[1], is_multi_class(predictions, unmasked), self.ignore_index)
                self.scores = Scores(*about, how.threshold, how.temperature, contract is not None)
            self.scores.update(predictions, unmasked, valid)
        for index in range(len(tensors_of(predictions)[0])):
            prediction, target = one_of((predictions, targets), index)
            if self._is_ignored(target):
                self.sample_losses.append(math.nan)
                continue  # no pixel counts, of which some losses are NaN
            for name, function in self.averaged.items():
                self._values[name].append(float(function(*known(prediction, target))))
            self.sample_losses.append(self._values["loss"][-1])

    def _is_ignored(self, target: Any) -> bool:
        if not isinstance(target, Tensor):
            return False
        return bool((target.isnan() if target.is_floating_point() else target == self.ignore_index).all())

    def results(self) -> dict[str, float]:
        """
        Return the loss and each metric, also by class ("name.class") if there are several. With a contract
        also average_precision, ece (the expected calibration error) and ignored_pixels.

        :raises Preempted: if a signal has asked any of the processes to end, so that parts may be missing
        """
        parts = gather_unless_stopped((self._values, self.scores, self.sample_losses))
        self._values = {name: [value for part in parts for value in part[0][name]] for name in self.averaged}
        scores = [part[1] for part in parts if part[1] is not None]
        self.scores = sum(scores[1:], scores[0]) if scores else None
        self.sample_losses = [loss for part in parts for loss in part[2]]
        results = {name: _mean(values) for name, values in self._values.items()}
        for metric in self.accumulated:
            results |= metric.results(self.class_names)
        return results if self.scores is None else results | self._counted_results(self.scores)

    def _counted_results(self, scores: Scores) -> dict[str, float]:
        results = {} if self._contract is None else scores.reliability(self.class_names)
        for name, metric in self.counted.items():
            results |= scores.summary(name, metric.per_class(scores.confusion), self.class_names)
            results[name] = metric.from_counts(scores.confusion).item()
        if scores.multi_class and len(scores.confusion) == 2:  # of two classes, the second is the summary
            results = {key: one for key, one in results.items() if "." not in key or key in self.counted}
        return results


def gather_unless_stopped(value: Any) -> list[Any]:
    """
    Return the values of all processes, by rank.

    :raises Preempted: if a signal has asked any of them to end, so that parts may be missing
    """
    if num_processes() == 1:
        raise_if_stop_requested()
        return [value]
    parts = gather((stop_requested(), value))
    if any(stopped for stopped, _ in parts):
        raise Preempted("a signal was received")
    return [part for _, part in parts]


def holds_classes(predictions: Tensor, targets: Tensor) -> bool:
    """Return whether targets may hold classes by the conventions of targets.py, and so can be counted."""
    if not isinstance(targets, Tensor):
        return False
    try:
        check_shapes(predictions, targets)
    except ValueError:
        return False
    return True


def _mean(values: list[float]) -> float:
    # fsum is exactly rounded, so the order does not matter; it refuses inf - inf.
    total = math.fsum(values) if all(map(math.isfinite, values)) else sum(values)
    return total / len(values) if values else math.nan


@torch.no_grad()
def evaluate_batch(
    model: nn.Module, batch: tuple[Any, Any], evaluation: Accumulator, context: DeviceContext
) -> None:
    """
    Add a batch to an evaluation; the model has to be in evaluation mode. Do nothing once a signal has asked
    to end: there will be no results.

    :param batch: (inputs, targets)
    """
    if stop_requested():
        return
    seed_step(0, 0, context.device)  # what a model draws, as Monte-Carlo dropout does, follows from the batch
    inputs, targets = context.move_pair(batch)
    with context.autocast():
        predictions = main_output(call_model(model, inputs), targets)
    evaluation.update(map_tensors(Tensor.float, predictions), targets)


def evaluate(
    model: nn.Module, batches: Iterable[tuple[Any, Any]], evaluation: Accumulator, context: DeviceContext
) -> dict[str, float]:
    """
    Evaluate a model on a dataset. The mode that the model was in is restored.

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
