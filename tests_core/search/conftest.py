"""Fixtures for tests of searches: a toy to search over, and workers that may be killed."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dida_core.config.keys import copy_config
from dida_core.config.project import project_of
from dida_core.search.space import Space, choice, integer, log_uniform, uniform
from dida_core.search.study import Search
from dida_core.search.workers import Worker

from tests.helpers import PACKAGE, Child

TOY_SPACE = {
    "OPTIMIZER_CONFIG.lr": log_uniform(1e-4, 1e-1),
    "OPTIMIZER": choice(torch.optim.SGD, torch.optim.AdamW),
    "MODEL_CONFIG.bulk_ch": integer(4, 16, step=4),
    "MODEL_CONFIG.dropout": uniform(0.0, 0.5),
}


@pytest.fixture
def toy_train() -> Callable[[dict[str, Any]], Any]:
    """What a run is to a search, without training: its value follows from the config, and grows."""

    def train(config: dict[str, Any]) -> Any:
        rate, dropout = config["OPTIMIZER_CONFIG"]["lr"], config["MODEL_CONFIG"]["dropout"]
        goal = 1 - abs(rate - 1e-2) ** 0.3 - (dropout - 0.2) ** 2
        goal += 0.01 * (config["OPTIMIZER"] is torch.optim.AdamW)
        state = SimpleNamespace(epoch=0, stopped=False)
        run: Any = SimpleNamespace(config=config, history={}, monitored="f1", state=state)
        for epoch in range(1, config["EPOCHS"] + 1):
            run.state.epoch, run.state.best = epoch, goal * epoch / config["EPOCHS"]
            run.history[epoch] = {"validation.f1": run.state.best}
            assert not config["AFTER_EPOCH"](run), "the toy is not to be pruned"
        return run

    return train


@pytest.fixture
def new_search(tiny_config: dict, global_config: dict) -> Callable[..., Search]:
    """Opens a study of the test's own, as another process would."""

    def make(
        space: dict | None = None, storage: str | None = None, pruning: bool = False, **changes: Any
    ) -> Search:
        config, project = copy_config(tiny_config) | changes, project_of(PACKAGE)
        made = Space(space or TOY_SPACE, project)
        return Search("toy", made, config, global_config, project, storage, pruning)

    return make


@pytest.fixture
def work() -> Callable[..., None]:
    """Has a worker train a search."""
    return lambda search, train, num_trials: Worker(search).work(train, num_trials)


@pytest.fixture
def fork(tmp_path: Path) -> Iterator[Callable[[Callable[[], Any]], Child]]:
    """Starts work in a process of its own; none outlives the test."""
    children: list[Child] = []

    def start(work: Callable[[], Any]) -> Child:
        children.append(Child(work, tmp_path / "output.txt"))
        return children[-1]

    yield start
    for child in children:
        child.kill()
