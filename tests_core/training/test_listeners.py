"""Listeners of a run: their protocol, TensorBoard, pictures, and mails."""

import errno
import io
import math
import os
import signal
import sys
import time
from typing import Any

import numpy as np
import pytest
from dida_core.errors import ConfigError, Preempted, UserError
from dida_core.report import pictures
from dida_core.report.console import ProgressBar, signs_of_life
from dida_core.report.listener import Listener
from dida_core.report.pictures import Picture, choose_samples
from dida_core.report.tensorboard import TensorBoard
from dida_core.runs.lookup import run_names
from dida_core.runs.run import start_run
from dida_core.training.setup import prepare
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.util.tensor_util import make_ndarray
from torch import Tensor, nn

from dida_tools.training import pytorch_training
from dida_tools.utils.loss import multi_class_dice_ce_sum
from dida_tools.utils.notify import smtp

from tests.helpers import events_of, run_script, scalars_of

SECRET = "hunter2-in-the-error"
train = pytorch_training.train


class Recorder(Listener):
    """Notes what it is told, and fails where it should."""

    def __init__(self, failing: str = "") -> None:
        self.failing, self.told = failing, []

    def _note(self, what: str, *values: Any) -> None:
        self.told.append((what, *values))
        if what == self.failing:
            raise RuntimeError(f"{what} is broken")

    def started(self, run) -> None:
        self._note("started", run.state.step)

    def step(self, run, event) -> None:
        self._note("step", event["step"], event.get("log.twice"), list(run.pending.images))

    def epoch(self, run, event) -> None:
        self._note("epoch", event["epoch"], event.get("log.mine"))

    def finished(self, run, result) -> None:
        self._note("finished", result.name)

    def ended(self, run, status, error) -> None:
        self._note("ended", status, str(error))


@pytest.fixture
def run_with(datasets, tiny_config, global_config, quick):
    """A loop of one's own: no training, but the run's bookkeeping, with values of one's own."""

    def loop(*listeners: Listener, fail_at: int = 0, **changes: Any) -> Any:
        setup = prepare(*datasets, tiny_config | changes, global_config, None, pytorch_training.__name__)
        with start_run(setup, listeners) as run:
            for epoch in run.epochs():
                for inputs, targets in run.batches():
                    run.log("twice", 2 * (run.state.step + 1))
                    run.log_image("first/one", np.full((8, 8, 3), run.state.step, np.uint8))
                    run.end_batch(setup.loss_fn(setup.model(inputs), targets))
                    if run.state.step + 1 == fail_at:
                        raise LookupError("no more")
                    run.end_step()
                run.log("mine", epoch / 2)
                run.end_epoch({"f1": 0.5})
            return run.finish()

    return loop


def test_listeners_get_each_event_and_values_of_ones_own(run_with):
    recorder = Recorder()
    result = run_with(recorder, TensorBoard(), Picture())
    steps = [("step", number, 2 * number, ["first/one"]) for number in range(1, 9)]
    epochs = [("epoch", 1, 0.5), ("epoch", 2, 1.0)]
    expected = [*steps[:4], epochs[0], *steps[4:], epochs[1]]
    assert recorder.told == [("started", 0), *expected, ("finished", result.name)]
    assert [event["log.twice"] for event in events_of(result.log_dir, "step")] == list(range(2, 18, 2))
    shown = scalars_of(result.log_dir)
    assert shown["log/twice"] == [(number, 2 * number) for number in range(1, 9)]
    assert shown["log/mine"] == [(4, 0.5), (8, 1.0)]
    images = sorted((result.log_dir / "images").iterdir())
    assert [image.name for image in images] == [f"first-one-{step:08d}.png" for step in range(1, 9)]
    assert np.asarray(Image.open(images[-1]))[0, 0].tolist() == [7, 7, 7]


@pytest.mark.parametrize("failing", ["started", "step", "epoch", "finished"])
def test_a_listener_that_fails_is_reported_once_and_ends_nothing(run_with, capsys, failing):
    broken, valid = Recorder(failing), Recorder()
    result = run_with(broken, valid, ProgressBar())
    assert events_of(result.log_dir)[-1]["event"] == "test" and broken.told == valid.told
    sentence = f"Recorder failed (RuntimeError: {failing} is broken). Training continues."
    assert capsys.readouterr().out.count(sentence) == 1


def test_listeners_get_to_know_of_a_failure_and_of_a_resumption(run_with, global_config):
    recorder = Recorder()
    with pytest.raises(LookupError):
        run_with(recorder, CHECKPOINT_SECONDS=0, fail_at=3)
    assert recorder.told[-1] == ("ended", "failed", "no more")
    (name,) = run_names(global_config["LOG_DIR"])
    run_with(recorder, RESUME=name)
    assert ("started", 2) in recorder.told


def test_a_result_is_a_short_table_and_shows_its_curves(datasets, tiny_config, global_config, quick, capsys):
    result = train(*datasets, tiny_config, global_config)
    shown = repr(result)
    assert len(shown) < 800 and max(map(len, shown.splitlines())) < 250 and "{" not in shown
    for text in (result.name, "2 epochs", f"f1 {result.metrics['test.f1']:.4g}", "best.pt", "plot()"):
        assert text in shown
    assert result.plot().size == (810, 324) and result.plot().getextrema()[0] == (0, 255)
    assert "UNET, 1,763 parameters, on cpu" in capsys.readouterr().out


@pytest.mark.parametrize("in_notebook", [False, True])
def test_the_next_steps_after_a_call_from_python_work_there(
    datasets, tiny_config, global_config, quick, capsys, monkeypatch, pairs_dir, tmp_path, in_notebook
):
    monkeypatch.setitem(sys.modules, "ipykernel", sys) if in_notebook else None
    train(*datasets, tiny_config, global_config)
    printed = capsys.readouterr()
    assert ("it/s" in printed.err or "images/s" in printed.err) == in_notebook  # progress within an epoch
    _, _, steps = printed.out.partition("Next:\n")
    assert "train.py" not in printed.out and "run_prediction.py" not in printed.out
    assert ("  %tensorboard --logdir" in steps) == in_notebook
    code = "\n".join(
        line.strip() for line in steps.splitlines() if line.startswith(("  from", "  predict", "  train"))
    )
    code = code.replace('"IMAGES"', repr(str(pairs_dir / "test" / "x"))).replace(
        '"DIR"', repr(str(tmp_path / "maps"))
    )
    names = {"train": train, "config": tiny_config, "global_config": global_config}
    exec(code, names | dict(zip(("train_dataset", "test_dataset"), datasets, strict=True)))
    assert len(list((tmp_path / "maps").glob("*.npy"))) == 4
    assert "trained 4 epochs" in capsys.readouterr().out


def test_signs_of_life_without_a_terminal(capsys):
    with signs_of_life(lambda: "12 of 40 MP", seconds=0.01):
        time.sleep(0.1)
    assert 2 <= capsys.readouterr().out.count("12 of 40 MP\n") <= 10
    time.sleep(0.05)
    assert capsys.readouterr().out == ""


def test_all_that_tensorboards_tabs_show(datasets, tiny_config, global_config, quick):
    result = train(*datasets, tiny_config, global_config)
    sizes = {"scalars": 0, "tensors": 0, "images": 0}
    reader = EventAccumulator(str(result.log_dir / "tensorboard"), size_guidance=sizes)
    reader.Reload()
    scalars = scalars_of(result.log_dir)
    assert [step for step, _ in scalars["train/loss"]] == list(range(1, 9))
    assert [value for _, value in scalars["train/learning_rate"]] == pytest.approx([1e-2] * 8)
    written = [value for _, value in scalars["validation/f1"]]
    assert written == pytest.approx([event["validation.f1"] for event in result.history])
    assert scalars["test/f1"][-1][1] == pytest.approx(result.metrics["test.f1"])

    shown = reader.Tags()["images"]
    assert shown == ["validation/image_04.npy", "validation/image_06.npy"]  # none of the test set
    assert len(reader.Images(shown[0])) == 2
    picture = Image.open(io.BytesIO(reader.Images(shown[0])[0].encoded_image_string))
    assert picture.size == (4 * 32 + 3 * 4, 32)  # image, target, prediction, errors

    curves = reader.PluginTagToContent("pr_curves")
    assert curves.keys() == {"test/0", "test/1", "test/2"}
    for tag in curves:  # true positives, false positives, ..., precision, recall by threshold
        curve = make_ndarray(reader.Tensors(tag)[-1].tensor_proto)
        assert curve.shape == (6, 128) and (curve[:4].sum(0) == 4 * 32 * 32).all()
        assert curve[5][0] == 1 and (curve[5][:-1] >= curve[5][1:]).all()

    found = {}
    for content in reader.PluginTagToContent("hparams").values():
        data = plugin_data_pb2.HParamsPluginData.FromString(content)
        found[data.WhichOneof("data")] = getattr(data, data.WhichOneof("data"))
    options = found["session_start_info"].hparams
    assert options["OPTIMIZER_CONFIG.lr"].number_value == 0.01
    assert options["MODEL"].string_value == ".models.unet:UNET"
    listed = {info.name.tag for info in found["experiment"].metric_infos}
    assert {"test/f1", "validation/f1"} <= listed <= set(scalars)  # the tab looks the values up there
    assert "session_end_info" in found


# ---------------------------------------------------------------------------------------------- pictures


def test_a_picture_that_cannot_be_drawn_to_its_end_leaves_the_old_one(tmp_path, monkeypatch):
    def fail(_: Any, stream: Any, **options: Any) -> None:
        stream.write(b"half of it")
        raise OSError(errno.ENOSPC, "no space left on device")

    file = tmp_path / "picture.png"
    file.write_bytes(b"old")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OSError, match="no space left"):
        pictures.save_picture(file, "run", [], "loss", None, [])
    assert {one.name: one.read_bytes() for one in tmp_path.iterdir()} == {"picture.png": b"old"}


def test_the_worst_the_best_and_some_samples_at_random_are_shown_once_each():
    order, losses = [7, 3, 5, 1, 0, 2, 6, 4], [0.7, 0.3, 0.5, 0.1, 0.0, 0.2, math.nan, 0.4]
    chosen = choose_samples(object(), order, losses, seed=0)
    assert list(chosen)[:4] == [7, 5, 0, 1]
    assert chosen[7] == "worst: 7, loss 0.700" and chosen[0] == "best: 0, loss 0.000"
    assert set(list(chosen)[4:]) <= {2, 3, 4} and len(chosen) == 6
    assert all(chosen[index].startswith("random: ") for index in list(chosen)[4:])
    assert choose_samples(object(), order, losses, seed=0) == chosen
    assert len({tuple(choose_samples(object(), order, losses, seed))[4:] for seed in range(20)}) > 1
    assert sorted(choose_samples(object(), [0, 1], [0.5, 0.2], seed=0)) == [0, 1]
    assert choose_samples(object(), [0], [math.nan], seed=0) == {}


# -------------------------------------------------------------------------------------------------- mail


@pytest.fixture
def mails(monkeypatch) -> list[tuple[str, str, bytes | None]]:
    """Subject, text and picture of what is sent; that a server gets it is a test of the notifier."""
    sent: list[tuple[str, str, bytes | None]] = []
    notify = lambda _, text, subject, picture=None: sent.append((subject, text, picture))  # noqa: E731
    monkeypatch.setattr(smtp.SMTPNotifier, "notify", notify)
    settings = {"HOST": "127.0.0.1", "PORT": "9", "SECURITY": "none", "SENDER": "lab@example.org"}
    for name, value in settings.items():
        monkeypatch.setenv(f"SMTP_{name}", value)
    return sent


class FailingLoss(nn.Module):
    """Fails in the training's first step, after the dry run has gone well."""

    num_steps = 0

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        self.num_steps += pred.requires_grad
        if self.num_steps == 2:
            self.happen()
        return multi_class_dice_ce_sum(pred, target)

    def happen(self) -> None:
        raise RuntimeError(f"no connection with {SECRET}")


class SignalingLoss(FailingLoss):
    def happen(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_start_and_end_are_mailed_with_results_and_the_picture(
    mails, datasets, tiny_config, global_config, monkeypatch
):
    shown = {}

    def note(dataset, order, losses, seed):
        shown.update(zip(order, losses, strict=True))
        return choose_samples(dataset, order, losses, seed)

    monkeypatch.setattr(pictures, "choose_samples", note)
    changes = {"NOTIFY": ["me@example.org"], "DATA_LOADER_CONFIG": {"batch_size": 3}}
    result = train(*datasets, tiny_config | changes, global_config)
    assert sorted(shown) == list(range(len(datasets[1])))  # the losses belong to the samples
    assert sum(shown.values()) / len(shown) == result.metrics["test.loss"]
    assert Image.open(result.picture).size[0] > 500
    (started, _, _), (finished, text, picture) = mails
    assert [started, finished] == [f"started: {result.name}", f"finished: {result.name}"]
    assert f"test.f1 {result.metrics['test.f1']:.4f}" in text and "2 epochs in 0 min" in text
    assert picture == result.picture.read_bytes()


@pytest.mark.parametrize(
    ("loss", "error", "status", "text"),
    [
        (FailingLoss, RuntimeError, "failed", "no connection with [redacted]"),
        (SignalingLoss, Preempted, "preempted", "python train.py --resume"),
    ],
)
def test_an_end_without_a_result_is_mailed_without_secrets(
    mails, datasets, tiny_config, global_config, monkeypatch, quick, loss, error, status, text
):
    monkeypatch.setenv("DATABASE_PASSWORD", SECRET)
    with pytest.raises(error):
        train(*datasets, tiny_config | {"LOSS": loss, "NOTIFY": "me@example.org"}, global_config)
    (name,) = run_names(global_config["LOG_DIR"])
    assert [subject for subject, _, _ in mails] == [f"started: {name}", f"{status}: {name}"]
    assert text in mails[-1][1] and (status == "preempted" or "in happen" in mails[-1][1])
    assert SECRET not in repr(mails)


def test_the_command_has_an_option_for_it(mails, pairs_dir, tmp_path, quick):
    options = ["MODEL_CONFIG.bulk_ch=8", "MODEL_CONFIG.n_recursions=1", "DEVICE=cpu", "PRECISION=fp32"]
    options += ["DATA_LOADER_CONFIG.num_workers=0", "EPOCHS=1"]
    done = run_script("train.py", "--data", pairs_dir, "--smtp", "me@example.org", *options, root=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [subject.partition(":")[0] for subject, _, _ in mails] == ["started", "finished"]


def test_without_a_server_or_an_address_the_training_does_not_start(
    datasets, tiny_config, global_config, monkeypatch
):
    for name in ("HOST", "SENDER", "USER"):
        monkeypatch.delenv(f"SMTP_{name}", raising=False)
    with pytest.raises(UserError, match="SMTP_HOST"):
        train(*datasets, tiny_config | {"NOTIFY": "me@example.org"}, global_config)
    for wrong in ("nobody", [], [3], {"a@b.c": 1}):
        with pytest.raises(ConfigError, match=r"NOTIFY .*must be an e-mail address or a list of them"):
            train(*datasets, tiny_config | {"NOTIFY": wrong}, global_config)
    assert run_names(global_config["LOG_DIR"]) == []
