"""What the suite measures with: quality by class, baselines, perturbed images, memory, tables."""

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dida_core.data.contract import DataContract
from dida_core.training.counts import f1_per_class
from dida_core.training.scores import Scores
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WIDTH = 100
Predict = Callable[[np.ndarray], np.ndarray]


class Quality:
    """Quality of predictions by class or value, more is better: F1, or R2 (explained variance) of values."""

    def __init__(self, contract: DataContract, num_outputs: int, ignore_index: int) -> None:
        self.name = "R2" if contract.task == "values" else "F1"
        self.multi_class = contract.task == "multi-class"
        self.scores = Scores(num_outputs, self.multi_class, ignore_index, contract.threshold)
        # Number, sum, squares, squared errors.
        self.moments = torch.zeros(4, num_outputs, dtype=torch.float64)

    def update(self, probabilities: Tensor, targets: Tensor, valid: Tensor | None = None) -> None:
        """Add probabilities or values (N, C, ...), and targets by the convention of loss.py."""
        if self.name == "F1":
            p = probabilities.double().clamp(1e-9, 1 - 1e-9)
            self.scores.update(p.log() if self.multi_class else p.logit(), targets, valid)
            return
        truth, predicted = (one.double().movedim(1, 0).flatten(1) for one in (targets, probabilities))
        sums = truth.sum(1), (truth**2).sum(1), ((truth - predicted) ** 2).sum(1)
        self.moments += torch.stack([torch.full((len(truth),), truth.shape[1]), *sums])

    def per_class(self) -> list[float]:
        """Return the quality of each class or value; NaN of a class that is neither present nor predicted."""
        if self.name == "F1":
            return f1_per_class(self.scores.confusion).tolist()
        number, total, squares, errors = self.moments
        return (1 - errors / (squares - total**2 / number).clamp(min=1e-12)).tolist()

    def mean(self) -> float:
        return torch.tensor(self.per_class()).nanmean().item()


def rows_of(
    inputs: Tensor, targets: Tensor, valid: Tensor | None, task: str
) -> tuple[np.ndarray, np.ndarray]:
    """
    Return what a model without context learns from: pixels where the target has pixels, otherwise mean and
    std of each channel, or the input itself where it is a vector.

    :return: (rows, features), and (rows,) class numbers or (rows, K)
    """
    targets = targets.unsqueeze(1) if task == "multi-class" else targets
    if targets.shape[2:] == inputs.shape[2:]:
        inputs, targets = inputs.movedim(1, -1).flatten(0, -2), targets.movedim(1, -1).flatten(0, -2)
        keep = slice(None) if valid is None else valid.flatten() > 0
        inputs, targets = inputs[keep], targets[keep]
    elif inputs.ndim > 2:
        inputs = torch.cat([inputs.flatten(2).mean(-1), inputs.flatten(2).std(-1)], 1)
    return inputs.numpy(), (targets[:, 0] if task == "multi-class" else targets).numpy()


def fit_rows(
    features: np.ndarray, targets: np.ndarray, task: str, ignore_index: int
) -> tuple[Predict, Predict]:
    """
    Fit two baselines: boosted trees that see one pixel at a time, and the most frequent class or the mean.

    :return: functions of (rows, features) that give (rows,) class numbers or (rows, K)
    """
    from sklearn import dummy, ensemble

    options: dict[str, Any] = {"max_iter": 50, "early_stopping": False, "random_state": 0}
    by_trees, trivial = [], []
    for column in targets.reshape(len(targets), -1).T:
        keep = np.ones(len(column), bool) if task == "values" else column != ignore_index
        trees: Any = ensemble.HistGradientBoostingClassifier(**options)
        constant: Any = dummy.DummyClassifier(strategy="most_frequent")
        if task == "values":
            trees, constant = ensemble.HistGradientBoostingRegressor(**options), dummy.DummyRegressor()
        trivial.append(constant.fit(features[keep], column[keep]))
        can_learn = len(np.unique(column[keep])) > 1
        by_trees.append(trees.fit(features[keep], column[keep]) if can_learn else trivial[-1])

    def predict(models: list[Any], rows: np.ndarray) -> np.ndarray:
        predicted = np.stack([model.predict(rows) for model in models], 1)
        return predicted[:, 0] if task == "multi-class" else predicted

    return lambda rows: predict(by_trees, rows), lambda rows: predict(trivial, rows)


def with_noise(inputs: Tensor, std: float) -> Tensor:
    """Add noise, in units of each channel's std where images are normalized."""
    return inputs + std * torch.randn(inputs.shape, generator=torch.Generator().manual_seed(0))


def with_gain(inputs: Tensor, factor: float, contract: DataContract) -> Tensor:
    """Multiply the values as they stand in the files."""
    mean, std = _statistics(inputs, contract)
    return ((inputs * std + mean) * factor - mean) / std


def without_channel(inputs: Tensor, channel: int, contract: DataContract) -> Tensor:
    """Set a channel of the files to 0."""
    mean, std = _statistics(inputs, contract)
    changed = inputs.clone()
    changed[:, channel] = (-mean / std).expand(inputs.shape)[:, channel]
    return changed


def as_in_files(inputs: Tensor, contract: DataContract) -> Tensor:
    """Undo normalization and scaling, as float32."""
    mean, std = _statistics(inputs, contract)
    return (inputs * std + mean) / contract.scale


def _statistics(inputs: Tensor, contract: DataContract) -> tuple[Tensor, Tensor]:
    shape = (1, -1, *[1] * (inputs.ndim - 2))
    mean, std = (contract.mean, contract.std) if contract.mean else ([0.0], [1.0])
    return torch.tensor(mean).reshape(shape), torch.tensor(std).reshape(shape)


def read_export(file: Path) -> Callable[[Tensor], Tensor]:
    """Load an exported model the way its recipients do."""
    if file.suffix == ".pt2":
        return torch.export.load(file).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"image": images.numpy()})[0])


class PeakMemory(TorchDispatchMode):
    """Count the bytes of tensors made while it is on, and the most that were alive at once; on any device."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.peak = 0, 0
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = _storages((args, kwargs)).keys()
        result = func(*args, **(kwargs or {}))
        for key, storage in _storages(result).items():
            if key not in known | self._alive.keys():
                self._alive[key] = weakref.finalize(storage, self._leave, key, storage.nbytes())
                self.bytes += storage.nbytes()
                self.peak = max(self.peak, self.bytes)
        return result

    def _leave(self, key: int, size: int) -> None:
        self.bytes -= size
        self._alive.pop(key, None)


def _storages(values: Any) -> dict[int, torch.UntypedStorage]:
    storages = [one.untyped_storage() for one in tree_leaves(values) if isinstance(one, Tensor)]
    return {storage._cdata: storage for storage in storages}


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """
    Return a table of at most WIDTH columns, numbers at the right; name the columns that do not fit.

    :param rows: the first column is text, numbers get three digits
    """
    cells = [[header[0], *(_short(name, 12) for name in header[1:])]]
    cells += [[_short(str(first), 40), *map(_cell, others)] for first, *others in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    number = max(n for n in range(1, len(widths) + 1) if n == 1 or sum(widths[:n]) + 2 * (n - 1) <= WIDTH)
    lines = [title]
    for first, *others in cells:
        numbers = [text.rjust(width) for text, width in zip(others[: number - 1], widths[1:], strict=False)]
        lines.append("  ".join([first.ljust(widths[0]), *numbers]).rstrip())
    if left_out := header[number:]:
        lines.append(f"({len(left_out)} more columns do not fit: {_short(', '.join(left_out), 60)})")
    return "\n".join(lines)


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "-" if np.isnan(value) else f"{value:.3f}"
    return "-" if value is None else str(value)
