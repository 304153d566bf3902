"""What people read while a run trains: a bar, a line for each epoch, and the results at the end."""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
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


def hides_bar() -> bool | None:
    """Return tqdm's disable: a bar is for terminals (None) and notebooks (False), not for files."""
    return False if "ipykernel" in sys.modules else None


@contextlib.contextmanager
def signs_of_life(describe: Callable[[], str], seconds: float = 30) -> Iterator[None]:
    """Print a line every half minute where no bar is shown."""
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(seconds):
            say(describe())

    thread = threading.Thread(target=work, daemon=True)
    if hides_bar() is None and not sys.stderr.isatty():
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if thread.is_alive():
            thread.join()


def next_steps(run: RunView) -> dict[str, str]:
    """Return what to do with a run: commands, or Python where datasets or folders are those of a caller."""
    name, epochs, experiment = run.name, 2 * run.config["EPOCHS"], run.setup.experiment
    script = Path(getattr(sys.modules["__main__"], "__file__", "")).name
    own = experiment.project.module(".config.config").global_config
    is_own = all(own[key] == experiment.global_config[key] for key in ("LOG_DIR", "WEIGHT_DIR"))
    found, logs = relative_path(sys.executable), relative_path(run.log_dir.parent)
    python = "python" if found == sys.executable else found  # of the project's own environment
    steps = {"look": f"{python} -m tensorboard.main --logdir {logs}"}
    if is_own and script in ("train.py", "hyperparameter.py"):
        steps["predict"] = f"{python} run_prediction.py {name} -i IMAGES -o DIR"
        steps["resume"] = f"{python} train.py --resume {name}"
        return steps | {"prolong": f"{steps['resume']} EPOCHS={epochs}"}
    if "ipykernel" in sys.modules:
        steps["look"] = f"%load_ext tensorboard\n  %tensorboard --logdir {logs}"
    folders, resume = "" if is_own else ", global_config", f'{{"RESUME": "{name}"}}'
    call = "from dida_core.prediction import predict_run\n  predict_run"
    steps["predict"] = f'{call}("{name}", "IMAGES", "DIR"{folders})'
    steps["resume"] = f"train(train_dataset, test_dataset, config | {resume}{folders})"
    return steps | {"prolong": steps["resume"].replace('"}', f'", "EPOCHS": {epochs}}}')}


class ProgressBar(Listener):
    """The terminal's view of a run. Without a terminal there is no bar, only the lines."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._latest: dict[str, str] = {}  # the monitored result

    def started(self, run: RunView) -> None:
        """Print what is trained, and show the bar."""
        setup, batches = run.setup, run.setup.loaders.batches
        number = sum(parameter.numel() for parameter in setup.model.parameters())
        splits = {"train": setup.data.train, "validate": setup.data.validation, "test": setup.data.test}
        sizes = ", ".join(f"{name} {len(split)}" for name, split in splits.items() if split is not None)
        model, context = type(setup.model).__name__, setup.context
        about = f"{model}, {number:,} parameters, on {context.device}, {context.precision}"
        say(f"{run.name}: {about}; samples: {sizes}")
        self._samples = min(batches.num_samples, batches.num_batches * batches.batch_size)
        total, done = run.config["EPOCHS"] * self._samples, run.state.epoch * self._samples
        looks = {"unit": " images", "disable": hides_bar(), "leave": False, "dynamic_ncols": True}
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
        steps = next_steps(run)
        say(f"Next:\n  {steps['look']}\n  {steps['predict']}\n  {steps['prolong']}")

    def ended(self, run: RunView, status: str, error: BaseException) -> None:
        """Take the bar away."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
