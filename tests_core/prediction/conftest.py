"""Fixtures for the tests of prediction."""

from pathlib import Path
from typing import Any

import pytest

from tests_core.prediction.samples import Net, make_config


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A predict_config of Net."""
    monkeypatch.setattr(Net, "calls", 0)
    return make_config(tmp_path, Net())
