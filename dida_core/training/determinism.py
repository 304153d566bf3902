"""
Randomness as a pure function, not a state.

The order of the data follows from (seed, epoch), a sample's augmentation from (seed, epoch, index), dropout
and all else within a step from (seed, batch index). Nothing of it has to be saved, so a run resumes exactly
after any interruption, with any number of workers, and the same in every routine.
"""

import contextlib
import functools
import multiprocessing
import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ..data.dataset import Stream, TrainingData
from ..errors import ConfigError, UserError
from .signals import blocked_signals, ignore_signals

_ORDER, _SAMPLE, _STEP = range(3)


def mix(*numbers: int) -> int:
    """Return a 63-bit number that depends on all of these (splitmix64, doi.org/10.1145/2660193.2660195)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


def seed_step(seed: int, batch_index: int, device: torch.device, rank: int = 0) -> None:
    """
    Seed what a training step draws, such as dropout. Call it between fetching the batch and the forward pass.

    :param batch_index: counted over all epochs
    """
    number = mix(_STEP, seed, batch_index, rank)
    _seed_cpu(number)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(number)
    elif device.type == "mps":
        torch.mps.manual_seed(number)


def seed_sample(seed: int, epoch: int, index: int, *place: int) -> None:
    """Seed what a sample's crop and augmentation draw, from PyTorch, numpy or Python."""
    _seed_cpu(mix(_SAMPLE, seed, epoch, index, *place))


def _seed_cpu(number: int) -> None:
    torch.default_generator.manual_seed(number)  # torch.manual_seed visits every device: 100 times slower
    np.random.seed(number % 2**32)
    random.seed(number)


class Samples(Dataset):
    """
    A dataset whose samples are the same each time they are asked for by (epoch, index).

    A sampler may draw one several times, and its place in the epoch is a third number then.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed
        self._stream: Iterator[Any] = iter(())
        self._next = 0  # place in the stream

    def __getitem__(self, key: tuple[int, ...]) -> Any:
        epoch, index, *place = key
        if isinstance(self.dataset, Stream):
            return self._read_on(index)
        seed_sample(self.seed, epoch, index, *place)
        return self.dataset[index]

    def _read_on(self, place: int) -> Any:
        """Return what stands at a place of a stream: what comes before is read, too, and left out."""
        if self._next == 0 or place < self._next:
            self._stream, self._next = iter(self.dataset), 0
        sample = None
        while self._next <= place:
            seed_sample(self.seed, 0, self._next)
            sample, self._next = next(self._stream), self._next + 1
        return sample


class SamplerOrder:
    """The order that a sampler draws in an epoch, as a function of (seed, epoch)."""

    def __init__(self, sampler: Any, seed: int, num_samples: int) -> None:
        """:raises ConfigError: if it draws from a state of its own, or samples that there are not"""
        self.sampler, self.seed = sampler, seed
        first = self(0)
        if first != self(0):
            remedy = "let it draw from torch, numpy or random, or by set_epoch"
            raise ConfigError(f"DATA_LOADER_CONFIG.sampler draws from a state of its own: {remedy}.")
        if not set(first) <= set(range(num_samples)):
            about = f"DATA_LOADER_CONFIG.sampler draws sample {max(first)} of {num_samples}"
            remedy = "VALIDATION_FRACTION takes some, so give a validation set, or a function of the dataset"
            raise ConfigError(f"{about}: {remedy}.")
        self.num_drawn = len(first)

    def __call__(self, epoch: int) -> list[int]:
        """Return the samples of an epoch."""
        number = mix(_ORDER, self.seed, epoch)
        _seed_cpu(number)
        if hasattr(self.sampler, "generator"):
            self.sampler.generator = torch.Generator().manual_seed(number)
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)
        return [int(index) for index in self.sampler]


class TrainingBatches(Sampler):
    """
    The batches of an epoch as lists of (epoch, index). Each process gets its part of every batch.

    The main process draws from it, so that persistent workers need not know the epoch.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        shuffle: bool,
        drop_last: bool,
        seed: int,
        rank: int = 0,
        num_processes: int = 1,
        draw: Callable[[int], Sequence[int]] | None = None,
    ) -> None:
        """:param draw: returns the samples of an epoch in their order; None: all, by shuffle"""
        self.num_samples, self.batch_size, self.shuffle, self.seed = num_samples, batch_size, shuffle, seed
        self.draw = draw
        self.rank, self.num_processes = rank, num_processes
        self.num_batches = num_samples // batch_size if drop_last else -(-num_samples // batch_size)
        self.epoch, self.first_batch = 0, 0

    def __len__(self) -> int:
        return self.num_batches - self.first_batch

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        order, size = self.order(self.epoch), self.batch_size
        keys: Sequence[tuple[int, ...]] = [(self.epoch, index) for index in order]
        if self.draw is not None:
            keys = [(*key, place) for place, key in enumerate(keys)]
        for batch in range(self.first_batch, self.num_batches):
            some = keys[batch * size : (batch + 1) * size]
            # DDP all-reduces in every process: one without samples runs a dummy sample with loss weight 0.
            yield list(some[self._own(batch)] or some[:1])

    def order(self, epoch: int) -> Sequence[int]:
        """Return the samples of an epoch in their order."""
        if self.draw is not None:
            order = self.draw(epoch)
            if len(order) != self.num_samples:
                numbers = f"{self.num_samples} samples in epoch 1, and {len(order)} in epoch {epoch + 1}"
                raise ConfigError(f"DATA_LOADER_CONFIG.sampler draws {numbers}: draw as many in each.")
            return order
        if not self.shuffle:
            return range(self.num_samples)
        return np.random.default_rng([_ORDER, self.seed, epoch]).permutation(self.num_samples).tolist()

    def indices(self, epoch: int, batch: int) -> list[int]:
        """Return the samples of one batch, of all processes."""
        return list(self.order(epoch)[batch * self.batch_size : (batch + 1) * self.batch_size])

    def size(self, batch: int) -> int:
        """Return the number of samples of a batch, of all processes."""
        return min(self.batch_size, self.num_samples - batch * self.batch_size)

    def own_size(self, batch: int) -> int:
        """Return the number of samples of a batch that this process computes."""
        own = self._own(batch)
        return own.stop - own.start

    def _own(self, batch: int) -> slice:
        size, number = self.size(batch), self.num_processes
        return slice(-(-self.rank * size // number), -(-(self.rank + 1) * size // number))


class EvaluationBatches(Sampler):
    """
    The batches of an evaluation as lists of (0, index): every sample once, samples of one shape together.

    Of several processes, each gets every so many batches.
    """

    def __init__(
        self,
        dataset: TrainingData,
        batch_size: int,
        max_pixels: int | None,
        rank: int = 0,
        num_processes: int = 1,
    ) -> None:
        """:param max_pixels: of a batch that has more than one sample"""
        batches: list[list[tuple[int, int]]] = []
        by_shape: dict[Any, list[int]] = {}
        for index in range(len(dataset)):
            by_shape.setdefault(dataset.sample_shape(index), []).append(index)
        for shape, indices in by_shape.items():
            size = batch_size
            if shape is not None and max_pixels is not None:
                size = min(batch_size, max(1, max_pixels // (shape[0] * shape[1])))
            keys = [(0, index) for index in indices]
            batches += [keys[start : start + size] for start in range(0, len(keys), size)]
        parts = [batches[part::num_processes] for part in range(num_processes)]
        self.order = [index for part in parts for batch in part for _, index in batch]  # of all processes
        self.batches = parts[rank]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.batches)


class Loader(DataLoader):
    """A DataLoader whose workers ignore signals, and end when it is closed."""

    def __init__(
        self, dataset: Any, worker_init_fn: Callable[[int], None] | None = None, **options: Any
    ) -> None:
        super().__init__(dataset, worker_init_fn=functools.partial(_init_worker, worker_init_fn), **options)
        self._latest: Any = None

    def __iter__(self) -> Any:
        with blocked_signals():  # which would end a worker that is still starting, and the training with it
            self._latest = super().__iter__()
        return map(_raised, self._latest)

    def close(self) -> None:
        """End the workers: they ignore SIGTERM, so that an exiting process would wait for them forever."""
        if hasattr(self._latest, "_shutdown_workers"):
            self._latest._shutdown_workers()
        self._latest = self._iterator = None


def _raised(batch: Any) -> Any:
    """Raise what a worker has returned instead of a batch: raised there, it would arrive as a traceback."""
    if isinstance(batch, UserError):
        raise batch
    return batch


def _init_worker(users: Callable[[int], None] | None, number: int) -> None:
    def end_with_main_process() -> None:  # as PyTorch does, but also if it is killed while this one starts
        if (main_process := multiprocessing.parent_process()) is not None:
            main_process.join()
            os._exit(1)

    ignore_signals()
    threading.Thread(target=end_with_main_process, daemon=True).start()
    if users is not None:
        users(number)


@contextlib.contextmanager
def deterministic_algorithms(device: torch.device) -> Iterator[None]:
    """Have a GPU compute the same result each time, where it can. CPUs do so anyway."""
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read with the first matrix product
    memory: Any = torch.utils.deterministic  # type: ignore[attr-defined]
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    was_warning = torch.is_deterministic_algorithms_warn_only_enabled()
    was_filling, was_benchmark = memory.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        memory.fill_uninitialized_memory, torch.backends.cudnn.benchmark = False, False
        yield
    finally:
        torch.use_deterministic_algorithms(was_deterministic, warn_only=was_warning)
        memory.fill_uninitialized_memory, torch.backends.cudnn.benchmark = was_filling, was_benchmark
