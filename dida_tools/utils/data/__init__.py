"""Images, datasets, augmentation and the built-in scenes."""

from .datasets import NpyDataset, NpyPredictionDataset
from .scenes import SceneDataset

__all__ = ["NpyDataset", "NpyPredictionDataset", "SceneDataset"]
