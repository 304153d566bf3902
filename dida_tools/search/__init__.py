"""
Contains the search over a config: what to try (space), where trials are kept (storage), how a worker does them (study),
how workers are started and shown (workers), and pictures. hyperparameter.py puts them together.

A project that does not search deletes this folder, hyperparameter.py, their tests, and the line in pyproject.toml.
"""
