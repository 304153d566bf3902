"""Contains the models."""

from .unet import UNET

__all__ = ["UNET"]
