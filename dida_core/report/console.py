"""What people read while a run trains: a bar, a line for each epoch, and the results at the end."""

import contextlib
import sys
from typing import Any

from tqdm import tqdm

from ..errors import printable
from ..storage.files import relative_path
from ..storage.journal import Event
from ..training.distributed import is_main
from .listener import Listener, Result, RunView


def say(text: str) -> None:
    """
    Print a line without tearing the bar, and controls as text. Of several processes the main one prints.

    A line that cannot be printed, as on a full disk, is left out.
    """
    if is_main():
        with contextlib.suppress(OSError):
            tqdm.write(printable(text))


class ProgressBar(Listener):
    """The terminal's view of a run. Without a terminal there is no bar, only the lines."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._latest: dict[str, str] = {}  # the monitored result

    def started(self, run: RunView) -> None:
        """Print what is trained, and show the bar."""
        setup, batches = run.setup, run.setup.loaders.batches
        million = sum(parameter.numel() for parameter in setup.model.parameters()) / 1e6
        splits = {"train": setup.data.train, "validate": setup.data.validation, "test": setup.data.test}
        sizes = ", ".join(f"{name} {len(split)}" for name, split in splits.items() if split is not None)
        model, context = type(setup.model).__name__, setup.context
        about = f"{model}, {million:.2f} million parameters, on {context.device}, {context.precision}"
        say(f"{run.name}: {about}; samples: {sizes}")
        self._samples = min(batches.num_samples, batches.num_batches * batches.batch_size)
        total, done = run.config["EPOCHS"] * self._samples, run.state.epoch * self._samples
        looks = {"unit": " images", "disable": None, "leave": False, "dynamic_ncols": True}
        self._bar = tqdm(total=total, initial=done + run.state.num_samples, **looks)

    def step(self, run: RunView, event: Event) -> None:
        """Move the bar."""
        state = run.state
        loss = state.loss_sum / max(1, state.num_samples)
        values = {"epoch": f"{event['epoch']}/{run.config['EPOCHS']}", "loss": f"{loss:.4f}"}
        self._bar.set_postfix(values | self._latest, refresh=False)
        self._bar.update(state.epoch * self._samples + state.num_samples - self._bar.n)

    def epoch(self, run: RunView, event: Event) -> None:
        """Print a line about an epoch."""
        results = {key[11:]: value for key, value in event.items() if key.startswith("validation.")}
        if run.monitored in results:
            self._latest = {run.monitored: f"{results[run.monitored]:.4f}"}
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
        metrics, epochs, logs = result.metrics, result.state.epoch, result.log_dir.parent
        of_test = {key[5:]: value for key, value in metrics.items() if key.startswith("test.")}
        of_test = {key: value for key, value in of_test.items() if "." not in key}
        ignored = of_test.pop("ignored_pixels", 0)
        trust = {"average precision": of_test.pop("average_precision", None)}
        trust |= {"calibration error": of_test.pop("ece", None)}
        trust |= {name: metrics.get(f"validation.{name}") for name in ("temperature", "threshold")}
        found, confidence = (
            ", ".join(f"{name} {value:.4f}" for name, value in values.items() if value is not None)
            for values in (of_test, trust)
        )
        own = relative_path(sys.executable)
        python = "python" if own == sys.executable else own  # of the project's own environment
        say(f"\n{result.name}: trained {epochs} epochs in {result.state.seconds:.0f} s; best epoch "
            f"{result.state.best_epoch}")  # fmt: skip
        pixels = f"; {ignored:,} pixels are ignored" if ignored else ""
        say(f"  test set   {found or '(there is none)'}{pixels}")
        if confidence:
            say(f"  confidence {confidence}")
        last = result.weights["last"].name
        say(f"  weights    {relative_path(result.weights['best'])}  (and {last}, to resume from)")
        say(f"  log        {relative_path(result.log_dir)}")
        say(f"  tracker    {relative_path(logs / run.config['LOGFILE'])}")
        if result.picture:
            say(f"  picture    {relative_path(result.picture)}")
        say(f"Next:\n  {python} -m tensorboard.main --logdir {relative_path(logs)}")
        say(f"  {python} run_prediction.py {result.name} -i IMAGES -o DIR")
        say(f"  {python} train.py --resume {result.name} EPOCHS={2 * run.config['EPOCHS']}")

    def ended(self, run: RunView, status: str, error: BaseException) -> None:
        """Take the bar away."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
