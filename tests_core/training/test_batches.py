"""Several inputs, targets and outputs, dicts, samplers, streams: each in every routine. And bad samples."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from dida_core.data.contract import DataContract
from dida_core.errors import ConfigError, UserError
from dida_core.prediction.predictor import Predictor
from dida_core.training.determinism import SamplerOrder
from dida_core.training.targets import OutputLoss, main_output, resize_nearest
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, IterableDataset, RandomSampler, WeightedRandomSampler

from dida_tools.utils.loss import dice_bce_sum, f1, multi_class_dice_ce_sum

from tests.helpers import FIRST, ROUTINES, differing, events_of, global_config_of, load_routine

pytestmark = pytest.mark.usefixtures("quick")

# ------------------------------------------------------------------------------------------------- datasets


SAMPLES: dict[str, Callable[[Tensor, Tensor, int], Any]] = {
    "pair": lambda image, mask, index: (image, mask),
    "dict": lambda image, mask, index: {"image": image, "name": f"scene {index}", "mask": mask},
    "triple": lambda image, mask, index: (image[:2], image[2:], mask),
    "two inputs": lambda image, mask, index: ((image[:2], image[2:]), mask),
    "two targets": lambda image, mask, index: (image, {"mask": mask, "level": image.mean()[None]}),
    "many sizes": lambda image, mask, index: (image[:, : 4 + index % 5], mask[: 4 + index % 5]),
    "none": lambda image, mask, index: None,
    "size": lambda image, mask, index: (image[:, 1:], mask[1:]),
    "class": lambda image, mask, index: (image, mask + 7),
    "nan": lambda image, mask, index: (image / 0, mask),
    "channels": lambda image, mask, index: (image[:2], mask),
}


class Scenes(Dataset):
    """Images (3, 8, 8) with class numbers (8, 8), other noise each time; some samples are of another kind."""

    def __init__(self, number: int, seed: int = 0, kind: str = "pair", at: int = 0, length: int = 99) -> None:
        masks = np.random.default_rng(seed).integers(0, 3, (number, 2, 2))
        self.masks = torch.from_numpy(masks.repeat(4, 1).repeat(4, 2))
        self.kind, self.those = kind, range(at, at + length)

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, index: int) -> Any:
        mask = self.masks[index]
        image = functional.one_hot(mask, 3).movedim(-1, 0) + 0.3 * torch.randn(3, 8, 8)
        return SAMPLES[self.kind if index in self.those else "pair"](image, mask, index)


class Streamed(IterableDataset):
    """Ten scenes in an order that is drawn for each pass."""

    def __init__(self, number: int, *about: Any, **options: Any) -> None:
        self.scenes = Scenes(number, *about, **options)

    def __iter__(self) -> Iterator[Any]:
        for index in torch.randperm(len(self.scenes)).tolist():
            yield self.scenes[index]


# --------------------------------------------------------------------------------------------------- models


class Segmenter(nn.Module):
    def __init__(self, kind: str = "tensor") -> None:
        super().__init__()
        self.kind = kind
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(6), nn.Dropout(0.1)
        )
        self.head, self.side, self.level = nn.Conv2d(6, 3, 1), nn.Conv2d(6, 3, 1, 2), nn.Linear(6, 1)

    def forward(self, image: Tensor, other: Tensor | None = None) -> Any:
        x = self.body(image if other is None else torch.cat([image, other], 1))
        if self.kind == "targets":
            return {"mask": self.head(x), "level": self.level(x.mean((2, 3)))}
        if self.kind == "dict":  # as torchvision's
            return {"out": self.head(x), "aux": self.head(x)}
        if self.kind == "list" and self.training:
            return [self.head(x), self.side(x)]
        return self.head(x)


class OnlyInEvaluation(Segmenter):
    def forward(self, image: Tensor, other: Tensor | None = None) -> Any:
        return super().forward(image[:, :2] if self.training else image)


class Paired(Segmenter):
    def forward(self, image: Tensor, other: Tensor) -> Any:  # type: ignore[override]
        return super().forward(image, other)


class Rising(Segmenter):
    def forward(self, image: Tensor, other: Tensor | None = None) -> Any:
        return [self.side(self.body(image)), self.head(self.body(image))]


def of_dict(batch: dict[str, Any]) -> Any:
    return {"image": batch["image"]}, batch["mask"]


def of_triple(batch: list[Tensor]) -> Any:
    return batch[:2], batch[2]


def both_losses(predictions: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
    levels = functional.mse_loss(predictions["level"], targets["level"].float())
    return functional.cross_entropy(predictions["mask"], targets["mask"]) + levels


def padded(samples: list[Any]) -> Any:
    height = max(image.shape[1] for image, _ in samples)
    images = [functional.pad(image, (0, 0, 0, height - image.shape[1])) for image, _ in samples]
    masks = [functional.pad(mask, (0, 0, 0, height - mask.shape[0]), value=255) for _, mask in samples]
    return torch.stack(images), torch.stack(masks)


def with_empty_corners_more_often(dataset: Any) -> WeightedRandomSampler:
    weights = [1.0 + 9 * (dataset[index][1][0, 0] == 0) for index in range(len(dataset))]
    return WeightedRandomSampler(weights, 14)


def of(kind: str) -> dict[str, Any]:
    return {"train": {"number": 18, "kind": kind}, "test": {"number": 5, "seed": 1, "kind": kind}}


LOADER = {"batch_size": 4, "shuffle": True}
THIRTEEN = functools.partial(RandomSampler, replacement=True, num_samples=13)
NO_NAME = {"VALIDATION_FRACTION": 0, "DATASET": None, "DATASET_CONFIG": None}
BASE = {
    "SESSION_NAME": "batches",
    "DATE": "2021-01-01",
    "MODEL": Segmenter,
    "MODEL_CONFIG": {},
    "DATASET": Scenes,
    "DATASET_CONFIG": of("pair"),
    "DATA_LOADER_CONFIG": LOADER,
    "OPTIMIZER": torch.optim.AdamW,
    "OPTIMIZER_CONFIG": {"lr": 1e-2},
    "EPOCHS": 3,
    "LOSS": multi_class_dice_ce_sum,
    "METRICS": {"f1": f1},
    "MONITOR": "max f1",
    "DEVICE": "cpu",
    "PRECISION": "fp32",
    "CHECKPOINT_SECONDS": 0,
    "REQUIRE_RERUNNABLE": False,  # a record takes no functions from tests
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "dict": {"DATASET_CONFIG": of("dict"), "UNPACK": of_dict},
    "triple": {"DATASET_CONFIG": of("triple"), "UNPACK": of_triple, "PRECISION": "bf16"},
    "two-inputs": {"DATASET_CONFIG": of("two inputs"), "ACCUMULATE": 2},
    "two-targets": {
        "DATASET_CONFIG": of("two targets"), "MODEL_CONFIG": {"kind": "targets"}, "LOSS": both_losses,
        "METRICS": {}, "MONITOR": "min loss",
    },
    "list-of-outputs": {"MODEL_CONFIG": {"kind": "list"}, "PRECISION": "bf16"},
    "dict-of-outputs": {"MODEL_CONFIG": {"kind": "dict"}, "LOSS": nn.CrossEntropyLoss},
    "collate": {"DATASET_CONFIG": of("many sizes"), "DATA_LOADER_CONFIG": LOADER | {"collate_fn": padded}},
    "weighted-sampler": {"DATA_LOADER_CONFIG": LOADER | {"sampler": with_empty_corners_more_often}},
    "sampler-2workers": {
        "DATA_LOADER_CONFIG": {"batch_size": 4, "num_workers": 2, "drop_last": True, "sampler": THIRTEEN},
    },
    "stream": {"DATASET": Streamed, "STEPS_PER_EPOCH": 3, "ACCUMULATE": 2, "VALIDATION_FRACTION": 0},
    "stream-1worker": {
        "DATASET": Streamed, "STEPS_PER_EPOCH": 4, "VALIDATION_FRACTION": 0,
        "DATA_LOADER_CONFIG": LOADER | {"num_workers": 1},
    },
}  # fmt: skip
BY_DEFAULT = ("two-targets", "list-of-outputs", "stream")
EACH_CASE = [pytest.param(n, marks=() if n in BY_DEFAULT else pytest.mark.slow) for n in CASES]


def train(root: Any, case: dict[str, Any], routine: str = FIRST, sets: Any = None, **changes: Any) -> Any:
    config = BASE | case | changes
    if sets is None:
        test = Scenes if config["DATASET"] is Streamed else config["DATASET"]
        arguments = config["DATASET_CONFIG"]
        sets = config["DATASET"](**arguments["train"]), test(**arguments["test"])
    return load_routine(routine).train(*sets, config, global_config_of(root))


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Interrupt the next training in its seventh batch."""

    def arm(after: int) -> None:
        calls, forward = iter(range(10**6)), OutputLoss.forward

        def counted(self: OutputLoss, outputs: Any, targets: Any) -> Tensor:
            if torch.is_grad_enabled() and next(calls) == after:
                monkeypatch.setattr(OutputLoss, "forward", forward)
                raise KeyboardInterrupt
            return forward(self, outputs, targets)

        monkeypatch.setattr(OutputLoss, "forward", counted)

    return arm


@pytest.mark.parametrize("case", EACH_CASE)
def test_each_kind_of_batch_ends_the_same_in_every_routine_and_resumed(case, tmp_path, interrupted, capfd):
    expected, ends = train(tmp_path / "expected", CASES[case]), {}
    assert "failed" not in capfd.readouterr().out  # no listener
    losses = [event["train.loss"] for event in expected.history]
    assert losses[-1] < 0.95 * losses[0] and all(map(math.isfinite, losses))
    assert {"test.loss", "validation.loss"} <= expected.metrics.keys() | (
        {"validation.loss"} if "stream" in case else set()
    )
    for routine in [one for one in ROUTINES if one != FIRST]:
        ends[routine] = train(tmp_path / routine, CASES[case], routine)
    interrupted(6)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "resumed", CASES[case])
    ends["resumed"] = train(tmp_path / "resumed", CASES[case], RESUME=expected.name)
    for name, end in ends.items():
        assert end.digest == expected.digest, name
        assert differing(end.metrics, expected.metrics) == [], name
    steps = [[e["loss"] for e in events_of(end.log_dir, "step")] for end in (expected, *ends.values())]
    assert all(one == steps[0] for one in steps)


# -------------------------------------------------------------------------------------------- what is refused

KINDS = {
    "none": "is None: leave it out",
    "size": r"has the shapes \[\(3, 7, 8\), \(7, 8\)\]|and sample \d+ \[\(3, 7, 8\)",
    "class": "its target holds [789], but the model has 3 classes: it must be below 3, or 255",
    "nan": "its input holds NaN or infinite values",
}
ROUTINES_BY_DEFAULT = [pytest.param(r, marks=() if r == FIRST else pytest.mark.slow) for r in ROUTINES]


@pytest.mark.parametrize("routine", ROUTINES_BY_DEFAULT)
@pytest.mark.parametrize("kind", KINDS)
def test_a_later_sample_that_cannot_be_used_is_named_when_it_is_met(kind, routine, tmp_path):
    bad = Scenes(40, 0, kind, 1, 1)
    for workers, sets in enumerate(((bad, Scenes(4)), (Scenes(8), bad))):
        loader = LOADER | {"num_workers": workers}
        with pytest.raises(UserError, match=KINDS[kind]) as caught:
            train(tmp_path / str(workers), NO_NAME, routine, sets, DATA_LOADER_CONFIG=loader)
        assert "sample 1" in str(caught.value) and "Traceback" not in str(caught.value)
        assert (tmp_path / str(workers) / "logs").exists()  # it had started


@pytest.mark.parametrize("split", ["train", "test", "validation"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_some_samples_show_is_refused_at_the_start_by_split(kind, split, tmp_path):
    bad, good = Scenes(12, 0, kind, 9, 1), Scenes(8)
    sets = [bad if one == split else good for one in ("train", "test", "validation")]
    with pytest.raises(UserError, match=f"the {split} data: .*({KINDS[kind]})") as caught:
        refuse(tmp_path, sets)
    assert "sample 9" in str(caught.value)


def refuse(root: Any, sets: Any = None, **changes: Any) -> None:
    """Train, and see that nothing is written."""
    config = BASE | changes
    sets = sets or [config["DATASET"](**arguments) for arguments in config["DATASET_CONFIG"].values()]
    try:
        load_routine(FIRST).train(*sets[:2], config, global_config_of(root), *sets[2:])
    finally:
        assert not any(root.rglob("journal.jsonl"))


WHITE = [(torch.zeros(3, 8, 8), 255.0 * (torch.rand(3, 8, 8) > 0.5)) for _ in range(8)]
REFUSED = {
    "the test data: sample 0 has inputs of the shape (1, 2, 8, 8)": {
        "sets": [Scenes(8), Scenes(8, 0, "channels")]},
    "the test data: sample 0: its target holds": {"sets": [Scenes(8), Scenes(8, 0, "class")]},
    "the first training samples hold 0 and 255 alone, which is ignored": {
        "sets": [WHITE, WHITE], "LOSS": dice_bce_sum},
    "sample 0 is None": {"sets": [Scenes(8, 0, "none", 0, 1), Scenes(8)]},
    "does not take inputs of the shape (1, 3, 8, 8) in training mode": {"MODEL": OnlyInEvaluation},
    "they must be of (3,) channels, the largest first": {"MODEL": Rising},
    "a batch is a list of 3, which is no pair of tensors (input, target): set UNPACK": {
        "DATASET_CONFIG": of("triple")},
    "a batch is a dict of 3, which is no pair": {"DATASET_CONFIG": of("dict")},
    "UNPACK returns a list of 3, which is no pair": {"DATASET_CONFIG": of("triple"), "UNPACK": list},
    "no batch can be made of it by collate_fn and UNPACK (KeyError: 'image')": {
        "DATASET_CONFIG": of("triple"), "UNPACK": lambda batch: {}["image"]},
    "STEPS_PER_EPOCH is missing": {"sets": [Streamed(8), Scenes(8)], "VALIDATION_FRACTION": 0},
    "but a stream cannot be split": {"sets": [Streamed(8), Scenes(8)], "STEPS_PER_EPOCH": 2},
    "num_workers is 2, but a stream has one order": {
        "sets": [Streamed(8), Scenes(8)], "STEPS_PER_EPOCH": 2, "DATA_LOADER_CONFIG": {"num_workers": 2}},
    "the test data is a stream": {"sets": [Scenes(8), Streamed(8)]},
    "STEPS_PER_EPOCH is 3, but the training data is no stream": {"STEPS_PER_EPOCH": 3},
    "draws from a state of its own": {"DATA_LOADER_CONFIG": {"sampler": lambda data: Stateful()}},
    "draws sample 17 of 14": {"DATA_LOADER_CONFIG": {"sampler": lambda data: range(18)}},
    "gives nothing: let it start anew": {
        "sets": [Streamed(0), Scenes(8)], "STEPS_PER_EPOCH": 2, "VALIDATION_FRACTION": 0},
}  # fmt: skip


class Stateful:
    def __init__(self) -> None:
        self.random = np.random.default_rng(0)

    def __iter__(self) -> Iterator[int]:
        return iter(self.random.permutation(14).tolist())


@pytest.mark.parametrize("message", REFUSED)
def test_what_no_routine_can_train_on_is_refused_before_it_starts(message, tmp_path):
    with pytest.raises(UserError) as caught:
        refuse(tmp_path, **REFUSED[message])
    assert message in str(caught.value)


# --------------------------------------------------------------------------------------------- exact values


def test_several_outputs_weigh_half_of_the_one_before_and_meet_the_target_in_their_size():
    target = torch.tensor([[[0, 1, 2, 255], [0, 1, 2, 2], [1, 1, 0, 0], [1, 1, 0, 0]]])
    assert resize_nearest(target, (2, 2)).tolist() == [[[1, 2], [1, 0]]]
    assert resize_nearest(target, (4, 4)) is target
    assert resize_nearest(target, (1, 3)).tolist() == [[[1, 0, 0]]]
    logits = [torch.randn(1, 3, size, size, dtype=torch.bfloat16) for size in (4, 2, 1)]
    seen = []

    def loss(pred: Tensor, target: Tensor) -> Tensor:
        seen.append(pred.dtype)
        return functional.cross_entropy(pred, target, ignore_index=255)

    wanted = [loss(one.float(), resize_nearest(target, one.shape[2:])) for one in logits]
    for outputs in (logits, tuple(logits), {"out": logits[0], "aux": logits[1:]}):
        assert OutputLoss(loss)(outputs, target) == 4 / 7 * wanted[0] + 2 / 7 * wanted[1] + 1 / 7 * wanted[2]
        assert main_output(outputs, target) is logits[0]
    assert OutputLoss(loss)(logits[0], target) == wanted[0] and set(seen) == {torch.float32}


def test_a_sampler_draws_by_seed_and_epoch_alone():
    sampler, weights = WeightedRandomSampler([0.1] * 30 + [5.0] * 10, 4000), torch.zeros(40)
    order = SamplerOrder(sampler, 5, 40)
    drawn = order(3)
    torch.rand(7)
    assert order(4) != drawn == order(3) == SamplerOrder(sampler, 5, 40)(3) != SamplerOrder(sampler, 6, 40)(3)
    for index in drawn:
        weights[index] += 1 / len(drawn)
    assert weights[30:].sum() == pytest.approx(50 / 53, abs=0.02)


@pytest.mark.parametrize(("kind", "two"), [("dict", False), ("list", False), ("tensor", True)])
def test_prediction_takes_the_first_output_of_an_image_alone(kind, two, tmp_path):
    model = Paired() if two else Segmenter(kind)
    predictor = Predictor(model, DataContract(3, outputs=3), device="cpu", precision="fp32")
    image = torch.randn(1, 3, 8, 8)
    if two:
        with pytest.raises(ConfigError, match=r"MODEL Paired takes more than an image \(.*missing 1"):
            predictor(image)
    else:
        wanted = model.head(model.body(image)).softmax(1).detach().numpy()
        assert predictor(image) == pytest.approx(wanted, abs=1e-6)
