"""Check a dataset before training: python -m dida_core.doctor DIR."""
