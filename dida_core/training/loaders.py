"""The datasets of a training by split, and their loaders."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..data.dataset import TrainingData, as_dataset
from ..errors import ConfigError
from .determinism import EvaluationBatches, Loader, Samples, TrainingBatches
from .distributed import num_processes, rank
from .optimization import config_errors


@dataclass
class Splits:
    """The datasets; None where there is none."""

    train: TrainingData
    test: TrainingData | None = None
    validation: TrainingData | None = None
    hashes: dict[str, dict[str, Any]] = field(default_factory=dict)  # size and SHA-256 of files, where known
    digest: str = ""  # of all of them, or which data has none

    def items(self) -> list[tuple[str, TrainingData]]:
        """Return name and dataset of each split that there is."""
        named = {"train": self.train, "test": self.test, "validation": self.validation}
        return [(split, dataset) for split, dataset in named.items() if dataset is not None]

    def map(self, change: Callable[[Any], Any]) -> "Splits":
        """Return the splits with their datasets changed."""
        changed: dict[str, Any] = {split: as_dataset(change(dataset)) for split, dataset in self.items()}
        return Splits(**changed)


@dataclass
class Loaders:
    """The loaders; None where there is no dataset."""

    train: Loader
    test: Loader | None
    validation: Loader | None
    batches: TrainingBatches  # of the training set
    steps_per_epoch: int  # optimizer steps; the last one may have fewer batches


@config_errors("DATA_LOADER")
def build_loaders(config: dict[str, Any], data: Splits, device: torch.device, shape: torch.Size) -> Loaders:
    """
    Build the loaders by DATA_LOADER_CONFIG.

    :param shape: of a training sample; in evaluation, a batch has no more pixels than one of training
    """
    options, seed, process = dict(config["DATA_LOADER_CONFIG"]), config["SEED"], (rank(), num_processes())
    batch_size, shuffle = options.pop("batch_size", 1), options.pop("shuffle", True)
    drop_last = options.pop("drop_last", False)
    # Elsewhere than on CUDA, pinned memory is useless and warned of.
    options["pin_memory"] = options.get("pin_memory", False) and device.type == "cuda"
    if options.get("num_workers", 0) > 0:
        options.setdefault("persistent_workers", True)
    batches = TrainingBatches(len(data.train), batch_size, shuffle, drop_last, seed, *process)
    if batches.num_batches == 0:
        raise ConfigError([f"drop_last leaves no batch: {len(data.train)} samples, batch_size {batch_size}."])
    max_pixels = batch_size * shape[-2] * shape[-1] if len(shape) == 3 else None

    def load(dataset: TrainingData, order: TrainingBatches | EvaluationBatches) -> Loader:
        return Loader(Samples(dataset, seed), batch_sampler=order, **options)

    test, validation = (
        None if one is None else load(one, EvaluationBatches(one, batch_size, max_pixels, *process))
        for one in (data.test, data.validation)
    )
    steps_per_epoch = math.ceil(batches.num_batches / config["ACCUMULATE"])
    return Loaders(load(data.train, batches), test, validation, batches, steps_per_epoch)
