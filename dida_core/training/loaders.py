"""The datasets of a training by split, their batches, and their loaders."""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate, default_convert

from ..data.dataset import Stream, TrainingData, as_dataset
from ..data.images import DataError
from ..errors import ConfigError, UserError
from .determinism import EvaluationBatches, Loader, SamplerOrder, Samples, TrainingBatches
from .device import one_of, tensors_of
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
class Collate:
    """Make a batch (inputs, targets) of samples, by collate_fn and UNPACK."""

    function: Callable[[list[Any]], Any] | None = None
    unpack: Callable[[Any], Any] | None = None

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Collate":
        """Return that of a config."""
        return cls(config["DATA_LOADER_CONFIG"].get("collate_fn"), config["UNPACK"])

    def __call__(self, samples: Sequence[Any], names: Sequence[str]) -> tuple[Any, Any]:
        """Make a batch of samples with names; raise UserError, with the sample that is unlike the first."""
        try:
            batch = (self.function or default_collate)(list(samples))
            batch = batch if self.unpack is None else self.unpack(batch)
        except UserError:
            raise
        except Exception as error:
            raise DataError([self._odd_one(samples, names, error)]) from error
        if not (isinstance(batch, tuple | list) and len(batch) == 2 and all(map(tensors_of, batch))):
            length = f" of {len(batch)}" if hasattr(batch, "__len__") else ""
            what = f"{type(batch).__name__}{length}"
            maker = "UNPACK returns" if self.unpack else "a batch is"
            remedy = "set UNPACK to a function of a batch that returns (inputs, targets)"
            raise ConfigError([f"{maker} a {what}, which is no pair of tensors (input, target): {remedy}."])
        return batch[0], batch[1]

    def _odd_one(self, samples: Sequence[Any], names: Sequence[str], error: Exception) -> str:
        shapes = [[tuple(one.shape) for one in tensors_of(default_convert(sample))] for sample in samples]
        for name, sample, own in zip(names, samples, shapes, strict=True):
            if sample is None and self.function is None:
                return f"{name} is None: leave it out of the dataset, or out of batches by a collate_fn"
            if own != shapes[0]:
                remedy = "bring all to one size, take batch_size=1, or set DATA_LOADER_CONFIG.collate_fn"
                return f"{name} has the shapes {own}, and {names[0]} {shapes[0]}: {remedy}"
        about = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return f"{', '.join(names)}: no batch can be made of it by collate_fn and UNPACK ({about})"


@dataclass
class Values:
    """
    What a batch may hold.

    :param num_classes: of class numbers; None: the targets are none
    :param ignored: target values that count nowhere
    """

    num_classes: int | None = None
    ignored: Sequence[Any] = ()

    def problem(self, inputs: Any, targets: Any) -> str | None:
        """Return what is wrong with the values of a batch."""
        if not all(bool(one.isfinite().all()) for one in tensors_of(inputs)):
            return "its input holds NaN or infinite values: replace them in the dataset"
        if self.num_classes is None or not isinstance(targets, Tensor):
            return None
        wrong = (targets < 0) | (targets >= self.num_classes)
        for value in self.ignored:
            wrong &= targets != value
        if not bool(wrong.any()):
            return None
        ignored = " or ".join(map(str, self.ignored))
        about = f"its target holds {targets[wrong][0].item()}, but the model has {self.num_classes} classes"
        return f"{about}: it must be below {self.num_classes}, or {ignored}, which counts nowhere"


class BatchedSamples(Samples):
    """The batches of a dataset. One that cannot be used is the error instead, which Loader raises."""

    def __init__(self, dataset: TrainingData, seed: int, collate: Collate, values: Values) -> None:
        super().__init__(dataset, seed)
        self.collate, self.values = collate, values

    def __getitems__(self, keys: list[tuple[int, ...]]) -> Any:
        """Return the batch of these samples, or a UserError that names one."""
        try:
            return self.batch(keys)
        except UserError as error:
            return error

    def batch(self, keys: list[tuple[int, ...]]) -> tuple[Any, Any]:
        """
        Return the batch of these samples.

        :raises UserError: naming the sample that cannot be used
        """
        names = [str(self.dataset.sample_name(key[1])) for key in keys]
        batch = self.collate([self[key] for key in keys], names)
        if (problem := self.values.problem(*batch)) is None:
            return batch
        for number, name in enumerate(names if len(tensors_of(batch)[0]) == len(names) else ()):
            if problem := self.values.problem(*one_of(batch, number)):
                raise DataError([f"{name}: {problem}"])
        raise DataError([f"{', '.join(names)}: {problem}"])


@dataclass
class Loaders:
    """The loaders; None where there is no dataset."""

    train: Loader
    test: Loader | None
    validation: Loader | None
    batches: TrainingBatches  # of the training set
    steps_per_epoch: int  # optimizer steps; the last one may have fewer batches
    collate: Collate


@config_errors("DATA_LOADER")
def build_loaders(
    config: dict[str, Any], data: Splits, device: torch.device, shape: torch.Size, values: Values
) -> Loaders:
    """
    Build the loaders by DATA_LOADER_CONFIG.

    :param shape: of a training sample; in evaluation, a batch has no more pixels than one of training
    """
    options, seed, process = dict(config["DATA_LOADER_CONFIG"]), config["SEED"], (rank(), num_processes())
    batch_size, shuffle = options.pop("batch_size", 1), options.pop("shuffle", True)
    drop_last, sampler = options.pop("drop_last", False), options.pop("sampler", None)
    options["collate_fn"], collate = default_convert, Collate.of(config)  # BatchedSamples has made batches
    # Elsewhere than on CUDA, pinned memory is useless and warned of.
    options["pin_memory"] = options.get("pin_memory", False) and device.type == "cuda"
    if options.get("num_workers", 0) > 0:
        options.setdefault("persistent_workers", True)
    num_samples, draw = len(data.train), None
    if isinstance(data.train, Stream):
        draw = _continued(num_samples)
    elif sampler is not None:
        draw = SamplerOrder(_built(sampler, data.train), seed, num_samples)
        num_samples = draw.num_drawn
    batches = TrainingBatches(num_samples, batch_size, shuffle, drop_last, seed, *process, draw)
    if batches.num_batches == 0:
        raise ConfigError([f"drop_last leaves no batch: {num_samples} samples, batch_size {batch_size}."])
    max_pixels = batch_size * shape[-2] * shape[-1] if len(shape) == 3 else None

    def load(dataset: TrainingData, order: TrainingBatches | EvaluationBatches) -> Loader:
        return Loader(BatchedSamples(dataset, seed, collate, values), batch_sampler=order, **options)

    evaluated = {
        split: load(dataset, EvaluationBatches(dataset, batch_size, max_pixels, *process))
        for split, dataset in data.items()[1:]
    }
    steps_per_epoch, train = math.ceil(batches.num_batches / config["ACCUMULATE"]), load(data.train, batches)
    return Loaders(
        train, evaluated.get("test"), evaluated.get("validation"), batches, steps_per_epoch, collate
    )


def stream_problems(config: dict[str, Any], data: Splits) -> list[str]:
    """Enter the length of an epoch into streaming data, and return why it cannot be trained on."""
    options, steps, evaluated = config["DATA_LOADER_CONFIG"], config["STEPS_PER_EPOCH"], data.items()[1:]
    problems = [
        f"the {split} data is a stream: give a dataset of a known length, such as list(it)."
        for split, dataset in evaluated
        if isinstance(dataset, Stream)
    ]
    if not isinstance(data.train, Stream):
        about = f"STEPS_PER_EPOCH is {steps}, but the training data is no stream (IterableDataset)"
        return problems if steps is None else [*problems, f"{about}: leave it out."]
    if steps is None:
        problems.append("STEPS_PER_EPOCH is missing: the training data is a stream, which has no length.")
    else:
        data.train.num_samples = steps * config["ACCUMULATE"] * options.get("batch_size", 1)
    if data.validation is None and config["VALIDATION_FRACTION"] > 0:
        about = f"VALIDATION_FRACTION is {config['VALIDATION_FRACTION']}, but a stream cannot be split"
        problems.append(f"{about}: give a validation set, or set it to 0.")
    if options.get("num_workers", 0) > 1:
        about = f"DATA_LOADER_CONFIG.num_workers is {options['num_workers']}, but a stream has one order"
        problems.append(f"{about}: set it to 0, or to 1, which reads ahead.")
    if options.get("sampler") is not None:
        problems.append("DATA_LOADER_CONFIG.sampler is set, but a stream has its own order: leave it out.")
    return problems


def _built(sampler: Callable[..., Any], dataset: TrainingData) -> Any:
    """Build a sampler: of the dataset, if it wants anything that it has not been given."""
    wanted = inspect.signature(sampler).parameters.values()
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    is_complete = all(one.default is not one.empty or one.kind in variable for one in wanted)
    return sampler() if is_complete else sampler(dataset)


def _continued(num_samples: int) -> Callable[[int], Sequence[int]]:
    """Return the places of a stream by epoch: each continues where the one before has ended."""
    return lambda epoch: range(epoch * num_samples, (epoch + 1) * num_samples)
