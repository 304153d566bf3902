"""Contains the model under test, with all that its checks need: from a test file's config, or from a run's record."""

import copy
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import default_collate

from dida_tools.config.device import get_device, get_precision
from dida_tools.config.errors import UserError
from dida_tools.config.project import project_of
from dida_tools.training.determinism import EvaluationBatches
from dida_tools.training.device import DeviceContext
from dida_tools.training.evaluation import evaluate
from dida_tools.training.setup import Setup, prepare
from dida_tools.utils.data.build import build_datasets
from dida_tools.utils.data.contract import DataContract
from dida_tools.utils.data.images import DataError
from dida_tools.utils.logging.journal import read_journal
from dida_tools.utils.logging.runs import find_run, read_run_config
from dida_tools.utils.targets import unmask
from dida_tools.utils.torchutils import evaluation_mode, fill_model, set_seed
from dida_tools.utils.weights import load_weights, model_state

from .measures import Quality

# What a check demands, where a test file does not say otherwise in its BOUNDS.
BOUNDS = {
    "parameter": 1e3,  # largest parameter
    "batch": 1e-4,  # largest change of an output by the other images of a batch, in parts of the largest output
    "translation": 0.02,  # mean change of a probability (or value, in deviations) by a translation
    "flips": 0.05,  # loss of quality by a flip of the images
    "averaged": 0.01,  # loss of quality by the average over flips
    "recorded": 0.002,  # loss of a result as against the recorded one: another processor rounds in another way
    "baselines": 0.0,  # by how much a class may be worse than those
    "calibration": 0.1,  # expected calibration error
    "robustness": 0.1,  # loss of quality by the mildest of the changes
    "export": 1e-3,  # largest difference of an exported form, in parts of the largest output
}
NUM_INPUTS, EDGE = 2, 64  # of the batch for quick checks
SAMPLE_PIXELS = 250_000  # of the test set, for what is measured many times


@dataclass(repr=False)
class Subject:
    """
    A model under test. Its checks read it; what changes a model takes a copy().

    :param model: in evaluation mode, on the device
    :param untrained: makes a new model
    :param optimizer: makes the optimizer of the training, of parameters
    :param inputs: (N, C, ...) what the model is used to; real ones, where there are data
    :param setup: of the run, with its datasets; None where there are none, and no_data says why
    :param recorded: results of the run on its test set, such as {"f1": 0.8, "f1.water": 0.7}
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
    recorded: dict[str, float] = field(default_factory=dict)
    bounds: dict[str, float] = field(default_factory=lambda: dict(BOUNDS))

    def __repr__(self) -> str:
        return self.name

    def copy(self) -> nn.Module:
        """A copy that may be changed."""
        return copy.deepcopy(self.model)

    @property
    def is_map(self) -> bool:
        """Whether it answers with an image of the input's height and width."""
        return self.inputs.ndim == 4 and self.answer(self.inputs).shape[2:] == self.inputs.shape[2:]

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, or of the values."""
        names = self.contract.class_names
        return [str(name) for name in (names if len(names) == self.num_outputs else range(self.num_outputs))]

    @functools.cached_property
    def num_outputs(self) -> int:
        """Classes, or values."""
        return self.answer(self.inputs[:1]).shape[1]

    @property
    def context(self) -> DeviceContext:
        """That of the training, or the plainest one."""
        return DeviceContext(self.device) if self.setup is None else self.setup.context

    @torch.no_grad()
    def answer(self, inputs: Tensor) -> Tensor:
        """The model's output, in the precision and memory format of its training."""
        with evaluation_mode(self.model), self.context.autocast():
            return self.model(self.context.move(inputs)).float()

    def probabilities(self, inputs: Tensor) -> Tensor:
        """Probabilities of the classes, or the values."""
        return self.contract.probabilities(self.answer(inputs))

    # ------------------------------------------------------------------------------------------------------ on the data

    @property
    def data(self) -> Setup:
        """The run, with a test set."""
        assert self.setup is not None
        return self.setup

    def test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All of the test set."""
        yield from _batches(self.data.data.test, self.data.config["DATA_LOADER_CONFIG"].get("batch_size", 1))

    @functools.cached_property
    def test_sample(self) -> list[tuple[Tensor, Tensor]]:
        """Batches of a part of the test set, for what is measured many times."""
        order = torch.randperm(len(self.data.data.test), generator=torch.Generator().manual_seed(0)).tolist()
        pixels = self.data.data.test[0][0][0].numel()
        number = min(len(order), 2000, max(1, SAMPLE_PIXELS // pixels))
        samples = [self.data.data.test[index] for index in sorted(order[:number])]
        if len({(x.shape, y.shape) for x, y in samples}) > 1 or pixels > 10_000:
            return [default_collate([sample]) for sample in samples]
        return [default_collate(samples[start : start + 64]) for start in range(0, number, 64)]

    @functools.cached_property
    def evaluated(self) -> tuple[dict[str, float], Any]:
        """Results on the test set, counted as in training, and their Scores (None of values)."""
        evaluation = self.data.metrics(self.contract)
        results = evaluate(self.model, self.test_batches(), evaluation, self.context)
        return results, evaluation.scores

    def bare(self, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """Targets without their usability mask, and that mask."""
        if not any(getattr(metric, "masked", False) for metric in self.data.config["METRICS"].values()):
            return targets, None
        return unmask(torch.empty(len(targets), self.num_outputs, *targets.shape[2:], device="meta"), targets)

    def quality(
        self,
        change: Callable[[Tensor], Tensor] = lambda x: x,
        answer: Callable[[Tensor], Tensor] | None = None,
    ) -> Quality:
        """
        How good the answers on test_sample are.

        :param change: what is done to the inputs before
        :param answer: inputs to probabilities; None asks the model
        """
        quality = self.new_quality()
        for inputs, targets in self.test_sample:
            probabilities = (answer or self.probabilities)(change(inputs)).cpu()
            quality.update(probabilities, *self.bare(targets))
        return quality

    @functools.cached_property
    def plain_quality(self) -> Quality:
        """On test_sample, as it is."""
        return self.quality()

    def quality_on_all(self) -> Quality:
        """How good the answers on the whole test set are."""
        quality, (_, scores) = self.new_quality(), self.evaluated
        if quality.name == "F1":
            quality.scores = scores
            return quality
        for inputs, targets in self.test_batches():
            quality.update(self.probabilities(inputs).cpu(), targets)
        return quality

    def new_quality(self) -> Quality:
        """Nothing counted yet."""
        return Quality(self.contract, self.num_outputs, self.data.config["IGNORE_INDEX"])


def subject_of_config(module: ModuleType, weights: str | None = None) -> Subject:
    """
    The model of a test file's config, new or with the weights of a file.

    :param module: holds MODEL, MODEL_CONFIG, INPUT_DIM, OUTPUT_DIM, LOSS, OPTIMIZER, OPTIMIZER_CONFIG, DEVICE, and for
        other than multi-class models TASK
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
    inputs, targets = _invented(module.INPUT_DIM, module.OUTPUT_DIM, contract.task)
    return Subject(
        name=f"{module.MODEL.__name__}, {'untrained' if weights is None else weights}",
        model=model,
        untrained=untrained,
        loss=module.LOSS,
        optimizer=lambda parameters: module.OPTIMIZER(parameters, **module.OPTIMIZER_CONFIG),
        contract=contract,
        device=device,
        inputs=inputs.to(device),
        targets=targets.to(device),
        no_data="there are no test data without a run: give --run NAME",
        is_trained=weights is not None,
        bounds=BOUNDS | getattr(module, "BOUNDS", {}),
    )


def subject_of_run(
    module: ModuleType, name: str, global_config: dict[str, str], weights: str | Path | None = None
) -> Subject:
    """
    The model of a run: everything is taken from its record, but for DEVICE and BOUNDS.

    :param weights: other weights than the best ones
    :param module: may hold DATASETS, a function of the config that gives (train, test, validation),
        for runs whose record does not name their datasets
    :raises UserError: if the record or the weights cannot be used
    """
    log_dir = Path(global_config["LOG_DIR"]) / name
    weights = Path(weights or Path(global_config["WEIGHT_DIR"]) / name / "best.pt")
    stored = load_weights(weights)
    if "contract" not in stored:
        raise UserError(f"{weights}: holds no data contract, so it is no file of a run.")
    contract = DataContract.from_dict(stored["contract"])
    events = read_journal(log_dir / "journal.jsonl")
    config = read_run_config(log_dir, project_of("dida_tools")) | {"DEVICE": module.DEVICE}
    config |= dict.fromkeys(("RESUME", "RERUN_OF", "INIT_WEIGHTS", "NOTIFY"))
    device = get_device(module.DEVICE)
    started = [event for event in events if event["event"] == "start"]
    config["PRECISION"] = _precision(device, started[-1]["precision"] if started else "auto")
    options = config.get("DATA_LOADER_CONFIG", {})
    config["DATA_LOADER_CONFIG"] = {key: options[key] for key in ("batch_size",) if key in options}
    untrained = functools.partial(_new_model, config["MODEL"], config.get("MODEL_CONFIG", {}), device)
    results = [event for event in events if event["event"] == "test"]
    recorded = (
        {key[5:]: value for key, value in results[-1].items() if key.startswith("test.")} if results else {}
    )
    about: dict[str, Any] = {
        "untrained": untrained,
        "contract": contract,
        "device": device,
        "recorded": recorded,
    }
    about["optimizer"] = lambda parameters: config["OPTIMIZER"](parameters, **config["OPTIMIZER_CONFIG"])
    about |= {"name": name, "bounds": BOUNDS | getattr(module, "BOUNDS", {})}
    model = untrained().eval()
    fill_model(model, model_state(stored), str(weights))
    try:
        train_set, test_set, validation_set = getattr(module, "DATASETS", build_datasets)(config)
        setup = prepare(train_set, test_set, config, global_config, validation_set, "dida_tools")
    except DataError as error:
        about |= {"loss": _loss(config), "no_data": f"{name}: {error}"}
        inputs, targets = _invented_for(model, contract)
    else:
        if setup.data.test is None:
            about["no_data"] = f"{name} has no test data"
        elif hasattr(setup.data.test, "with_contract"):
            setup.data.test = setup.data.test.with_contract(contract)
            setup.data.train = setup.data.train.with_contract(contract)
        about |= {"loss": setup.loss_fn, "setup": setup}
        inputs, targets = _quick_batch(setup.data.train, model, device)
    return Subject(model=model, inputs=inputs.to(device), targets=targets.to(device), **about)


def choose_subject(
    module: ModuleType, run: str | None, weights: str | None, global_config: dict[str, str]
) -> Subject:
    """
    What --run and --weights, or else DEFAULT_WEIGHTS, name. Weights in the folder of a run come with its record.

    :raises UserError: if it cannot be used
    """
    if run is not None:
        return subject_of_run(module, find_run(global_config, run, with_weights=True), global_config, weights)
    weights = weights or module.DEFAULT_WEIGHTS
    name = Path(weights).resolve().parent.name if weights else None
    if name and (Path(global_config["LOG_DIR"]) / name / "journal.jsonl").is_file():
        return subject_of_run(module, name, global_config, weights)
    return subject_of_config(module, weights)


def _new_model(model: type[nn.Module], options: dict[str, Any], device: torch.device) -> nn.Module:
    set_seed(0)
    return model(**options).to(device)


def _precision(device: torch.device, wanted: str) -> str:
    try:
        return get_precision(device, wanted)
    except UserError:
        warnings.warn(f"{device} cannot compute in {wanted}: the suite takes fp32.", stacklevel=2)
        return "fp32"


def _invented(input_dim: tuple[int, ...], output_dim: tuple[int, ...], task: str) -> tuple[Tensor, Tensor]:
    """Noise, and a target that follows from it."""
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


def _invented_for(model: nn.Module, contract: DataContract) -> tuple[Tensor, Tensor]:
    """The same for a model of which only the number of channels is known: images, or lists of numbers."""
    device = next(model.parameters()).device
    for shape in ((NUM_INPUTS, contract.channels, EDGE, EDGE), (4 * NUM_INPUTS, contract.channels)):
        try:
            with torch.no_grad():
                output = model(torch.zeros(shape, device=device))
        except RuntimeError:  # not of this shape
            continue
        return _invented(shape, tuple(output.shape), contract.task)
    name = type(model).__name__
    raise UserError(f"{name} takes neither images of {EDGE} pixels nor lists of numbers: put its data back.")


def _loss(config: dict[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
    loss, options = config["LOSS"], config.get("LOSS_CONFIG", {})
    return loss(**options) if isinstance(loss, type) else functools.partial(loss, **options)


def _quick_batch(dataset: Any, model: nn.Module, device: torch.device) -> tuple[Tensor, Tensor]:
    """A few small samples of the training set, with as many different targets as there are."""
    set_seed(0)
    samples = [dataset[index] for index in range(min(16, len(dataset)))]
    inputs = samples[0][0][None]
    with torch.no_grad():
        is_map = inputs.ndim == 4 and model(inputs.to(device)).shape[2:] == inputs.shape[2:]
    if not is_map:
        return default_collate(samples[: max(NUM_INPUTS, 8)])
    small = [(x[..., :EDGE, :EDGE], torch.as_tensor(y)[..., :EDGE, :EDGE]) for x, y in samples]
    small.sort(key=lambda pair: -len(pair[1].unique()))
    return default_collate([pair for pair in small if pair[0].shape == small[0][0].shape][:NUM_INPUTS])


def _batches(dataset: Any, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    inputs = dataset[0][0]
    max_pixels = batch_size * inputs.shape[-2] * inputs.shape[-1] if inputs.ndim == 3 else None
    for batch in EvaluationBatches(dataset, batch_size, max_pixels):
        yield default_collate([dataset[index] for _, index in batch])
