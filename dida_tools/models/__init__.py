"""Models."""

from .unet import UNET

__all__ = ["UNET"]
