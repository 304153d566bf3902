"""Losses, metrics, names, paths, model helpers, data, logging, mail."""
