"""A run that was interrupted ends with the weights of the run that was not."""

from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch import Tensor, nn

from dida_tools.config.capture import ConfigError
from dida_tools.config.errors import UserError
from dida_tools.models import UNET
from dida_tools.training.pytorch_training import train
from dida_tools.utils.logging import read_log
from dida_tools.utils.logging.journal import read_journal
from dida_tools.utils.weights import load_weights


class InterruptedUNET(UNET):
    """Raises KeyboardInterrupt in a chosen forward pass of training, as Ctrl-C would."""

    interrupt_at: int | None = None
    forwards = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            InterruptedUNET.forwards += 1
            if InterruptedUNET.forwards == InterruptedUNET.interrupt_at:
                raise KeyboardInterrupt
        return super().forward(x)


@pytest.fixture
def rich_config(tiny_config) -> dict:
    """Everything that has a state: momentum, schedule, accumulation, moving average, dropout, augmentation."""
    tiny_config |= {"MODEL": InterruptedUNET, "EPOCHS": 3, "ACCUMULATE": 2, "EMA": 0.9, "CLIP_NORM": 1.0}
    tiny_config |= {"SCHEDULER": torch.optim.lr_scheduler.OneCycleLR, "CHECKPOINT_SECONDS": 0}
    tiny_config |= {"DATA_LOADER_CONFIG": {"batch_size": 3, "shuffle": True}}
    InterruptedUNET.interrupt_at, InterruptedUNET.forwards = None, 0
    return tiny_config


def interrupt(datasets, config: dict, global_config: dict, at: int) -> str:
    InterruptedUNET.interrupt_at, InterruptedUNET.forwards = at, 0
    with pytest.raises(KeyboardInterrupt):
        train(*datasets, config, global_config)
    InterruptedUNET.interrupt_at = None
    return config.get("RESUME") or read_log(Path(global_config["LOG_DIR"]) / "experiments.csv")[-1]["NAME"]


def equal_states(one, other) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal_states(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal_states, one, other))
    return one == other


def assert_same_end(result, expected) -> None:
    state, wanted = load_weights(result.weights["last"]), load_weights(expected.weights["last"])
    for one in (state, wanted):
        for timed in (one["state"], *one["history"]):
            timed.pop("seconds")
    for part in wanted:
        assert equal_states(state[part], wanted[part]), part
    best, wanted_best = load_weights(result.weights["best"]), load_weights(expected.weights["best"])
    assert equal_states(best, wanted_best)
    assert result.metrics == expected.metrics
    plain = [[{k: v for k, v in event.items() if k != "seconds"} for event in r.history] for r in (result, expected)]
    assert plain[0] == plain[1]


def steps_in_journal(result) -> list[int]:
    return [event["step"] for event in read_journal(result.log_dir / "journal.jsonl") if event["event"] == "step"]


def test_interrupted_at_every_batch_it_ends_the_same(datasets, rich_config, global_config):
    expected = train(*datasets, rich_config, global_config)
    num_batches = InterruptedUNET.forwards
    assert num_batches == 18
    for at in range(1, num_batches + 1):
        name = interrupt(datasets, rich_config, global_config, at)
        result = train(*datasets, rich_config | {"RESUME": name}, global_config)
        assert result.name == name
        assert_same_end(result, expected)
        assert steps_in_journal(result) == list(range(1, 10))


def test_twice_in_one_epoch_and_with_other_workers(datasets, rich_config, global_config):
    expected = train(*datasets, rich_config, global_config)
    name = interrupt(datasets, rich_config, global_config, at=9)
    with_workers = rich_config | {"DATA_LOADER_CONFIG": rich_config["DATA_LOADER_CONFIG"] | {"num_workers": 2}}
    interrupt(datasets, with_workers | {"RESUME": name}, global_config, at=3)
    result = train(*datasets, rich_config | {"RESUME": name}, global_config)
    assert_same_end(result, expected)
    rows = read_log(Path(global_config["LOG_DIR"]) / "experiments.csv")
    assert [row["STATUS"] for row in rows if row["NAME"] == name] == ["finished"]


def test_before_the_first_checkpoint_it_starts_again_under_its_name(datasets, rich_config, global_config, capsys):
    rich_config["CHECKPOINT_SECONDS"] = 1000
    expected = train(*datasets, rich_config, global_config)
    name = interrupt(datasets, rich_config, global_config, at=5)
    row = read_log(Path(global_config["LOG_DIR"]) / "experiments.csv")[-1]
    assert row["STATUS"] == "interrupted"
    result = train(*datasets, rich_config | {"RESUME": name}, global_config)
    assert "starts again" in capsys.readouterr().out
    assert_same_end(result, expected)
    assert steps_in_journal(result) == list(range(1, 10))


def test_a_damaged_checkpoint_is_said_and_the_one_before_used(datasets, rich_config, global_config, capsys):
    expected = train(*datasets, rich_config, global_config)
    name = interrupt(datasets, rich_config, global_config, at=12)
    newest = max((Path(global_config["WEIGHT_DIR"]) / name).glob("last-*.pt"))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    result = train(*datasets, rich_config | {"RESUME": name}, global_config)
    assert "damaged" in capsys.readouterr().out
    assert_same_end(result, expected)


def test_a_finished_run_is_prolonged_as_if_it_had_been_longer(datasets, rich_config, global_config):
    rich_config["SCHEDULER"] = None
    expected = train(*datasets, rich_config | {"EPOCHS": 4}, global_config)
    short = train(*datasets, rich_config | {"EPOCHS": 2}, global_config)
    longer = train(*datasets, rich_config | {"EPOCHS": 4, "RESUME": short.name}, global_config)
    assert longer.name == short.name
    assert_same_end(longer, expected)
    rows = read_log(Path(global_config["LOG_DIR"]) / "experiments.csv")
    assert [row["EPOCHS"] for row in rows if row["NAME"] == short.name] == [4]


def test_a_prolonged_schedule_is_that_of_the_new_length(datasets, rich_config, global_config):
    long = train(*datasets, rich_config | {"EPOCHS": 6}, global_config)
    short = train(*datasets, rich_config | {"EPOCHS": 3}, global_config)
    prolonged = train(*datasets, rich_config | {"EPOCHS": 6, "RESUME": short.name}, global_config)
    rates = [
        [event["learning_rate"] for event in read_journal(r.log_dir / "journal.jsonl") if event["event"] == "step"]
        for r in (long, prolonged)
    ]
    assert rates[0][10:] == pytest.approx(rates[1][10:])
    assert rates[0][:9] != pytest.approx(rates[1][:9])


def test_a_run_that_stopped_early_can_go_on(datasets, rich_config, global_config):
    rich_config |= {"PATIENCE": 1, "EPOCHS": 10, "OPTIMIZER_CONFIG": {"lr": 0.0}, "SCHEDULER": None, "EMA": None}
    stopped = train(*datasets, rich_config, global_config)
    assert stopped.state.epoch < 10
    again = train(*datasets, rich_config | {"EPOCHS": 12, "RESUME": stopped.name}, global_config)
    assert again.state.epoch > stopped.state.epoch


def test_a_run_in_training_is_locked(datasets, rich_config, global_config):
    name = interrupt(datasets, rich_config, global_config, at=5)
    with (
        FileLock(Path(global_config["LOG_DIR"]) / name / ".lock"),
        pytest.raises(UserError, match="trained by another process"),
    ):
        train(*datasets, rich_config | {"RESUME": name}, global_config)


def test_another_config_is_refused_and_another_machine_said(datasets, rich_config, global_config, capsys):
    name = interrupt(datasets, rich_config, global_config, at=9)
    record = (Path(global_config["LOG_DIR"]) / name / "config.json").read_bytes()
    loss, rich_config["LOSS"] = rich_config["LOSS"], nn.CrossEntropyLoss
    rich_config["OPTIMIZER_CONFIG"] = {"lr": 0.5}
    with pytest.raises(ConfigError, match=r"(?s)OPTIMIZER_CONFIG.lr was .* LOSS|LOSS .*OPTIMIZER_CONFIG.lr was"):
        train(*datasets, rich_config | {"RESUME": name}, global_config)
    assert record == (Path(global_config["LOG_DIR"]) / name / "config.json").read_bytes()
    rich_config |= {"LOSS": loss, "OPTIMIZER_CONFIG": {"lr": 1e-2}}
    train(*datasets, rich_config | {"RESUME": name, "CHANNELS_LAST": False}, global_config)
    assert "goes on with another CHANNELS_LAST" in capsys.readouterr().out


@pytest.mark.parametrize("at", [2, 6, 7, 9, 13])
def test_tensorboard_goes_on_without_gaps_or_repetitions(datasets, rich_config, global_config, at):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    name = interrupt(datasets, rich_config, global_config, at)
    result = train(*datasets, rich_config | {"RESUME": name}, global_config)
    events = EventAccumulator(str(result.log_dir / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 10))
    assert [event.step for event in events.Scalars("validation/f1")] == [3, 6, 9]


def test_tensorboard_after_an_interruption_of_the_evaluation(datasets, rich_config, global_config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    expected = train(*datasets, rich_config, global_config)
    rich_config["METRICS"] = {"f1": rich_config["METRICS"]["f1"], "interrupts": interrupting_metric}
    InterruptingMetric.calls, InterruptingMetric.at = 0, 4
    with pytest.raises(KeyboardInterrupt):
        train(*datasets, rich_config, global_config)
    InterruptingMetric.at = None
    name = read_log(Path(global_config["LOG_DIR"]) / "experiments.csv")[-1]["NAME"]
    result = train(*datasets, rich_config | {"RESUME": name}, global_config)
    assert result.digest == expected.digest
    events = EventAccumulator(str(result.log_dir / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 10))
    assert [event.step for event in events.Scalars("validation/f1")] == [3, 6, 9]


class InterruptingMetric:
    """When to interrupt."""

    calls = 0
    at: int | None = None


def interrupting_metric(pred: Tensor, target: Tensor) -> float:
    InterruptingMetric.calls += 1
    if InterruptingMetric.calls == InterruptingMetric.at:
        raise KeyboardInterrupt
    return float((pred.argmax(1) == target).float().mean())


def test_changed_data_is_said(datasets, pairs_dir, rich_config, global_config, tmp_path, capsys):
    import shutil

    import numpy as np

    from dida_tools.utils.data import NpyDataset

    folder = shutil.copytree(pairs_dir / "train", tmp_path / "train")
    own = NpyDataset(folder / "x", folder / "y", crop=16), datasets[1]
    name = interrupt(own, rich_config, global_config, at=9)
    for file in (folder / "x").iterdir():
        np.save(file, np.load(file) // 2)
    again = NpyDataset(folder / "x", folder / "y", crop=16), datasets[1]
    capsys.readouterr()
    train(*again, rich_config | {"RESUME": name}, global_config)
    assert "the training data is not what it was" in capsys.readouterr().out
