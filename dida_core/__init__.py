"""The library under a project: it keeps the promises, and never imports the project."""

__version__ = "0.2.0"
