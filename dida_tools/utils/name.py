"""How runs are named."""

from datetime import datetime
from typing import Any

from .files import safe_name


def date_now() -> str:
    """Return date and time as the first part of a run's name, local time, to the second."""
    return datetime.now().strftime("%Y-%m-%d_%H-%M-%S")


def run_name(config: dict[str, Any]) -> str:
    """
    Return the name that a new run should get; a number is added where another run has it already.

    :param config: the completed config; names sort by time as long as they begin with DATE
    """
    return f"{safe_name(config['DATE'])}_{safe_name(config['SESSION_NAME'])}"  # <- your naming here
