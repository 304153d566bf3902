"""Pictures: samples with target and prediction, and one picture that sums up a run."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from ..utils.data.contract import PALETTE as _PALETTE
from ..utils.data.contract import DataContract
from .device import DeviceContext
from .listener import Listener, Result, RunView
from .modules import evaluation_mode

PALETTE = np.array(_PALETTE, np.uint8)
IGNORED_COLOR = (0, 0, 0)
_MAX_PIXELS = 512


class Picture(Listener):
    """Draws picture.png at the end of a run."""

    def finished(self, run: RunView, result: Result) -> None:
        """Draw learning curves, the confusion matrix, and the worst, the best and some other test samples."""
        panels, confusion = [], None
        loader, evaluation = run.setup.loaders.test, result.evaluation
        if loader is not None and evaluation is not None:
            order: Any = loader.batch_sampler
            losses, seed = evaluation.sample_losses, run.config["SEED"]
            panels = panels_of(run, choose_samples(run.setup.data.test, order.order, losses, seed))
            confusion = None if evaluation.scores is None else evaluation.scores.confusion
        file, class_names = run.log_dir / "picture.png", run.setup.contract.class_names
        save_picture(file, run.name, result.history, run.monitored, confusion, panels, class_names)


@dataclass
class Panel:
    """One sample as pictures (H, W, 3) uint8."""

    name: str
    image: np.ndarray
    target: np.ndarray
    prediction: np.ndarray
    errors: np.ndarray | None  # white where the prediction is wrong

    def row(self, gap: int = 4, with_errors: bool = False) -> np.ndarray:
        """Return image, target and prediction side by side; if asked for, also the errors."""
        white = np.full_like(self.image, 255)
        pictures = [self.image, self.target, self.prediction]
        if with_errors:
            pictures.append(white if self.errors is None else self.errors)
        return np.hstack([part for picture in pictures for part in (picture, white[:, :gap])][:-1])


def panels_of(run: RunView, samples: dict[int, str] | None = None) -> list[Panel]:
    """Return pictures of a run's test samples, as make_panels does."""
    setup = run.setup
    if setup.data.test is None:
        return []
    about = setup.contract, setup.context, setup.config["IGNORE_INDEX"]
    return make_panels(setup.eval_model, setup.data.test, *about, samples)


@torch.no_grad()
def make_panels(
    model: nn.Module,
    dataset: Any,
    contract: DataContract,
    context: DeviceContext,
    ignore_index: int,
    samples: dict[int, str] | None = None,
) -> list[Panel]:
    """
    Return pictures of samples; none where a dataset does not hold images with masks.

    :param samples: titles by index; None: four samples, spread over the dataset
    """
    panels: list[Panel] = []
    name_of = getattr(dataset, "sample_name", str)
    if samples is None:
        spread = np.unique(np.linspace(0, len(dataset) - 1, 4).round().astype(int)).tolist()
        samples = {index: str(name_of(index)) for index in spread}
    with evaluation_mode(model):
        for index, title in samples.items():
            inputs, targets = default_collate([dataset[index]])
            if inputs.ndim != 4 or targets.ndim < 3:
                return []
            with context.autocast():
                logits = model(context.move(inputs))
            if not inputs.shape[-2:] == targets.shape[-2:] == logits.shape[-2:]:
                return []
            target = targets[0]
            if target.ndim > 2 and contract.task == "multi-class":
                target = target[-1]  # the first channel is a usability mask
            panels.append(_panel(title, inputs[0], target, logits.float().cpu(), contract, ignore_index))
    return panels


def choose_samples(
    dataset: Any, order: list[int], losses: list[float], seed: int, number: int = 2
) -> dict[int, str]:
    """
    Choose the samples with the highest and the lowest loss, and some others at random, for make_panels.

    :param order: the samples' indices
    :param losses: of each; NaN where no pixel counts
    :param number: how many of each kind
    """
    name_of = getattr(dataset, "sample_name", str)
    loss_of = {index: loss for index, loss in zip(order, losses, strict=True) if not math.isnan(loss)}
    ranked = sorted(loss_of, key=lambda index: (loss_of[index], index))
    kinds = {"worst": ranked[::-1][:number], "best": ranked[:number]}
    rest = sorted(set(ranked) - {index for kind in kinds.values() for index in kind})
    kinds["random"] = np.random.default_rng(seed).permutation(rest)[:number].tolist()
    return {
        index: f"{kind}: {name_of(index)}, loss {loss_of[index]:.3f}"
        for kind, some in kinds.items()
        for index in some
    }


def _panel(
    name: str, inputs: Tensor, target: Tensor, logits: Tensor, contract: DataContract, ignore_index: int
) -> Panel:
    cut = (slice(0, _MAX_PIXELS), slice(0, _MAX_PIXELS))
    image = inputs.numpy()
    if len(contract.mean):  # as it was, so that colors are natural
        image = image * np.asarray(contract.std)[:, None, None] + np.asarray(contract.mean)[:, None, None]
    image = to_rgb(image, contract.channel_names)[cut]
    outputs = contract.probabilities(logits)
    if contract.task == "values":
        low, high = float(target[-1].min()), float(target[-1].max())
        truth, predicted = (_gray(values[-1].numpy(), low, high)[cut] for values in (target, outputs[0]))
        return Panel(name, image, truth, predicted, errors=None)
    predicted = contract.classes(outputs)[0].numpy()
    truth = target.numpy()
    if contract.task == "multi-label":
        num_labels = outputs.shape[1]
        truth = truth[-num_labels:]
        ignored = (truth == ignore_index).any(0)
        truth = np.where(ignored, ignore_index, _highest_label(truth == 1))
        predicted = _highest_label(predicted.reshape(num_labels, *truth.shape) == 1)
    wrong = (truth != predicted) & (truth != ignore_index)
    errors = np.repeat((wrong * np.uint8(255))[..., None], 3, -1)
    return Panel(name, image, to_colors(truth, ignore_index)[cut], to_colors(predicted)[cut], errors[cut])


def _highest_label(labels: np.ndarray) -> np.ndarray:
    """Return overlapping labels (C, H, W) as one number: 0 for none, else 1 + the last label."""
    numbers = np.arange(1, len(labels) + 1)[:, None, None]
    return (labels * numbers).max(0)


def to_rgb(image: np.ndarray, channel_names: Any = ()) -> np.ndarray:
    """
    Return an image of any number of channels as something to look at.

    :param image: (C, H, W)
    :return: (H, W, 3) uint8: the channels called red, green and blue (or B04, B03, B02), or the first three
    """
    names = [str(name).lower() for name in channel_names]
    for wanted in (("red", "green", "blue"), ("b04", "b03", "b02"), ("b4", "b3", "b2")):
        if all(name in names for name in wanted):
            image = image[[names.index(name) for name in wanted]]
            break
    else:
        image = image[:3] if len(image) >= 3 else image[:1].repeat(3, 0)
    low, high = (np.percentile(image, percent) for percent in (1, 96))
    stretched = np.clip((image - low) / max(high - low, 1e-6), 0, 1) ** 0.8
    return np.moveaxis((stretched * 255).astype(np.uint8), 0, -1)


def to_colors(classes: np.ndarray, ignore_index: int | None = None) -> np.ndarray:
    """Return class numbers (H, W) as colors (H, W, 3) uint8."""
    colors = PALETTE[classes.astype(np.int64) % len(PALETTE)]
    if ignore_index is not None:
        colors[classes == ignore_index] = IGNORED_COLOR
    return colors


def _gray(values: np.ndarray, low: float, high: float) -> np.ndarray:
    scaled = np.clip((values - low) / max(high - low, 1e-6), 0, 1) * 255
    return np.repeat(scaled.astype(np.uint8)[..., None], 3, -1)


def save_picture(
    path: str | os.PathLike | BinaryIO,
    title: str,
    history: list[dict[str, Any]],
    monitor: str,
    confusion: Tensor | None,
    panels: list[Panel],
    class_names: Sequence[str] = (),
) -> None:
    """
    Draw learning curves, the confusion matrix of the test set, and samples of it, into one PNG.

    :param history: the events of the epochs
    :param monitor: name of the result that selects
    :param confusion: (C, C), or (C, 2, 2)
    """
    # Imported where used; without pyplot, so that no window system is touched.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6 + 3.0 * len(panels)), layout="constrained")
    figure.suptitle(title)
    grid = figure.add_gridspec(1 + len(panels), 3, height_ratios=[3.4] + [3.0] * len(panels))
    axes = [figure.add_subplot(grid[0, column]) for column in range(3)]
    keys = sorted({key for event in history for key in event if key.startswith("validation.")})
    losses = {"train.loss": "training"} | ({"validation.loss": "validation"} if keys else {})
    _draw_curves(axes[0], "loss", history, losses)
    keys = [key for key in keys if key != "validation.loss"]
    keys = [key for key in keys if key.count(".") == 1] or keys  # without those of single classes
    names = {key: key.partition(".")[2] for key in keys}
    _draw_curves(axes[1], "validation", history, names, bold=f"validation.{monitor}")
    _draw_confusion(axes[2], confusion, class_names)
    for row, panel in enumerate(panels, 1):
        _draw_panel(figure.add_subplot(grid[row, :]), panel)
    if panels and class_names:
        _draw_legend(figure, class_names)
    figure.savefig(path, dpi=90, format="png")


def _draw_curves(
    axis: Any, title: str, history: list[dict[str, Any]], names: dict[str, str], bold: str = ""
) -> None:
    """Draw values by epoch; names are the curves' labels by key."""
    from matplotlib.ticker import MaxNLocator

    epochs = [event["epoch"] for event in history]
    for key, name in names.items():
        values = [event.get(key, np.nan) for event in history]
        axis.plot(epochs, values, label=name, marker=".", linewidth=2.5 if key == bold else 1.5)
    axis.set(title=title, xlabel="epoch")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if names:
        axis.legend()


def _draw_panel(axis: Any, panel: Panel) -> None:
    """Draw four pictures side by side, as one: axes of their own for each would take most of the time."""
    width = panel.image.shape[1]
    gap = max(1, width // 24)
    axis.imshow(panel.row(gap, with_errors=True), interpolation="nearest")
    titles = (panel.name, "target", "prediction", "" if panel.errors is None else "errors")
    style = {"textcoords": "offset points", "ha": "center", "va": "bottom", "fontsize": 9}
    for number, title in enumerate(titles):
        axis.annotate(title, (number * (width + gap) + width / 2, -0.5), (0, 3), **style)
    axis.set_axis_off()


def _draw_legend(figure: Any, class_names: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=PALETTE[number % len(PALETTE)] / 255, edgecolor="gray", label=name)
        for number, name in enumerate(class_names)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(8, len(handles)))


def _draw_confusion(axis: Any, confusion: Tensor | None, class_names: Sequence[str]) -> None:
    if confusion is None:
        axis.set_axis_off()
        return
    matrix = (confusion.sum(0) if confusion.ndim == 3 else confusion).double()
    names = ["no", "yes"] if confusion.ndim == 3 else [str(number) for number in range(len(matrix))]
    if confusion.ndim == 2 and len(class_names) == len(matrix):
        names = list(class_names)
    fractions = (matrix / matrix.sum(1, keepdim=True).clamp(min=1)).numpy()
    axis.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    axis.set(title="test set: fraction of each class", xlabel="prediction", ylabel="target")
    axis.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    if len(names) <= 12:
        for (row, column), fraction in np.ndenumerate(fractions):
            color = "white" if fraction > 0.5 else "black"
            axis.text(column, row, f"{fraction:.2f}", ha="center", va="center", fontsize=8, color=color)
