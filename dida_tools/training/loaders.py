"""The datasets of a training by split, and their loaders."""

from dataclasses import dataclass, field
from typing import Any

import torch

from ..config.errors import ConfigError
from ..utils.data.dataset import TrainingData
from .determinism import EvaluationBatches, Loader, Samples, TrainingBatches
from .distributed import num_processes, rank


@dataclass
class Splits:
    """The datasets; None where there is none."""

    train: TrainingData
    validation: TrainingData | None
    test: TrainingData | None
    hashes: dict[str, dict[str, Any]] = field(default_factory=dict)  # size and SHA-256 of each file, if known


@dataclass
class Loaders:
    """The loaders; None where there is no dataset."""

    train: Loader
    validation: Loader | None
    test: Loader | None
    batches: TrainingBatches  # of the training set


def build_loaders(config: dict[str, Any], data: Splits, device: torch.device, shape: torch.Size) -> Loaders:
    """
    Build the loaders by DATA_LOADER_CONFIG.

    :param shape: of a training sample; a batch in evaluation has no more pixels than one in training
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

    def evaluation_loader(dataset: TrainingData | None) -> Loader | None:
        if dataset is None:
            return None
        order = EvaluationBatches(dataset, batch_size, max_pixels, *process)
        return Loader(Samples(dataset, seed), batch_sampler=order, **options)

    train = Loader(Samples(data.train, seed), batch_sampler=batches, **options)
    return Loaders(train, evaluation_loader(data.validation), evaluation_loader(data.test), batches)
