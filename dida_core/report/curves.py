"""Learning curves."""

import io
from typing import Any

from PIL import Image


def plot_history(title: str, history: list[dict[str, Any]]) -> Image.Image:
    """Return the learning curves of a run as a picture, which a notebook shows."""
    from matplotlib.figure import Figure

    figure, stream = Figure(figsize=(9, 3.6), layout="constrained"), io.BytesIO()
    figure.suptitle(title)
    draw_history(figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2), history)
    figure.savefig(stream, dpi=90, format="png")
    return Image.open(stream)


def draw_history(losses: Any, results: Any, history: list[dict[str, Any]], monitor: str = "") -> None:
    """Draw the losses and the results of the validation set by epoch."""
    keys = sorted({key for event in history for key in event if key.startswith("validation.")})
    names = {"train.loss": "training"} | ({"validation.loss": "validation"} if keys else {})
    _draw_curves(losses, "loss", history, names)
    keys = [key for key in keys if key != "validation.loss"]
    keys = [key for key in keys if key.count(".") == 1] or keys  # without those of single classes
    names = {key: key.partition(".")[2] for key in keys}
    _draw_curves(results, "validation", history, names, bold=f"validation.{monitor}")


def _draw_curves(
    axis: Any, title: str, history: list[dict[str, Any]], names: dict[str, str], bold: str = ""
) -> None:
    """Draw values by epoch; names are the curves' labels by key."""
    epochs = [event["epoch"] for event in history]
    for key, name in names.items():
        values = [event.get(key, float("nan")) for event in history]
        axis.plot(epochs, values, label=name, marker=".", linewidth=2.5 if key == bold else 1.5)
    axis.set(title=title, xlabel="epoch")
    axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    if names:
        axis.legend()
