"""TensorBoard: numbers, images, precision-recall curves, and runs by their config."""

import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config.tree import flatten
from ..storage.journal import Event, read_journal
from ..training.scores import Scores, counts_by_threshold
from .listener import Listener, Result, RunView
from .pictures import panels_of

_NUM_THRESHOLDS = 128  # more take the browser long


class TensorBoard(Listener):
    """A view of a run for TensorBoard. A resumed run shows no step twice, and nothing that it lost."""

    def __init__(self) -> None:
        self._writer: Any = None

    def started(self, run: RunView) -> None:
        """Open a file; of a resumed run, what older files have after its last checkpoint does not count."""
        from torch.utils.tensorboard import SummaryWriter  # imported where used: it takes a second

        folder, state = run.log_dir / "tensorboard", run.state
        if not folder.exists():
            self._writer = SummaryWriter(str(folder))
            return
        events = read_journal(run.log_dir / "journal.jsonl")
        is_tested = any(event["event"] == "test" and event["step"] == state.step for event in events)
        # An epoch's or a test's results have the step of the last checkpoint: write that step again.
        first = state.step if run.awaits_evaluation or is_tested else state.step + 1
        _wait_for_a_later_name(folder)
        self._writer = SummaryWriter(str(folder), purge_step=first)
        for event in events:
            if event["event"] == "step" and first <= event["step"] <= state.step:
                self.step(run, event)
        if is_tested and state.epoch in run.history:
            self.epoch(run, run.history[state.epoch])

    def step(self, run: RunView, event: Event) -> None:
        """Write the numbers of a step."""
        self._write(run, {f"train/{name}": event[name] for name in ("loss", "learning_rate")}, event)

    def epoch(self, run: RunView, event: Event) -> None:
        """Write the numbers of an epoch, and pictures of validation samples: the test set is for the end."""
        scalars = {key: value for key, value in event.items() if key.startswith("validation.")}
        self._write(run, {"train/epoch_loss": event["train.loss"]} | scalars, event)
        for panel in panels_of(run, run.setup.data.validation):
            self._writer.add_image(f"validation/{panel.name}", panel.row(), event["step"], dataformats="HWC")
        self._writer.flush()

    def finished(self, run: RunView, result: Result) -> None:
        """Write the test's results, and the config for the HPARAMS tab."""
        step = result.state.step
        scores = None if result.evaluation is None else result.evaluation.scores
        if scores is not None:
            self._write_pr_curves(scores, run.setup.contract.class_names, step)
        metrics = {name.replace(".", "/"): value for name, value in result.metrics.items()}
        for name, value in metrics.items():
            if name.startswith(("test/", "validation/temperature", "validation/threshold")):
                self._writer.add_scalar(name, value, step)
        # For the HPARAMS tab. The writer's add_hparams would make a run of its own for it.
        from torch.utils.tensorboard.summary import hparams

        config, kinds = flatten(run.captured), (bool, int, float, str)
        plain = {key: value if isinstance(value, kinds) else str(value) for key, value in config.items()}
        for summary in hparams(plain, metrics):
            self._writer.file_writer.add_summary(summary)
        self._writer.close()

    def ended(self, run: RunView, status: str, error: BaseException) -> None:
        """End writing."""
        if self._writer is not None:
            self._writer.close()

    def _write(self, run: RunView, scalars: dict[str, float], event: Event) -> None:
        scalars = scalars | {key: value for key, value in event.items() if key.startswith("log.")}
        for name, value in scalars.items():
            self._writer.add_scalar(name.replace(".", "/"), value, event["step"])
        for name, image in run.pending.images.items():
            self._writer.add_image(f"log/{name}", image, event["step"], dataformats="HWC")
        self._writer.flush()  # so that a killed process has shown all steps up to its last checkpoint

    def _write_pr_curves(self, scores: Scores, class_names: Sequence[str], step: int) -> None:
        histograms = scores.histograms.unflatten(-1, (_NUM_THRESHOLDS, -1)).sum(-1)
        names = class_names if len(class_names) == len(histograms) else range(len(histograms))
        for name, histogram in zip(names, histograms, strict=True):
            counts = counts_by_threshold(histogram)
            tp = counts["true_positives"].double()
            precision = tp / (tp + counts["false_positives"]).clamp(min=1)
            recall = tp / (tp + counts["false_negatives"]).clamp(min=1)
            kinds = ("true_positives", "false_positives", "true_negatives", "false_negatives")
            curve = [column.numpy() for column in (*(counts[kind] for kind in kinds), precision, recall)]
            self._writer.add_pr_curve_raw(f"test/{name}", *curve, step, _NUM_THRESHOLDS)


def _wait_for_a_later_name(folder: Path) -> None:
    """TensorBoard reads files in the order of their names, which hold second, host and process."""
    newest = max((file.name for file in folder.iterdir()), default="")
    process = f"{socket.gethostname()}.{os.getpid()}"
    for _ in range(20):
        if newest < f"events.out.tfevents.{int(time.time()):010d}.{process}":
            return
        time.sleep(0.1)
