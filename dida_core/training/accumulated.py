"""Metrics that are objects with update, compute and reset, such as torchmetrics has."""

import copy
import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from .counts import CountMetric
from .distributed import num_processes
from .targets import is_multi_class, known


def is_accumulated(metric: Any) -> bool:
    """Tell whether a metric is such an object, its class, or a functools.partial of its class."""
    kind = metric.func if isinstance(metric, functools.partial) else metric
    return all(callable(getattr(kind, name, None)) for name in ("update", "compute", "reset"))


def is_averaged(metric: Any) -> bool:
    """Tell whether a metric is a plain function, of which there is only a mean over samples."""
    return not isinstance(metric, CountMetric) and not is_accumulated(metric)


class Accumulated:
    """
    A metric of a whole dataset. It gets probabilities where the task is classes, and else the predictions.

    :raises ConfigError: if several processes train
    """

    def __init__(self, name: str, metric: Any, task: str, ignore_index: int) -> None:
        if num_processes() > 1:  # some of theirs hang where one process has no sample
            raise ConfigError([f"METRICS.{name} is an object: several processes cannot share it."])
        self.name, self.task, self.ignore_index = name, task, ignore_index
        if isinstance(metric, type | functools.partial):
            given = metric.keywords if isinstance(metric, functools.partial) else {}
            takes_it = "ignore_index" in inspect.signature(metric).parameters and "ignore_index" not in given
            self.metric = metric(**({"ignore_index": ignore_index} if takes_it and task != "values" else {}))
        else:
            self.metric = copy.deepcopy(metric)
            self.metric.reset()

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Add a batch."""
        if hasattr(self.metric, "to"):
            self.metric = self.metric.to(predictions.device)
        if self.task in ("multi-class", "multi-label"):
            multi_class, targets = is_multi_class(predictions, targets), targets.long()
            predictions = predictions.softmax(1) if multi_class else predictions.sigmoid()
            parts = getattr(self.metric, "values", lambda: [self.metric])()
            ignores = all(getattr(part, "ignore_index", None) == self.ignore_index for part in parts)
            if not ignores and bool((targets == self.ignore_index).any()):
                about = f"METRICS.{self.name} does not ignore {self.ignore_index}, which targets hold"
                raise ConfigError([f"{about}: give it ignore_index={self.ignore_index}, or take another."])
        predictions, targets = known(predictions, targets)
        if targets.numel():
            self.metric.update(predictions, targets)

    def results(self, class_names: Sequence[str]) -> dict[str, float]:
        """Return what it computes, of several values each by its class or name."""
        computed = self.metric.compute()
        if isinstance(computed, dict):
            return {f"{self.name}.{key}": float(value) for key, value in computed.items()}
        values = torch.as_tensor(computed).flatten().tolist()
        names = class_names if len(class_names) == len(values) else range(len(values))
        if len(values) == 1:
            return {self.name: values[0]}
        return {f"{self.name}.{name}": value for name, value in zip(names, values, strict=True)}
