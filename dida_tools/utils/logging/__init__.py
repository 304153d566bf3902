"""The experiment tracker."""

from .csv import read_frame, read_log, write_log

__all__ = ["read_frame", "read_log", "write_log"]
