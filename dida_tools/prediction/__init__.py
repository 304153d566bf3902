"""Prediction: from a trained model to maps."""

from .predict import predict, predict_run
from .predictor import Predictor, load_predictor, predict_array

__all__ = ["predict", "predict_run", "Predictor", "load_predictor", "predict_array"]
