"""The fixtures of the project's tests of data."""

from tests.utils.data.conftest import memory_growth, run_python, write, write_pairs

__all__ = ["memory_growth", "run_python", "write", "write_pairs"]
