"""Fixtures that write images and datasets in every format, and measure memory."""

import resource
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import Child
from tests.utils.data.conftest import write, write_pairs

__all__ = ["memory_growth", "write", "write_pairs"]


@pytest.fixture
def memory_growth(tmp_path: Path) -> Callable[[Callable[[], object]], float]:
    """Return by how many MiB a forked process grows while it does some work."""
    if sys.platform != "linux":
        pytest.skip("ru_maxrss is in KiB on Linux")

    def measure(work: Callable[[], object]) -> float:
        def print_growth() -> None:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            work()
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)

        child = Child(print_growth, tmp_path / "growth")
        assert child.wait() and child.code == 0, child.said()
        return int(child.said().split()[-1]) / 1024

    return measure
