"""Layers."""

from .conv import ConvLayer, DeconvLayer, TransConvLayer

__all__ = ["ConvLayer", "DeconvLayer", "TransConvLayer"]
