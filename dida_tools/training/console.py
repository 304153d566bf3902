"""What people read while a run trains: a bar, a line for each epoch, and the results at the end."""

import contextlib
import os
import sys
from typing import Any

from tqdm import tqdm

from ..utils.files import relative_path
from ..utils.logging.journal import Event
from .distributed import is_main
from .listener import Listener, Result, RunView


def say(text: str) -> None:
    """
    Print a line without tearing the bar. Of several processes the main one prints.

    A line that cannot be printed, as on a full disk, is left out.
    """
    if is_main():
        with contextlib.suppress(OSError):
            tqdm.write(text)


class ProgressBar(Listener):
    """The terminal's view of a run. Without a terminal there is no bar, only the lines."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._latest: float | None = None  # the monitored result

    def started(self, run: RunView) -> None:
        """Print what is trained, and show the bar."""
        model, data, context, batches = (
            run.setup.model,
            run.setup.data,
            run.setup.context,
            run.setup.loaders.batches,
        )
        million = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        splits = {"train": data.train, "validate": data.validation, "test": data.test}
        sizes = ", ".join(f"{name} {len(split)}" for name, split in splits.items() if split is not None)
        say(
            f"{run.name}: {type(model).__name__}, {million:.2f} million parameters, on {context.device}, "
            f"{context.precision}; samples: {sizes}"
        )
        samples = min(batches.num_samples, batches.num_batches * batches.batch_size)
        self._bar = tqdm(
            total=run.config["EPOCHS"] * samples,
            initial=run.state.epoch * samples + run.state.num_samples,
            unit=" images",
            disable=None,
            leave=False,
            dynamic_ncols=True,
        )
        self._samples = samples

    def step(self, run: RunView, event: Event) -> None:
        """Move the bar."""
        state = run.state
        values = {"epoch": f"{event['epoch']}/{run.config['EPOCHS']}"}
        values["loss"] = f"{state.loss_sum / max(1, state.num_samples):.4f}"
        if self._latest is not None:
            values[run.monitored] = f"{self._latest:.4f}"
        self._bar.set_postfix(values, refresh=False)
        self._bar.update(state.epoch * self._samples + state.num_samples - self._bar.n)

    def epoch(self, run: RunView, event: Event) -> None:
        """Print a line about an epoch."""
        results = {key[11:]: value for key, value in event.items() if key.startswith("validation.")}
        self._latest = results.get(run.monitored)
        parts = [f"epoch {event['epoch']:>3}/{run.config['EPOCHS']}", f"train loss {event['train.loss']:.4f}"]
        for name, value in results.items():
            if "." not in name:  # without those of single classes
                parts.append(f"{'validation ' if name == 'loss' else ''}{name} {value:.4f}")
        if event["best"] and results:
            parts.append("best")
        say("  ".join(parts))
        if run.state.stopped:
            say(f"No better {run.monitored} in {run.config['PATIENCE']} epochs: training stops here.")

    def finished(self, run: RunView, result: Result) -> None:
        """Print the results, where everything lies, and what to do next."""
        self._close()
        metrics, state = result.metrics, result.state
        of_test = {
            key[5:]: value
            for key, value in metrics.items()
            if key.startswith("test.") and key.count(".") == 1
        }
        ignored = of_test.pop("ignored_pixels", 0)
        trust = {
            "average precision": of_test.pop("average_precision", None),
            "calibration error": of_test.pop("ece", None),
        }
        trust |= {name: metrics.get(f"validation.{name}") for name in ("temperature", "threshold")}
        found = ", ".join(f"{name} {value:.4f}" for name, value in of_test.items()) or "(there is none)"
        confidence = ", ".join(f"{name} {value:.4f}" for name, value in trust.items() if value is not None)
        python = (
            relative_path(sys.executable)
            if not os.path.relpath(sys.executable).startswith("..")
            else "python"
        )
        say("")
        epochs, best, last = state.epoch, state.best_epoch, result.weights["last"].name
        say(f"{result.name}: trained {epochs} epochs in {state.seconds:.0f} s; best epoch {best}")
        say(f"  test set   {found}" + (f"; {ignored:,} pixels are ignored" if ignored else ""))
        if confidence:
            say(f"  confidence {confidence}")
        say(f"  weights    {relative_path(result.weights['best'])}  (and {last}, to resume from)")
        say(f"  log        {relative_path(result.log_dir)}")
        say(f"  tracker    {relative_path(result.log_dir.parent / run.config['LOGFILE'])}")
        if result.picture:
            say(f"  picture    {relative_path(result.picture)}")
        say("Next:")
        say(f"  {python} -m tensorboard.main --logdir {relative_path(result.log_dir.parent)}")
        say(f"  {python} run_prediction.py {result.name} -i IMAGES -o DIR")
        say(f"  {python} train.py --resume {result.name} EPOCHS={2 * run.config['EPOCHS']}")

    def ended(self, run: RunView, status: str, error: BaseException) -> None:
        """Take the bar away."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
