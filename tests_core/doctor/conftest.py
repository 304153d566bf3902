"""The fixture that writes images in every format."""

from tests.utils.data.conftest import write

__all__ = ["write"]
