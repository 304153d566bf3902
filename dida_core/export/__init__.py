"""Trained models for other runtimes: python -m dida_core.export NAME."""
