"""
Contains what TensorBoard shows of a run: numbers, images, precision-recall curves, and runs by their config.

It is a view of the journal: what a full disk did not take is written from there once there is space again.
"""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..utils.logging.journal import Event
from ..utils.scores import Scores, counts_by_threshold

_NUM_THRESHOLDS = 128  # more take the browser long


class Board:
    """TensorBoard's file of a run, open for writing."""

    def __init__(self, folder: Path, say: Callable[[str], None], purge_step: int | None = None) -> None:
        """
        :param say: gets a sentence if it cannot be written
        :param purge_step: what older files of the folder have from this step on does not count
        """
        self._folder, self._say = str(folder), say
        self._last_step = self._safe_step = (
            purge_step or 1
        ) - 1  # what was written, and what is surely on the disk
        self._writer: Any = self._open(purge_step)

    def write_event(self, event: Event) -> None:
        """Writes the numbers of a step or an epoch."""
        self.write_scalars(scalars_of(event), event["step"])

    def write_scalars(self, scalars: dict[str, float], step: int) -> None:
        """Writes numbers by their tags."""
        for tag, value in scalars.items():
            self._write(step, "add_scalar", tag, value, step)

    def write_image(self, tag: str, image: Any, step: int) -> None:
        """Writes an image (H, W, 3) in uint8."""
        self._write(step, "add_image", tag, image, step, dataformats="HWC")

    def write_pr_curves(self, scores: Scores, class_names: Sequence[str], step: int) -> None:
        """Writes the precision-recall curve of each class for the PR CURVES tab."""
        histograms = scores.histograms.unflatten(-1, (_NUM_THRESHOLDS, -1)).sum(-1)
        names = class_names if len(class_names) == len(histograms) else range(len(histograms))
        for name, one in zip(names, histograms, strict=True):
            counts = counts_by_threshold(one)
            hits = counts["true_positives"].double()
            precision = hits / (hits + counts["false_positives"]).clamp(min=1)
            recall = hits / (hits + counts["false_negatives"]).clamp(min=1)
            kinds = ("true_positives", "false_positives", "true_negatives", "false_negatives")
            curve = [column.numpy() for column in (*(counts[kind] for kind in kinds), precision, recall)]
            self._write(step, "add_pr_curve_raw", f"test/{name}", *curve, step, _NUM_THRESHOLDS)

    def write_hparams(self, config: dict[str, Any], metrics: dict[str, float], step: int) -> None:
        """
        Writes config and results for the HPARAMS tab, in which runs can be sorted and compared.

        :param config: dotted keys, as flatten gives them
        :param metrics: by the tags of the scalars that were written
        """
        # Not by the writer's add_hparams, which makes a run of its own for them.
        from torch.utils.tensorboard.summary import hparams

        kinds = (bool, int, float, str)
        plain = {key: value if isinstance(value, kinds) else str(value) for key, value in config.items()}
        for summary in hparams(plain, metrics):
            self._write(step, "add_summary", summary)

    def sync(self, read_events: Callable[[], Iterable[Event]]) -> None:
        """
        Hands over to the disk what was written; what could not be is written again.

        :param read_events: gives the journal
        """
        if self._writer is None:
            self._writer = self._open(self._safe_step + 1)
            events = list(read_events()) if self._writer is not None else []
            for event in events:
                if event["event"] in ("step", "epoch") and event["step"] > self._safe_step:
                    self.write_event(event)
        self._write(self._last_step, "flush")
        if self._writer is not None:
            self._safe_step = self._last_step

    def close(self) -> None:
        """Ends writing."""
        self._write(self._last_step, "close")

    def _open(self, purge_step: int | None) -> Any:
        from torch.utils.tensorboard import SummaryWriter  # imported where used: it takes a second

        try:
            return SummaryWriter(self._folder, purge_step=purge_step)
        except OSError as error:
            self._say_why(error)
            return None

    def _write(self, step: int, method: str, *args: Any, **options: Any) -> None:
        if self._writer is None:
            return  # until sync opens another file
        try:
            owner = self._writer.file_writer if method == "add_summary" else self._writer
            getattr(owner, method)(*args, **options)
            self._last_step = max(step, self._last_step)
        except OSError as error:
            self._say_why(error)
            broken, self._writer = self._writer, None
            with contextlib.suppress(OSError):
                broken.close()

    def _say_why(self, error: OSError) -> None:
        self._say(
            f"{self._folder} cannot be written ({error.strerror or error}): what is missing there is written later."
        )


def scalars_of(event: Event) -> dict[str, float]:
    """The numbers of a step's or epoch's event by TensorBoard's tags."""
    if event["event"] == "step":
        return {f"train/{name}": event[name] for name in ("loss", "learning_rate")}
    validation = {
        key.replace(".", "/"): value for key, value in event.items() if key.startswith("validation.")
    }
    return {"train/epoch_loss": event["train.loss"]} | validation
