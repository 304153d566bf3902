"""Contains the mails about a run: that it has started, and how it ended."""

import io
import time
import traceback
from typing import Any

from ..utils.notify import SMTPNotifier
from ..utils.redact import Redactor
from .pictures import save_picture
from .progress import say
from .setup import Setup

_MAX_TRACEBACK_CHARACTERS = 3000


class Notification:
    """Mails to the receivers that NOTIFY names; what cannot be sent is said, and the run goes on."""

    def __init__(self, setup: Setup, redactor: Redactor) -> None:
        """
        Reaches for no server yet.

        :raises UserError: if the environment does not say by which server to send
        """
        self._setup = setup
        self._notifier = SMTPNotifier(setup.config["NOTIFY"], redact=redactor.text, say=say)
        self._started = time.monotonic()

    def started(self, run: Any) -> None:
        """The run begins, or goes on."""
        setup, state = self._setup, run.state
        place = f"on {setup.context.device}, {setup.context.precision}"
        since = f", after epoch {state.epoch}, step {state.step}" if state.step else ""
        text = f"{run.name} trains for {setup.config['EPOCHS']} epochs {place}{since}.\nLog: {run.log_dir}"
        self._notifier.notify(text, subject=f"started: {run.name}")

    def finished(self, run: Any, result: Any) -> None:
        """The run has ended as it should."""
        metrics = {name: value for name, value in result.metrics.items() if name.count(".") == 1}
        results = [
            f"{name} {value}" if isinstance(value, int) else f"{name} {value:.4f}"
            for name, value in metrics.items()
        ]
        lines = [
            f"{run.name}: {result.state.epoch} epochs in {self._duration()}; best epoch {result.state.best_epoch}",
            *results,
            f"Weights: {result.weights['best']}",
            f"Log: {result.log_dir}",
        ]
        self._notifier.notify("\n".join(lines), subject=f"finished: {run.name}", picture=result.picture)

    def ended(self, run: Any, status: str, error: BaseException) -> None:
        """The run has ended otherwise: failed, preempted, interrupted."""
        state = run.state
        lines = [
            f"{run.name}: {status} after epoch {state.epoch}, step {state.step}, {self._duration()}.",
            str(error),
        ]
        if status == "failed":
            lines += ["", "".join(traceback.format_exception(error))[-_MAX_TRACEBACK_CHARACTERS:]]
        lines.append(f"To go on: python train.py --resume {run.name}")
        self._notifier.notify("\n".join(lines), subject=f"{status}: {run.name}", picture=self._curves(run))

    def close(self) -> None:
        """Waits a while for what is not sent yet."""
        self._notifier.close()

    def _duration(self) -> str:
        minutes, seconds = divmod(round(time.monotonic() - self._started), 60)
        return (
            f"{minutes // 60} h {minutes % 60} min {seconds} s"
            if minutes >= 60
            else f"{minutes} min {seconds} s"
        )

    def _curves(self, run: Any) -> bytes | None:
        history = [run.history[epoch] for epoch in sorted(run.history)]
        if not history:
            return None
        picture = io.BytesIO()
        try:
            save_picture(picture, run.name, history, run.monitored, None, [])
        except Exception as error:  # whatever it is, the mail matters more
            say(f"The mail goes without learning curves: {error}")
        return picture.getvalue() or None
