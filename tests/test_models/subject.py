"""The model under test, with all that its checks need: from a test file's config, or from a run's record."""

import copy
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from dida_core.config.project import project_of
from dida_core.data.build import build_datasets
from dida_core.data.contract import DataContract
from dida_core.data.images import DataError
from dida_core.errors import UserError
from dida_core.runs.lookup import find_run, read_run_config
from dida_core.storage.journal import read_journal
from dida_core.storage.weights import load_weights, model_state
from dida_core.training.determinism import EvaluationBatches
from dida_core.training.device import DeviceContext
from dida_core.training.evaluation import evaluate
from dida_core.training.setup import Setup, prepare
from dida_core.training.targets import unmask
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import default_collate

from dida_tools.config.device import get_device, get_precision
from dida_tools.utils.torchutils import evaluation_mode, fill_model, set_seed

from tests.test_models.measures import Quality

# What a check demands, where a test file does not say otherwise in its BOUNDS.
BOUNDS = {
    "parameter": 1e3,  # largest parameter
    "batch": 1e-4,  # change of an output by the other images of a batch, relative to the largest output
    "translation": 0.02,  # mean change of a probability (or value, in std) by a translation
    "flips": 0.05,  # loss of quality by a flip of the images
    "averaged": 0.01,  # loss of quality by averaging over flips
    "recorded": 0.002,  # loss of a metric against the recorded one: another processor rounds differently
    "baselines": 0.0,  # by how much a class may be worse than those
    "calibration": 0.1,  # expected calibration error
    "robustness": 0.1,  # loss of quality by the mildest perturbation
    "export": 1e-3,  # difference of an exported model, relative to the largest output
}
NUM_INPUTS, SIZE = 2, 64  # of the batch for quick checks
SAMPLE_PIXELS = 250_000  # of the test set, for what is measured many times


@dataclass(repr=False)
class Subject:
    """
    A model under test. Its checks read it; what changes a model takes a copy().

    :param model: in evaluation mode, on the device
    :param untrained: makes a new model
    :param optimizer: makes the optimizer of the training, from parameters
    :param inputs: (N, C, ...) typical inputs; real ones, where there are data
    :param setup: of the run, with its datasets; None where there are none, and no_data says why
    :param recorded: results of the run on its test set, such as {"f1": 0.8, "f1.water": 0.7}
    :param multiple: of which heights and widths of its images have to be multiples
    """

    name: str
    model: nn.Module
    untrained: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    contract: DataContract
    device: torch.device
    inputs: Tensor
    targets: Tensor
    setup: Setup | None = None
    no_data: str = ""
    is_trained: bool = True
    multiple: int = 1
    recorded: dict[str, float] = field(default_factory=dict)
    bounds: dict[str, float] = field(default_factory=lambda: dict(BOUNDS))

    def __post_init__(self) -> None:
        self.inputs, self.targets = self.inputs.to(self.device), self.targets.to(self.device)

    def __repr__(self) -> str:
        return self.name

    def copy(self) -> nn.Module:
        """Return a copy that may be changed."""
        return copy.deepcopy(self.model)

    @property
    def is_map(self) -> bool:
        """Whether the output is an image of the input's height and width."""
        return self.inputs.ndim == 4 and self.output(self.inputs).shape[2:] == self.inputs.shape[2:]

    @property
    def class_names(self) -> list[str]:
        names = self.contract.class_names
        return [str(name) for name in (names if len(names) == self.num_outputs else range(self.num_outputs))]

    @functools.cached_property
    def num_outputs(self) -> int:
        return self.output(self.inputs[:1]).shape[1]

    @property
    def context(self) -> DeviceContext:
        return DeviceContext(self.device) if self.setup is None else self.setup.context

    @torch.no_grad()
    def output(self, inputs: Tensor) -> Tensor:
        """Return the model's output, in the precision and memory format of its training."""
        with evaluation_mode(self.model), self.context.autocast():
            return self.model(self.context.move(inputs)).float()

    def probabilities(self, inputs: Tensor) -> Tensor:
        return self.contract.probabilities(self.output(inputs))

    @property
    def run(self) -> Setup:
        assert self.setup is not None
        return self.setup

    @property
    def test_set(self) -> Any:
        return self.run.data.test

    def test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        batch_size, inputs = self.run.config["DATA_LOADER_CONFIG"].get("batch_size", 1), self.test_set[0][0]
        max_pixels = batch_size * inputs.shape[-2] * inputs.shape[-1] if inputs.ndim == 3 else None
        for batch in EvaluationBatches(self.test_set, batch_size, max_pixels):
            yield default_collate([self.test_set[index] for _, index in batch])

    @functools.cached_property
    def test_sample(self) -> list[tuple[Tensor, Tensor]]:
        """Return batches of a part of the test set, for what is measured many times."""
        order = torch.randperm(len(self.test_set), generator=torch.Generator().manual_seed(0)).tolist()
        pixels = self.test_set[0][0][0].numel()
        number = min(len(order), 2000, max(1, SAMPLE_PIXELS // pixels))
        samples = [self.test_set[index] for index in sorted(order[:number])]
        is_mixed = len({(x.shape, y.shape) for x, y in samples}) > 1
        size = 1 if is_mixed or pixels > 10_000 else 64
        return [default_collate(samples[start : start + size]) for start in range(0, number, size)]

    @functools.cached_property
    def evaluated(self) -> tuple[dict[str, float], Any]:
        """Return results on the test set, counted as in training, and their Scores (None of values)."""
        evaluation = self.run.metrics(self.contract)
        results = evaluate(self.model, self.test_batches(), evaluation, self.context)
        return results, evaluation.scores

    def unmasked(self, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return targets without their usability mask, and that mask."""
        if not any(getattr(metric, "masked", False) for metric in self.run.config["METRICS"].values()):
            return targets, None
        return unmask(torch.empty(len(targets), self.num_outputs, *targets.shape[2:], device="meta"), targets)

    def quality(
        self,
        perturb: Callable[[Tensor], Tensor] = lambda x: x,
        predict: Callable[[Tensor], Tensor] | None = None,
        batches: Iterable[tuple[Tensor, Tensor]] | None = None,
    ) -> Quality:
        """Return the quality on batches (default: test_sample) of a predict function (default: the model)."""
        quality = self.new_quality()
        for inputs, targets in self.test_sample if batches is None else batches:
            quality.update((predict or self.probabilities)(perturb(inputs)).cpu(), *self.unmasked(targets))
        return quality

    @functools.cached_property
    def plain_quality(self) -> Quality:
        return self.quality()

    def new_quality(self) -> Quality:
        return Quality(self.contract, self.num_outputs, self.run.config["IGNORE_INDEX"])


def choose_subject(
    module: ModuleType, run: str | None, weights: str | None, global_config: dict[str, str]
) -> Subject:
    """
    Return what --run and --weights, or else DEFAULT_WEIGHTS, name. Weights of a run come with its record.

    :raises UserError: if it cannot be used
    """
    if run is not None:
        return subject_of_run(module, find_run(global_config, run, with_weights=True), global_config, weights)
    weights = weights or module.DEFAULT_WEIGHTS
    name = Path(weights).resolve().parent.name if weights else None
    if name and (Path(global_config["LOG_DIR"]) / name / "journal.jsonl").is_file():
        return subject_of_run(module, name, global_config, weights)
    return subject_of_config(module, weights)


def subject_of_config(module: ModuleType, weights: str | None = None) -> Subject:
    """
    Return the model of a test file's config, new or with the weights of a file.

    :param module: holds MODEL, MODEL_CONFIG, INPUT_DIM, OUTPUT_DIM, LOSS, OPTIMIZER, OPTIMIZER_CONFIG,
        DEVICE, and for other than multi-class models TASK
    """
    device = get_device(module.DEVICE)
    stored = {} if weights is None else load_weights(weights)
    task = getattr(module, "TASK", "multi-class")
    contract = DataContract(module.INPUT_DIM[1], task=task, outputs=module.OUTPUT_DIM[1])
    if "contract" in stored:
        contract = DataContract.from_dict(stored["contract"])
    untrained = functools.partial(_new_model, module.MODEL, module.MODEL_CONFIG, device)
    model = untrained().eval()
    if stored:
        fill_model(model, model_state(stored), str(weights))
    name = f"{module.MODEL.__name__}, {'untrained' if weights is None else weights}"
    optimizer = _optimizer(module.OPTIMIZER, module.OPTIMIZER_CONFIG)
    batch = _synthetic(module.INPUT_DIM, module.OUTPUT_DIM, contract.task)
    no_data = "there are no test data without a run: give --run NAME"
    about = {"no_data": no_data, "is_trained": weights is not None} | _told(module)
    return Subject(name, model, untrained, module.LOSS, optimizer, contract, device, *batch, **about)


def subject_of_run(
    module: ModuleType, name: str, global_config: dict[str, str], weights: str | Path | None = None
) -> Subject:
    """
    Return the model of a run: everything is taken from its record, but for DEVICE, BOUNDS and MULTIPLE.

    :param weights: other weights than the best ones
    :param module: may hold DATASETS, a function of the config that returns (train, test, validation),
        for runs whose record does not name their datasets
    :raises UserError: if the record or the weights cannot be used
    """
    log_dir = Path(global_config["LOG_DIR"]) / name
    weights = Path(weights or Path(global_config["WEIGHT_DIR"]) / name / "best.pt")
    stored = load_weights(weights)
    if "contract" not in stored:
        raise UserError(f"{weights}: no data contract, so this is no file of a run.")
    contract, device = DataContract.from_dict(stored["contract"]), get_device(module.DEVICE)
    events = read_journal(log_dir / "journal.jsonl")
    config = _config_of_run(log_dir, events, device, module.DEVICE)
    untrained = functools.partial(_new_model, config["MODEL"], config.get("MODEL_CONFIG", {}), device)
    model = untrained().eval()
    fill_model(model, model_state(stored), str(weights))
    setup, no_data = None, ""
    try:
        train_set, test_set, validation_set = getattr(module, "DATASETS", build_datasets)(config)
        setup = prepare(train_set, test_set, config, global_config, validation_set, "dida_tools")
    except DataError as error:
        no_data, loss = f"{name}: {error}", functools.partial(config["LOSS"], **config.get("LOSS_CONFIG", {}))
        loss = loss() if isinstance(config["LOSS"], type) else loss
        inputs, targets = _synthetic_for(model, contract)
    else:
        loss = setup.loss_fn
        if setup.data.test is None:
            no_data = f"{name} has no test data"
        elif hasattr(setup.data.test, "with_contract"):
            setup.data.test = setup.data.test.with_contract(contract)
            setup.data.train = setup.data.train.with_contract(contract)
        inputs, targets = _quick_batch(setup.data.train, model, device)
    tested = next((event for event in reversed(events) if event["event"] == "test"), {})
    recorded = {key[5:]: value for key, value in tested.items() if key.startswith("test.")}
    optimizer = _optimizer(config["OPTIMIZER"], config["OPTIMIZER_CONFIG"])
    about = {"setup": setup, "no_data": no_data, "recorded": recorded} | _told(module)
    return Subject(name, model, untrained, loss, optimizer, contract, device, inputs, targets, **about)


def _optimizer(kind: Any, options: dict[str, Any]) -> Callable[[Iterable[nn.Parameter]], Any]:
    return lambda parameters: kind(parameters, **options)


def _told(module: ModuleType) -> dict[str, Any]:
    """Return what a test file decides for new models and runs alike."""
    return {"bounds": BOUNDS | getattr(module, "BOUNDS", {}), "multiple": getattr(module, "MULTIPLE", 1)}


def _config_of_run(log_dir: Path, events: list[dict], device: torch.device, wanted: str) -> dict[str, Any]:
    config = read_run_config(log_dir, project_of("dida_tools")) | {"DEVICE": wanted}
    config |= dict.fromkeys(("RESUME", "RERUN_OF", "INIT_WEIGHTS", "NOTIFY"))
    precision = next((one["precision"] for one in reversed(events) if one["event"] == "start"), "auto")
    try:
        config["PRECISION"] = get_precision(device, precision)
    except UserError:
        warnings.warn(f"{device} cannot compute in {precision}: the suite takes fp32.", stacklevel=2)
        config["PRECISION"] = "fp32"
    options = config.get("DATA_LOADER_CONFIG", {})
    config["DATA_LOADER_CONFIG"] = {key: options[key] for key in ("batch_size",) if key in options}
    return config


def _new_model(model: type[nn.Module], options: dict[str, Any], device: torch.device) -> nn.Module:
    set_seed(0)
    return model(**options).to(device)


def _synthetic(input_dim: tuple[int, ...], output_dim: tuple[int, ...], task: str) -> tuple[Tensor, Tensor]:
    """Return noise, and a target that follows from it."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(input_dim, generator=generator)
    mixture = torch.randn(input_dim[1], output_dim[1], generator=generator)
    values = torch.einsum("nc...,ck->nk...", inputs, mixture)
    if len(output_dim) < len(input_dim):
        values = values.flatten(2).mean(-1)
    elif values.ndim == 4:
        values = functional.avg_pool2d(values, 9, stride=1, padding=4)
    if task == "values":
        return inputs, values
    return inputs, values.argmax(1) if task == "multi-class" else (values > 0).float()


def _synthetic_for(model: nn.Module, contract: DataContract) -> tuple[Tensor, Tensor]:
    """Return the same for a model of which only the number of channels is known: images, or vectors."""
    device = next(model.parameters()).device
    for shape in ((NUM_INPUTS, contract.channels, SIZE, SIZE), (4 * NUM_INPUTS, contract.channels)):
        try:
            with torch.no_grad():
                output = model(torch.zeros(shape, device=device))
        except RuntimeError:  # another shape
            continue
        return _synthetic(shape, tuple(output.shape), contract.task)
    what = f"{type(model).__name__} takes neither images of {SIZE} pixels nor vectors"
    raise UserError(f"{what}: put its data back.")


def _quick_batch(dataset: Any, model: nn.Module, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a few small samples of the training set, with as many different targets as possible."""
    set_seed(0)
    samples = [dataset[index] for index in range(min(16, len(dataset)))]
    inputs = samples[0][0][None]
    with torch.no_grad():
        is_map = inputs.ndim == 4 and model(inputs.to(device)).shape[2:] == inputs.shape[2:]
    if not is_map:
        return default_collate(samples[: max(NUM_INPUTS, 8)])
    small = [(x[..., :SIZE, :SIZE], torch.as_tensor(y)[..., :SIZE, :SIZE]) for x, y in samples]
    small.sort(key=lambda pair: -len(pair[1].unique()))
    return default_collate([pair for pair in small if pair[0].shape == small[0][0].shape][:NUM_INPUTS])
