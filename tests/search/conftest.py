"""Fixtures for tests of searches: a toy to search over, and workers that may be killed."""

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dida_tools.config.keys import copy_config
from dida_tools.search.space import Space, choice, integer, log_uniform, uniform
from dida_tools.search.study import Search

HANGS_AFTER_SECONDS = 120.0
TOY_SPACE = {
    "OPTIMIZER_CONFIG.lr": log_uniform(1e-4, 1e-1),
    "OPTIMIZER": choice(torch.optim.SGD, torch.optim.AdamW),
    "MODEL_CONFIG.bulk_ch": integer(4, 16, step=4),
    "MODEL_CONFIG.dropout": uniform(0.0, 0.5),
}


def toy_train(config: dict[str, Any]) -> Any:
    """What a run is to a search, without training: the value follows from the config, and grows with the epochs."""
    rate, dropout = config["OPTIMIZER_CONFIG"]["lr"], config["MODEL_CONFIG"]["dropout"]
    goal = (
        1 - abs(rate - 1e-2) ** 0.3 - (dropout - 0.2) ** 2 + 0.01 * (config["OPTIMIZER"] is torch.optim.AdamW)
    )
    run: Any = SimpleNamespace(
        config=config, history={}, monitored="f1", state=SimpleNamespace(epoch=0, stopped=False)
    )
    for epoch in range(1, config["EPOCHS"] + 1):
        run.state.epoch, run.state.best = epoch, goal * epoch / config["EPOCHS"]
        run.history[epoch] = {"validation.f1": run.state.best}
        assert not config["AFTER_EPOCH"](run), "the toy is not to be pruned"
    return run


@pytest.fixture(name="toy_train")
def fixture_of_toy_train() -> Callable[[dict[str, Any]], Any]:
    return toy_train


@pytest.fixture
def new_search(tiny_config: dict, global_config: dict) -> Callable[..., Search]:
    """Opens a study of the test's own, as another process would."""

    def make(
        space: dict | None = None, storage: str | None = None, pruning: bool = False, **changes: Any
    ) -> Search:
        config = copy_config(tiny_config) | changes
        return Search("toy", Space(space or TOY_SPACE), config, global_config, storage, pruning)

    return make


class Fork:
    """A process that does some work, and can be killed meanwhile."""

    def __init__(self, work: Callable[[], object], output: Path) -> None:
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 86
            try:
                sys.stdout = sys.stderr = open(output, "a", buffering=1)  # noqa: SIM115
                work()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)

    def wait(self, seconds: float = HANGS_AFTER_SECONDS) -> bool:
        """Whether it ends in that time."""
        deadline = time.monotonic() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                return False
            else:
                time.sleep(0.002)
        return True

    def kill(self, signum: int = signal.SIGKILL) -> None:
        if self.code is None:
            os.kill(self.pid, signum)
            assert self.wait(), "it does not end"


@pytest.fixture
def fork(tmp_path: Path) -> Iterator[Callable[[Callable[[], object]], Fork]]:
    """Starts work in a process of its own; none outlives the test."""
    children: list[Fork] = []

    def start(work: Callable[[], object]) -> Fork:
        children.append(Fork(work, tmp_path / "output.txt"))
        return children[-1]

    yield start
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            child.kill()


@pytest.fixture
def wait_for() -> Callable[[Callable[[], Any]], Any]:
    """Gives what a condition gives, once it is true."""

    def wait(condition: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + HANGS_AFTER_SECONDS
        while not (found := condition()):
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.01)
        return found

    return wait
