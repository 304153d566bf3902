"""Contains what people read while a run trains: a bar, a line for each epoch, and what was reached at the end."""

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from ..utils.path import shown
from .setup import Setup

if TYPE_CHECKING:
    from .run import Result, State


class Progress:
    """The terminal's part of a run. Without a terminal there is no bar, only the lines."""

    def __init__(self, name: str, setup: Setup, state: "State", monitored: str) -> None:
        self._config, self._monitored = setup.config, monitored
        self._latest: float | None = None
        model = setup.model
        million = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        sets = {
            "train": setup.data.train,
            "validate": setup.data.validation,
            "test": setup.data.test,
        }
        sizes = ", ".join(f"{part} {len(dataset)}" for part, dataset in sets.items() if dataset is not None)
        place = f"{setup.context.device}, {setup.context.precision}"
        say(f"{name}: {type(model).__name__}, {million:.2f} million parameters, on {place}; samples: {sizes}")
        batches = setup.loaders.batches
        samples = min(batches.num_samples, batches.num_batches * batches.batch_size)
        total, done = self._config["EPOCHS"] * samples, state.epoch * samples + state.num_samples
        self._bar = tqdm(
            total=total, initial=done, unit=" images", disable=None, leave=False, dynamic_ncols=True
        )

    def batch(self, state: "State", num_samples: int) -> None:
        """Moves the bar."""
        self._bar.update(num_samples)
        values = {"loss": f"{state.loss_sum / max(1, state.num_samples):.4f}"}
        if self._latest is not None:
            values[self._monitored] = f"{self._latest:.4f}"
        self._bar.set_postfix(
            {"epoch": f"{state.epoch + 1}/{self._config['EPOCHS']}"} | values, refresh=False
        )

    def epoch(self, state: "State", train_loss: float, results: dict[str, float], improved: bool) -> None:
        """A line about an epoch."""
        self._latest = results.get(self._monitored)
        main_results = {name: value for name, value in results.items() if "." not in name}
        parts = [f"epoch {state.epoch:>3}/{self._config['EPOCHS']}", f"train loss {train_loss:.4f}"]
        parts += [
            f"{'validation ' if name == 'loss' else ''}{name} {value:.4f}"
            for name, value in main_results.items()
        ]
        say("  ".join(parts) + ("  best" if improved and results else ""))
        if state.stopped:
            say(f"No better {self._monitored} in {self._config['PATIENCE']} epochs: training stops here.")

    def end(self, result: "Result", seconds: float, log_file: Path) -> None:
        """What was reached, where it lies, and what to do next."""
        metrics = dict(result.metrics)
        ignored = metrics.pop("test.ignored_pixels", 0)
        probabilities = {"average precision": "test.average_precision", "calibration error": "test.ece"}
        probabilities |= {one: f"validation.{one}" for one in ("temperature", "threshold")}
        sure = [f"{name} {metrics.pop(key):.4f}" for name, key in probabilities.items() if key in metrics]
        results = {
            key: one for key, one in metrics.items() if key.startswith("test.") and key.count(".") == 1
        }
        reached = ", ".join(f"{key[5:]} {value:.4f}" for key, value in results.items()) or "(there is none)"
        reached += f"; {ignored:,} pixels are ignored" if ignored else ""
        python = shown(sys.executable) if not os.path.relpath(sys.executable).startswith("..") else "python"
        epochs, best = result.state.epoch, result.state.best_epoch
        lines = [
            "",
            f"{result.name}: trained {epochs} epochs in {seconds:.0f} s; best epoch {best}",
            f"  test set   {reached}",
            *([f"  certainty  {', '.join(sure)}"] if sure else []),
            f"  weights    {shown(result.weights['best'])}  (and {result.weights['last'].name}, to go on from)",
            f"  log        {shown(result.log_dir)}",
            f"  tracker    {shown(log_file)}",
            f"  picture    {shown(result.picture)}" if result.picture else "",
            "Next:",
            f"  {python} -m tensorboard.main --logdir {shown(result.log_dir.parent)}",
            f"  {python} run_prediction.py {result.name} -i IMAGES -o DIR",
            f"  {python} train.py --resume {result.name} EPOCHS={2 * self._config['EPOCHS']}",
        ]
        for line in lines:
            say(line)

    def close(self) -> None:
        """Takes the bar away."""
        self._bar.close()


def say(text: str) -> None:
    """Prints a line without tearing the bar; where that fails, as on a full disk, training goes on without it."""
    with contextlib.suppress(OSError):
        tqdm.write(text)
