"""A finished run that is trained once for all tests."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from dida_tools.config.config import make_global_config
from dida_tools.training.pytorch_training import train

from tests.helpers import rows_of

trained: list[Path] = []


@pytest.fixture
def first(
    datasets: Any, tiny_config: dict, quick: None, global_config: dict, tmp_path_factory: Any
) -> dict[str, Any]:
    """The row of a run of tiny_config, and a copy of all its files in the test's own project."""
    if not trained:
        root = tmp_path_factory.mktemp("trained") / "project"
        train(*datasets, tiny_config, make_global_config(root))
        trained.append(root)
    shutil.copytree(trained[0], global_config["ROOT_PATH"])
    return rows_of(global_config)[0]
