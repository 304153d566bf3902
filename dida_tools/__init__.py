"""dida tools: configs, layers, models, datasets, losses and training loops, to be read and modified."""

__version__ = "0.2.0"
