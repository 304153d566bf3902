"""
A search over a config: what to try (space), the study and its results (study), and its workers (workers).

A project that does not search deletes this folder, hyperparameter.py, their tests, and the line in
pyproject.toml.
"""
