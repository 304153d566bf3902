"""
Contains randomness as a pure function: the order of the data follows from (seed, epoch), a sample's augmentation from
(seed, epoch, index), dropout and everything else within a step from (seed, number of the batch).

Nothing of it has to be saved, so a run goes on exactly after any interruption, with any number of workers, and the same
in every routine.
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

from ..utils.signals import blocked_signals, ignore_signals

_ORDER, _SAMPLE, _STEP = range(3)


def mix(*numbers: int) -> int:
    """A 63-bit number that depends on all of these (splitmix64, https://doi.org/10.1145/2660193.2660195)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


def seed_step(seed: int, batch_number: int, device: torch.device, rank: int = 0) -> None:
    """
    Seeds what a training step draws, such as dropout. Call it after fetching the batch and before the forward pass.

    :param batch_number: counted over all epochs
    """
    number = mix(_STEP, seed, batch_number, rank)
    _seed_cpu(number)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(number)
    elif device.type == "mps":
        torch.mps.manual_seed(number)


def seed_sample(seed: int, epoch: int, index: int) -> None:
    """Seeds what a sample's crop and augmentation draw, from PyTorch, numpy or Python."""
    _seed_cpu(mix(_SAMPLE, seed, epoch, index))


def _seed_cpu(number: int) -> None:
    torch.default_generator.manual_seed(
        number
    )  # torch.manual_seed also visits every device: 100 times slower
    np.random.seed(number % 2**32)
    random.seed(number)


class Samples(Dataset):
    """A dataset whose samples are asked for by (epoch, index), and then always the same."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        seed_sample(self.seed, epoch, index)
        return self.dataset[index]


class TrainingBatches(Sampler):
    """
    The batches of an epoch as lists of (epoch, index); of several processes, each gets its part of every batch.

    The main process draws from it, so workers that live on from epoch to epoch need not be told of the epoch.
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
    ) -> None:
        self.num_samples, self.batch_size, self.shuffle, self.seed = num_samples, batch_size, shuffle, seed
        self.rank, self.num_processes = rank, num_processes
        self.num_batches = num_samples // batch_size if drop_last else -(-num_samples // batch_size)
        self.epoch, self.first_batch = 0, 0

    def __len__(self) -> int:
        return self.num_batches - self.first_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = self.order(self.epoch)
        for batch in range(self.first_batch, self.num_batches):
            whole = self._whole(order, batch)
            # A process without a sample computes the first one, whose loss counts nothing: all must take part.
            yield [(self.epoch, index) for index in whole[self._own(batch)] or whole[:1]]

    def order(self, epoch: int) -> Sequence[int]:
        """All samples in the order of an epoch."""
        if not self.shuffle:
            return range(self.num_samples)
        return np.random.default_rng([_ORDER, self.seed, epoch]).permutation(self.num_samples).tolist()

    def indices(self, epoch: int, batch: int) -> list[int]:
        """The samples of one batch, of all processes."""
        return self._whole(self.order(epoch), batch)

    def size(self, batch: int) -> int:
        """Number of samples of one batch of an epoch, of all processes."""
        return min(self.batch_size, self.num_samples - batch * self.batch_size)

    def own_size(self, batch: int) -> int:
        """Number of samples that this process computes of it."""
        part = self._own(batch)
        return part.stop - part.start

    def _own(self, batch: int) -> slice:
        size, number = self.size(batch), self.num_processes
        return slice(-(-self.rank * size // number), -(-(self.rank + 1) * size // number))

    def _whole(self, order: Sequence[int], batch: int) -> list[int]:
        return list(order[batch * self.batch_size : (batch + 1) * self.batch_size])


class EvaluationBatches(Sampler):
    """
    Batches for evaluation as lists of (0, index): every sample once, samples of one shape together, and no batch with
    more pixels than max_pixels, if it has more than one sample. Of several processes, each gets every so many batches.
    """

    def __init__(
        self, dataset: Any, batch_size: int, max_pixels: int | None, rank: int = 0, num_processes: int = 1
    ) -> None:
        self.batches: list[list[tuple[int, int]]] = []
        by_shape: dict[Any, list[int]] = {}
        for index in range(len(dataset)):
            by_shape.setdefault(dataset.sample_shape(index), []).append(index)
        for shape, indices in by_shape.items():
            size = batch_size
            if shape is not None and max_pixels is not None:
                size = min(batch_size, max(1, max_pixels // (shape[0] * shape[1])))
            cut = (indices[start : start + size] for start in range(0, len(indices), size))
            self.batches += [[(0, index) for index in part] for part in cut]
        parts = [self.batches[part::num_processes] for part in range(num_processes)]
        self.order = [
            index for part in parts for batch in part for _, index in batch
        ]  # of all processes, one by one
        self.batches = parts[rank]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.batches)


class Loader(DataLoader):
    """A DataLoader whose workers take no signals, and end when they are told to."""

    def __init__(
        self, dataset: Any, worker_init_fn: Callable[[int], None] | None = None, **options: Any
    ) -> None:
        super().__init__(dataset, worker_init_fn=functools.partial(_init_worker, worker_init_fn), **options)
        self._latest: Any = None

    def __iter__(self) -> Any:
        with blocked_signals():  # a worker that is only starting would end by them, and the training with it
            self._latest = super().__iter__()
        return self._latest

    def close(self) -> None:
        """Ends the workers: since they ignore SIGTERM, an exiting process would wait for them for ever."""
        if hasattr(self._latest, "_shutdown_workers"):
            self._latest._shutdown_workers()
        self._latest = self._iterator = None


def _init_worker(users: Callable[[int], None] | None, number: int) -> None:
    ignore_signals()
    threading.Thread(target=_end_with_main_process, daemon=True).start()
    if users is not None:
        users(number)


def _end_with_main_process() -> None:
    """PyTorch looks for that too, but never ends a worker that was only starting when its main process was killed."""
    main_process = multiprocessing.parent_process()
    if main_process is not None:
        main_process.join()
        os._exit(1)


@contextlib.contextmanager
def deterministic_algorithms(device: torch.device) -> Iterator[None]:
    """Has a GPU compute the same result each time, where it can. CPUs do so anyway."""
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # read when the first matrix product is computed
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    was_warning = torch.is_deterministic_algorithms_warn_only_enabled()
    was_benchmark = torch.backends.cudnn.benchmark
    was_filling = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = False
        yield
    finally:
        torch.use_deterministic_algorithms(was_deterministic, warn_only=was_warning)
        torch.utils.deterministic.fill_uninitialized_memory = was_filling  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = was_benchmark
