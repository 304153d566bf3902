"""Listeners: what is told of a run while it trains, such as to the tracker, TensorBoard, bar and mail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..storage.files import relative_path

if TYPE_CHECKING:  # a listener that needs no torch, such as the tracker, imports none
    from PIL.Image import Image

    from ..storage.journal import Event
    from ..training.evaluation import Evaluation
    from ..training.setup import Setup


@dataclass
class State:
    """Where a training stands."""

    epoch: int = 0  # epochs done
    batch: int = 0  # batches done of the current epoch
    step: int = 0  # optimizer steps done
    loss_sum: float = 0.0  # over the samples of the current epoch
    num_samples: int = 0
    best: float | None = None
    best_epoch: int | None = None  # counted from 1
    best_digest: str | None = None  # of its weights
    bad_epochs: int = 0  # since the best one
    stopped: bool = False  # early
    seconds: float = 0.0  # of training, over all interruptions


@dataclass(repr=False)
class Result:
    """What a training leaves."""

    name: str
    log_dir: Path
    weight_dir: Path
    weights: dict[str, Path]  # "best" and "last"
    digest: str  # of the last weights; equal for runs that are equal bit for bit
    metrics: dict[str, float]  # "validation.f1" of the best epoch, "test.f1", ...
    history: list[dict[str, Any]]  # one dict an epoch
    state: State = field(default_factory=State)
    identical: bool | None = None  # with RERUN_OF: whether the weights are those of that run
    evaluation: Evaluation | None = None  # of the test set: confusion matrix, loss of each sample

    def __repr__(self) -> str:
        """Return the results in a few lines; metrics and history have all of them."""
        best, seconds = self.state.best_epoch, self.state.seconds
        lines = {"": f"{self.state.epoch} epochs in {seconds:.0f} s, the best is {best}"}
        for split in ("validation", "test"):
            named = {
                key[len(split) + 1 :]: value for key, value in self.metrics.items() if key.startswith(split)
            }
            lines[split] = "  ".join(f"{key} {value:.4g}" for key, value in named.items() if "." not in key)
        lines |= {name: relative_path(path) for name, path in self.weights.items()}
        lines |= {"log": relative_path(self.log_dir), "curves": "plot()"}
        return "\n".join([self.name, *(f"  {name:<11} {text}" for name, text in lines.items() if text)])

    def plot(self) -> Image:
        """Return the learning curves as a picture, which a notebook shows; its save() writes a file."""
        from .curves import plot_history  # imported where used: it imports what draws

        return plot_history(self.name, self.history)

    @property
    def picture(self) -> Path | None:
        """The picture that sums up the run, if it was drawn."""
        file = self.log_dir / "picture.png"
        return file if file.is_file() else None


@dataclass
class Pending:
    """What has happened in a run since its last event."""

    losses: list[float] = field(default_factory=list)  # of the batches of an optimizer step
    learning_rate: float = 0.0
    values: dict[str, float] = field(default_factory=dict)  # that the user has logged
    images: dict[str, Any] = field(default_factory=dict)  # likewise, (H, W, 3) uint8


class RunView(Protocol):
    """A run as its listeners see it."""

    name: str
    log_dir: Path
    weight_dir: Path
    setup: Setup
    config: dict[str, Any]
    state: State
    history: dict[int, Event]  # the events of the epochs, by epoch
    pending: Pending
    captured: dict[str, Any]  # the config as plain data, without secrets
    redact: Callable[[str], str]  # takes secrets out of a text

    @property
    def monitored(self) -> str:
        """Name of the result that selects the best weights."""
        ...

    @property
    def awaits_evaluation(self) -> bool:
        """Whether all batches of an epoch are done, but not its evaluation."""
        ...


class Listener:
    """
    Base of all listeners: override what you need. Of several processes, the main one alone calls them.

    An ordinary exception in a listener is reported and never ends a training.
    """

    def check(self, setup: Setup) -> None:
        """Raise UserError if this listener cannot work. Nothing is written yet, and nothing will be."""

    def started(self, run: RunView) -> None:
        """Act on a run that starts or resumes; run.state tells where."""

    def step(self, run: RunView, event: Event) -> None:
        """Act on an optimizer step: step, epoch (from 1), loss, learning_rate, "log.NAME" of your own."""

    def epoch(self, run: RunView, event: Event) -> None:
        """Act on the end of an epoch: epoch (from 1), step, best (so far), train.loss, validation.NAME."""

    def finished(self, run: RunView, result: Result) -> None:
        """Act on a run that is trained and tested. The model holds the best weights."""

    def ended(self, run: RunView, status: str, error: BaseException) -> None:
        """Act on an end without a result; its status is failed, preempted, interrupted or pruned."""
