"""Pictures: samples with target and prediction, and one picture that sums up a run."""

import functools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.contract import PALETTE as _PALETTE
from ..data.contract import DataContract
from ..storage.files import safe_name, write_atomic
from ..storage.journal import Event
from ..training.modules import call_model, evaluation_mode
from ..training.targets import main_output
from .curves import draw_history
from .listener import Listener, Result, RunView

PALETTE = np.array(_PALETTE, np.uint8)
_SIZE = slice(0, 512)  # more of an image is not shown


class Picture(Listener):
    """Draws picture.png at the end of a run, and keeps the images that the user logs, in images/."""

    def step(self, run: RunView, event: Event) -> None:
        """Save the images logged since the last event."""
        for name, image in run.pending.images.items():
            file = run.log_dir / "images" / f"{safe_name(name)}-{event['step']:08d}.png"
            picture = Image.fromarray(np.asarray(image))
            write_atomic(file, functools.partial(picture.save, format="png"))

    epoch = step

    def finished(self, run: RunView, result: Result) -> None:
        """Draw learning curves, the confusion matrix, and the worst, the best and some other test samples."""
        panels, confusion = [], None
        loader, evaluation, data = run.setup.loaders.test, result.evaluation, run.setup.data.test
        if loader is not None and evaluation is not None:
            order: Any = loader.batch_sampler
            losses, seed = evaluation.sample_losses, run.config["SEED"]
            panels = panels_of(run, data, choose_samples(data, order.order, losses, seed))
            confusion = None if evaluation.scores is None else evaluation.scores.confusion
        file, class_names = run.log_dir / "picture.png", run.setup.contract.class_names
        save_picture(file, run.name, result.history, run.monitored, confusion, panels, class_names)


@dataclass
class Panel:
    """One sample: image, target, prediction and, of classes, errors (white), each (H, W, 3) in uint8."""

    name: str
    pictures: list[np.ndarray]

    def row(self, gap: int = 4) -> np.ndarray:
        """Return the pictures side by side."""
        white = np.full_like(self.pictures[0][:, :gap], 255)
        return np.hstack([part for picture in self.pictures for part in (picture, white)][:-1])


@torch.no_grad()
def panels_of(run: RunView, dataset: Any, samples: dict[int, str] | None = None) -> list[Panel]:
    """
    Return pictures of samples; none where these are not images with masks.

    :param dataset: such as run.setup.data.test; None gives none
    :param samples: titles by index; None: four samples, spread over the dataset
    """
    setup, panels = run.setup, []
    contract, model = setup.contract, setup.eval_model
    if dataset is None:
        return []
    if samples is None:
        name_of = getattr(dataset, "sample_name", str)
        spread = np.unique(np.linspace(0, len(dataset) - 1, 4).round().astype(int)).tolist()
        samples = {index: str(name_of(index)) for index in spread}
    with evaluation_mode(model):
        for index, title in samples.items():
            inputs, targets = setup.loaders.collate([dataset[index]], [title])
            if not (isinstance(inputs, Tensor) and isinstance(targets, Tensor)):
                return []
            if inputs.ndim != 4 or targets.ndim < 3:
                return []
            with setup.autocast():
                logits = main_output(call_model(model, setup.context.move(inputs))).float().cpu()
            if not inputs.shape[-2:] == targets.shape[-2:] == logits.shape[-2:]:
                return []
            image = inputs[0].numpy()
            if len(contract.mean):  # as it was, so that colors are natural
                image = image * np.reshape(contract.std, (-1, 1, 1)) + np.reshape(contract.mean, (-1, 1, 1))
            pictures = [_to_rgb(image, contract.channel_names)]
            pictures += _compare(targets[0], logits, contract, setup.config["IGNORE_INDEX"])
            panels.append(Panel(title, [picture[_SIZE, _SIZE] for picture in pictures]))
    return panels


def choose_samples(dataset: Any, order: list[int], losses: list[float], seed: int) -> dict[int, str]:
    """
    Choose two samples each with the highest and the lowest loss, and at random; return their titles by index.

    :param order: the samples' indices
    :param losses: of each; NaN where no pixel counts
    """
    name_of = getattr(dataset, "sample_name", str)
    loss_of = {index: loss for index, loss in zip(order, losses, strict=True) if not math.isnan(loss)}
    ranked = sorted(loss_of, key=lambda index: (loss_of[index], index))
    kinds = {"worst": ranked[::-1][:2], "best": ranked[:2]}
    rest = sorted(set(ranked[:2] + ranked[-2:]) ^ set(ranked))
    kinds["random"] = np.random.default_rng(seed).permutation(rest)[:2].tolist()
    return {
        index: f"{kind}: {name_of(index)}, loss {loss_of[index]:.3f}"
        for kind, some in kinds.items()
        for index in some
    }


def _compare(target: Tensor, logits: Tensor, contract: DataContract, ignore_index: int) -> list[np.ndarray]:
    """Return target, prediction and, of classes, errors as pictures."""
    outputs = contract.probabilities(logits)
    if contract.task == "values":
        shown = target[-1].nan_to_num(float(target[-1].nanmean().nan_to_num()))  # NaN counts nowhere
        low, high = float(shown.min()), float(shown.max())
        grays = [(one.numpy() - low) / max(high - low, 1e-6) for one in (shown, outputs[0, -1])]
        return [np.repeat((one.clip(0, 1) * 255).astype(np.uint8)[..., None], 3, -1) for one in grays]
    predicted, truth = contract.classes(outputs)[0].numpy(), target.numpy()
    if contract.task == "multi-label":  # overlapping labels as one number: 0 for none, else 1 + the last one
        numbers = np.arange(1, outputs.shape[1] + 1)[:, None, None]
        truth = truth[-len(numbers) :]
        ignored = (truth == ignore_index).any(0)
        truth = np.where(ignored, ignore_index, ((truth == 1) * numbers).max(0))
        predicted = ((predicted.reshape(len(numbers), *truth.shape) == 1) * numbers).max(0)
    elif truth.ndim > 2:
        truth = truth[-1]  # the first channel is a usability mask
    colored = [PALETTE[classes.astype(np.int64) % len(PALETTE)] for classes in (truth, predicted)]
    colored[0][truth == ignore_index] = 0
    wrong = (truth != predicted) & (truth != ignore_index)
    return [*colored, np.repeat((wrong * np.uint8(255))[..., None], 3, -1)]


def _to_rgb(image: np.ndarray, channel_names: Any) -> np.ndarray:
    """Show the channels called red, green and blue (or B04, B03, B02) of (C, H, W), or the first three."""
    names = [str(name).lower() for name in channel_names]
    for wanted in (("red", "green", "blue"), ("b04", "b03", "b02"), ("b4", "b3", "b2")):
        if all(name in names for name in wanted):
            image = image[[names.index(name) for name in wanted]]
            break
    else:
        image = image[:3] if len(image) >= 3 else image[:1].repeat(3, 0)
    low, high = np.percentile(image, (1, 96))
    stretched = np.clip((image - low) / max(high - low, 1e-6), 0, 1) ** 0.8
    return np.moveaxis((stretched * 255).astype(np.uint8), 0, -1)


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
    from matplotlib.patches import Patch

    figure = Figure(figsize=(12, 3.6 + 3.0 * len(panels)), layout="constrained")
    figure.suptitle(title)
    grid = figure.add_gridspec(1 + len(panels), 3, height_ratios=[3.4] + [3.0] * len(panels))
    axes = [figure.add_subplot(grid[0, column]) for column in range(3)]
    draw_history(axes[0], axes[1], history, monitor)
    _draw_confusion(axes[2], confusion, class_names)
    for row, panel in enumerate(panels, 1):
        _draw_panel(figure.add_subplot(grid[row, :]), panel)
    if panels and class_names:
        colors = [PALETTE[number % len(PALETTE)] / 255 for number in range(len(class_names))]
        named = zip(colors, class_names, strict=True)
        handles = [Patch(facecolor=color, edgecolor="gray", label=name) for color, name in named]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(8, len(handles)))
    save = functools.partial(figure.savefig, dpi=90, format="png")
    if isinstance(path, str | os.PathLike):
        write_atomic(path, save)
    else:
        save(path)


def _draw_panel(axis: Any, panel: Panel) -> None:
    """Draw pictures side by side, as one: axes of their own for each would take most of the time."""
    width = panel.pictures[0].shape[1]
    gap = max(1, width // 24)
    axis.imshow(panel.row(gap), interpolation="nearest")
    style = {"textcoords": "offset points", "ha": "center", "va": "bottom", "fontsize": 9}
    titles = (panel.name, "target", "prediction", "errors")
    for number, title in enumerate(titles[: len(panel.pictures)]):
        axis.annotate(title, (number * (width + gap) + width / 2, -0.5), (0, 3), **style)
    axis.set_axis_off()


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
