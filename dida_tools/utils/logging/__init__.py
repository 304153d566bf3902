"""Contains the experiment tracker."""

from .csv import read_log, write_log

__all__ = ["read_log", "write_log"]
