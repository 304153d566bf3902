"""dida tools: configs, layers, models, datasets, training routines and prediction, to be read and modified."""

__version__ = "0.2.0"
