"""Mails of a training, received by a real server; see tests/utils/notify for what can go wrong on the way."""

import email
import email.policy
import importlib
import os
import pkgutil
import signal
import socket
import subprocess
import sys
import time
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from torch import Tensor

from dida_tools import training
from dida_tools.config.errors import ConfigError, UserError
from dida_tools.training.pytorch_training import train
from dida_tools.utils.logging.runs import run_names
from dida_tools.utils.loss import multi_class_dice_ce_sum
from dida_tools.utils.signals import Preempted

ROUTINES = [
    module.name for module in pkgutil.iter_modules(training.__path__) if module.name.endswith("_training")
]
ROOT = Path(__file__).resolve().parents[2]
SECRET = "hunter2-in-the-error"


class Handler:
    """Keeps what arrives."""

    def __init__(self) -> None:
        self.mails: list[EmailMessage] = []

    async def handle_DATA(self, _server: Any, _session: Any, envelope: Any) -> str:
        self.mails.append(email.message_from_bytes(envelope.content, policy=email.policy.default))
        return "250 OK"


@pytest.fixture
def server(monkeypatch):
    """A server on this machine, named by the environment."""
    handler = Handler()
    controller = Controller(handler, hostname="127.0.0.1", port=0)
    # The controller cannot find out a port that the system has chosen.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        controller.port = free.getsockname()[1]
    controller.start()
    for name in ("USER", "PASSWORD"):
        monkeypatch.delenv(f"SMTP_{name}", raising=False)
    settings = {
        "HOST": "127.0.0.1",
        "PORT": str(controller.port),
        "SECURITY": "none",
        "SENDER": "lab@example.org",
    }
    for name, value in settings.items():
        monkeypatch.setenv(f"SMTP_{name}", value)
    yield handler
    controller.stop()


def text_of(mail: EmailMessage) -> str:
    return mail.get_body(("plain",)).get_content()


def failing_loss(pred: Tensor, target: Tensor) -> Tensor:
    if pred.requires_grad:
        raise RuntimeError(f"no connection with {SECRET}")
    return multi_class_dice_ce_sum(pred, target)


def signaling_loss(pred: Tensor, target: Tensor) -> Tensor:
    if pred.requires_grad:
        os.kill(os.getpid(), signal.SIGTERM)
    return multi_class_dice_ce_sum(pred, target)


@pytest.mark.parametrize("routine", ROUTINES)
def test_start_and_end_are_told_with_results_and_curves(
    routine, server, datasets, tiny_config, global_config
):
    module = importlib.import_module(f"dida_tools.training.{routine}")
    result = module.train(*datasets, tiny_config | {"NOTIFY": ["me@example.org"]}, global_config)
    assert [mail["Subject"] for mail in server.mails] == [
        f"started: {result.name}",
        f"finished: {result.name}",
    ]
    end = server.mails[1]
    assert end["To"] == "me@example.org"
    assert f"test.f1 {result.metrics['test.f1']:.4f}" in text_of(end) and "2 epochs in 0 min" in text_of(end)
    pictures = [part for part in end.walk() if part.get_content_type() == "image/png"]
    assert [part.get_content() for part in pictures] == [result.picture.read_bytes()]
    assert end.get_body(("html",)) is not None


def test_a_failure_is_told_with_the_end_of_the_traceback_and_without_secrets(
    server, datasets, tiny_config, global_config, monkeypatch
):
    monkeypatch.setenv("DATABASE_PASSWORD", SECRET)
    with pytest.raises(RuntimeError):
        train(*datasets, tiny_config | {"LOSS": failing_loss, "NOTIFY": "me@example.org"}, global_config)
    name = run_names(global_config["LOG_DIR"])[0]
    assert server.mails[-1]["Subject"] == f"failed: {name}"
    text = text_of(server.mails[-1])
    assert "in failing_loss" in text and "no connection with [redacted]" in text
    texts = [part for mail in server.mails for part in mail.walk() if part.get_content_maintype() == "text"]
    assert len(texts) == 4 and not any(SECRET in part.get_content() for part in texts)


def test_a_preempted_run_is_told(server, datasets, tiny_config, global_config):
    with pytest.raises(Preempted):
        train(*datasets, tiny_config | {"LOSS": signaling_loss, "NOTIFY": "me@example.org"}, global_config)
    name = run_names(global_config["LOG_DIR"])[0]
    assert server.mails[-1]["Subject"] == f"preempted: {name}"
    assert f"python train.py --resume {name}" in text_of(server.mails[-1])


@pytest.mark.slow
def test_a_server_that_never_answers_changes_nothing(
    datasets, tiny_config, global_config, monkeypatch, capsys
):
    expected = train(*datasets, tiny_config, global_config)
    with socket.create_server(("127.0.0.1", 0)) as black_hole:
        for name, value in {
            "HOST": "127.0.0.1",
            "PORT": str(black_hole.getsockname()[1]),
            "SECURITY": "none",
        }.items():
            monkeypatch.setenv(f"SMTP_{name}", value)
        monkeypatch.setenv("SMTP_SENDER", "lab@example.org")
        start = time.monotonic()
        result = train(*datasets, tiny_config | {"NOTIFY": "me@example.org"}, global_config)
    assert time.monotonic() - start < 120  # hangs for ever otherwise
    assert result.digest == expected.digest
    assert "could not be sent" in capsys.readouterr().out


def test_the_command_has_an_option_for_it(server, pairs_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("ROOT_PATH", str(tmp_path))
    options = [
        "EPOCHS=1",
        "MODEL_CONFIG.bulk_ch=8",
        "MODEL_CONFIG.n_recursions=1",
        "DEVICE=cpu",
        "PRECISION=fp32",
    ]
    command = [sys.executable, "train.py", "--data", str(pairs_dir), "--smtp", "me@example.org", *options]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert [mail["Subject"].partition(":")[0] for mail in server.mails] == ["started", "finished"]
    assert {mail["To"] for mail in server.mails} == {"me@example.org"}


def test_without_a_server_the_training_does_not_start(datasets, tiny_config, global_config, monkeypatch):
    for name in ("HOST", "SENDER", "USER"):
        monkeypatch.delenv(f"SMTP_{name}", raising=False)
    with pytest.raises(UserError, match="SMTP_HOST"):
        train(*datasets, tiny_config | {"NOTIFY": "me@example.org"}, global_config)
    assert run_names(global_config["LOG_DIR"]) == []


@pytest.mark.parametrize("wrong", ["nobody", [], [3], {"a@b.c": 1}])
def test_what_is_no_address_is_a_problem_of_the_config(wrong, datasets, tiny_config, global_config):
    with pytest.raises(ConfigError, match=r"NOTIFY .*must be an e-mail address or a list of them"):
        train(*datasets, tiny_config | {"NOTIFY": wrong}, global_config)
