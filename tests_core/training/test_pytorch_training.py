"""The raw routine: it trains what it is given, evaluates honestly, and leaves what it promises."""

import copy
import io
import itertools
import json
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from dida_core.config.capture import capture, restore
from dida_core.config.check import check
from dida_core.config.keys import NOT_RESTORED
from dida_core.config.project import project_of
from dida_core.config.tree import difference
from dida_core.data.contract import DataContract
from dida_core.data.images import DataError
from dida_core.errors import ConfigError, UserError
from dida_core.runs.failures import NonFiniteLoss, OutOfMemory
from dida_core.storage.weights import load_weights, save_weights, weights_digest
from dida_core.training.setup import prepare
from sklearn.metrics import f1_score
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import TensorDataset

from dida_tools.models import UNET
from dida_tools.training.config import small, train_config
from dida_tools.training.pytorch_training import train
from dida_tools.utils.data import NpyDataset
from dida_tools.utils.loss import (
    accuracy,
    f1,
    masked_dice_bce_sum,
    masked_f1,
    masked_multi_class_dice_ce_sum,
    multi_class_dice_ce_sum,
    smooth_dice_loss,
)
from dida_tools.utils.torchutils import load_model, set_seed

from tests.helpers import PACKAGE, events_of, rows_of
from tests.utils.data.conftest import write_file as write

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def fit(datasets, tiny_config, global_config):
    """Train on the tiny datasets, or others, with changes of the tiny config."""

    def train_with(*sets, validation=None, **changes):
        return train(*(sets or datasets), tiny_config | changes, global_config, validation)

    return train_with


def last_state(result) -> dict:
    return load_weights(result.weights["last"])


def best_weights(result) -> dict:
    return load_weights(result.weights["best"])


def the_row(global_config: dict) -> dict:
    (row,) = rows_of(global_config)
    return row


def initial_model(config: dict) -> nn.Module:
    set_seed(config.get("SEED", 0))
    return config["MODEL"](**config["MODEL_CONFIG"])


def is_finite(file: Path) -> bool:
    return all(torch.isfinite(tensor).all() for tensor in load_weights(file)["model"].values())


def rates_of(result) -> list[float]:
    return [event["learning_rate"] for event in events_of(result.log_dir, "step")]


# ------------------------------------------------------------------------------------------ what it learns


class ModeLog(nn.Sequential):
    """Notes the mode of each forward pass."""

    modes: list[bool] = []  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        ModeLog.modes.append(self.training)
        return super().forward(x)


def test_it_learns_in_training_mode_and_evaluates_in_evaluation_mode(fit):
    ModeLog.modes.clear()
    result = fit(MODEL=ModeLog, MODEL_CONFIG={}, EPOCHS=20)
    losses = [event["train.loss"] for event in result.history]
    assert len(losses) == 20 and losses[-1] < 0.6 * losses[0]
    assert result.metrics["test.f1"] > 0.8
    state = last_state(result)["model"]
    before = initial_model({"MODEL": ModeLog, "MODEL_CONFIG": {}}).state_dict()
    assert all(not torch.equal(before[name], state[name]) for name in before)
    # Evaluation left the statistics alone.
    assert sum(ModeLog.modes) - 1 == state["1.num_batches_tracked"] == 20 * 4  # it was tried once before
    assert ModeLog.modes.count(False) > 20


def test_the_seed_decides_and_nothing_outside_does(fit):
    first = fit()
    torch.manual_seed(1234)
    np.random.seed(99)
    again = fit(DATA_LOADER_CONFIG={"batch_size": 4, "shuffle": True, "num_workers": 2})
    assert again.digest == first.digest
    losses = [[event["train.loss"] for event in result.history] for result in (first, again)]
    assert losses[0] == losses[1]
    assert fit(SEED=1).digest != first.digest


# --------------------------------------------------------------------------------------- order, selection


class Recorded(list):
    """Notes which samples are read."""

    def __init__(self, dataset) -> None:
        super().__init__(dataset[index] for index in range(len(dataset)))
        self.log: list[int] = []

    def __getitem__(self, index: int):
        self.log.append(index)
        return super().__getitem__(index)


def test_training_is_shuffled_and_complete_and_the_test_set_is_read_in_order(fit, pairs_dir):
    folders = [pairs_dir / split for split in ("train", "test")]
    sets = [Recorded(NpyDataset(folder / "x", folder / "y").for_evaluation()) for folder in folders]
    fit(*sets, EPOCHS=3, VALIDATION_FRACTION=0)
    train_log, test_log = (one.log for one in sets)
    epochs = [train_log[start : start + 10] for start in range(len(train_log) - 30, len(train_log), 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != list(range(10))
    in_order = [index for index, following in itertools.pairwise(test_log) if following == index + 1]
    assert in_order[:3] == [0, 1, 2]


def test_the_test_set_takes_no_part_in_selection_and_need_not_be(fit, datasets, pairs_dir):
    usual = fit()
    swapped = NpyDataset(pairs_dir / "train" / "x", pairs_dir / "train" / "y")
    other, without = fit(datasets[0], swapped), fit(datasets[0], None)
    for result in (other, without):
        assert (usual.digest, usual.state.best_epoch) == (result.digest, result.state.best_epoch)
    assert usual.metrics["test.f1"] != other.metrics["test.f1"]
    assert {key.partition(".")[0] for key in without.metrics} == {"validation"}
    contract, (train_split, _) = best_weights(usual)["contract"], datasets[0].split(0.2, seed=0)
    pixels = np.concatenate([np.load(file).reshape(-1, 3) for file in train_split.images]) / 255
    assert contract["mean"] == pytest.approx(pixels.mean(0))  # of the training split alone
    assert contract["std"] == pytest.approx(pixels.std(0)) and len(train_split.images) == 8


def test_the_best_weights_are_those_of_the_best_epoch_and_give_the_test_result(fit, datasets, tiny_config):
    # The smallest F1 is wanted, so that the best epoch is not the last one.
    result = fit(EPOCHS=4, MONITOR="min f1")
    scores = [event["validation.f1"] for event in result.history]
    assert result.state.best_epoch == 1 + int(np.argmin(scores)) != 4
    assert result.metrics["validation.f1"] == min(scores)
    model = load_model(result.weights["best"], UNET, tiny_config["MODEL_CONFIG"])
    contract = DataContract.from_dict(best_weights(result)["contract"])
    test_set = datasets[1].with_contract(contract).for_evaluation()
    pairs = [test_set[index] for index in range(len(test_set))]
    with torch.no_grad():
        predicted = torch.cat([model(image[None])[0].argmax(0).flatten() for image, _ in pairs])
    target = torch.cat([mask.flatten() for _, mask in pairs])
    assert result.metrics["test.f1"] == pytest.approx(f1_score(target, predicted, average="macro"), abs=1e-12)
    per_class = f1_score(target, predicted, average=None)
    assert [result.metrics[f"test.f1.{label}"] for label in range(3)] == pytest.approx(per_class, abs=1e-12)


def test_what_selects(fit, datasets, tiny_config, capsys):
    result = fit(validation=datasets[1])
    assert result.metrics["validation.f1"] == result.metrics["test.f1"]
    result = fit(VALIDATION_FRACTION=0, EPOCHS=2)
    assert weights_digest(best_weights(result)["model"]) == result.digest and result.state.best_epoch == 2
    still = {"OPTIMIZER_CONFIG": {"lr": 0.0}, "MODEL_CONFIG": tiny_config["MODEL_CONFIG"] | {"norm": None}}
    result = fit(EPOCHS=30, PATIENCE=2, **still)
    assert result.state.stopped and len(result.history) == result.state.best_epoch + 2 == 3
    assert "training stops here" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------- the optimization


def test_accumulation_makes_the_steps_of_larger_batches(fit, tiny_config):
    tiny_config |= {"OPTIMIZER": torch.optim.SGD, "OPTIMIZER_CONFIG": {"lr": 0.1}, "EPOCHS": 1}
    tiny_config["MODEL_CONFIG"] |= {"dropout": 0.0, "norm": None}
    states = []
    for batch_size, accumulate in ((8, 1), (4, 2), (2, 4)):
        loader = {"batch_size": batch_size}
        result = fit(DATA_LOADER_CONFIG=loader, ACCUMULATE=accumulate, VALIDATION_FRACTION=0)
        assert result.state.step == 3  # 20 samples: 8, 8, and 4 in fewer batches
        states.append(last_state(result)["model"])
    for state, name in itertools.product(states[1:], states[0]):
        torch.testing.assert_close(states[0][name], state[name], rtol=1e-4, atol=1e-5)


def test_the_norm_of_the_gradient_is_clipped(fit, tiny_config):
    tiny_config |= {"OPTIMIZER": torch.optim.SGD, "OPTIMIZER_CONFIG": {"lr": 1.0}, "EPOCHS": 1}
    tiny_config |= {"DATA_LOADER_CONFIG": {"batch_size": 100}}
    before, moved = initial_model(tiny_config), {}
    for clip in (None, 1e-3):
        after = last_state(fit(CLIP_NORM=clip))["model"]
        steps = [(after[name] - weight.detach()).flatten() for name, weight in before.named_parameters()]
        moved[clip] = torch.cat(steps).norm().item()
    assert moved[1e-3] == pytest.approx(1e-3, rel=1e-2)
    assert moved[None] > 10 * moved[1e-3]


class SteppedSGD(torch.optim.SGD):
    """Notes the weights after each step."""

    after_steps: list[list[Tensor]] = []  # noqa: RUF012

    def step(self, closure=None):
        super().step(closure)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        SteppedSGD.after_steps.append([parameter.detach().clone() for parameter in parameters])


def test_the_moving_average_is_evaluated_and_becomes_the_best(fit, tiny_config):
    tiny_config |= {"OPTIMIZER": SteppedSGD, "OPTIMIZER_CONFIG": {"lr": 0.1}, "EPOCHS": 1, "EMA": 0.5}
    SteppedSGD.after_steps.clear()
    result = fit()
    expected = SteppedSGD.after_steps[0]
    for weights in SteppedSGD.after_steps[1:]:
        expected = [0.5 * old + 0.5 * new for old, new in zip(expected, weights, strict=True)]
    best = best_weights(result)["model"]
    names = [name for name, _ in initial_model(tiny_config).named_parameters()]
    for name, tensor in zip(names, expected, strict=True):
        torch.testing.assert_close(best[name], tensor)
        assert not torch.equal(best[name], last_state(result)["model"][name])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"SCHEDULER": StepLR, "SCHEDULER_CONFIG": {"step_size": 1, "gamma": 0.5}, "SCHEDULER_STEP": "epoch"},
         [0.1] * 4 + [0.05] * 4),
        ({"SCHEDULER": StepLR, "SCHEDULER_CONFIG": {"step_size": 4}}, [0.1] * 4 + [0.01] * 4),
        ({"SCHEDULER": ReduceLROnPlateau, "SCHEDULER_CONFIG": {"patience": 0, "threshold": 10.0},
          "SCHEDULER_STEP": "epoch", "EPOCHS": 3}, [0.1] * 8 + [0.01] * 4),
    ],
)  # fmt: skip
def test_the_schedule_steps_when_it_should(fit, changes, expected):
    assert rates_of(fit(OPTIMIZER_CONFIG={"lr": 0.1}, **changes)) == pytest.approx(expected)


def test_what_a_schedule_lacks_is_filled_in(fit, datasets, tiny_config, global_config):
    rates = rates_of(fit(SCHEDULER=OneCycleLR))
    assert len(rates) == 8 and max(rates) <= 1e-2 and rates[-1] < 1e-3 < rates[2]
    plateau = {"SCHEDULER": ReduceLROnPlateau, "SCHEDULER_STEP": "epoch"}
    for monitor, mode in (("max f1", "max"), ("min loss", "min")):
        config = tiny_config | plateau | {"MONITOR": monitor}
        assert prepare(*datasets, config, global_config, None, train.__module__).scheduler.mode == mode


def test_it_starts_from_given_weights(fit, tiny_config, tmp_path):
    torch.manual_seed(7)
    given = UNET(**tiny_config["MODEL_CONFIG"])
    save_weights(tmp_path / "ours.pt", {"model": given.state_dict()})
    torch.save(given.state_dict(), tmp_path / "plain.pt")
    for file in ("ours.pt", "plain.pt"):
        options = {"OPTIMIZER_CONFIG": {"lr": 0.0}, "INIT_WEIGHTS": str(tmp_path / file), "EPOCHS": 1}
        after = last_state(fit(**options))["model"]
        assert all(torch.equal(after[name], tensor) for name, tensor in given.named_parameters())


def test_bf16_trains_to_nearly_the_same_and_keeps_weights_in_float32(fit):
    results = [fit(PRECISION=one) for one in ("fp32", "bf16")]
    assert results[0].digest != results[1].digest
    tensors = [tensor for tensor in last_state(results[1])["model"].values() if tensor.ndim]
    assert all(tensor.dtype == torch.float32 for tensor in tensors)
    losses = [result.history[-1]["train.loss"] for result in results]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_it_trains_on_a_gpu_repeatably(fit, precision):
    results = [fit(DEVICE="cuda", PRECISION=precision, EPOCHS=10) for _ in range(2)]
    assert results[0].digest == results[1].digest
    assert results[0].history[-1]["train.loss"] < results[0].history[0]["train.loss"]


# ------------------------------------------------------------------------- any model, any data, any metric


def absolute_error(pred: Tensor, target: Tensor) -> Tensor:
    return (pred - target).abs().mean()


def test_a_regression_trains_and_plain_metrics_are_means_over_samples(fit, tiny_config):
    features = torch.randn(150, 4, generator=torch.Generator().manual_seed(0))
    values = features @ torch.tensor([[1.0], [-2.0], [0.5], [0.0]])
    values[0] = 0  # a first target of zero makes no classification of it
    linear = {"in_features": 4, "out_features": 1}
    tiny_config["OPTIMIZER_CONFIG"] = {"lr": 0.1}
    tiny_config |= {"MODEL": nn.Linear, "MODEL_CONFIG": linear, "EPOCHS": 20, "MONITOR": "min error"}
    tiny_config |= {
        "LOSS": nn.functional.mse_loss,
        "METRICS": {"error": absolute_error},
        "REQUIRE_RERUNNABLE": False,
    }
    result = fit(*(TensorDataset(features[part], values[part]) for part in (slice(120), slice(120, None))))
    model = load_model(result.weights["best"], nn.Linear, linear)
    with torch.no_grad():
        expected = (model(features[120:]) - values[120:]).abs().mean().item()
    assert result.metrics["test.error_sample_mean"] == pytest.approx(expected, rel=1e-5)
    assert expected < 0.2 and best_weights(result)["contract"]["task"] == "values"


def test_heights_without_data_count_nowhere(fit, tiny_config, tmp_path):
    tiny_config["MODEL_CONFIG"] |= {"ch_out": 1}
    tiny_config |= {"LOSS": nn.MSELoss, "METRICS": {"error": absolute_error}, "MONITOR": "min error"}
    tiny_config |= {"REQUIRE_RERUNNABLE": False}  # a record takes no functions from tests
    results = []
    for fill in (-9999, 7, np.nan):
        for split, number in (("train", 6), ("test", 2)):
            for index in range(number):
                rng = np.random.default_rng([index, number])
                image = rng.integers(1, 200, (16, 16, 3)).astype(np.uint8)
                heights = (image.sum(-1) / 100).astype(np.float32)
                heights[:, :5] = fill
                image[:3] = 0
                heights[:3] = rng.normal()  # of pixels without data
                write(tmp_path / str(fill) / split / "x" / f"{index}.tif", image, nodata=0)
                write(tmp_path / str(fill) / split / "y" / f"{index}.tif", heights, nodata=fill)
        places = [tmp_path / str(fill) / split for split in ("train", "test")]
        results.append(fit(*(NpyDataset(one / "x", one / "y", task="values") for one in places)))
    assert len({result.digest for result in results}) == 1
    assert results[0].metrics["test.error_sample_mean"] == results[2].metrics["test.error_sample_mean"] < 10


def test_binary_masks_of_0_and_255_are_mapped_by_the_config(fit, pairs_dir, tmp_path, tiny_config):
    for file in pairs_dir.glob("*/*/*.npy"):
        array, copied = np.load(file), tmp_path / file.relative_to(pairs_dir)
        copied.parent.mkdir(parents=True, exist_ok=True)
        np.save(copied, array if file.parent.name == "x" else np.uint8(255) * (array > 0))
    make = partial(NpyDataset, task="multi-label")
    sets = [make(tmp_path / split / "x", tmp_path / split / "y") for split in ("train", "test")]
    tiny_config["MODEL_CONFIG"]["ch_out"] = 1
    tiny_config |= {"LOSS": smooth_dice_loss, "EPOCHS": 20, "MASK_VALUES": {255: 1}}
    assert fit(*sets).metrics["test.f1"] > 0.7
    with pytest.raises(DataError, match=r"255.*MASK_VALUES"):
        fit(*sets, MASK_VALUES=None)


def test_a_lambda_trains_where_the_user_asks_for_it_and_the_row_says_so(fit, tiny_config, global_config):
    tiny_config["LOSS"] = lambda pred, target: multi_class_dice_ce_sum(pred, target)
    with pytest.raises(ConfigError, match="lambda"):
        fit()
    fit(REQUIRE_RERUNNABLE=False)
    assert "LOSS" in the_row(global_config)["RERUNNABLE"]


class MeanClassifier(nn.Linear):
    """Classifies by the mean color."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mean((-2, -1)))


def test_images_with_plain_numbers_as_labels_train_and_get_no_name_of_other_data(
    fit, tiny_config, global_config
):
    generator = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(3, 8, 8, generator=generator) + index % 2, index % 2) for index in range(60)]
    tiny_config |= {"MODEL": MeanClassifier, "MODEL_CONFIG": {"in_features": 3, "out_features": 2}}
    tiny_config |= {"EPOCHS": 20, "OPTIMIZER_CONFIG": {"lr": 0.1}, "LOSS": nn.CrossEntropyLoss}
    tiny_config |= {"METRICS": {"accuracy": accuracy}, "MONITOR": "max accuracy"}
    tiny_config |= {key: small()[key] for key in ("DATASET", "DATASET_CONFIG")}  # which is not what is given
    result = fit(pairs[:40], pairs[40:])
    assert result.metrics["test.accuracy"] == 1.0
    assert best_weights(result)["contract"]["task"] == "multi-class"
    row = the_row(global_config)
    assert row["RERUNNABLE"].startswith("no: the datasets are not named") and row["DATASET"] is None


@pytest.mark.parametrize(
    ("loss", "channels", "task"),
    [(masked_multi_class_dice_ce_sum, 2, "multi-class"), (masked_dice_bce_sum, 4, "multi-label")],
)
def test_the_task_of_masked_targets_is_that_of_what_is_under_the_mask(fit, tiny_config, loss, channels, task):
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 2 if task == "multi-label" else 3, (8, channels, 16, 16), generator=generator)
    targets[:, 0] = 1  # all usable
    targets[:, 0, :4], targets[:, 1:, :4] = 0, 77  # but these, where anything may stand
    tiny_config |= {"LOSS": loss, "METRICS": {"f1": masked_f1}, "EPOCHS": 1}
    kinds = [targets]
    if task == "multi-label":  # NaN is no class number, not even one that does not count
        kinds.append(targets.float().masked_fill(targets == 77, math.nan))
    for anything in kinds:
        train_set = TensorDataset(torch.rand(8, 3, 16, 16, generator=generator), anything)
        result = fit(train_set, train_set)
        assert best_weights(result)["contract"]["task"] == task


# ----------------------------------------------------------------------------------------- what it leaves


def test_config_files_row_and_result_agree(
    datasets, tiny_config, global_config, capsys, monkeypatch, tmp_path
):
    monkeypatch.undo()  # with a picture and the list of packages
    project = project_of(PACKAGE)
    before = copy.deepcopy(capture(tiny_config, project))
    result = train(*datasets, tiny_config, global_config | {"NOTE": str(tmp_path / "no folder")})
    assert capture(tiny_config, project) == before
    row = the_row(global_config)
    assert row["NAME"] == result.name == result.log_dir.name == result.weight_dir.name
    assert result.name == f"{row['DATE']}_tiny"
    assert row["WEIGHTS_DIGEST"] == result.digest == weights_digest(last_state(result)["model"])
    wanted = {
        "STATUS": "finished",
        "RERUNNABLE": "yes",
        "RAN_ON": "cpu fp32",
        "MODEL": ".models.unet:UNET",
        "ROUTINE_NAME": ".training.pytorch_training",
        "OPTIMIZER_CONFIG.lr": 1e-2,
        "DATASET_CONFIG.train.crop": 16,
        "test.f1": result.metrics["test.f1"],
    }
    assert {key: row[key] for key in wanted} == wanted
    files = ["config.json", "environment.json", "journal.jsonl", "picture.png", "tensorboard"]
    assert sorted(path.name for path in result.log_dir.iterdir() if not path.name.startswith(".")) == files
    weights = ["best.pt", "last-00000004.pt", "last-00000008.pt"]
    assert sorted(path.name for path in result.weight_dir.iterdir()) == weights
    assert sorted(path.name for path in Path(global_config["ROOT_PATH"]).iterdir()) == ["logs", "weights"]
    environment = json.loads((result.log_dir / "environment.json").read_text())
    assert (environment["device"], environment["precision"]) == ("cpu", "fp32")
    assert environment["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert len(environment["data"]) == 28
    printed = capsys.readouterr().out
    for text in (result.name, "best.pt", "experiments.csv", "picture.png", "predict_run("):
        assert text in printed
    assert result.picture.read_bytes().startswith(b"\x89PNG")
    assert [event["step"] for event in events_of(result.log_dir, "step")] == list(range(1, 9))
    kinds = [event["event"] for event in events_of(result.log_dir) if event["event"] != "step"]
    assert [kind for kind in kinds if kind != "best"] == ["start", "epoch", "epoch", "test"]
    assert kinds[1] == "best"  # the first epoch, whatever its result


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_lines_that_cannot_be_printed_end_no_training(fit, global_config, monkeypatch):
    with open("/dev/full", "wb", buffering=0) as file:  # as a job's output on a disk that is full
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file, write_through=True))
        with pytest.raises(OSError):
            print("anything")
        fit()
        monkeypatch.undo()
    assert the_row(global_config)["STATUS"] == "finished"


def test_two_runs_within_a_second_get_two_names(fit, global_config):
    names = [fit(EPOCHS=1, DATE="2021-01-01").name for _ in range(2)]
    assert names == ["2021-01-01_tiny", "2021-01-01_tiny-2"]
    assert len(rows_of(global_config)) == 2


# ------------------------------------------------------------------------------------- what cannot go well


def test_all_problems_are_reported_at_once_and_nothing_is_written(
    fit, tmp_path, datasets, tiny_config, global_config
):
    wrong = {"EPOCH": 3, "DEVICE": "cuda:77", "LOSS": lambda a, b: a, "ACCUMULATE": 0}
    with pytest.raises(ConfigError) as caught:
        fit(MODEL_CONFIG=tiny_config["MODEL_CONFIG"] | {"dropuot": 0.1}, **wrong)
    for text in ("EPOCHS?", "cuda:77", "lambda", "ACCUMULATE", "dropout?"):
        assert text in str(caught.value)
    for kind, content in {"x": np.full((32, 32, 3), np.nan, "f4"), "y": np.full((32, 32), 77, "u1")}.items():
        (tmp_path / kind).mkdir()
        np.save(tmp_path / kind / "broken.npy", content)
    broken = NpyDataset(tmp_path / "x", tmp_path / "y", crop=16)
    with pytest.raises(ConfigError) as caught:
        fit(broken, datasets[1], EPOCHS=0)
    for text in ("EPOCHS", "broken.npy", "NaN", "77"):
        assert text in str(caught.value)
    assert not list(Path(global_config["ROOT_PATH"]).rglob("config.json"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MODEL_CONFIG": {"ch_in": 12, "ch_out": 3}}, "ch_in is 12, but the images have 3 channels"),
        ({"MODEL_CONFIG": {"ch_in": 3, "ch_out": 2}}, r"the values 2 are outside of the classes 0 to 1"),
        ({"LOSS": smooth_dice_loss}, "LOSS or METRICS do not fit"),
        ({"LOSS": f1}, "LOSS f1 has no gradient"),
        ({"LOSS": nn.CrossEntropyLoss, "LOSS_CONFIG": {"reduction": "none"}}, "returns 256 numbers"),
        ({"MONITOR": "max f1.nonsense"}, "f1.nonsense is not among the results"),
        ({"INIT_WEIGHTS": "nowhere.pt"}, "no such weights file"),
        ({"PRECISION": "fp16"}, "fp16"),
        ({"RESUME": "no-such-run"}, "no such run"),
        ({"PATIENCE": 3, "VALIDATION_FRACTION": 0}, "PATIENCE is 3, which needs a validation set"),
        ({"OPTIMIZER_CONFIG": {"lr": -1.0}}, "OPTIMIZER cannot be built"),
        ({"DATA_LOADER_CONFIG": {"batch_size": 4, "num_workers": -1}}, "DATA_LOADER cannot be built"),
        ({"SCHEDULER": ReduceLROnPlateau}, "SCHEDULER_STEP=epoch"),
        ({"IGNORE_INDEX": 9}, "IGNORE_INDEX is 9, but the train data ignores 255"),
    ],
)
def test_what_does_not_fit_is_reported_before_training(fit, global_config, changes, message):
    with pytest.raises(ValueError, match=message):
        fit(**changes)
    assert not list(Path(global_config["ROOT_PATH"]).rglob("journal.jsonl"))


@pytest.mark.parametrize(
    ("types", "message"),
    [
        ((torch.float64, torch.int64), r"inputs .* of the type float64 \(let .* give float32\)"),
        ((torch.uint8, torch.int64), r"does not take inputs .* of the type uint8 \(let .* give float32\)"),
        ((torch.float32, torch.uint8), r"the target, of the type uint8 \(let .* int64 for classes"),
    ],
)
def test_samples_of_unusual_types_are_named(fit, types, message):
    inputs, targets = torch.ones(8, 3, 8, 8).to(types[0]), torch.ones(8, 8, 8).to(types[1])
    data = TensorDataset(inputs, targets)
    with pytest.raises(ConfigError, match=message):
        fit(data, data, REQUIRE_RERUNNABLE=False, LOSS=nn.CrossEntropyLoss, METRICS={}, MONITOR="min loss")


def test_folders_that_are_none_are_refused(datasets, tiny_config, global_config, tmp_path):
    (tmp_path / "file").write_text("")
    for key, value, message in (
        ("WEIGHT_DIR", None, "WEIGHT_DIR is missing in global_config"),
        ("LOG_DIR", tmp_path / "file", "LOG_DIR is .*file: take a folder"),
        ("LOG_DIR", tmp_path / "file" / "logs", "LOG_DIR is .*file is a file: take a folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(*datasets, tiny_config, global_config | {key: value})


def test_splits_with_several_tasks_are_refused(fit, datasets, pairs_dir):
    other = NpyDataset(pairs_dir / "test" / "x", pairs_dir / "test" / "y", task="values")
    with pytest.raises(ConfigError, match="several tasks"):
        fit(datasets[0], other)


def test_weights_that_are_not_finite_are_never_saved(fit, global_config):
    sgd = {"OPTIMIZER": torch.optim.SGD, "OPTIMIZER_CONFIG": {"lr": 1e38}, "CHECKPOINT_SECONDS": 0}
    with pytest.raises(NonFiniteLoss):
        fit(**sgd)
    assert all(map(is_finite, Path(global_config["WEIGHT_DIR"]).rglob("last-*.pt")))


class Glutton(nn.Conv2d):
    """Wants more memory than there is, in training."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            torch.empty(2**60, dtype=torch.uint8)
        return super().forward(x)


def test_what_goes_wrong_in_a_batch_is_explained(fit, pairs_dir, global_config):
    with pytest.raises(OutOfMemory, match=r"batch_size=4.*batch_size=2 ACCUMULATE=2"):
        fit(MODEL=Glutton, MODEL_CONFIG={"in_channels": 3, "out_channels": 3, "kernel_size": 1})
    assert the_row(global_config)["STATUS"] == "failed"
    folders = [pairs_dir / split for split in ("train", "test")]
    tiny = [NpyDataset(folder / "x", folder / "y", crop=2) for folder in folders]
    with pytest.raises(UserError, match=r"BatchNorm.*drop_last=True.*GroupNorm"):
        fit(*tiny, DATA_LOADER_CONFIG={"batch_size": 1})


def test_the_shipped_configs_are_valid_and_round_trip():
    project = project_of(PACKAGE)
    for config in (train_config, small()):
        check(config, project)
        record = json.loads(json.dumps(capture(config, project)))
        taken = {key: value for key, value in config.items() if key not in NOT_RESTORED}
        assert difference(restore(record, project), taken) == {}
    parameters = UNET(**train_config["MODEL_CONFIG"]).parameters()
    assert sum(parameter.numel() for parameter in parameters) > 30e6
