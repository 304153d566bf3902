"""The fixtures of the project's own tests."""

from tests.conftest import datasets, faint_pairs_dir, global_config, pairs_dir, quick, tiny_config

__all__ = ["datasets", "faint_pairs_dir", "global_config", "pairs_dir", "quick", "tiny_config"]
