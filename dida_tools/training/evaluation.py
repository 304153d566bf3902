"""Contains evaluation: one result for a whole data set, the same for every batch size and order."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config.device import autocast
from ..utils.loss import count, unmask
from ..utils.torchutils import evaluation_mode


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
    ) -> None:
        self.counted: dict[str, Any] = {key: one for key, one in metrics.items() if hasattr(one, "from_counts")}
        self.averaged = {"loss": loss_function} | {
            f"{key}_sample_mean": one for key, one in metrics.items() if key not in self.counted
        }
        self.ignore_index, self.class_names = ignore_index, class_names
        self.num_samples = 0
        self.counts: dict[bool, Tensor] = {}  # by whether the target's first channel is a usability mask
        self._sums: dict[str, float] = {}

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """
        Adds a batch.

        :param predictions: (N, C, ...) logits in float32
        :param targets: by the convention of loss.py
        """
        for masked in {metric.masked for metric in self.counted.values()}:
            bare, valid = unmask(predictions, targets) if masked else (targets, None)
            counts = count(predictions, bare, valid, ignore_index=self.ignore_index).cpu()
            self.counts[masked] = self.counts[masked] + counts if masked in self.counts else counts
        for index in range(len(predictions)):
            prediction, target = predictions[index : index + 1], targets[index : index + 1]
            if not target.is_floating_point() and bool((target == self.ignore_index).all()):
                continue  # no pixel counts, and some losses answer NaN to that
            self.num_samples += 1
            for name, function in self.averaged.items():
                self._sums[name] = self._sums.get(name, 0.0) + float(function(prediction, target))

    def results(self) -> dict[str, float]:
        """The loss and each metric, and of metrics with several classes also "name.class"."""
        number = self.num_samples or float("nan")
        results = {name: self._sums.get(name, 0.0) / number for name in self.averaged}
        for name, metric in self.counted.items():
            counts = self.counts[metric.masked]
            results[name] = metric.from_counts(counts).item()
            per_class = metric.per_class(counts).tolist()
            if len(per_class) > 2 or (len(per_class) == 2 and counts.ndim == 3):
                names = self.class_names if len(self.class_names) == len(per_class) else range(len(per_class))
                results |= {f"{name}.{class_name}": value for class_name, value in zip(names, per_class, strict=True)}
        return results


@torch.no_grad()
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

    :param batches: (inputs, targets)
    :param evaluation: an empty one, which holds the counts afterwards
    """
    with evaluation_mode(model):
        for inputs, targets in batches:
            inputs, targets = to_device(inputs, device, channels_last), targets.to(device)
            with autocast(device, precision):
                predictions = model(inputs)
            evaluation.update(predictions.float(), targets)
    return evaluation.results()


def to_device(inputs: Tensor, device: torch.device, channels_last: bool) -> Tensor:
    """Moves inputs to the device; images (N, C, H, W) into the memory format that convolutions are fastest with."""
    if channels_last and inputs.ndim == 4:
        return inputs.to(device, non_blocking=True, memory_format=torch.channels_last)
    return inputs.to(device, non_blocking=True)
