"""Contains what the suite measures with: quality by class, baselines, changes of images, memory, tables."""

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dida_tools.utils.data.contract import DataContract
from dida_tools.utils.counts import f1_per_class
from dida_tools.utils.scores import Scores

WIDTH = 100
Predict = Callable[[np.ndarray], np.ndarray]


class Quality:
    """How good answers are, for each class or value, more is better: F1, or for values the explained variance R2."""

    def __init__(self, contract: DataContract, num_outputs: int, ignore_index: int) -> None:
        self.name = "R2" if contract.task == "values" else "F1"
        self.multi_class = contract.task == "multi-class"
        self.scores = Scores(num_outputs, self.multi_class, ignore_index, contract.threshold)
        self.moments = torch.zeros(
            4, num_outputs, dtype=torch.float64
        )  # number, sum, squares, squared errors

    def update(self, probabilities: Tensor, targets: Tensor, valid: Tensor | None = None) -> None:
        """
        Adds answers.

        :param probabilities: (N, C, ...), or values
        :param targets: by the convention of loss.py
        """
        if self.name == "F1":
            probabilities = probabilities.double().clamp(1e-9, 1 - 1e-9)
            logits = probabilities.log() if self.multi_class else probabilities.logit()
            self.scores.update(logits, targets, valid)
            return
        truth, answers = (
            targets.double().movedim(1, 0).flatten(1),
            probabilities.double().movedim(1, 0).flatten(1),
        )
        number = torch.full((len(truth),), truth.shape[1])
        self.moments += torch.stack(
            [number, truth.sum(1), (truth**2).sum(1), ((truth - answers) ** 2).sum(1)]
        )

    def per_class(self) -> list[float]:
        """Of each class or value; NaN of a class that is neither there nor found."""
        if self.name == "F1":
            return f1_per_class(self.scores.confusion).tolist()
        number, total, squares, errors = self.moments
        return (1 - errors / (squares - total**2 / number).clamp(min=1e-12)).tolist()

    def mean(self) -> float:
        """Over all that are not NaN."""
        return torch.tensor(self.per_class()).nanmean().item()


# ------------------------------------------------------------------------------------------------------------ baselines


def rows_of(
    inputs: Tensor, targets: Tensor, valid: Tensor | None, task: str
) -> tuple[np.ndarray, np.ndarray]:
    """
    What a model without context learns from: pixels where the target has pixels, otherwise mean and deviation of each
    channel, or the input itself where it is a list of numbers.

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
    Fits two models that a trained one has to beat: gradient-boosted trees that see a pixel at a time, and what does not
    look at all: always the commonest class, or the mean.

    :return: functions of (rows, features) that give (rows,) class numbers or (rows, K)
    """
    from sklearn.dummy import DummyClassifier, DummyRegressor
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    options: dict[str, Any] = {"max_iter": 50, "early_stopping": False, "random_state": 0}
    columns = targets.reshape(len(targets), -1)
    by_trees, trivial = [], []
    for column in columns.T:
        is_values = task == "values"
        keep = np.ones(len(column), bool) if is_values else column != ignore_index
        dummy = DummyRegressor() if is_values else DummyClassifier(strategy="most_frequent")
        trivial.append(dummy.fit(features[keep], column[keep]))
        if len(np.unique(column[keep])) < 2:
            by_trees.append(trivial[-1])
        else:
            trees = (
                HistGradientBoostingRegressor(**options)
                if is_values
                else HistGradientBoostingClassifier(**options)
            )
            by_trees.append(trees.fit(features[keep], column[keep]))

    def predict(models: list[Any], rows: np.ndarray) -> np.ndarray:
        answers = np.stack([model.predict(rows) for model in models], 1)
        return answers[:, 0] if task == "multi-class" else answers

    return lambda rows: predict(by_trees, rows), lambda rows: predict(trivial, rows)


# -------------------------------------------------------------------------------------------------------------- changes


def with_noise(inputs: Tensor, deviations: float) -> Tensor:
    """Adds noise, in units of each channel's deviation where images are normalized."""
    return inputs + deviations * torch.randn(inputs.shape, generator=torch.Generator().manual_seed(0))


def with_gain(inputs: Tensor, factor: float, contract: DataContract) -> Tensor:
    """Multiplies the values as they stand in the files."""
    return _in_files(inputs, lambda values: values * factor, contract)


def without_channel(inputs: Tensor, channel: int, contract: DataContract) -> Tensor:
    """Has 0 in a channel of the files."""
    changed = inputs.clone()
    changed[:, channel] = _in_files(inputs, torch.zeros_like, contract)[:, channel]
    return changed


def _in_files(inputs: Tensor, change: Callable[[Tensor], Tensor], contract: DataContract) -> Tensor:
    if not contract.mean:
        return change(inputs)
    shape = (1, -1, *[1] * (inputs.ndim - 2))
    mean, std = (
        torch.tensor(values, dtype=torch.float32).reshape(shape) for values in (contract.mean, contract.std)
    )
    return (change(inputs * std + mean) - mean) / std


def as_in_files(inputs: Tensor, contract: DataContract) -> Tensor:
    """What inputs were before they were scaled and normalized, as float32."""
    if contract.mean:
        shape = (1, -1, *[1] * (inputs.ndim - 2))
        inputs = inputs * torch.tensor(contract.std).reshape(shape) + torch.tensor(contract.mean).reshape(
            shape
        )
    return inputs / contract.scale


def read_export(file: Path) -> Callable[[Tensor], Tensor]:
    """The model in an exported file, read as those will who get it."""
    if file.suffix == ".pt2":
        return torch.export.load(file).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"image": images.numpy()})[0])


# --------------------------------------------------------------------------------------------------------------- memory


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors made while it is on, and the most that were alive at once; any device."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.peak = 0, 0
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {_storage(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if (
                isinstance(value, Tensor)
                and _storage(value) not in known
                and _storage(value) not in self._alive
            ):
                self._enter(value.untyped_storage())
        return result

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._alive[key] = weakref.finalize(storage, self._leave, key, size)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

    def _leave(self, key: int, size: int) -> None:
        self.bytes -= size
        self._alive.pop(key, None)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


# --------------------------------------------------------------------------------------------------------------- tables


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """
    A table of at most WIDTH columns. Numbers stand right; columns that do not fit are left out, with a note.

    :param rows: the first column is text, numbers get three digits
    """
    cells = [[_short(name, 12) if place else name for place, name in enumerate(header)]]
    cells += [[_cell(value) for value in row] for row in rows]
    widths = [max(len(row[place]) for row in cells) for place in range(len(header))]
    widths[0] = min(widths[0], 40)
    number = max(n for n in range(1, len(widths) + 1) if n == 1 or sum(widths[:n]) + 2 * (n - 1) <= WIDTH)
    lines = [title]
    for row in cells:
        first, *others = row[:number]
        numbers = [text.rjust(width) for text, width in zip(others, widths[1:], strict=False)]
        lines.append("  ".join([_short(first, 40).ljust(widths[0]), *numbers]).rstrip())
    if number < len(header):
        lines.append(
            f"({len(header) - number} more columns do not fit: {_short(', '.join(header[number:]), 60)})"
        )
    return "\n".join(lines)


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "-" if np.isnan(value) else f"{value:.3f}"
    return "-" if value is None else str(value)
