"""The library: files, configs and records, data contracts, what loops share, a run's life, prediction."""

__version__ = "0.2.0"
