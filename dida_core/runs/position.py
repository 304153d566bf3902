"""Where a training stands in its epochs, batches and steps, and what comes next."""

from collections.abc import Iterator
from typing import Any

from ..report.listener import State
from ..training.accumulated import is_averaged
from ..training.determinism import seed_step
from ..training.distributed import rank
from ..training.setup import Setup


class Batches:
    """The rest of the current epoch, each time it is iterated over: moved to the device, dropout reseeded."""

    def __init__(self, setup: Setup, state: State) -> None:
        self._setup, self._state = setup, state

    def __len__(self) -> int:
        return self._setup.loaders.batches.num_batches - self._state.batch

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        order, context, seed = self._setup.loaders.batches, self._setup.context, self._setup.config["SEED"]
        order.epoch, order.first_batch = self._state.epoch, self._state.batch
        if order.first_batch == order.num_batches:
            return  # the epoch's evaluation was interrupted, and is all that is left of it
        first = order.epoch * order.num_batches + order.first_batch
        for number, batch in enumerate(self._setup.loaders.train, first):
            inputs, targets = context.move_pair(batch)
            seed_step(seed, number, context.device, rank())
            yield inputs, targets


class Position:
    """Where a training stands in its epochs and steps."""

    def __init__(self, setup: Setup, state: State) -> None:
        self.setup, self.config, self.state = setup, setup.config, state

    @property
    def monitored(self) -> str:
        """Name of the result that selects the best weights."""
        goal = self.config["MONITOR"].split()[1]
        metric = self.config["METRICS"].get(goal)
        return goal if metric is None or not is_averaged(metric) else f"{goal}_sample_mean"

    @property
    def epochs_left(self) -> int:
        """Number of epochs to be trained or evaluated; 0 also after an early stop."""
        return 0 if self.state.stopped else max(0, self.config["EPOCHS"] - self.state.epoch)

    @property
    def batch_index(self) -> int:
        """Index of the next batch, counted over all epochs."""
        return self.state.epoch * self.setup.loaders.batches.num_batches + self.state.batch

    @property
    def awaits_evaluation(self) -> bool:
        """Whether all batches of the epoch are done, but not its evaluation. Runs resume there, too."""
        return self.state.batch == self.setup.loaders.batches.num_batches

    @property
    def is_update_step(self) -> bool:
        """Whether an optimizer step follows on the batch that has just ended (gradient accumulation)."""
        return self.state.batch % self.config["ACCUMULATE"] == 0 or self.awaits_evaluation

    @property
    def loss_weight(self) -> float:
        """
        Weight of the next batch's loss in its optimizer step.

        It is 1 / ACCUMULATE, or more at the epoch's end, where there are fewer batches. Of several processes,
        whose gradients are averaged, each weighs its loss by its fraction of the samples.
        """
        batches, batch, accumulate = self.setup.loaders.batches, self.state.batch, self.config["ACCUMULATE"]
        fraction = batches.own_size(batch) * batches.num_processes / batches.size(batch)
        return fraction / min(accumulate, batches.num_batches - (batch - batch % accumulate))
